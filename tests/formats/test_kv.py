import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from tiny_models import EVERY, write_tiny
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel

from compress.core.errors import InputError
from compress.formats.fp8 import E4M3_MAX
from compress.formats.kv import attention_over, set_kv_format, stored
from compress.formats.table import KvFormat
from compress.model.architecture import Architecture, from_json, in_kv_format, kv_text, to_json
from compress.model.build import load, load_model, set_kv_formats
from compress.model.config import architecture_of, read_config
from compress.model.families import read_architecture
from compress.model.modules import attention_of, final_hidden
from compress.scores.kv import kv_costs
from compress.sweep.placement import Placement
from compress.sweep.stack import final_states, stack_at

TOKENS = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(3))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def by_hand(x: Tensor) -> Tensor:
    """E4M3 by its definition: four significant bits, steps of 2**-9 at the bottom, 448 on top."""
    clamped = x.double().clamp(-E4M3_MAX, E4M3_MAX)
    exponent = torch.frexp(clamped).exponent
    step = torch.exp2((exponent - 4).clamp(min=-9).double())
    return ((clamped / step).round() * step).to(x.dtype)


def test_stored_values_are_those_of_e4m3() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 3
    extreme = torch.tensor([0.0, 1e-4, 2.0**-10, 1.5 * 2.0**-9, 448.0, 460.0, -1e9])
    for x in (values, values * 1e-3, values * 100, extreme):
        assert torch.equal(stored(x), by_hand(x))


def test_the_gradient_passes_the_rounding() -> None:
    x = torch.randn(8, requires_grad=True)
    stored(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(8))


def test_attention_over_an_fp8_cache_is_attention_over_rounded_keys_and_values(
    tiny_llama: Path,
) -> None:
    attention = load_model(tiny_llama).model.layers[0].self_attn
    groups = attention.num_key_value_groups
    draw = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, 6, 16, generator=draw)
    key, value = (torch.randn(1, 4 // groups, 6, 16, generator=draw) for _ in range(2))
    set_kv_format(attention, "fp8")
    found, _ = attention_over(attention, query, key, value, None, scaling=0.25, is_causal=True)
    wide = [by_hand(x).repeat_interleave(groups, 1) for x in (key, value)]
    expected = scaled_dot_product_attention(query, *wide, is_causal=True, scale=0.25)
    assert_close(found, expected.transpose(1, 2))


def test_an_fp8_cache_changes_logits_a_little_and_switching_back_undoes_it(tiny: Path) -> None:
    model, architecture = load_model(tiny), architecture_of(tiny, read_config(tiny))
    before = logits(model)
    set_kv_formats(model, in_kv_format(architecture, "fp8"))
    during = logits(model)
    set_kv_formats(model, architecture)
    difference = float((during - before).square().mean().sqrt())
    assert 0 < difference < 0.15 * float(before.std())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kv_format", ["bf16", "fp8"])
def test_attention_sinks_are_heard_in_both_formats(kv_format: KvFormat, tmp_path: Path) -> None:
    model: Any = load_model(write_tiny(tmp_path / "m", EVERY["gpt_oss"]))
    before = logits(model)
    for layer in model.model.layers:
        set_kv_format(layer.self_attn, kv_format)
    during = logits(model)
    assert torch.equal(during, before) == (kv_format == "bf16")
    for layer in model.model.layers:
        layer.self_attn.sinks += 3
    assert (logits(model) - during).abs().max() > 0.5


class Rounded(DynamicCache):
    """A cache that holds what it is given in FP8."""

    def update(self, keys: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return super().update(stored(keys), stored(values), *others)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt_oss"])
def test_an_fp8_cache_rounds_what_transformers_caches(family: str, tmp_path: Path) -> None:
    model = load_model(write_tiny(tmp_path / family, EVERY[family]))
    expected = model(TOKENS, past_key_values=Rounded(config=model.config)).logits
    architecture = read_architecture(EVERY[family])
    set_kv_formats(model, in_kv_format(architecture, "fp8"))
    assert_close(logits(model), expected)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_padding_is_masked_in_both_formats(family: str, tmp_path: Path) -> None:
    model = load_model(write_tiny(tmp_path / family, EVERY[family]))
    architecture = read_architecture(EVERY[family])
    mask = torch.ones_like(TOKENS)
    mask[:, :5] = 0
    other = torch.where(mask.bool(), TOKENS, 7)
    formats: list[KvFormat] = ["bf16", "fp8"]
    for kv_format in formats:
        set_kv_formats(model, in_kv_format(architecture, kv_format))
        with torch.no_grad():
            one, two = (
                model(input_ids=ids, attention_mask=mask).logits[:, 5:] for ids in (TOKENS, other)
            )
        assert_close(one, two)


def mixed(architecture: Architecture) -> Architecture:
    """The last of its caches in FP8, the others not."""
    blocks = list(architecture.blocks)
    last = max(architecture.kv_formats)
    blocks[last] = in_kv_format(architecture, "fp8").blocks[last]
    return replace(architecture, blocks=tuple(blocks))


def test_every_layer_reads_its_cache_in_its_own_format(tiny_llama: Path) -> None:
    architecture = mixed(architecture_of(tiny_llama, read_config(tiny_llama)))
    assert kv_text(architecture) == "fp8 in 1 of 3 blocks"
    seen: dict[int, list[Tensor]] = {}

    def see(module: Any, inputs: Any, options: Any, output: Any) -> None:
        seen.setdefault(module.layer_idx, []).append(output[0])

    model = load_model(tiny_llama)
    for number in architecture.kv_formats:
        block = architecture.blocks[number]
        attention_of(model, block).register_forward_hook(see, with_kwargs=True)
    logits(model)
    set_kv_formats(model, architecture)
    logits(model)
    assert [torch.equal(*seen[layer]) for layer in sorted(seen)] == [True, True, False]


def test_a_directory_says_which_layers_have_an_fp8_cache(tiny_llama: Path, tmp_path: Path) -> None:
    architecture = mixed(architecture_of(tiny_llama, read_config(tiny_llama)))
    copytree(tiny_llama, tmp_path / "mixed")
    (tmp_path / "mixed" / "architecture.json").write_text(to_json(architecture))
    found, plain = load(tmp_path / "mixed"), load(tiny_llama)
    assert not torch.equal(logits(found), logits(plain))
    set_kv_formats(plain, architecture)
    assert torch.equal(logits(found), logits(plain))
    # In a sweep, and token by token with a cache.
    [swept] = final_states(stack_at(tmp_path / "mixed"), [TOKENS])
    assert_close(swept, final_hidden(found, TOKENS))
    prompt = TOKENS[:1, :8]
    cached, whole = (
        found.generate(prompt, max_new_tokens=9, do_sample=False, use_cache=use, eos_token_id=-1)
        for use in (True, False)
    )
    assert torch.equal(cached, whole)


def test_one_kv_format_for_all_is_read_as_that_of_every_block(tiny_llama: Path) -> None:
    architecture = architecture_of(tiny_llama, read_config(tiny_llama))
    written = json.loads(to_json(architecture))
    for block in written["blocks"]:
        block.pop("kv_format", None)
    text = json.dumps(written | {"kv_format": "fp8"})
    assert from_json(text) == in_kv_format(architecture, "fp8")
    with pytest.raises(InputError, match="int2"):
        from_json(json.dumps(written | {"kv_format": "int2"}))


@pytest.mark.parametrize("memory", [None, 2**15])
def test_costs_of_caches_add_up_to_that_of_all(tiny_llama: Path, memory: int | None) -> None:
    stack = stack_at(tiny_llama, Placement(memory=memory))
    costs = kv_costs(stack, TOKENS)
    assert list(costs) == [f"layers.{layer}.attention/fp8" for layer in range(3)]
    assert all(cost > 0 for cost in costs.values())
    model, architecture = load_model(tiny_llama), stack.architecture
    teacher = logits(model).log_softmax(-1)
    kls = []
    for made in (in_kv_format(architecture, "fp8"), mixed(architecture)):
        set_kv_formats(model, made)
        found = logits(model).log_softmax(-1)
        kls.append(float((teacher.exp() * (teacher - found)).sum(-1).mean()))
    everywhere, last = kls
    assert sum(costs.values()) == pytest.approx(everywhere, rel=1e-3)
    assert costs["layers.2.attention/fp8"] == pytest.approx(last, rel=0.5)
    # The stack is the teacher's again.
    assert_close(final_states(stack, [TOKENS])[0], final_hidden(load_model(tiny_llama), TOKENS))
