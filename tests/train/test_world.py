"""Two processes are one to rounding, and what one began any number continues."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import SERVER
from safetensors.torch import load_file
from test_distill import SETTINGS, quiet, taught, tokens
from test_pretrain import recipe
from tiny_models import TINY, write_tiny
from torch import Tensor

from compress.cli import run_command
from compress.core.errors import InputError
from compress.model.build import load_model
from compress.train.distill import distill
from compress.train.pretrain import pretrain
from compress.train.world import World, world

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def begin(rank: int, size: int, nodes: int, port: int, target: Any, given: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size // nodes),
        "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    target(*given)


def together(size: int, target: Callable[..., None], *given: Any, nodes: int = 1) -> list[int]:
    """Exit codes of so many processes that run a function of a test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        SERVER.Process(target=begin, args=(rank, size, nodes, port, target, given))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def teach(teacher: Path, student: Path, out: Path, stop: int = 0) -> None:
    """Distil a student; the first process writes what it became."""
    found = load_model(student)

    def progress(done: int, steps: int, figures: dict[str, float]) -> None:
        if done == stop and world().leads:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        curve = distill(
            taught(teacher, tokens()), found, tokens(), SETTINGS, directory=out, progress=progress
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if world().leads:
        weights = {name: weight.clone() for name, weight in found.state_dict().items()}
        torch.save([weights, [point.loss for point in curve]], out / "found.pt")


def found_in(out: Path) -> tuple[dict[str, Tensor], list[float]]:
    weights, losses = torch.load(out / "found.pt")
    return weights, losses


@pytest.fixture(scope="module")
def hybrid_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("pair")
    return write_tiny(home / "teacher", TINY["hybrid"], 0), write_tiny(
        home / "s", TINY["hybrid"], 1
    )


def test_two_processes_distil_as_one_which_goes_on_alone(
    tmp_path: Path, hybrid_pair: tuple[Path, Path]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    teach(*hybrid_pair, one)
    assert together(2, teach, *hybrid_pair, two, 2) == [130, 130]
    assert [file.name for file in sorted(two.glob("training-*"))] == [
        "training-0000002.safetensors", "training-0000003.safetensors"
    ]  # fmt: skip
    teach(*hybrid_pair, two)
    (weights, losses), (others, same) = found_in(one), found_in(two)
    assert losses == pytest.approx(same, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, **CLOSE)


def command(*arguments: str) -> None:
    raise SystemExit(run_command(list(arguments)))


def test_two_processes_distil_a_candidate_of_a_run(run_copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_copy, other)
    given = ("--distill-tokens", "256", "--distill-length", "16", "--distill-batch-tokens", "64")
    run_command(["distill", str(run_copy), *given])
    assert together(2, command, "distill", str(other), *given) == [0, 0]
    [one] = run_copy.glob("distill/*[0-9]/curve.jsonl")
    points, others = (
        [json.loads(line)["loss"] for line in (run / one.relative_to(run_copy)).open()]
        for run in (run_copy, other)
    )
    assert len(points) == 4
    assert points == pytest.approx(others, rel=1e-4)


def test_two_nodes_pretrain_as_one_process(tmp_path: Path) -> None:
    path, one, two = recipe(tmp_path), tmp_path / "one", tmp_path / "two"
    metrics = pretrain(path, one, progress=quiet)
    assert together(2, command, "pretrain", str(path), "--out", str(two), nodes=2) == [0, 0]
    assert json.loads((two / "metrics.json").read_text()) == pytest.approx(metrics, rel=1e-3)
    weights, others = (load_file(out / "model.safetensors") for out in (one, two))
    for name, weight in weights.items():
        # A rounding of BF16 apart at most.
        torch.testing.assert_close(others[name], weight, rtol=2**-7, atol=1e-4)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="3 rows does not divide among 2 processes"):
        World(size=2).require(3, "adamw")
    with pytest.raises(InputError, match="adamw8bit is of one process"):
        World(size=2).require(4, "adamw8bit")
