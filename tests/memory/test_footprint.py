import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from published import LLAMA_8B, PUBLISHED
from published_hybrids import HYBRID_8B, HYBRID_9B, HYBRID_12B, HYBRID_30B
from safetensors import safe_open

from compress.core.errors import InputError
from compress.core.quantities import parse_bytes
from compress.formats.table import FORMATS, Format
from compress.memory.budget import in_format, resolve_budget, teacher_bytes
from compress.memory.devices import DEVICES, find_device
from compress.memory.footprint import (
    Deployment,
    block_bytes,
    block_takes,
    footprint,
    largest_batch,
    largest_context,
    outside_bytes,
    tensor_bytes,
    weight_bytes,
)
from compress.model.architecture import Architecture, Attention, Block, in_kv_format
from compress.model.build import weight_format
from compress.model.config import architecture_of, read_config
from compress.model.families import in_one_format, parameters, read_architecture

LONG = Deployment(context=131072)


def test_the_plan_of_a_published_hybrid_to_the_byte() -> None:
    architecture = read_architecture(HYBRID_9B)
    taken = footprint(architecture, LONG)
    assert dataclasses.asdict(taken) == {
        "weights": 17776454656,
        "kv_cache": 2147483648,
        "ssm_state": 141557760,
        "conv_state": 1990656,
        "mtp": 0,
        "workspace": 0,
    }
    assert taken.total == 20067486720
    assert largest_context(architecture, LONG, parse_bytes("22GiB")) == 348041


@pytest.mark.parametrize(
    ("config", "kv_bytes_a_token", "ssm_mib"),
    [
        (HYBRID_8B, 16384, 96),
        (HYBRID_12B, 24576, 140),
        (HYBRID_9B, 16384, 135),
        (HYBRID_30B, 6144, 46),
        (LLAMA_8B, 131072, 0),
    ],
)
def test_caches_of_published_models(
    config: dict[str, object], kv_bytes_a_token: int, ssm_mib: int
) -> None:
    taken = footprint(read_architecture(config), LONG)
    assert taken.kv_cache == kv_bytes_a_token * 131072
    assert taken.ssm_state == ssm_mib * 2**20


def test_predicted_bytes_are_the_bytes_of_the_files(tiny: Path) -> None:
    architecture = architecture_of(tiny, read_config(tiny))
    with safe_open(tiny / "model.safetensors", framework="pt") as reader:
        names = list(reader.keys())
        written = sum(reader.get_tensor(name).nbytes for name in names)
    assert weight_bytes(architecture) == written


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_blocks_and_the_rest_add_up_to_the_parameters(name: str, format: Format) -> None:
    architecture = in_format(read_architecture(PUBLISHED[name][0]), format)
    one_by_one = sum(
        tensor_bytes(
            parameter.slot,
            parameter.shape,
            weight_format(architecture, parameter),
        )
        for parameter in parameters(architecture)
    )
    blocks = sum(
        block_bytes(block, architecture.hidden, architecture.family)
        for block in architecture.blocks
    )
    assert one_by_one == blocks + outside_bytes(architecture) == weight_bytes(architecture)


def in_one(block: Block, format: Format) -> Block:
    return dataclasses.replace(block, formats=in_one_format(block, "llama", format))


def test_formats_take_the_bytes_of_the_formula() -> None:
    ffn = read_architecture(LLAMA_8B).blocks[1]
    elements, norm = 3 * 4096 * 14336, 4096 * 2
    taken = {format: block_bytes(in_one(ffn, format), 4096, "llama") for format in FORMATS}
    assert taken["bf16"] == 2 * elements + norm
    assert taken["fp8"] == elements + 3 * 4 + norm
    assert taken["nvfp4"] == elements * 9 // 16 + 3 * 4 + norm
    assert taken["int4"] == elements * 33 // 64 + 3 * 2 * 8 + norm


def test_a_shape_that_cannot_take_a_format_is_never_given_it() -> None:
    config = LLAMA_8B | {"intermediate_size": 14328}
    architecture = read_architecture(config)
    ffn = architecture.blocks[1]
    assert not block_takes(ffn, 4096, "llama", "nvfp4")
    assert block_takes(ffn, 4096, "llama", "fp8")
    assert in_format(architecture, "nvfp4").formats == {"bf16", "nvfp4"}
    with pytest.raises(InputError, match="14328 inputs are not a multiple of 16"):
        block_bytes(in_one(ffn, "nvfp4"), 4096, "llama")


def test_every_part_grows_as_its_deployment() -> None:
    architecture = read_architecture(HYBRID_9B)
    one = footprint(architecture, LONG)
    four = footprint(architecture, dataclasses.replace(LONG, batch_size=4, workspace_bytes=7))
    assert four.weights == one.weights
    assert four.kv_cache == 4 * one.kv_cache
    assert (four.ssm_state, four.conv_state) == (4 * one.ssm_state, 4 * one.conv_state)
    assert four.workspace == 7
    half = footprint(architecture, dataclasses.replace(LONG, ssm_format="bf16"))
    assert 2 * half.ssm_state == one.ssm_state
    eight_bit = footprint(in_kv_format(architecture, "fp8"), LONG)
    assert 2 * eight_bit.kv_cache == one.kv_cache


def windowed(window: int | None) -> Architecture:
    """A llama whose layers attend to a window, all but the last."""
    architecture = read_architecture(LLAMA_8B)
    blocks = tuple(
        dataclasses.replace(block, window=window) if isinstance(block, Attention) else block
        for block in architecture.blocks[:-2]
    )
    return dataclasses.replace(architecture, blocks=blocks + architecture.blocks[-2:])


@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize("context", [1, 1000, 100_000])
def test_the_largest_context_fits_and_one_token_more_does_not(
    window: int | None, context: int
) -> None:
    architecture = windowed(window)
    taken = footprint(architecture, Deployment(context=context)).total
    assert largest_context(architecture, LONG, taken) == context
    assert largest_context(architecture, LONG, taken - 1) == context - 1


def test_a_budget_below_the_weights_holds_no_token_and_a_bounded_cache_any_number() -> None:
    architecture = windowed(4096)
    assert largest_context(architecture, LONG, weight_bytes(architecture) - 1) == 0
    bounded = dataclasses.replace(architecture, blocks=architecture.blocks[:-2])
    assert largest_context(bounded, LONG, 2 * weight_bytes(architecture)) is None


@pytest.mark.parametrize("config", [LLAMA_8B, HYBRID_9B])
def test_the_largest_batch_fits_and_one_sequence_more_does_not(config: dict[str, Any]) -> None:
    architecture = read_architecture(config)
    for batch in (1, 3, 1000):
        taken = footprint(architecture, dataclasses.replace(LONG, batch_size=batch)).total
        assert largest_batch(architecture, LONG, taken) == batch
        assert largest_batch(architecture, LONG, taken - 1) == batch - 1
    assert largest_batch(architecture, LONG, weight_bytes(architecture) - 1) == 0
    bare = dataclasses.replace(architecture, blocks=architecture.blocks[1:2])
    assert largest_batch(bare, LONG, weight_bytes(bare)) is None
    assert largest_batch(bare, LONG, weight_bytes(bare) - 1) == 0


def test_a_share_is_of_the_teacher_in_bf16_with_a_16_bit_cache() -> None:
    teacher = read_architecture(HYBRID_9B)
    small = in_kv_format(in_format(teacher, "nvfp4"), "fp8")
    assert teacher_bytes(small, LONG) == footprint(teacher, LONG).total
    budget = resolve_budget(small, LONG, Fraction(7, 10), None)
    assert budget is not None
    assert budget.bytes == footprint(teacher, LONG).total * 7 // 10


def test_of_a_budget_and_a_device_the_smaller_binds_and_both_are_named() -> None:
    teacher = read_architecture(HYBRID_9B)
    for text, binding in (("20GiB", parse_bytes("20GiB")), ("40GiB", parse_bytes("22.06GiB"))):
        budget = resolve_budget(teacher, LONG, parse_bytes(text), find_device("a10g"))
        assert budget is not None
        assert budget.bytes == binding
        assert "a10g offers 22.060 GiB" in budget.description
        assert f"budget {text[:2]}.000 GiB" in budget.description
    assert resolve_budget(teacher, LONG, None, None) is None


def test_devices_come_in_counts_and_unknown_ones_are_listed() -> None:
    assert find_device("8xH100").visible_bytes == 8 * DEVICES["h100"].visible_bytes
    assert find_device("a10g").visible_bytes == parse_bytes("22.06GiB")
    assert find_device("8xa10g").capability == 86
    for wrong in ("h101", "0xh100", "xh100"):
        with pytest.raises(InputError, match="known: a10g, l4"):
            find_device(wrong)
