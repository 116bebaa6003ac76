"""The number formats, a row each; nothing here imports torch.

Adding one is a file with its arithmetic and a row with its name. The file is named like the format
and has ``fake`` (a weight after the format and back), ``pack`` (the stored tensors), ``unpack``
(their fp32 values), and what these are made of: ``scales`` as stored, the ``steps`` that they stand
for, ``round_`` to the codes' values and ``encode`` at given scales; ``formats/int4.py`` shows what
one takes.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from compress.core.errors import InputError

Format = Literal[
    "bf16", "fp8", "nvfp4", "mxfp4", "int4", "q8_0", "q4_0", "fp8_a8", "nvfp4_a4"
]  # fmt: skip
KvFormat = Literal["bf16", "fp8"]
# The format of every linear group of a block, by the group's name; none: BF16 throughout.
GroupFormats = tuple[tuple[str, Format], ...]
# How weights come to the values of a format: ``student/rounding.py``.
Rounding = Literal["nearest", "scales", "second-order"]

# By which a linear layer rounds what it reads: of the tensor, in formats that do.
INPUT_SCALE = "input_scale"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A tensor stored beside a quantized weight, under the weight's name with another ending.

    It has one number a group [out, in / group], or one for the tensor []. ``dtype`` is torch's name
    of what takes ``bytes`` a number.
    """

    suffix: str
    dtype: str
    bytes: int
    per_group: bool = False


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """One format of linear weights [out, in].

    Attributes:
        name: in space files, architectures and on the command line.
        bits: of a code, by which a server's layout calls it too, with ``kind``.
        group: inputs in a row that share a scale; 1 where only the tensor has one.
        codes: torch's name of what the stored weight is made of; codes of 4 bits come in pairs.
        scales: what is stored beside the weight, in the order of ``unpack``.
        shared: fused groups (q/k/v, gate/up, a layer's experts) have one tensor scale.
        weights: the format that weights have, where what they are multiplied with is rounded too,
            by a scale of the tensor from calibration.
        capability: of a device from which servers have products for it, 89 for 8.9; of weights
            alone they dequantize.
        shape_bytes: of the shape, which is stored beside codes in words that do not tell it.
    """

    name: Format
    bits: int
    group: int = 1
    codes: str = "uint8"
    kind: Literal["float", "int"] = "float"
    scales: tuple[Scale, ...] = ()
    shared: bool = False
    weights: Format | None = None
    capability: int = 0
    shape_bytes: int = 0

    @property
    def numerics(self) -> Any:
        """The file with its arithmetic, imported when first asked for; BF16 has none."""
        return importlib.import_module(f"compress.formats.{self.weights or self.name}")

    @property
    def rounds_inputs(self) -> bool:
        """Whether layers round what they read, which servers need products of such numbers for."""
        return self.weights is not None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The endings of what is stored beside a weight."""
        return tuple(scale.suffix for scale in self.scales)

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape, input width last, can be stored so."""
        return shape[-1] % self.group == 0

    def require(self, shape: Sequence[int]) -> None:
        """InputError where a weight of this shape cannot be stored so."""
        if not self.takes(shape):
            raise InputError(
                f"a weight of shape {list(shape)} cannot be {self.name}: "
                f"{shape[-1]} inputs are not a multiple of {self.group}"
            )

    def bytes(self, shape: Sequence[int]) -> int:
        """Bytes of the stored tensors of a weight; InputError where it cannot be stored so."""
        self.require(shape)
        count = prod(shape)
        scales = ((s.bytes, count // self.group if s.per_group else 1) for s in self.scales)
        scale_bytes = sum(size * numbers for size, numbers in scales)
        return count * self.bits // 8 + scale_bytes + self.shape_bytes


WHOLE = Scale(suffix="weight_scale", dtype="float32", bytes=4)
SECOND = Scale(suffix="weight_scale_2", dtype="float32", bytes=4)
INPUT = Scale(suffix=INPUT_SCALE, dtype="float32", bytes=4)
E4M3 = Scale(suffix="weight_scale", dtype="float8_e4m3fn", bytes=1, per_group=True)
E8M0 = Scale(suffix="weight_scale", dtype="uint8", bytes=1, per_group=True)
FP16 = Scale(suffix="weight_scale", dtype="float16", bytes=2, per_group=True)
BF16 = Scale(suffix="weight_scale", dtype="bfloat16", bytes=2, per_group=True)
ROWS = (
    NumberFormat(name="bf16", bits=16, codes="bfloat16"),
    NumberFormat(name="fp8", bits=8, codes="float8_e4m3fn", scales=(WHOLE,), shared=True),
    NumberFormat(name="nvfp4", bits=4, group=16, scales=(E4M3, SECOND), shared=True),
    NumberFormat(name="mxfp4", bits=4, group=32, scales=(E8M0,)),
    NumberFormat(name="int4", bits=4, group=128, kind="int", scales=(BF16,), shape_bytes=16),
    NumberFormat(name="q8_0", bits=8, group=32, codes="int8", kind="int", scales=(FP16,)),
    NumberFormat(name="q4_0", bits=4, group=32, kind="int", scales=(FP16,)),
    NumberFormat(
        name="fp8_a8", weights="fp8", capability=89, bits=8, codes="float8_e4m3fn",
        scales=(WHOLE, INPUT), shared=True,
    ),
    NumberFormat(
        name="nvfp4_a4", weights="nvfp4", capability=100, bits=4, group=16,
        scales=(E4M3, SECOND, INPUT), shared=True,
    ),
)  # fmt: skip
FORMATS: Mapping[Format, NumberFormat] = {row.name: row for row in ROWS}
WEIGHT_ONLY: tuple[Format, ...] = tuple(row.name for row in ROWS if not row.rounds_inputs)

# Bytes of a number in a KV cache; the first is what a cache holds where nothing was decided.
KV_BYTES: Mapping[KvFormat, int] = {"bf16": 2, "fp8": 1}
KV_FORMATS: tuple[KvFormat, ...] = tuple(KV_BYTES)
# Bytes of the scales of keys and of values that are stored with the weights of a block.
KV_SCALE_BYTES: Mapping[KvFormat, int] = {"bf16": 0, "fp8": 8}


def by_group(formats: Mapping[str, Format]) -> GroupFormats:
    """Formats of all linear groups of a block as blocks have them; equal ones are equal."""
    return () if set(formats.values()) <= {"bf16"} else tuple(sorted(formats.items()))


def used_in(formats: GroupFormats) -> set[Format]:
    """The number formats of a block."""
    return {format for _, format in formats} or {"bf16"}


def formats_text(formats: GroupFormats) -> str:
    """Formats in words: one where all groups agree, else ``down nvfp4, gate_up fp8``."""
    used = used_in(formats)
    return min(used) if len(used) == 1 else ", ".join(" ".join(pair) for pair in formats)
