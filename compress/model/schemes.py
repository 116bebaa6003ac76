"""How quantized weights are stored, by others and by us: a table; no torch.

Schemes differ in where codes and scales lie::

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
from typing import TYPE_CHECKING

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
    fp8,
    halves,
    int8,
    mxfp4,
    nvfp4,
    ours,
    words,
)
from compress.model.headers import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, Shape]
EXPONENTS = ("U8", "F8_E8M0")
WHOLE = ("I8", "I32", "I64")


@dataclass(frozen=True, kw_only=True)
class Scheme:
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
    if len(scale) < 2 or not scale[-1]:
        return False
    return scale[:-1] == shape[:-1] and shape[-1] % scale[-1] == 0


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
    zero = parts.get(ZERO, down) == down
    held = parts[PACKED] == (*rows, -(-inputs * bits // 32))
    return held and zero and scaled(parts, SCALE, shape, block)


def halves_fit(parts: Shapes, shape: Shape, block: Shape) -> bool:
    """Whether there is a byte for two numbers of a column."""
    half = (*shape[:-2], shape[-2] / 2, shape[-1])
    return parts[CODES] == half and scaled(parts, SCALE, shape, block)


MODELOPT, VLLM = ("modelopt", "compress"), ("compressed-tensors",)
FP8 = ("F8_E4M3", "F8_E5M2")
SCHEMES = (
    Scheme(
        format="FP8",
        methods=("fp8", "fbgemm_fp8", *MODELOPT, *VLLM),
        parts={CODES: FP8, SCALE: (*FLOATS, *EXPONENTS)},
        optional={INPUTS: FLOATS},
        fits=partial(whole_fit, SCALE),
        values=partial(fp8, SCALE),
    ),
    Scheme(
        format="FP8",
        methods=("fp8",),
        parts={CODES: FP8, INVERSE: (*FLOATS, *EXPONENTS)},
        optional={},
        fits=partial(whole_fit, INVERSE),
        values=partial(fp8, INVERSE),
    ),
    Scheme(
        format="INT8",
        methods=(*MODELOPT, *VLLM),
        parts={CODES: ("I8",), SCALE: FLOATS},
        optional={INPUTS: FLOATS, ZERO: WHOLE},
        fits=partial(whole_fit, SCALE),
        values=int8,
    ),
    Scheme(
        format="NVFP4",
        methods=MODELOPT,
        parts={CODES: ("U8",), SCALE: ("F8_E4M3",), SECOND: ("F32",)},
        optional={INPUTS: FLOATS},
        fits=partial(pairs_fit, CODES),
        values=partial(nvfp4, CODES),
    ),
    Scheme(
        format="NVFP4",
        methods=VLLM,
        parts={PACKED: ("U8",), SCALE: ("F8_E4M3",), GLOBAL: ("F32",)},
        optional={},
        fits=partial(pairs_fit, PACKED),
        values=partial(nvfp4, PACKED),
    ),
    Scheme(
        format="MXFP4",
        methods=MODELOPT,
        parts={CODES: ("U8",), SCALE: EXPONENTS},
        optional={},
        fits=partial(pairs_fit, CODES),
        values=partial(mxfp4, CODES),
    ),
    Scheme(
        format="MXFP4",
        methods=VLLM,
        parts={PACKED: ("U8",), SCALE: EXPONENTS},
        optional={},
        fits=partial(pairs_fit, PACKED),
        values=partial(mxfp4, PACKED),
    ),
    Scheme(
        format="MXFP4",
        methods=("mxfp4",),
        parts={BLOCKS: ("U8",), SCALES: EXPONENTS},
        optional={},
        fits=experts_fit,
        values=experts,
    ),
    *(
        Scheme(
            format=f"INT{bits}",
            methods=VLLM,
            parts={PACKED: ("I32",), SCALE: FLOATS},
            optional={ZERO: ("I32",), ORDER: WHOLE, SHAPE: WHOLE},
            fits=partial(words_fit, bits),
            values=partial(words, bits),
        )
        for bits in (4, 8)
    ),
    Scheme(
        format="INT4",
        methods=("modelopt",),
        parts={CODES: ("U8",), SCALE: FLOATS},
        optional={INPUTS: FLOATS},
        fits=halves_fit,
        values=halves,
    ),
    Scheme(
        format="INT4",
        methods=("compress",),
        parts={CODES: ("U8",), SCALE: FLOATS},
        optional={SHAPE: WHOLE},
        fits=partial(pairs_fit, CODES),
        values=ours,
    ),
)
METHODS = tuple(dict.fromkeys(method for scheme in SCHEMES for method in scheme.methods))
