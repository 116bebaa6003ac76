"""A replayed option costs what the student costs; replays stop early and resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, write_tiny
from torch import Tensor

from compress.measure.kl import measure, reference
from compress.model.architecture import Architecture, block_name
from compress.model.build import load_model
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.model.modules import final_hidden
from compress.run.score import REPLAY_FORWARDS, replay_rows
from compress.scores import replay
from compress.scores.replay import NEVER, Keep, Stop, removal_costs, replayed, variant
from compress.student.candidate import Candidate, student_architecture
from compress.sweep.placement import Placement
from compress.sweep.stack import Stack, stack_of
from teachers import stack_with

LENGTH = 16
TOKENS = torch.randint(0, 128, (8, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["llama", "hybrid"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = write_tiny(
        tmp_path_factory.mktemp("replay") / "m", TINY[request.param], dtype=torch.float32
    )
    return open_checkpoint(path)


def cuts(architecture: Architecture) -> dict[int, dict[str, Keep]]:
    """A removal and a cut along every axis that is a mask, of every block."""
    options: dict[int, dict[str, Keep]] = {}
    for number, block in enumerate(architecture.blocks):
        found: dict[str, dict[str, Tensor]] = {
            "attention": {
                "kv_head": {"kv_head": torch.tensor([1])},
                "query": {"query": torch.tensor([[0], [1]])},
            },
            "ffn": {"ffn": {"ffn": torch.arange(0, 96, 2)}},
            "moe": {
                "shared_ffn": {"shared_ffn": torch.arange(16)},
                "expert": {"expert": torch.tensor([0, 2, 3, 5])},
            },
            "mamba": {
                "head": {"head": torch.tensor([[0, 2], [1, 3]])},
                "channel": {"channel": torch.arange(0, 16, 4)},
            },
        }[block.kind]
        options[number] = {"removed": None, **found}
    return options


def all_replayed(stack: Stack, stop: Stop = NEVER) -> dict[tuple[int, str], Tensor]:
    """KLs of all ``cuts`` by block number and name."""
    options = {
        (number, key): cut
        for number, keeps in cuts(stack.architecture).items()
        for key, cut in keeps.items()
    }
    variants = {f"{n} {key}": variant(stack, n, cut) for (n, key), cut in options.items()}
    found = replayed(stack, TOKENS, variants, stop)
    assert list(found) == list(variants)
    return dict(zip(options, found.values(), strict=True))


def test_a_replayed_option_costs_what_the_student_of_surgery_costs(teacher: Checkpoint) -> None:
    architecture = teacher.architecture
    found = all_replayed(stack_of(teacher))
    text = reference(teacher, stack_of(teacher), TOKENS)
    everything = list(range(len(architecture.blocks)))
    for number, keeps in cuts(architecture).items():
        prefix = block_name(architecture.blocks[number])
        for key, cut in keeps.items():
            blocks = [n for n in everything if cut is not None or n != number]
            keep = {"blocks": torch.tensor(blocks)}
            keep |= {f"{prefix}/{axis}": index for axis, index in (cut or {}).items()}
            student = student_architecture(architecture, keep, {}, {})
            candidate = Candidate(id="", kind="", architecture=student, keep=keep)
            kl = torch.cat(list(measure(candidate, text)))
            torch.testing.assert_close(found[number, key], kl, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("memory", [0, 300_000])
def test_streamed_costs_what_resident_does(teacher: Checkpoint, memory: int) -> None:
    resident = all_replayed(stack_of(teacher))
    # Without memory every variant has a sweep of its own.
    streamed = all_replayed(stack_of(teacher, Placement(memory=memory)))
    for key, kl in resident.items():
        assert torch.equal(streamed[key], kl), key


def test_bf16_agrees_within_a_few_percent(teacher: Checkpoint) -> None:
    exact = all_replayed(stack_of(teacher))
    found = all_replayed(stack_of(teacher, Placement(dtype=torch.bfloat16)))
    for key, kl in exact.items():
        # A sequence whose tokens go to other experts differs more than the mean.
        torch.testing.assert_close(found[key], kl, rtol=0.15, atol=1e-3)
        torch.testing.assert_close(found[key].mean(), kl.mean(), rtol=0.03, atol=1e-3)


def test_a_variant_leaves_the_teacher_as_it_was(teacher: Checkpoint) -> None:
    stack, model = stack_of(teacher), load_model(teacher.path)
    all_replayed(stack)
    assert torch.equal(final_hidden(stack.model, TOKENS), final_hidden(model, TOKENS))


def test_sequences_are_added_until_the_mean_is_known(teacher: Checkpoint) -> None:
    stack = stack_of(teacher)
    whole = all_replayed(stack)
    assert {len(kl) for kl in whole.values()} == {len(TOKENS)}
    early = all_replayed(stack, Stop(relative=10.0))
    assert {len(kl) for kl in early.values()} == {4}
    for key, kl in early.items():
        assert torch.equal(kl, whole[key][:4])
    # A bound that only some options meet: those stop, the others go on to the limit.
    errors = {key: float(kl[:4].std()) / 2 for key, kl in whole.items()}
    mixed = all_replayed(stack, Stop(absolute=min(errors.values()) * 1.001))
    easiest = min(errors, key=lambda key: errors[key])
    assert len(mixed[easiest]) == 4
    assert max(len(kl) for kl in mixed.values()) == len(TOKENS)


def test_a_killed_replay_continues_with_the_finished_sweeps(
    teacher: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, sweep, run = stack_of(teacher, Placement(memory=400_000)), replay.sweep, []
    plain = removal_costs(stack, TOKENS)
    assert list(plain) == [block_name(block) for block in teacher.architecture.blocks]
    monkeypatch.setattr(replay, "in_flight", lambda stack, ids: 4)

    def killed(*given: Any) -> dict[str, Tensor]:
        if len(run) == 3:
            raise KeyboardInterrupt
        run.append(given[2].keys())
        return sweep(*given)

    monkeypatch.setattr(replay, "sweep", killed)
    known = tmp_path / "replays.json"
    with pytest.raises(KeyboardInterrupt):
        removal_costs(stack, TOKENS, known=known)
    finished, seen = len(run), list[tuple[int, int]]()

    def counted(*given: Any) -> dict[str, Tensor]:
        run.append(given[2].keys())
        return sweep(*given)

    monkeypatch.setattr(replay, "sweep", counted)
    again = removal_costs(
        stack, TOKENS, progress=lambda done, total: seen.append((done, total)), known=known
    )
    assert again == plain
    # Nothing ran twice: two chunks of every block.
    assert sorted(name for names in run for name in names) == sorted([*plain, *plain])
    assert len(run) > finished
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_dead_layer_costs_nothing_and_ranks_last(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "m", TINY["llama"]))
    model = load_model(checkpoint.path)
    model.model.layers[1].mlp.down_proj.weight.zero_()
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    dead = {2, 3}
    for (number, _), kl in all_replayed(stack_with(checkpoint, model)).items():
        assert (float(kl.mean()) < 1e-6) == (number in dead)


def test_all_replays_cost_no_more_than_their_share(teacher: Checkpoint) -> None:
    architecture = teacher.architecture
    # As many layers as a deep model has.
    deep = replace(
        architecture,
        blocks=tuple(
            replace(block, layer=block.layer + n * architecture.layers)
            for n in range(20)
            for block in architecture.blocks
        ),
    )
    forwards = sum(1 - block.layer / deep.layers for block in deep.blocks)
    many = torch.zeros(10_000, LENGTH)
    taken = replay_rows(deep, many, tokens=10_000 * LENGTH)
    assert REPLAY_FORWARDS - forwards / len(many) < taken * forwards / len(many) <= REPLAY_FORWARDS
    assert replay_rows(deep, many, tokens=5 * LENGTH) == 5
    least = replay_rows(deep, many[:1], tokens=10_000 * LENGTH)
    assert least == max(4, int(REPLAY_FORWARDS / forwards))
