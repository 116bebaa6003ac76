"""What may be wrong with the weights of a checkpoint."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def header_only(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def without(file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)


def beyond(file: Path) -> None:
    save_file(load_file(file) | {"model.surprise.weight": torch.zeros(4)}, file)


def other_shape(file: Path) -> None:
    save_file(load_file(file) | {"model.norm.weight": torch.zeros(4)}, file)


def not_finite(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, file)


def bad_index(file: Path) -> None:
    file.rename(file.with_name("model-00001-of-00001.safetensors"))
    file.with_name("model.safetensors.index.json").write_text("{")
