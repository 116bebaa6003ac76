"""Axes have names: shapes as patterns, and structured pruning as "keep these along these axes".

A pattern lists dimensions separated by spaces. ``(a b)`` is a product of axes, ``[x | y]`` a
concatenation of products, a bare number a constant. A concatenation may end a product, whose
parts then take turns: here every key head has rows of its own for each::

    (kv_head query head_dim) hidden
    [(group head channel) | (group state)] 1 kernel
    (key_head [key_dim | key_dim | (value value_dim)]) hidden
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Product = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which rows of a larger matrix, of one expert in a stack, a weight is; all by default.

    They are the ``number``-th of ``of`` runs of equal length, or, ``interleaved``, every ``of``-th
    row from that number on. Where it is ``transposed`` the larger matrix has them as columns.
    """

    number: int = 0
    of: int = 1
    interleaved: bool = False
    transposed: bool = False

    def view(self, larger: "torch.Tensor") -> "torch.Tensor":
        """The weight as a view of the larger tensor."""
        rows = larger.T if self.transposed else larger
        if self.interleaved:
            return rows[self.number :: self.of]
        return rows.chunk(self.of)[self.number]

    def larger(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the larger tensor, of the weight's."""
        rows, *others = shape
        found = (rows * self.of, *others)
        return found[::-1] if self.transposed else found


WHOLE = Part()


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One weight as a family's table declares it.

    ``fused`` names the linear group of a quantizable weight: the block's weights of one group share
    format and tensor scale (q/k/v, gate/up, the experts). None: stays BF16. ``normalizes``
    are the axes a norm averages over, so that surgery can fold the changed width into the weight,
    which acts as ``offset`` + weight; one ``over_heads`` of queries or keys is read by no
    projection. ``times_root`` are axes by the root of whose sizes the model multiplies it.

    ``place`` is the tensor of the layer's torch module that holds it, None where that is called
    what it is; experts are stacked there, each a larger matrix of which this is a ``part``.
    ``stack`` is the tensor of the layer on disk that holds it the same way, if one does.
    """

    shape: str
    fused: str | None = None
    normalizes: tuple[str, ...] = ()
    offset: float = 0.0
    over_heads: bool = False
    times_root: tuple[str, ...] = ()
    float32: bool = False
    place: str | None = None
    part: Part = WHOLE
    stack: str | None = None


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A slot made concrete: its name on disk, the sizes of its axes and the block it belongs to.

    ``stack`` is the tensor on disk that the weights of all experts are stacked in, ``stacked`` its
    shape; None where they are not. Where they are, ``name`` is what this one is called when it is
    quantized: then it is a tensor of its own.
    """

    name: str
    slot: Slot
    sizes: Mapping[str, int] = field(repr=False)
    block: int | None = None
    expert: int | None = None
    stack: str | None = None

    @property
    def stacked(self) -> tuple[int, ...] | None:
        """Shape of the stack on disk."""
        if self.stack is None:
            return None
        return (self.sizes["expert"], *self.slot.part.larger(self.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape on disk."""
        return shape(self.slot.shape, self.sizes)

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Dimension:
    """A concatenation of products of axis names.

    All of them begin with the same ``outer`` axes, for every position of which they take turns.
    """

    products: tuple[Product, ...]
    outer: int = 0


@cache
def parse(pattern: str) -> tuple[Dimension, ...]:
    """The dimensions of a pattern."""
    dimensions = []
    for text in re.findall(r"\[[^\]]*\]|\((?:\[[^\]]*\]|[^)])*\)|\S+", pattern):
        before, several, listed = text.partition("[")
        first = tuple(before.strip("( )").split())
        parts = listed.rpartition("]")[0].split("|") if several else [""]
        products = tuple(first + tuple(part.strip("( )").split()) for part in parts)
        dimensions.append(Dimension(products, len(first) if several else 0))
    return tuple(dimensions)


def size_of(axis: str, sizes: Mapping[str, int]) -> int:
    """Size of an axis; a bare number is its own size."""
    return int(axis) if axis.isdigit() else sizes[axis]


def shape(pattern: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of a tensor under axis sizes."""
    return tuple(
        sum(prod(size_of(axis, sizes) for axis in product) for product in dimension.products)
        for dimension in parse(pattern)
    )


def take(
    tensor: "torch.Tensor",
    pattern: str,
    sizes: Mapping[str, int],
    keep: Mapping[str, "torch.Tensor"],
) -> "torch.Tensor":
    """The tensor with only the kept indices of every axis named in ``keep``.

    ``sizes`` are the tensor's own. A one-dimensional index applies everywhere; a two-dimensional
    one has a row for every kept position of the axes before it in the product (the kept query
    heads of each kept KV head).
    """
    for number, dimension in enumerate(parse(pattern)):
        if any(axis in keep for product in dimension.products for axis in product):
            kept = kept_positions(dimension, sizes, keep).to(tensor.device)
            tensor = tensor.index_select(number, kept)
    return tensor


def split(
    values: "torch.Tensor", dimension: Dimension, sizes: Mapping[str, int]
) -> "Iterator[tuple[Product, torch.Tensor]]":
    """Of values [..., a whole dimension] those of each of its products, in the product's order."""
    import torch

    first = dimension.products[0][: dimension.outer]
    inner = (product[dimension.outer :] for product in dimension.products)
    widths = [prod(size_of(axis, sizes) for axis in own) for own in inner]
    turns = values.reshape(*values.shape[:-1], prod(size_of(a, sizes) for a in first), sum(widths))
    for product, part in zip(dimension.products, torch.split(turns, widths, -1), strict=True):
        yield product, part.flatten(-2)


def kept_positions(
    dimension: Dimension, sizes: Mapping[str, int], keep: Mapping[str, "torch.Tensor"]
) -> "torch.Tensor":
    """Flat positions of one dimension that survive, ascending within each product."""
    import torch

    length = sum(prod(size_of(axis, sizes) for axis in each) for each in dimension.products)
    found = []
    for product, places in split(torch.arange(length), dimension, sizes):
        flat, turns = torch.zeros(1, dtype=torch.long), 1
        for number, axis in enumerate(product):
            size = size_of(axis, sizes)
            index = keep.get(axis, torch.arange(size))
            flat = (flat[:, None] * size + index).reshape(-1)
            turns = len(flat) if number < dimension.outer else turns
        found.append(places[flat].view(turns, -1))
    return torch.cat(found, 1).flatten()


def axes(pattern: str) -> Iterator[str]:
    """Names of the axes of a pattern, in order, with repetition."""
    for dimension in parse(pattern):
        for product in dimension.products:
            yield from (axis for axis in product if not axis.isdigit())
