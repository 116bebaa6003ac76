"""A model visited layer by layer is the model: streamed, resident and transformers' own agree."""

from pathlib import Path

import pytest
import torch

from compress.core.errors import InputError
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.model.modules import final_hidden
from compress.sweep.placement import REFERENCE, Placement, placement
from compress.sweep.stack import final_states, stack_of

BATCHES = [torch.arange(1, 49).view(3, 16), torch.arange(50, 70).view(1, 20)]


@pytest.mark.parametrize("memory", [None, 0, 300_000])
def test_a_sweep_gives_what_the_model_does(tiny: Path, memory: int | None) -> None:
    stack, model = stack_of(open_checkpoint(tiny), Placement(memory=memory)), load_model(tiny)
    for _ in range(2):
        found = final_states(stack, BATCHES)
        for ids, states in zip(BATCHES, found, strict=True):
            with torch.no_grad():
                assert torch.equal(states, final_hidden(model, ids))


def test_only_what_fits_stays(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    for memory, kept in ((None, 1 + checkpoint.architecture.layers), (0, 0)):
        stack = stack_of(checkpoint, Placement(memory=memory))
        final_states(stack, BATCHES)
        assert len(stack.there) == kept
        assert any(p.is_meta for p in stack.model.parameters()) == (kept == 0)


def test_a_failure_inside_a_layer_lets_it_go(tiny: Path) -> None:
    stack = stack_of(open_checkpoint(tiny), Placement(memory=0))
    with pytest.raises(ZeroDivisionError), stack.layer(0):
        raise ZeroDivisionError
    assert not stack.there


def test_memory_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="more than"):
        placement("cpu", 2**60)
    assert placement("cpu", 2**20).memory == 2**20
    assert placement("cpu", None).device == REFERENCE.device


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        placement("cuda", None)
