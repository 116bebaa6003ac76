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

from compress.core.files import write_text

OWN = ("choice", "rolling")
CHOICES = 4
CHOICE_ROWS = 200
# Characters of a context and of what follows: the first for which any document is long enough.
CHOICE_SIZES = ((240, 48), (120, 24), (60, 12))
ROLLING_CHARACTERS = 4000
ROLLING_TEXT = 40_000
# Where a word begins (at a single space) and ends; at any character in scripts that put no spaces
# between words: Thai to Tibetan, Burmese, Khmer, Chinese and Japanese.
EDGES = (r"(?<=\S) (?=\S)", r"\S(?!\S)")
UNSPACED_EDGES = (r"(?<=\S)(?=\S)", r"\S")
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]"
)


def make_choice_rows(
    documents: Sequence[str], count: int, seed: int
) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """At most ``count`` rows ``{context, choices, answer}``: what follows, among four pieces.

    All four have the same number of characters and consist of whole words; the three false ones
    begin at random places of ``documents``. Contexts do not overlap. The rows come with the
    characters of context and choice; there are none where the documents are too short for any.
    """
    words = [found for found in map(Words.of, documents) if found.starts]
    for size in CHOICE_SIZES:
        generator = random.Random(seed)
        places = [(number, span) for number, text in enumerate(words) for span in text.spans(*size)]
        generator.shuffle(places)
        found = (choice_row(words, number, span, generator) for number, span in places)
        if rows := list(itertools.islice(filter(None, found), count)):
            break
    return rows, size


@dataclass(frozen=True)
class Words:
    """A text, and where pieces of whole words may begin and end, ascending.

    They begin at single spaces; where most of a text is of scripts without, at any character.
    """

    text: str
    starts: Sequence[int]
    ends: Sequence[int]

    @classmethod
    def of(cls, text: str) -> "Words":
        """The words of a text."""
        unspaced = 2 * len(UNSPACED.findall(text)) > len(text)
        start, end = UNSPACED_EDGES if unspaced else EDGES
        starts = [match.start() for match in re.finditer(start, text)]
        return cls(text, starts, [match.end() for match in re.finditer(end, text)])

    def piece(self, start: int, length: int) -> str | None:
        """So many characters from an edge on, None if they do not end with a word."""
        end = start + length
        return self.text[start:end] if first_from(self.ends, end) == end else None

    def spans(self, context: int, choice: int) -> Iterator[tuple[int, int, int]]:
        """Where context, continuation and rest begin, one row after the other, words kept whole."""
        begin = 0
        while True:
            start = first_from(self.starts, begin + context)
            end = first_from(self.ends, start + choice)
            if end > len(self.text):
                return
            # Text without single spaces for long, or a long word, is no prose.
            if end <= begin + context + 3 * choice:
                yield begin, start, end
            begin = end


def first_from(edges: Sequence[int], position: int) -> int:
    """The first edge at or after a position; beyond every text if there is none."""
    at = bisect_left(edges, position)
    return edges[at] if at < len(edges) else sys.maxsize


def choice_row(
    documents: Sequence[Words], number: int, span: tuple[int, int, int], generator: random.Random
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
            context = words.text[begin:start].strip()
            return {"context": context, "choices": choices, "answer": answer}
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
    directory: Path, documents: Sequence[str], tasks: Sequence[str], seed: int
) -> tuple[dict[str, Path], list[str]]:
    """Write rows of those of our own tasks that are among ``tasks``, from held-out ``documents``.

    Returns their files by task name, without ``choice`` where no document is long enough, and what
    a reader must know of the rows.
    """
    rows: dict[str, Sequence[Mapping[str, Any]]] = {}
    notes = []
    if "choice" in tasks:
        found, (context, choice) = make_choice_rows(documents, CHOICE_ROWS, seed)
        size = f"{context} characters of prose and {choice} that follow"
        if found:
            rows["choice"] = found
        else:
            notes.append(f"task choice is left out: no held-out document has {size}")
        if found and (context, choice) != CHOICE_SIZES[0]:
            notes.append(f"task choice asks after {size}: held-out documents are short")
    if "rolling" in tasks:
        rows["rolling"] = make_rolling_rows(documents, ROLLING_TEXT, seed)
    for task, lines in rows.items():
        write_text(directory / f"{task}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return {task: directory / f"{task}.jsonl" for task in rows}, notes
