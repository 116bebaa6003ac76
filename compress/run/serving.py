"""How fast readers serve models on this machine, side by side."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.core.errors import InputError
from compress.core.quantities import format_bytes
from compress.core.terminal import note, progress, table
from compress.export.layouts.gguf import FILE, write_gguf
from compress.export.layouts.student import Weight
from compress.export.readers import Reader
from compress.export.readers.table import timed
from compress.export.student import student_of
from compress.memory.latency import Profile
from compress.model.architecture import Architecture
from compress.model.checkpoint import open_checkpoint
from compress.model.config import architecture_of, read_config
from compress.model.families import stored_parameters

# Tokens of a prompt and after it; rounds in which all models take turns, prompts of each a round.
PROMPT, GENERATE, ROUNDS, REPEATS = 128, 32, 3, 3
# Of all timings: what else runs on the machine makes some longer, none shorter.
QUANTILE = 0.25


@dataclass(frozen=True)
class Speed:
    """How a reader serves a model: tokens a second of a prompt and after it, and its peak.

    ``predicted`` are the first two as a profile has them, if one is given.
    """

    model: str
    reader: str
    prompt: float
    generation: float
    peak_bytes: int
    predicted: tuple[float, float] | None = None


def bench(
    models: Sequence[Path],
    reader: Reader,
    python: Path | None,
    profile: Profile | None = None,
    device: str = "cpu",
) -> list[Speed]:
    """Every model as a reader serves it, one request at a time; models take turns.

    A directory without a GGUF file is written as one, in BF16, for llama.cpp.

    Raises:
        InputError: the reader is not there, or ours.
        VerificationFailed: it does not load a model.
    """
    if reader == "compress":
        raise InputError("compress is no server; --reader is transformers, llama.cpp or vllm")
    architectures = [architecture_of(model, read_config(model)) for model in models]
    vocab = min(architecture.vocab for architecture in architectures)
    predicted = [None if profile is None else rates(profile, each) for each in architectures]
    tokens = torch.randint(vocab, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    answers: list[list[Any]] = [[] for _ in models]
    with progress("bench", ROUNDS * len(models)) as advance, readable(models, reader) as folders:
        for _ in range(ROUNDS):
            for folder, found in zip(folders, answers, strict=True):
                found.append(timed(reader, folder, tokens, GENERATE, REPEATS, python, device))
                advance(1, folder.name)
    return [speed(*each) for each in zip(models, answers, predicted, strict=True)]


def rates(profile: Profile, architecture: Architecture) -> tuple[float, float]:
    """Tokens a second of a prompt and after it, by a profile."""
    seconds = profile.model(architecture)
    return profile.prompt_tokens / seconds.prompt, 1 / seconds.token


def speed(model: Path, answers: Sequence[Any], predicted: tuple[float, float] | None) -> Speed:
    """What the answers of all rounds say of a model."""

    def seconds(key: str) -> float:
        return float(np.quantile([each for answer in answers for each in answer[key]], QUANTILE))

    return Speed(
        model=str(model), reader=answers[0]["reader"], prompt=PROMPT / seconds("prompt_seconds"),
        generation=1 / seconds("token_seconds"),
        peak_bytes=max(answer["peak_bytes"] for answer in answers), predicted=predicted,
    )  # fmt: skip


@contextmanager
def readable(models: Sequence[Path], reader: Reader) -> Iterator[list[Path]]:
    """The directories that a reader loads."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, model in enumerate(models):
            if reader != "llama.cpp" or (model / FILE).is_file():
                found.append(model)
                continue
            found.append(Path(folder, str(number)))
            found[-1].mkdir()
            checkpoint = open_checkpoint(model)
            weights = (
                Weight(each.name, "bf16", (checkpoint[each.name],))
                for each in stored_parameters(checkpoint.architecture)
            )
            student = student_of(checkpoint.config, model, weights, checkpoint.architecture)
            write_gguf(student, found[-1])
        yield found


def print_speeds(speeds: Sequence[Speed]) -> None:
    """A table of every model, each against the first."""
    first = speeds[0]
    columns = ["model", "prompt tokens/s", "", "generated tokens/s", "", "peak memory", ""]
    table(
        f"{first.reader}: a prompt of {PROMPT} tokens, {GENERATE} after it, one request at a time",
        columns,
        [
            [
                each.model,
                f"{each.prompt:.1f}", f"{each.prompt / first.prompt:.2f}x",
                f"{each.generation:.1f}", f"{each.generation / first.generation:.2f}x",
                format_bytes(each.peak_bytes), f"{each.peak_bytes / first.peak_bytes:.2f}x",
            ]
            for each in speeds
        ],
    )  # fmt: skip
    for each in speeds:
        if each.predicted is not None:
            prompt, generation = each.predicted
            note(
                f"{each.model}: the profile predicts {prompt:.1f} and {generation:.1f} tokens/s, "
                f"{prompt / each.prompt:.2f} and {generation / each.generation:.2f} of the measured"
            )
