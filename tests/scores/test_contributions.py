"""Contributions are gradients of drawn labels, whatever the batches, the memory and the device."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.model.checkpoint import open_checkpoint
from compress.scores import gradients
from compress.scores.contributions import contributions, drawn
from compress.scores.gated import Gated
from compress.scores.gradients import gate_gradients
from compress.scores.taps import Taps
from compress.sweep.placement import REFERENCE, Placement
from compress.sweep.stack import Stack, final_states, stack_of

LENGTH = 16
TOKENS = torch.randint(0, 128, (10, LENGTH), generator=torch.Generator().manual_seed(7))
FORMATS = ["fp8", "nvfp4"]


def rows_of(path: Path, place: Placement = REFERENCE, tokens: Tensor = TOKENS, batch: int = 4):
    return contributions(stack_of(open_checkpoint(path), place), tokens, 2, FORMATS, batch=batch)


def hooks(model: nn.Module) -> int:
    """Hooks and replaced forwards that a model has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    found = sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)
    return found + sum("forward" in vars(m) for m in model.modules())


def test_streamed_equals_resident_bit_for_bit(tiny: Path) -> None:
    resident, streamed = rows_of(tiny), rows_of(tiny, Placement(memory=0))
    assert resident.keys() == streamed.keys()
    for key, rows in resident.items():
        assert torch.equal(rows, streamed[key]), key


def test_batches_and_their_order_do_not_matter(tiny: Path) -> None:
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    first = rows_of(tiny, tokens=TOKENS[:6], batch=6)
    second = rows_of(tiny, tokens=TOKENS[:6][order], batch=4)
    for key, rows in first.items():
        squares = rows.square().mean(0)
        torch.testing.assert_close(second[key].square().mean(0), squares, rtol=1e-3, atol=1e-5)


def test_a_wave_of_any_size_gives_the_same(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    # As much as two batches of layer inputs need, so that there are two waves.
    states = checkpoint.architecture.layers + 1 + 2
    memory = 4 * 2 * states * 4 * LENGTH * checkpoint.architecture.hidden * 4
    whole, waves = rows_of(tiny), rows_of(tiny, Placement(memory=memory))
    for key, rows in whole.items():
        assert torch.equal(rows, waves[key]), key


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("memory", [None, 0])
def test_a_killed_scoring_continues(
    memory: int | None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "SAVE_SECONDS", 0)
    stack = stack_of(open_checkpoint(tiny), Placement(memory=memory))
    plain = contributions(stack, TOKENS, 2, FORMATS, batch=4)
    seen: list[int] = []

    def killed(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == total - 1:
            raise Killed

    with pytest.raises(Killed):
        contributions(stack, TOKENS, 2, FORMATS, batch=4, progress=killed, directory=tmp_path)
    assert any(tmp_path.iterdir())
    again: list[int] = []
    found = contributions(
        stack, TOKENS, 2, FORMATS, batch=4,
        progress=lambda done, total: again.append(done), directory=tmp_path,
    )  # fmt: skip
    # A wave that was begun goes on at the layer before the one that was under way.
    assert min(again) > 1
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".safetensors"]
    for key, rows in plain.items():
        assert torch.equal(rows, found[key]), key


def test_errors_of_one_layer_are_alive(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[tuple[int, Any]] = []
    made = Gated.rounding_errors

    def counted(gated: Gated, number: int, *others: Any) -> dict[str, Tensor]:
        found, own = made(gated, number, *others), gated.stack.architecture.blocks[number].layer
        assert {layer for layer, error in alive if error() is not None} <= {own}
        alive.extend((own, weakref.ref(error)) for error in found.values())
        return found

    monkeypatch.setattr(Gated, "rounding_errors", counted)
    stack = stack_of(open_checkpoint(tiny), Placement(memory=0))
    contributions(stack, TOKENS, 2, FORMATS)
    assert {layer for layer, _ in alive} == set(range(stack.layers))


def test_rows_of_bf16_are_near_those_of_fp32(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    upstream = torch.randn(10, LENGTH, checkpoint.architecture.hidden) / 10

    def rows(dtype: torch.dtype) -> dict[str, Tensor]:
        teacher = Gated(stack_of(checkpoint, Placement(dtype=dtype)))
        given = [upstream.to(dtype)]
        [found] = gate_gradients(teacher, Taps(teacher), [TOKENS], FORMATS, lambda *_: given)
        return found

    exact = rows(torch.float32)
    for key, found in rows(torch.bfloat16).items():
        assert found.dtype == torch.float32
        assert (found - exact[key]).norm() < 0.15 * exact[key].norm(), key


def test_labels_are_drawn_from_the_distribution() -> None:
    generator = torch.Generator().manual_seed(3)
    probability = (torch.randn(3, 1000, generator=generator) * 2).softmax(-1)
    probability[:, 400:700] = 0
    uniform = torch.rand(3, 50_000, generator=generator, dtype=torch.float64)
    labels = drawn(probability, uniform)
    share = torch.stack([torch.bincount(row, minlength=1000) for row in labels]) / 50_000
    expected = probability / probability.sum(1, keepdim=True)
    assert (share[:, 400:700] == 0).all()
    # Four standard errors of a share, and a few of the smallest.
    assert ((share - expected).abs() < 4 * (expected / 50_000).sqrt() + 1e-4).all()
    sums = probability.double().cumsum(1)
    assert torch.equal(labels, torch.searchsorted(sums, uniform * sums[:, -1:], right=True))


def test_rounding_hardly_ever_moves_a_label() -> None:
    generator = torch.Generator().manual_seed(3)
    probability = torch.randn(64, 50_000, generator=generator).softmax(-1)
    noise = 1 + 1e-7 * torch.randn(64, 50_000, generator=generator)
    uniform = torch.rand(64, 8, generator=generator, dtype=torch.float64)
    moved = drawn(probability, uniform) != drawn(probability * noise, uniform)
    assert moved.float().mean() < 0.005


def broken(after: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Registering hooks fails after so many; how many there were is in the list."""
    count: list[int] = []

    def failing(register: Callable[..., Any]) -> Callable[..., Any]:
        def registered(module: nn.Module, hook: Any, **options: Any) -> Any:
            count.append(1)
            if len(count) > after:
                raise Killed
            return register(module, hook, **options)

        return registered

    for name in ("register_forward_hook", "register_forward_pre_hook"):
        monkeypatch.setattr(nn.Module, name, failing(getattr(nn.Module, name)))
    return count


def sweep(stack: Stack, keep: dict[str, Tensor]) -> None:
    teacher = Gated(stack, keep)
    given = [torch.ones(10, LENGTH, stack.architecture.hidden)]
    gate_gradients(teacher, Taps(teacher), [TOKENS], FORMATS, lambda *_: given)


def test_no_hook_is_left_behind_wherever_hooking_fails(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = stack_of(open_checkpoint(tiny))
    before, weights = hooks(stack.model), final_states(stack, [TOKENS])[0]
    keep = {"hidden": torch.arange(48)}
    with monkeypatch.context() as patch:
        count = broken(10**6, patch)
        sweep(stack, keep)
    for after in range(0, len(count), 3):
        with monkeypatch.context() as patch:
            broken(after, patch)
            with pytest.raises(Killed):
                sweep(stack, keep)
        assert hooks(stack.model) == before, after
    assert torch.equal(final_states(stack, [TOKENS])[0], weights)


def test_no_hook_is_left_behind_when_a_sweep_fails(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = stack_of(open_checkpoint(tiny))
    before, backward = hooks(stack.model), torch.autograd.grad
    for passes in range(stack.layers + 1):
        left = [passes]

        def killed(*others: Any, left: list[int] = left, **options: Any) -> Any:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return backward(*others, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", killed)
            with pytest.raises(Killed):
                sweep(stack, {})
        assert hooks(stack.model) == before
