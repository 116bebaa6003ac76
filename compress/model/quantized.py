"""Quantized checkpoints, of others and our own: which tensors hold a weight; no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.errors import InputError
from compress.core.files import read_json
from compress.model.dequantize import Shape
from compress.model.headers import Stored
from compress.model.schemes import SCHEMES, Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Where config.json has it: as transformers writes it, older compressed-tensors, our own exports.
SETTINGS = ("quantization_config", "compression_config", "quantization")
QUANT_CONFIG = "hf_quant_config.json"
# Of FP8 in blocks, where nothing says how large they are: DeepSeek's.
BLOCK = (128, 128)
# What servers round activations and caches by: a weight does not depend on it.
OF_ACTIVATIONS = (
    *(".input_scale", ".input_global_scale", ".input_scale_ub", ".input_zero_point"),
    *(".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".kv_scale"),
)


@dataclass(frozen=True)
class Method:
    """How a checkpoint says that it is quantized: by whom, in its words, and the size of blocks."""

    name: str
    said: str
    block: Shape = BLOCK


@dataclass(frozen=True)
class Quantized:
    """A weight as the tensors that hold it, by the names of their parts."""

    scheme: Scheme
    parts: Mapping[str, Stored]
    shape: Shape
    block: Shape

    @property
    def bytes(self) -> int:
        """Bytes on disk, scales included."""
        return sum(part.bytes for part in self.parts.values())

    def values(
        self, read: "Callable[[Stored, int | None], Tensor]", row: int | None = None
    ) -> "Tensor":
        """The weight, fp32, of tensors as ``read`` gives them, or of a stack one row, [1, ...].

        ``read`` gives all of a tensor, or that row [1, ...].
        """
        if row is None:
            parts = {key: read(part, None) for key, part in self.parts.items()}
            return self.scheme.values(parts, self.shape, self.block)
        count = self.shape[0]
        parts = {
            key: read(part, row if len(part.shape) > 1 and part.shape[0] == count else None)
            for key, part in self.parts.items()
        }
        return self.scheme.values(parts, (1, *self.shape[1:]), self.block)


def method_of(path: Path, config: Mapping[str, Any]) -> Method | None:
    """How a checkpoint says it is quantized, in config.json or ModelOpt's own file; None if not.

    InputError on rotations of activations, which no weight holds.
    """
    said = next((config[key] for key in SETTINGS if isinstance(config.get(key), dict)), None)
    if said is None and (path / QUANT_CONFIG).is_file():
        written = read_json(path / QUANT_CONFIG)
        said = written.get("quantization") if isinstance(written, dict) else None
    if not isinstance(said, dict) or not said:
        return None
    # ModelOpt alone names no method, but its algorithm.
    by, algorithm = said.get("quant_method"), said.get("quant_algo")
    name = "modelopt" if algorithm and by is None else str(by or "unknown")
    if said.get("transform_config"):
        raise InputError(f"{path}: transform_config of {name} is not read; take the one in BF16")
    return Method(name, str(by or algorithm or "by quantization_config"), block_of(said))


def block_of(said: Mapping[str, Any]) -> Shape:
    """The size of blocks that a quantization names, as any of its groups does."""
    groups = said.get("config_groups")
    found = [said.get("weight_block_size")]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        found.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    for block in found:
        if (
            isinstance(block, list)
            and len(block) == 2
            and all(type(n) is int and n > 0 for n in block)
        ):
            return block[0], block[1]
    return BLOCK


def part_name(part: str, name: str) -> str:
    """The name of a part of a weight."""
    return part.format(name=name, stem=name.removesuffix("weight"))


def held(
    path: Path, name: str, shape: Shape, stored: Mapping[str, Stored], method: Method
) -> Quantized | None:
    """A weight in the first scheme of a method that has it; None where it is not quantized.

    InputError where a part is missing or has another shape.
    """
    missing: list[str] = []
    found = None
    for scheme in (scheme for scheme in SCHEMES if method.name in scheme.methods):
        codes = next(iter(scheme.parts))
        # First of all, because a checkpoint may have tens of thousands of weights.
        if (held_in := stored.get(part_name(codes, name))) is None:
            continue
        if held_in.dtype not in scheme.parts[codes]:
            continue
        wanted = {**scheme.parts, **scheme.optional}
        names = {part: part_name(part, name) for part in wanted}
        parts = {part: stored[tensor] for part, tensor in names.items() if tensor in stored}
        if any(each.dtype not in wanted[part] for part, each in parts.items()):
            continue
        if lacking := [names[part] for part in scheme.parts if part not in parts]:
            missing = min(missing or lacking, lacking, key=len)
            continue
        found = Quantized(scheme, parts, shape, method.block)
        if scheme.fits({part: each.shape for part, each in parts.items()}, shape, method.block):
            return found
    if found:
        shapes = ", ".join(f"{part.name} {list(part.shape)}" for part in found.parts.values())
        format = found.scheme.format
        raise InputError(f"{shapes} in {path} hold no {list(shape)} in {format} by {method.name}")
    if missing:
        raise InputError(f"{path} has no tensor {missing[0]}, which {name} needs")
    return None
