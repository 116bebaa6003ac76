"""Tasks of our own for lm-eval (``evals/tasks``): their rows, made from held-out text.

The rows are what a run judges its students on when no benchmark is at hand: the same text that the
teacher has not seen, the same rows for every model.
"""

import itertools
import json
import random
import re
import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.core.files import write_text

CHOICES = 4
CONTEXT_CHARACTERS = 240
CHOICE_CHARACTERS = 48
ROLLING_CHARACTERS = 4000


def make_choice_rows(documents: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """At most ``count`` rows ``{context, choices, answer}``: what follows, among four pieces.

    All four have the same number of characters and consist of whole words; the three false ones
    begin at random places of ``documents``. Contexts do not overlap.

    Raises:
        InputError: the documents are too short for a single row.
    """
    generator = random.Random(seed)
    words = [found for found in map(Words.of, documents) if found.starts]
    places = [(number, span) for number, text in enumerate(words) for span in text.spans()]
    generator.shuffle(places)
    found = (choice_row(words, number, span, generator) for number, span in places)
    rows = list(itertools.islice(filter(None, found), count))
    if not rows:
        raise InputError(
            "the held-out text is too short for the task choice: no document of it has "
            f"{CONTEXT_CHARACTERS} characters of prose and what follows; give more text"
        )
    return rows


@dataclass(frozen=True)
class Words:
    """A text, and where pieces of whole words may begin (at single spaces) and end, ascending."""

    text: str
    starts: Sequence[int]
    ends: Sequence[int]

    @classmethod
    def of(cls, text: str) -> "Words":
        """The words of a text."""
        starts = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", text)]
        return cls(text, starts, [match.end() for match in re.finditer(r"\S+", text)])

    def piece(self, start: int, length: int) -> str | None:
        """So many characters from an edge on, None if they do not end with a word."""
        end = start + length
        return self.text[start:end] if first_from(self.ends, end) == end else None

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Where context, continuation and rest begin, one row after the other, words kept whole."""
        begin = 0
        while True:
            start = first_from(self.starts, begin + CONTEXT_CHARACTERS)
            end = first_from(self.ends, start + CHOICE_CHARACTERS)
            if end > len(self.text):
                return
            # Text without single spaces for long, or a long word, is no prose.
            if end <= begin + CONTEXT_CHARACTERS + 3 * CHOICE_CHARACTERS:
                yield begin, start, end
            begin = end


def first_from(edges: Sequence[int], position: int) -> int:
    """The first edge at or after a position; beyond every text if there is none."""
    at = bisect_left(edges, position)
    return edges[at] if at < len(edges) else sys.maxsize


def choice_row(
    documents: Sequence[Words],
    number: int,
    span: tuple[int, int, int],
    generator: random.Random,
) -> dict[str, Any] | None:
    """The row of one span; None if three other pieces of its length are not found."""
    words = documents[number]
    begin, start, end = span
    length = end - start
    choices = [words.text[start:end]]
    for _ in range(100 * CHOICES):
        other = generator.choice(documents)
        at = generator.choice(other.starts)
        piece = other.piece(at, length)
        overlaps = other is words and begin - length < at < end
        if piece is not None and not overlaps and piece not in choices:
            choices.append(piece)
        if len(choices) == CHOICES:
            answer = generator.randrange(CHOICES)
            choices.insert(answer, choices.pop(0))
            return {
                "context": words.text[begin:start].strip(),
                "choices": choices,
                "answer": answer,
            }
    return None


def make_rolling_rows(documents: Sequence[str], characters: int, seed: int) -> list[dict[str, str]]:
    """Rows ``{text}`` from random places, ``characters`` in all, or all text if it has fewer.

    Pieces of ``ROLLING_CHARACTERS`` rather than documents, so that a few long documents still give
    a standard error.
    """
    pieces = [
        text[start : start + ROLLING_CHARACTERS]
        for text in documents
        for start in range(0, len(text), ROLLING_CHARACTERS)
    ]
    random.Random(seed).shuffle(pieces)
    rows: list[dict[str, str]] = []
    for piece in filter(str.strip, pieces):
        if characters > 0:
            rows.append({"text": piece[:characters]})
            characters -= len(piece)
    return rows


def write_task_rows(
    directory: Path, documents: Sequence[str], count: int, characters: int, seed: int
) -> dict[str, Path]:
    """Write the rows of our own tasks from held-out ``documents``; their files by task name."""
    rows: dict[str, Sequence[Mapping[str, Any]]] = {
        "choice": make_choice_rows(documents, count, seed),
        "rolling": make_rolling_rows(documents, characters, seed),
    }
    for task, lines in rows.items():
        write_text(directory / f"{task}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return {task: directory / f"{task}.jsonl" for task in rows}
