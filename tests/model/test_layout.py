import pytest
import torch
from torch import Tensor

from compress.model.layout import axes, parse, shape, split, take

SIZES = {"kv_head": 3, "query": 2, "head_dim": 4, "hidden": 8}
HYBRID = {"group": 2, "head": 4, "channel": 3, "state": 5, "kernel": 4, "hidden": 6}
XBC = "[(group head channel) | (group state) | (group state)]"
DELTA = {"key_head": 2, "value": 3, "key_dim": 4, "value_dim": 5, "kernel": 4, "hidden": 6}
TURNS = "(key_head [key_dim | key_dim | (value value_dim) | (value value_dim)])"
CASES = [
    ("(kv_head query head_dim) hidden", SIZES),
    ("hidden (kv_head query head_dim)", SIZES),
    ("(kv_head head_dim) hidden", SIZES),
    (f"{XBC} 1 kernel", HYBRID),
    (f"{XBC[:-1]} | (group head)] hidden", HYBRID),
    (f"{TURNS} hidden", DELTA),
    ("(key_head [value | value]) hidden", DELTA),
    ("(kv_head query 2 head_dim) hidden", SIZES),
]


def numbered(pattern: str, sizes: dict[str, int]) -> Tensor:
    dimensions = shape(pattern, sizes)
    return torch.arange(torch.Size(dimensions).numel()).reshape(dimensions)


@pytest.mark.parametrize(("pattern", "sizes"), CASES)
def test_keeping_everything_is_the_identity(pattern: str, sizes: dict[str, int]) -> None:
    tensor = numbered(pattern, sizes)
    everything = {axis: torch.arange(size) for axis, size in sizes.items()}
    assert torch.equal(take(tensor, pattern, sizes, everything), tensor)
    assert torch.equal(take(tensor, pattern, sizes, {}), tensor)


@pytest.mark.parametrize(("pattern", "sizes"), CASES)
def test_the_shape_after_take_is_the_shape_of_the_smaller_sizes(
    pattern: str, sizes: dict[str, int]
) -> None:
    for axis in set(axes(pattern)):
        smaller = sizes | {axis: sizes[axis] - 1}
        cut = take(numbered(pattern, sizes), pattern, sizes, {axis: torch.arange(1, sizes[axis])})
        assert tuple(cut.shape) == shape(pattern, smaller)


@pytest.mark.parametrize(("pattern", "sizes"), CASES)
def test_cutting_twice_equals_cutting_once(pattern: str, sizes: dict[str, int]) -> None:
    tensor = numbered(pattern, sizes)
    for axis in set(axes(pattern)):
        size = sizes[axis]
        first, second = torch.arange(1, size), torch.arange(0, size - 1, 2)
        once = take(tensor, pattern, sizes, {axis: first[second]})
        halfway = take(tensor, pattern, sizes, {axis: first})
        twice = take(halfway, pattern, sizes | {axis: size - 1}, {axis: second})
        assert torch.equal(once, twice)


def test_a_nested_keep_has_a_row_for_every_kept_outer_position() -> None:
    tensor = torch.arange(12).reshape(12, 1)
    sizes = {"kv_head": 3, "query": 2, "head_dim": 2, "hidden": 1}
    keep = {"kv_head": torch.tensor([0, 2]), "query": torch.tensor([[1], [0]])}
    cut = take(tensor, "(kv_head query head_dim) hidden", sizes, keep)
    # Of KV head 0 its query head 1, rows 2 and 3; of KV head 2 its query head 0, rows 8 and 9.
    assert cut.flatten().tolist() == [2, 3, 8, 9]
    # The pattern without the query axis follows its KV heads only.
    keys = take(torch.arange(6).reshape(6, 1), "(kv_head head_dim) hidden", sizes, keep)
    assert keys.flatten().tolist() == [0, 1, 4, 5]


def test_every_part_of_a_concatenation_is_cut_by_its_own_axes() -> None:
    sizes = {"group": 1, "head": 2, "channel": 2, "state": 2}
    cut = take(torch.arange(8), XBC, sizes, {"head": torch.tensor([1])})
    assert cut.tolist() == [2, 3, 4, 5, 6, 7]
    cut = take(torch.arange(8), XBC, sizes, {"channel": torch.tensor([0])})
    assert cut.tolist() == [0, 2, 4, 5, 6, 7]


def test_the_parts_of_a_product_take_turns() -> None:
    sizes = {"key_head": 2, "key_dim": 2, "value": 2, "value_dim": 1}
    pattern = "(key_head [key_dim | (value value_dim)])"
    assert shape(pattern, sizes) == (8,)
    # Of either key head two keys, then two values.
    cut = take(torch.arange(8), pattern, sizes, {"key_head": torch.tensor([1])})
    assert cut.tolist() == [4, 5, 6, 7]
    cut = take(torch.arange(8), pattern, sizes, {"key_dim": torch.tensor([0])})
    assert cut.tolist() == [0, 2, 3, 4, 6, 7]
    # Another value of each key head.
    cut = take(torch.arange(8), pattern, sizes, {"value": torch.tensor([[1], [0]])})
    assert cut.tolist() == [0, 1, 3, 4, 5, 6]


@pytest.mark.parametrize(("pattern", "sizes"), CASES)
def test_every_product_has_its_own_part_of_a_dimension(pattern: str, sizes: dict[str, int]) -> None:
    for dimension, length in zip(parse(pattern), shape(pattern, sizes), strict=True):
        parts = list(split(torch.arange(length), dimension, sizes))
        for product, part in parts:
            assert tuple(part.shape) == shape(f"({' '.join(product)})", sizes)
        joined = torch.cat([part for _, part in parts])
        assert joined.sort().values.tolist() == list(range(length))


def test_shapes_of_products_concatenations_and_constants() -> None:
    assert shape("(kv_head query head_dim) hidden", SIZES) == (24, 8)
    assert shape(f"{XBC} 1 kernel", HYBRID) == (24 + 10 + 10, 1, 4)
    assert list(axes("hidden (kv_head head_dim)")) == ["hidden", "kv_head", "head_dim"]
