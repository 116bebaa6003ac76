"""The way from hidden states to logits is the one of transformers, whatever the family does."""

from typing import Any

import pytest
import torch
from tiny_models import TINY, write_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from compress.model.build import load_model
from compress.model.modules import Head, final_hidden, head_of

SIZES: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0,
)  # fmt: skip
# Families that scale or cap: (settings, scale, softcap).
SCALED = {
    "granite": ({"logits_scaling": 8.0}, 1 / 8, None),
    "cohere": ({"logit_scale": 0.25}, 0.25, None),
    "gemma2": ({"final_logit_softcapping": 3.0}, 1.0, 3.0),
    "qwen2": ({}, 1.0, None),
}
TOKENS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", SCALED)
def test_logits_are_those_of_transformers(family: str) -> None:
    settings, scale, softcap = SCALED[family]
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(family, **SIZES | settings)).eval()
    model.get_output_embeddings().weight.data.mul_(40)
    head = head_of(model)
    assert (head.scale, head.softcap) == (scale, softcap)
    with torch.no_grad():
        expected, ours = model(TOKENS).logits, head.logits(final_hidden(model, TOKENS))
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", TINY)
def test_a_key_that_the_family_does_not_know_scales_nothing(name: str, tmp_path: Any) -> None:
    stray = {"logits_scaling": 8.0, "logit_scale": 0.5, "final_logit_softcapping": 3.0}
    model = load_model(write_tiny(tmp_path / "m", TINY[name] | stray))
    head = head_of(model)
    assert (head.scale, head.softcap) == (1.0, None)
    with torch.no_grad():
        ours, expected = head.logits(final_hidden(model, TOKENS)), model(TOKENS).logits
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 2.0), (0.3, 2.0)])
def test_the_slope_is_the_derivative_of_the_logits(scale: float, softcap: float | None) -> None:
    # One hidden channel of weight 1: the logit is a function of one number.
    product = torch.linspace(-6, 6, 25)[:, None].requires_grad_()
    head = Head(torch.ones(1, 1), scale, softcap)
    logits = head.logits(product)
    (derivative,) = torch.autograd.grad(logits.sum(), product)
    torch.testing.assert_close(head.slope(logits.detach()).expand_as(derivative), derivative)
