"""A profile of this machine: what blocks of a model take in a reader, by kind, size and format.

Timed are students of random weights in the reader's own layout: one that has the first block of
each kind, and one with so many more of the block in question, whose difference is theirs. Their
vocabulary is small. With the whole one it is the first that tells what is outside the blocks: all
but what these take.
"""

import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.core.terminal import progress
from compress.export.accepted import reason
from compress.export.layouts.student import Weight, weight_specs
from compress.export.layouts.table import layout_of
from compress.export.readers import Reader
from compress.export.readers.table import timed
from compress.export.student import student_of
from compress.export.targets import Target, loader_of
from compress.formats.table import Format, by_group
from compress.memory.latency import OUTSIDE, Profile, Sample, group_weights, outside_weights
from compress.model.architecture import Architecture, Block
from compress.model.config import architecture_of, read_config
from compress.model.families import in_one_format
from compress.run.serving import GENERATE, PROMPT, QUANTILE, REPEATS
from compress.searches.space import counts
from compress.student.units import axes_in

# Tokens of a vocabulary that takes no time, and blocks more than one.
VOCAB, MORE = 1024, 8
# The axis of a block that is cut.
MAIN = {"attention": "kv_head", "ffn": "ffn", "moe": "expert_ffn", "mamba": "head"}
# Rounds in which all take turns, and shares of an axis that are measured besides all of it.
ROUNDS, SHARES = 2, (0.5, 0.125)


KEYS = ("prompt_seconds", "token_seconds")


@dataclass(frozen=True)
class Timed:
    """A student to time: the kind, format and weights of what it is for."""

    kind: str
    format: Format
    weights: int
    architecture: Architecture


def profile(model: Path, reader: Reader, python: Path | None, formats: Sequence[Format]) -> Profile:
    """Time a reader on blocks of a model's family, in all formats that it loads or in these.

    Raises:
        InputError: the reader takes no students with other blocks than the model's.
    """
    if reader == "compress":
        raise InputError("compress is no server; --reader is transformers, llama.cpp or vllm")
    target: Target = reader
    config = read_config(model)
    architecture = architecture_of(model, config)
    loader = loader_of(target, architecture.family)
    wanted = tuple(formats) or loader.formats
    students = list(students_of(architecture, wanted, loader.tied_formats))
    for student in students:
        if (refused := reason(student.architecture, loader)) is not None:
            raise InputError(f"{reader} cannot be profiled block by block: it takes {refused}")
    found: list[list[dict[str, list[float]]]] = [[] for _ in students]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (PROMPT,), generator=generator).tolist()
    with (
        progress(f"profile: {reader}", (ROUNDS + 1) * len(students)) as advance,
        tempfile.TemporaryDirectory() as folder,
    ):
        for number, student in enumerate(students):
            directory = Path(folder, str(number))
            directory.mkdir()
            weights = drawn(student.architecture)
            own = {**config, "vocab_size": student.architecture.vocab}
            written = student_of(own, model, weights, student.architecture)
            layout_of(target, student.architecture)(written, directory)
            advance(1, f"{student.kind} in {student.format}")
        for _ in range(ROUNDS):
            for number, student in enumerate(students):
                directory = Path(folder, str(number))
                found[number].append(
                    timed(reader, directory, tokens, GENERATE, REPEATS, python, "cpu")
                )
                advance(1, f"{student.kind} in {student.format}")
    seconds = [
        [low([x for answer in answers for x in answer[key]]) for key in KEYS] for answers in found
    ]
    samples = samples_of(students, seconds)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return Profile(
        reader=reader, machine=machine, family=architecture.family, prompt_tokens=PROMPT,
        samples=tuple(samples),
    )  # fmt: skip


def low(values: Sequence[float]) -> float:
    """A low quantile of timings."""
    return float(np.quantile(values, QUANTILE))


def samples_of(students: Sequence[Timed], seconds: Sequence[Sequence[float]]) -> list[Sample]:
    """What the students say of blocks, against the first of them, and of what is outside."""
    least, found = seconds[0], list[Sample]()
    for student, own in zip(students[1:], seconds[1:], strict=True):
        if student.kind == OUTSIDE:
            # Its blocks are the first ones in BF16, which were the first samples of their kinds.
            first = {each.kind: each for each in reversed(found) if each.kind != OUTSIDE}
            blocks = (
                sum(getattr(first[b.kind], key) for b in student.architecture.blocks)
                for key in KEYS
            )
            prompt, token = (max(0.0, a - b) for a, b in zip(own, blocks, strict=True))
        else:
            prompt, token = (max(0.0, a - b) / MORE for a, b in zip(own, least, strict=True))
        found.append(
            Sample(
                kind=student.kind, format=student.format, weights=student.weights,
                prompt_seconds=prompt, token_seconds=token,
            )
        )  # fmt: skip
    return found


def students_of(
    architecture: Architecture, formats: Sequence[Format], outside: Sequence[Format]
) -> Iterator[Timed]:
    """The students to time: the least, of each kind the whole in BF16, then others, outside."""
    family = architecture.family
    first = {block.kind: block for block in reversed(architecture.blocks)}
    kept = sorted(first.values(), key=architecture.blocks.index)
    places = {layer: n for n, layer in enumerate(dict.fromkeys(b.layer for b in kept))}
    base = tuple(replace(b, layer=places[b.layer], formats=()) for b in kept)
    least = replace(architecture, vocab=VOCAB, blocks=base, mtp=(), outside_formats=())
    yield Timed("least", "bf16", 0, least)
    ordered: list[Format] = ["bf16", *(each for each in formats if each != "bf16")]
    for block in base:
        for size in sizes_of(block):
            for format in ordered:
                own = replace(size, formats=in_one_format(size, family, format))
                more = tuple(replace(own, layer=len(places) + n) for n in range(MORE))
                weights = sum(group_weights(own, architecture.hidden, family).values())
                yield Timed(block.kind, format, weights, replace(least, blocks=base + more))
    weights = list(outside_weights(architecture).values())[-1]
    groups = list(outside_weights(architecture))[-1:]
    for format in [each for each in ordered if each in ("bf16", *outside)]:
        named = by_group({group: format for group in groups})
        whole = replace(least, vocab=architecture.vocab, outside_formats=named)
        yield Timed(OUTSIDE, format, weights, whole)


def sizes_of(block: Block) -> Iterator[Block]:
    """A block as it is and cut along the axis that its weights are proportional to."""
    yield block
    axis = MAIN.get(block.kind)
    for share in SHARES if axis in axes_in(block) else ():
        assert axis is not None
        cut: Any = {axis: counts(axis, getattr(block, axis), (share,))[-1]}
        yield replace(block, **cut)


def drawn(architecture: Architecture) -> Iterator[Weight]:
    """Random weights of a student, as they are stored; scales are one number."""
    generator = torch.Generator().manual_seed(0)

    def random(part: Tensor, number: int) -> Tensor:
        if number:
            one = 120 if part.dtype == torch.uint8 else 1e-2  # E8M0 is an exponent
            return torch.full(part.shape, one, dtype=torch.float32).to(part.dtype)
        if part.is_floating_point():
            return (torch.randn(part.shape, generator=generator) / 50).to(part.dtype)
        return torch.randint(0, 127, part.shape, generator=generator).to(part.dtype)

    for spec in weight_specs(architecture):
        yield replace(spec, parts=tuple(random(p, n) for n, p in enumerate(spec.parts)))
