"""A replayed option costs what the masked model costs; replays stop early and resume."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import TINY, write_tiny
from torch import Tensor
from transformers import PreTrainedModel

from compress import replay
from compress.architecture import Architecture, block_name
from compress.candidate import Candidate, student_architecture
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.losses import kl_from_hidden
from compress.model import load_model
from compress.replay import NEVER, Keep, Stop, option_costs
from compress.searches.measure import measure, reference

LENGTH = 16
TOKENS = torch.randint(0, 128, (8, LENGTH), generator=torch.Generator().manual_seed(3))
Teacher = tuple[Checkpoint, PreTrainedModel, Architecture]


@pytest.fixture(scope="module", params=["llama", "hybrid"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    path = write_tiny(tmp_path_factory.mktemp("replay") / "m", TINY[request.param], dtype=torch.float32)
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
            "moe": {"shared_ffn": {"shared_ffn": torch.arange(16)}},
            "mamba": {
                "head": {"head": torch.tensor([[0, 2], [1, 3]])},
                "channel": {"channel": torch.arange(0, 16, 4)},
            },
        }[block.kind]
        options[number] = {"removed": None, **found}
    return options


def test_a_replayed_option_costs_what_the_student_of_surgery_costs(teacher: Teacher) -> None:
    checkpoint, model, architecture = teacher
    options = cuts(architecture)
    found = option_costs(model, architecture, TOKENS, options)
    text = reference(checkpoint, model, TOKENS)
    everything = list(range(len(architecture.blocks)))
    for number, keeps in options.items():
        prefix = block_name(architecture.blocks[number])
        for key, cut in keeps.items():
            blocks = [n for n in everything if cut is not None or n != number]
            keep = {"blocks": torch.tensor(blocks)}
            keep |= {f"{prefix}/{axis}": index for axis, index in (cut or {}).items()}
            student = student_architecture(architecture, keep, {}, "bf16")
            kl = torch.cat(list(measure(Candidate(id="", kind="", architecture=student, keep=keep), text)))
            torch.testing.assert_close(found[number][key], kl, rtol=2e-2, atol=1e-5)


def test_stacking_and_chunks_do_not_matter(teacher: Teacher) -> None:
    _, model, architecture = teacher
    options = cuts(architecture)
    together = option_costs(model, architecture, TOKENS, options, chunk=8)
    for number, keeps in options.items():
        for key, keep in keeps.items():
            alone = option_costs(model, architecture, TOKENS, {number: {key: keep}}, chunk=3)
            torch.testing.assert_close(
                together[number][key], alone[number][key], rtol=1e-3, atol=1e-6
            )
