"""Quantized checkpoints, of others and our own: which tensors hold a weight; no torch.

Layouts differ in where codes and scales lie::

    format       codes of a weight [out, in]        scales, and what else there may be
    FP8, INT8    weight [out, in]                   weight_scale or weight_scale_inv (both are s)
    NVFP4        weight, weight_packed [out, in/2]  weight_scale * weight_scale_2, or / global
    MXFP4        weight, weight_packed [out, in/2]  weight_scale: exponents
    MXFP4        _blocks [expert, out, in/32, 16]   _scales; kept in memory as [expert, in, out]
    INT4, INT8   weight_packed I32 [out, in/8]      weight_scale, weight_zero_point
    INT4         weight [out/2, in] or [out, in/2]  weight_scale
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.errors import InputError
from compress.core.files import read_json
from compress.model.dequantize import (
    BLOCKS,
    CODES,
    GLOBAL,
    INPUTS,
    INVERSE,
    ORDER,
    PACKED,
    SCALE,
    SCALES,
    SECOND,
    SHAPE,
    ZERO,
    Parts,
    Shape,
    experts,
    halves,
    ours,
    pairs,
    whole,
    words,
)
from compress.model.headers import FLOATS, Stored

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, Shape]

# Where config.json has it: as transformers writes it, older compressed-tensors, our own exports.
SETTINGS = ("quantization_config", "compression_config", "quantization")
QUANT_CONFIG = "hf_quant_config.json"
EXPONENTS = ("U8", "F8_E8M0")
WHOLE = ("I8", "I32", "I64")
# Of FP8 in blocks, where nothing says how large they are: DeepSeek's.
BLOCK = (128, 128)
# What servers round activations and caches by: a weight does not depend on it.
OF_ACTIVATIONS = (
    *(".input_scale", ".input_global_scale", ".input_scale_ub", ".input_zero_point"),
    *(".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".kv_scale"),
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to store a quantized weight.

    Attributes:
        format: what reports call it.
        methods: who writes it, as ``quant_method`` says.
        parts: the tensors that are there, each with the types that it may have.
        optional: the same of those that may be there.
        fits: whether parts of these shapes hold a weight of a shape, in blocks of a size.
        values: the values of such a weight, fp32.
    """

    format: str
    methods: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]]
    fits: Callable[[Shapes, Shape, Shape], bool]
    values: Callable[[Parts, Shape, Shape], "Tensor"]


def grouped(scale: Shape, shape: Shape) -> bool:
    """Whether scales are those of equal groups of every row."""
    return len(scale) > 1 and scale[:-1] == shape[:-1] and shape[-1] % max(scale[-1], 1) == 0


def blocked(shape: Shape, block: Shape) -> Shape:
    """How many blocks the last two axes of a weight have."""
    rows, columns = (-(-size // of) for size, of in zip(shape[-2:], block, strict=True))
    return (*shape[:-2], rows, columns)


def scaled(parts: Shapes, scale: str, shape: Shape, block: Shape) -> bool:
    """Whether all that codes are multiplied by, and their zero points, are there for each."""
    known = [(), (1,), (1,) * len(shape), shape[:-1], blocked(shape, block)]
    found = parts[scale]
    inputs = all(parts.get(key, shape[-1:]) == shape[-1:] for key in (INPUTS, ORDER))
    return inputs and (found in known or grouped(found, shape))


def whole_fit(scale: str, parts: Shapes, shape: Shape, block: Shape) -> bool:
    """Whether there is a code of its own for every number."""
    zero = parts.get(ZERO, parts[scale]) == parts[scale]
    return parts[CODES] == shape and zero and scaled(parts, scale, shape, block)


def pairs_fit(codes: str, parts: Shapes, shape: Shape, block: Shape) -> bool:
    """Whether there is half a byte for every number, and a scale for a group of a row."""
    single = all(parts.get(key, ()) in ((), (1,)) for key in (SECOND, GLOBAL))
    half = (*shape[:-1], shape[-1] / 2)
    groups = grouped(parts[SCALE], shape) and scaled(parts, SCALE, shape, block)
    return parts[codes] == half and groups and single


def experts_fit(parts: Shapes, shape: Shape, _: Shape) -> bool:
    """Whether blocks hold experts [expert, in, out], each as its transpose."""
    blocks, scales = parts[BLOCKS], parts[SCALES]
    if len(shape) != 3 or len(blocks) != 4:
        return False
    expert, rows, groups, half = blocks
    return scales == blocks[:-1] and shape == (expert, 2 * groups * half, rows)


def words_fit(bits: int, parts: Shapes, shape: Shape, block: Shape) -> bool:
    """Whether words of 32 bits hold so many bits for every number of a row."""
    *rows, inputs = shape
    scale = parts[SCALE]
    down = (*rows[:-1], -(-rows[-1] * bits // 32), *scale[-1:])
    zero = parts.get(ZERO, scale) in (scale, down)
    held = parts[PACKED] == (*rows, -(-inputs * bits // 32))
    return held and zero and scaled(parts, SCALE, shape, block)


def halves_fit(parts: Shapes, shape: Shape, block: Shape) -> bool:
    """Whether there is a byte for two numbers of a column."""
    half = (*shape[:-2], shape[-2] / 2, shape[-1])
    return parts[CODES] == half and scaled(parts, SCALE, shape, block)


MODELOPT, VLLM = ("modelopt", "compress"), ("compressed-tensors",)
FP8 = ("F8_E4M3", "F8_E5M2")
LAYOUTS = (
    Layout(
        format="FP8",
        methods=("fp8", "fbgemm_fp8", *MODELOPT, *VLLM),
        parts={CODES: FP8, SCALE: (*FLOATS, *EXPONENTS)},
        optional={INPUTS: FLOATS},
        fits=partial(whole_fit, SCALE),
        values=partial(whole, SCALE),
    ),
    Layout(
        format="FP8",
        methods=("fp8",),
        parts={CODES: FP8, INVERSE: (*FLOATS, *EXPONENTS)},
        optional={},
        fits=partial(whole_fit, INVERSE),
        values=partial(whole, INVERSE),
    ),
    Layout(
        format="INT8",
        methods=(*MODELOPT, *VLLM),
        parts={CODES: ("I8",), SCALE: FLOATS},
        optional={INPUTS: FLOATS, ZERO: WHOLE},
        fits=partial(whole_fit, SCALE),
        values=partial(whole, SCALE),
    ),
    Layout(
        format="NVFP4",
        methods=MODELOPT,
        parts={CODES: ("U8",), SCALE: ("F8_E4M3",), SECOND: ("F32",)},
        optional={INPUTS: FLOATS},
        fits=partial(pairs_fit, CODES),
        values=partial(pairs, CODES),
    ),
    Layout(
        format="NVFP4",
        methods=VLLM,
        parts={PACKED: ("U8",), SCALE: ("F8_E4M3",), GLOBAL: ("F32",)},
        optional={},
        fits=partial(pairs_fit, PACKED),
        values=partial(pairs, PACKED),
    ),
    Layout(
        format="MXFP4",
        methods=MODELOPT,
        parts={CODES: ("U8",), SCALE: EXPONENTS},
        optional={},
        fits=partial(pairs_fit, CODES),
        values=partial(pairs, CODES),
    ),
    Layout(
        format="MXFP4",
        methods=VLLM,
        parts={PACKED: ("U8",), SCALE: EXPONENTS},
        optional={},
        fits=partial(pairs_fit, PACKED),
        values=partial(pairs, PACKED),
    ),
    Layout(
        format="MXFP4",
        methods=("mxfp4",),
        parts={BLOCKS: ("U8",), SCALES: EXPONENTS},
        optional={},
        fits=experts_fit,
        values=experts,
    ),
    *(
        Layout(
            format=f"INT{bits}",
            methods=VLLM,
            parts={PACKED: ("I32",), SCALE: FLOATS},
            optional={ZERO: WHOLE, ORDER: WHOLE, SHAPE: WHOLE},
            fits=partial(words_fit, bits),
            values=partial(words, bits),
        )
        for bits in (4, 8)
    ),
    Layout(
        format="INT4",
        methods=("modelopt",),
        parts={CODES: ("U8",), SCALE: FLOATS},
        optional={INPUTS: FLOATS},
        fits=halves_fit,
        values=halves,
    ),
    Layout(
        format="INT4",
        methods=("compress",),
        parts={CODES: ("U8",), SCALE: FLOATS},
        optional={},
        fits=partial(pairs_fit, CODES),
        values=ours,
    ),
)
METHODS = tuple(dict.fromkeys(method for layout in LAYOUTS for method in layout.methods))


@dataclass(frozen=True)
class Method:
    """How a checkpoint says that it is quantized: by whom, in its words, and the size of blocks."""

    name: str
    said: str
    block: Shape = BLOCK


@dataclass(frozen=True)
class Quantized:
    """A weight as the tensors that hold it, by the names of their parts."""

    layout: Layout
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
            return self.layout.values(parts, self.shape, self.block)
        count = self.shape[0]
        parts = {
            key: read(part, row if len(part.shape) > 1 and part.shape[0] == count else None)
            for key, part in self.parts.items()
        }
        return self.layout.values(parts, (1, *self.shape[1:]), self.block)


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
    """A weight in a layout of a method, if one has all its tensors; InputError on a wrong shape."""
    found = None
    for layout in (layout for layout in LAYOUTS if method.name in layout.methods):
        if any(part_name(part, name) not in stored for part in layout.parts):
            continue
        wanted = {**layout.parts, **layout.optional}
        names = {part: part_name(part, name) for part in wanted}
        parts = {part: stored[tensor] for part, tensor in names.items() if tensor in stored}
        if all(tensor.dtype in wanted[part] for part, tensor in parts.items()):
            found = Quantized(layout, parts, shape, method.block)
            if layout.fits({part: each.shape for part, each in parts.items()}, shape, method.block):
                return found
    if found is None:
        return None
    shapes = ", ".join(f"{part.name} {list(part.shape)}" for part in found.parts.values())
    format = found.layout.format
    raise InputError(f"{shapes} in {path} hold no {list(shape)} in {format} by {method.name}")
