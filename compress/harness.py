"""Tasks of our own for lm-eval (``evals/tasks``): their rows, made from held-out text.

The rows are what a run judges its students on when no benchmark is at hand: the same text that the
teacher has not seen, the same rows for every model.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import InputError
from compress.runs import write_text

CHOICES = 4
CONTEXT_CHARACTERS = 240
CHOICE_CHARACTERS = 48
ROLLING_CHARACTERS = 4000


def make_choice_rows(documents: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Rows ``{context, choices, answer}``: what follows the context, among four pieces of text.

    All four have the same number of characters and consist of whole words; the three false ones
    begin at random places of ``documents``. Contexts do not overlap.

    Raises:
        InputError: the documents give fewer than ``count`` contexts.
    """
    generator = random.Random(seed)
    span = CONTEXT_CHARACTERS + 2 * CHOICE_CHARACTERS
    places = [
        (number, start)
        for number, text in enumerate(documents)
        for start in range(0, len(text) - span + 1, span)
    ]
    generator.shuffle(places)
    words = [WordEdges.of(text) for text in documents]
    long_enough = [number for number, text in enumerate(documents) if len(text) >= span]
    rows: list[dict[str, Any]] = []
    for number, start in places:
        if len(rows) == count:
            break
        row = choice_row(documents, words, long_enough, (number, start), generator)
        rows += [row] if row else []
    if len(rows) < count:
        raise InputError(
            f"{count} choice rows were asked for, but the held-out text gives only {len(rows)} "
            f"contexts of {span} characters; give more text or ask for fewer"
        )
    return rows


@dataclass(frozen=True)
class WordEdges:
    """Where pieces of whole words may begin (at single spaces) and end, by character."""

    starts: Sequence[int]
    ends: frozenset[int]

    @classmethod
    def of(cls, text: str) -> "WordEdges":
        """The edges of a text."""
        starts = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", text)]
        ends = frozenset(match.end() for match in re.finditer(r"\S+", text))
        return cls(starts, ends)


def choice_row(
    documents: Sequence[str],
    words: Sequence[WordEdges],
    others: Sequence[int],
    place: tuple[int, int],
    generator: random.Random,
) -> dict[str, Any] | None:
    """The row of one place; None if no piece of whole words with three equals begins there."""
    number, begin = place
    text, edges = documents[number], words[number]
    after = begin + CONTEXT_CHARACTERS
    start = next((s for s in edges.starts if after <= s < after + CHOICE_CHARACTERS // 2), None)
    if start is None:
        return None
    end = min((e for e in edges.ends if e >= start + CHOICE_CHARACTERS), default=None)
    if end is None or end > begin + CONTEXT_CHARACTERS + 2 * CHOICE_CHARACTERS:
        return None
    length, true = end - start, text[start:end]
    false: list[str] = []
    for _ in range(50 * CHOICES):
        other = generator.choice(others)
        if not words[other].starts:
            continue
        at = generator.choice(words[other].starts)
        piece = documents[other][at : at + length]
        overlaps = other == number and at < end and at + length > begin
        if at + length in words[other].ends and not overlaps and piece not in (true, *false):
            false.append(piece)
        if len(false) == CHOICES - 1:
            answer = generator.randrange(CHOICES)
            choices = [*false[:answer], true, *false[answer:]]
            return {"context": text[begin:start].lstrip(), "choices": choices, "answer": answer}
    return None


def make_rolling_rows(documents: Sequence[str], characters: int) -> list[dict[str, str]]:
    """Rows ``{text}`` of at most ``ROLLING_CHARACTERS``, in order, ``characters`` in all at most.

    Pieces rather than documents, so that a few long documents still give a standard error.
    """
    rows: list[dict[str, str]] = []
    for text in documents:
        for start in range(0, len(text), ROLLING_CHARACTERS):
            piece = text[start : min(start + ROLLING_CHARACTERS, start + characters)]
            if piece.strip():
                rows.append({"text": piece})
                characters -= len(piece)
    return rows


def write_task_rows(
    directory: Path, documents: Sequence[str], count: int, characters: int, seed: int
) -> dict[str, Path]:
    """Write the rows of our own tasks from held-out ``documents``; their files by task name."""
    rows: dict[str, Sequence[Mapping[str, Any]]] = {
        "choice": make_choice_rows(documents, count, seed),
        "rolling": make_rolling_rows(documents, characters),
    }
    for task, lines in rows.items():
        write_text(directory / f"{task}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return {task: directory / f"{task}.jsonl" for task in rows}
