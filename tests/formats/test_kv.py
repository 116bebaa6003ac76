from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import EVERY, write_tiny
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel

from compress.formats.fp8 import E4M3_MAX
from compress.formats.kv import fp8_attention, set_kv_format, stored
from compress.formats.table import KvFormat
from compress.model.build import load_model

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
    found, _ = fp8_attention(attention, query, key, value, None, scaling=0.25, is_causal=True)
    wide = [by_hand(x).repeat_interleave(groups, 1) for x in (key, value)]
    expected = scaled_dot_product_attention(query, *wide, is_causal=True, scale=0.25)
    assert_close(found, expected.transpose(1, 2))


def test_an_fp8_cache_changes_logits_a_little_and_switching_back_undoes_it(tiny: Path) -> None:
    model = load_model(tiny)
    before = logits(model)
    set_kv_format(model, "fp8")
    during = logits(model)
    set_kv_format(model, "bf16")
    difference = float((during - before).square().mean().sqrt())
    assert 0 < difference < 0.15 * float(before.std())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kv_format", ["bf16", "fp8"])
def test_attention_sinks_are_heard_in_both_formats(kv_format: KvFormat, tmp_path: Path) -> None:
    model: Any = load_model(write_tiny(tmp_path / "m", EVERY["gpt_oss"]))
    before = logits(model)
    set_kv_format(model, kv_format)
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
    set_kv_format(model, "fp8")
    assert_close(logits(model), expected)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_padding_is_masked_in_both_formats(family: str, tmp_path: Path) -> None:
    model = load_model(write_tiny(tmp_path / family, EVERY[family]))
    mask = torch.ones_like(TOKENS)
    mask[:, :5] = 0
    other = torch.where(mask.bool(), TOKENS, 7)
    for kv_format in ("bf16", "fp8"):
        set_kv_format(model, kv_format)
        with torch.no_grad():
            one, two = (
                model(input_ids=ids, attention_mask=mask).logits[:, 5:] for ids in (TOKENS, other)
            )
        assert_close(one, two)
