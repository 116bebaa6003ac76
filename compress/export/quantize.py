"""Weight quantization by ModelOpt, block by block as an architecture says.

ModelOpt inserts the quantizers and keeps their state; the arithmetic is ours (``precision/``),
registered as its backends, because its own NVFP4 kernel needs a GPU. Formats are weight-only: the
input quantizers record the largest magnitude they see, for the ``input_scale`` that servers with
FP8 or FP4 matrix units ask for, and pass values on unchanged.
"""

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.core.errors import VerificationFailed
from compress.formats import fp8, nvfp4
from compress.formats.fake import group_amax
from compress.formats.table import Format
from compress.model.architecture import Architecture, Block
from compress.model.families import family_of, parameters

EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+|\*)\.(?P<name>\w+)$")
BLOCKS = {-1: nvfp4.BLOCK, "type": "dynamic", "scale_bits": (4, 3)}
NUMBERS: dict[Format, dict[str, Any]] = {
    "fp8": {"num_bits": (4, 3), "axis": None},
    "nvfp4": {"num_bits": (2, 1), "axis": None, "block_sizes": BLOCKS},
}
# The largest magnitude that a scale of exactly 1 stands for, by format.
UNIT_AMAX: dict[Format, float] = {
    "fp8": fp8.E4M3_MAX,
    "nvfp4": nvfp4.E2M1_MAX * nvfp4.E4M3_MAX,
}
CALIBRATION_ROWS, CALIBRATION_TOKENS = 8, 64


def quantize(
    model: PreTrainedModel, architecture: Architecture, calibration: Tensor | None = None
) -> PreTrainedModel:
    """Quantize the model in place; its logits are then those of ``fake_quantize``'s weights.

    ``calibration`` [rows, tokens] is what the input scales are taken from; token rows drawn
    uniformly from the vocabulary when absent.

    Raises:
        VerificationFailed: ModelOpt left a weight without a quantizer.
    """
    if architecture.formats == {"bf16"}:
        return model
    with quietly():
        mtq = modelopt("quantization")
        register_backends()
        rows = token_rows(architecture) if calibration is None else calibration

        def observe(observed: Any) -> None:
            with torch.no_grad():
                observed(input_ids=rows.to(model.device), use_cache=False)

        config = {"quant_cfg": rules(architecture), "algorithm": "max"}
        quantized: PreTrainedModel = mtq.quantize(model, config, forward_loop=observe)
        unify(quantized, architecture)
    return quantized


def modelopt(module: str) -> Any:
    """A module of ModelOpt, which takes seconds to import and carries no types."""
    return importlib.import_module(f"modelopt.torch.{module}")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep ModelOpt's progress prints, warnings and log lines off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def register_backends() -> None:
    """Make our numerics the ones that ModelOpt's fake quantization runs."""
    register = modelopt("quantization.nn.modules.tensor_quantizer").register_quant_backend
    register("compress_fp8", lambda x, quantizer: fp8.fake(x, quantizer.amax))
    register("compress_nvfp4", lambda x, quantizer: nvfp4.fake(x, quantizer.amax))
    register("compress_observe", lambda x, quantizer: x)


def rules(architecture: Architecture) -> list[dict[str, Any]]:
    """ModelOpt's ``quant_cfg``: nothing, then the linear weights of every quantized block."""
    found: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for block in architecture.blocks:
        if block.format == "bf16":
            continue
        for path in linear_paths(architecture, block):
            weight, observer = quantizer_names(path)
            numbers = NUMBERS[block.format]
            found += [
                {
                    "quantizer_name": weight,
                    "cfg": {**numbers, "backend": f"compress_{block.format}"},
                },
                {"quantizer_name": observer, "cfg": {**numbers, "backend": "compress_observe"}},
            ]
    return found


def linear_paths(architecture: Architecture, block: Block) -> list[str]:
    """Module paths, in memory, of a block's quantizable linear layers; ``*`` for the experts."""
    slots = family_of(architecture.family).tensors(block)
    return [
        f"model.layers.{block.layer}." + name.format(expert="*").removesuffix(".weight")
        for name, slot in slots.items()
        if slot.fused is not None
    ]


def quantizer_names(path: str) -> tuple[str, str]:
    """Names of the weight and the input quantizer of a linear layer or of fused experts."""
    if match := EXPERT.match(path):
        stem = f"{match['experts']}.{match['name']}"
        return f"{stem}_weight_quantizers.{match['number']}", f"{stem}_input_quantizer"
    return f"{path}.weight_quantizer", f"{path}.input_quantizer"


def unify(model: PreTrainedModel, architecture: Architecture) -> None:
    """Give every fused group one ``amax``, and what is all zeros the one that means scale 1."""
    quantizers = {name: module for name, module in model.named_modules() if "_quantizer" in name}
    for names, format in fused_groups(architecture):
        group = []
        for name in names:
            weight, observer = quantizer_names(name)
            # ModelOpt 0.47 skips what it does not recognise without a word.
            if not getattr(quantizers.get(weight), "is_enabled", False):
                raise VerificationFailed(f"ModelOpt did not quantize {name}")
            group.append(quantizers[weight])
            set_amax(quantizers[observer], quantizers[observer].amax, format)
        amax = group_amax([quantizer.amax for quantizer in group])
        for quantizer in group:
            set_amax(quantizer, amax, format)


def set_amax(quantizer: Any, amax: Tensor, format: Format) -> None:
    """Set a quantizer's range so that its scale is positive."""
    unit = UNIT_AMAX[format]
    scalable = bool(amax.float() / unit > 0)
    quantizer.amax = amax.float() if scalable else torch.full_like(amax, unit).float()


def fused_groups(architecture: Architecture) -> Iterator[tuple[list[str], Format]]:
    """Module paths of the linear layers that share a tensor scale, with their format."""
    layer = family_of(architecture.family).layer
    groups: dict[tuple[int, str], list[str]] = {}
    for parameter in parameters(architecture):
        number, fused = parameter.block, parameter.slot.fused
        if number is None or fused is None or architecture.blocks[number].format == "bf16":
            continue
        on_disk = layer.format(layer=architecture.blocks[number].layer)
        path = parameter.name.removeprefix(on_disk).removesuffix(".weight")
        in_memory = f"model.layers.{architecture.blocks[number].layer}.{path}"
        groups.setdefault((number, fused), []).append(in_memory)
    for (number, _), names in groups.items():
        yield names, architecture.blocks[number].format


def token_rows(architecture: Architecture, seed: int = 0) -> Tensor:
    """Token rows drawn uniformly from the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    shape = (CALIBRATION_ROWS, CALIBRATION_TOKENS)
    return torch.randint(architecture.vocab, shape, generator=generator)
