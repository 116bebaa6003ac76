"""Likelihoods of answers by sweeps are those of the whole model."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.measure.likelihoods import Asked, asked, likelihoods
from compress.measure.lm_eval import quiet
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.sweep.placement import Placement
from compress.sweep.stack import stack_at, stack_of
from compress.text.tokenizer import load_tokenizer

WINDOW = 40


def requests() -> list[tuple[tuple[str, str], list[int], list[int]]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for context, answer in ((30, 4), (1, 7), (50, 3), (30, 1), (9, 12), (39, 2)):
        tokens = torch.randint(2, 97, (context + answer,), generator=generator).tolist()
        found.append((("", ""), tokens[:context], tokens[context:]))
    # The same context before two answers of one token, which one input serves.
    return [*found, (("", ""), found[3][1], [5]), (("", ""), found[3][1], [6])]


def test_likelihoods_are_those_of_lm_eval(tiny: Path) -> None:
    model, wanted = load_model(tiny), requests()
    with quiet():
        adapter: Any = import_module("lm_eval.models.huggingface").HFLM(
            pretrained=model, tokenizer=load_tokenizer(tiny), max_length=WINDOW, batch_size=2
        )
        model.config.use_cache = False
        expected = adapter._loglikelihood_tokens(wanted)
    found = likelihoods(stack_at(tiny), [asked(*each[1:], WINDOW) for each in wanted])
    assert [value for value, _ in found] == pytest.approx([float(v) for v, _ in expected], rel=1e-5)
    assert [exact for _, exact in found] == [bool(exact) for _, exact in expected]


def test_the_likeliest_answer_is_found(tiny_llama: Path) -> None:
    stack, read = stack_at(tiny_llama), (3, 14, 15, 92, 65)
    [(value, _)] = likelihoods(stack, [Asked(read, (7,))])
    every = likelihoods(stack, [Asked(read, (token,)) for token in range(128)])
    assert every[7][0] == pytest.approx(value, rel=1e-6)
    assert [exact for _, exact in every].count(True) == 1
    assert max(every)[1]
    assert sum(torch.tensor([v for v, _ in every]).exp()) == pytest.approx(1, abs=1e-5)


def test_layers_that_come_and_go_change_nothing(tiny: Path) -> None:
    wanted = [asked(*each[1:], WINDOW) for each in requests()]
    checkpoint = open_checkpoint(tiny)
    resident, streamed = (
        stack_of(checkpoint, place) for place in (Placement(), Placement(memory=0))
    )
    assert likelihoods(resident, wanted) == likelihoods(streamed, wanted)
    assert not streamed.there
