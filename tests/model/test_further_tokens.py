"""Layers that predict further tokens are left out: no student has them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EVERY, write_tiny
from torch import Tensor

from compress.core.errors import InputError
from compress.model.build import load_model, student_config
from compress.model.checkpoint import open_checkpoint

WEIGHTS = "model.safetensors"


def logits(path: Path) -> Tensor:
    found: Tensor = load_model(path)(torch.arange(1, 13).view(2, 6)).logits
    return found


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("deepseek_v3", "model.layers.4.eh_proj.weight"),
        ("glm4_moe", "model.layers.4.eh_proj.weight"),
        ("hybrid", "mtp.fc.weight"),
    ],
)
def test_layers_that_predict_further_tokens_are_left_out(
    family: str, name: str, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "m", EVERY[family] | {"num_nextn_predict_layers": 1})
    before = logits(path)
    tensors = load_file(path / WEIGHTS)
    save_file(tensors | {name: torch.ones(2, 2)}, path / WEIGHTS, {"format": "pt"})
    assert torch.equal(logits(path), before)
    checkpoint = open_checkpoint(path)
    written = student_config(checkpoint.config, checkpoint.architecture)
    assert written["num_nextn_predict_layers"] == 0
    save_file(tensors | {name: torch.ones(2), "y": torch.ones(2)}, path / WEIGHTS)
    with pytest.raises(InputError, match="holds tensor y, which no table of"):
        open_checkpoint(path)
