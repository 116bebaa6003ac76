"""A student as a torch model, in its formats."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from compress.formats.kv import set_kv_format
from compress.model.architecture import Architecture
from compress.model.build import build_model, student_config
from compress.model.checkpoint import Checkpoint
from compress.student.surgery import quantized


def student_model(
    teacher: Checkpoint, architecture: Architecture, tensors: Iterable[tuple[str, Tensor]]
) -> Any:
    """A student of these BF16 tensors in fp32, every block and the KV cache in their formats."""
    config = student_config(teacher.config, architecture)
    model = build_model(config, architecture, quantized(tensors, architecture))
    set_kv_format(model, architecture.kv_format)
    return model
