import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from published import LLAMA_8B, PUBLISHED
from published_hybrids import HYBRID_9B, HYBRID_30B
from safetensors import safe_open
from tiny_models import EVERY

from compress.core.errors import InputError
from compress.formats.table import by_group
from compress.model.architecture import Mamba, from_json, in_kv_format, to_json
from compress.model.build import skeleton
from compress.model.families import (
    count_active,
    count_parameters,
    family_of,
    linear_groups,
    parameters,
    read_architecture,
)
from compress.model.families.wrapper import text_config

NAMES = list(PUBLISHED)


@pytest.mark.parametrize("name", NAMES)
def test_counts_of_published_configs_are_the_published_counts(name: str) -> None:
    config, count = PUBLISHED[name]
    assert count_parameters(read_architecture(config)) == count


@pytest.mark.parametrize("name", NAMES)
def test_the_model_of_a_published_config_has_as_many_parameters(name: str) -> None:
    config, count = PUBLISHED[name]
    model = skeleton(config, read_architecture(config))
    model.tie_weights()
    held = sum(parameter.numel() for parameter in model.parameters())
    held += sum(buffer.numel() for key, buffer in model.named_buffers() if "correction" in key)
    assert held == count


@pytest.mark.parametrize("name", EVERY)
def test_a_skeleton_holds_no_weights(name: str) -> None:
    model = skeleton(EVERY[name], read_architecture(EVERY[name]))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_only_the_chosen_experts_are_active() -> None:
    assert round(count_active(read_architecture(HYBRID_30B)) / 1e9, 3) == 3.580
    dense = read_architecture(LLAMA_8B)
    assert count_active(dense) == count_parameters(dense)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_reads_as_the_same_architecture(name: str) -> None:
    config = text_config(PUBLISHED[name][0])
    architecture = read_architecture(config)
    family = family_of(architecture.family)
    written: dict[str, Any] = {}
    for block in architecture.blocks:
        written |= family.fixed(block)
    written |= family.write(config, architecture) | family.lists(architecture)
    for key in config.keys() & written.keys():
        assert written[key] == config[key], key
    assert read_architecture({**config, **written}) == architecture


@pytest.mark.parametrize("name", NAMES)
def test_json_gives_an_architecture_back_without_loss(name: str) -> None:
    architecture = read_architecture(PUBLISHED[name][0])
    first, *others = architecture.blocks
    mixed = zip(linear_groups(first, architecture.family), ("nvfp4", "bf16", "fp8"), strict=False)
    formats = by_group(dict(mixed))
    changed = dataclasses.replace(
        architecture, blocks=(dataclasses.replace(first, formats=formats), *others)
    )
    changed = in_kv_format(changed, "fp8")
    assert from_json(to_json(architecture)) == architecture
    assert from_json(to_json(changed)) == changed != architecture


def test_every_tensor_of_a_file_is_claimed_by_exactly_one_parameter(tiny: Path) -> None:
    architecture = read_architecture(json.loads((tiny / "config.json").read_text()))
    claimed = [(parameter.name, parameter.shape) for parameter in parameters(architecture)]
    with safe_open(tiny / "model.safetensors", framework="pt") as reader:
        names = list(reader.keys())
        found = [(name, tuple(reader.get_slice(name).get_shape())) for name in names]
    assert sorted(claimed) == sorted(found)


def test_the_pattern_and_the_list_of_layers_say_the_same() -> None:
    pattern = HYBRID_30B["hybrid_override_pattern"]
    listed = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
    config = {key: value for key, value in HYBRID_30B.items() if key != "hybrid_override_pattern"}
    config["layers_block_type"] = [listed[letter] for letter in pattern]
    assert read_architecture(config) == read_architecture(HYBRID_30B)


def test_head_dim_is_its_own_key() -> None:
    mamba = read_architecture(HYBRID_9B).blocks[0]
    assert isinstance(mamba, Mamba)
    assert (mamba.group * mamba.head, mamba.channel) == (128, 80)
    wide = read_architecture(LLAMA_8B | {"head_dim": 96})
    assert count_parameters(wide) < count_parameters(read_architecture(LLAMA_8B))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; known: llama, "),
        ({}, "no model_type"),
        ({"model_type": "llama"}, "no num_attention_heads"),
        (LLAMA_8B | {"attention_bias": True}, "attention_bias"),
        (HYBRID_9B | {"hybrid_override_pattern": "MX"}, "unknown layer type 'X'"),
    ],
)
def test_what_no_table_expresses_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_architecture(config)


def test_a_broken_architecture_file_is_refused() -> None:
    text = to_json(read_architecture(LLAMA_8B))
    with pytest.raises(InputError, match="not one of ours"):
        from_json(text.replace('"ffn"', '"nff"', 1))
