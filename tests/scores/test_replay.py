"""A replayed option costs what the student costs; replays stop early and resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, write_tiny
from torch import Tensor
from transformers import PreTrainedModel

from compress.measure.kl import measure, reference
from compress.model.architecture import Architecture, block_name
from compress.model.build import load_model
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.run.score import REPLAY_FORWARDS, replay_rows
from compress.scores import replay
from compress.scores.replay import NEVER, Keep, Stop, Text, option_kl, removal_costs
from compress.student.candidate import Candidate, student_architecture

LENGTH = 16
TOKENS = torch.randint(0, 128, (8, LENGTH), generator=torch.Generator().manual_seed(3))
Teacher = tuple[Checkpoint, PreTrainedModel, Architecture]


@pytest.fixture(scope="module", params=["llama", "hybrid"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    path = write_tiny(
        tmp_path_factory.mktemp("replay") / "m", TINY[request.param], dtype=torch.float32
    )
    checkpoint = open_checkpoint(path)
    return checkpoint, load_model(path), checkpoint.architecture


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


def replayed(
    model: PreTrainedModel, architecture: Architecture, stop: Stop = NEVER, chunk: int = 4
) -> dict[int, dict[str, Tensor]]:
    """KLs of all ``cuts`` by block number."""
    text = Text(model, torch.split(TOKENS, chunk))
    return {
        number: {
            key: option_kl(text, architecture, number, cut, stop) for key, cut in keeps.items()
        }
        for number, keeps in cuts(architecture).items()
    }


def test_a_replayed_option_costs_what_the_student_of_surgery_costs(teacher: Teacher) -> None:
    checkpoint, model, architecture = teacher
    found = replayed(model, architecture)
    text = reference(checkpoint, model, TOKENS)
    everything = list(range(len(architecture.blocks)))
    for number, keeps in cuts(architecture).items():
        prefix = block_name(architecture.blocks[number])
        for key, cut in keeps.items():
            blocks = [n for n in everything if cut is not None or n != number]
            keep = {"blocks": torch.tensor(blocks)}
            keep |= {f"{prefix}/{axis}": index for axis, index in (cut or {}).items()}
            student = student_architecture(architecture, keep, {}, "bf16")
            candidate = Candidate(id="", kind="", architecture=student, keep=keep)
            kl = torch.cat(list(measure(candidate, text)))
            torch.testing.assert_close(found[number][key], kl, rtol=2e-2, atol=1e-5)


def test_chunks_do_not_matter(teacher: Teacher) -> None:
    _, model, architecture = teacher
    some, others = (replayed(model, architecture, chunk=chunk) for chunk in (8, 3))
    for number, found in some.items():
        for key, kl in found.items():
            torch.testing.assert_close(kl, others[number][key], rtol=1e-3, atol=1e-6)


def test_sequences_are_added_until_the_mean_is_known(teacher: Teacher) -> None:
    _, model, architecture = teacher
    whole = replayed(model, architecture, chunk=2)[0]
    assert {len(kl) for kl in whole.values()} == {len(TOKENS)}
    early = replayed(model, architecture, Stop(relative=10.0), chunk=2)[0]
    assert {len(kl) for kl in early.values()} == {4}
    for key, kl in early.items():
        torch.testing.assert_close(kl, whole[key][:4], rtol=1e-3, atol=1e-6)
    # A bound that only some options meet: those stop, the others go on to the limit.
    errors = {key: float(kl[:4].std()) / 2 for key, kl in whole.items()}
    bound = Stop(absolute=min(errors.values()) * 1.001)
    mixed = replayed(model, architecture, bound)[0]
    easiest = min(errors, key=lambda key: errors[key])
    assert len(mixed[easiest]) == 4
    assert max(len(kl) for kl in mixed.values()) == len(TOKENS)


def test_a_killed_replay_continues_with_the_finished_blocks(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, architecture = teacher
    plain = removal_costs(model, architecture, TOKENS)
    assert list(plain) == [block_name(block) for block in architecture.blocks]
    run: list[int] = []

    def killed(text: Text, architecture: Architecture, number: int, *rest: Any) -> Tensor:
        if len(run) == 2:
            raise KeyboardInterrupt
        run.append(number)
        return option_kl(text, architecture, number, *rest)

    monkeypatch.setattr(replay, "option_kl", killed)
    known = tmp_path / "removals.json"
    with pytest.raises(KeyboardInterrupt):
        removal_costs(model, architecture, TOKENS, known=known)
    finished = list(run)
    seen: list[tuple[int, int]] = []

    def counted(text: Text, architecture: Architecture, number: int, *rest: Any) -> Tensor:
        assert number not in finished
        return option_kl(text, architecture, number, *rest)

    monkeypatch.setattr(replay, "option_kl", counted)
    again = removal_costs(
        model, architecture, TOKENS,
        progress=lambda done, total: seen.append((done, total)), known=known,
    )  # fmt: skip
    assert seen[-1] == (len(plain), len(plain))
    assert again == plain


def test_a_dead_layer_costs_nothing_and_ranks_last(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", TINY["llama"])
    model, architecture = load_model(path), open_checkpoint(path).architecture
    model.model.layers[1].mlp.down_proj.weight.zero_()
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    dead = {2, 3}
    for number, costs in replayed(model, architecture).items():
        for kl in costs.values():
            assert (float(kl.mean()) < 1e-6) == (number in dead)


def test_all_replays_cost_no_more_than_their_share(teacher: Teacher) -> None:
    _, _, architecture = teacher
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
