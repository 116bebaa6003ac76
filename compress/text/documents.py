"""Documents: the texts of a source, and what of it cannot be used."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.core.terminal import note
from compress.text.embedded import embedded_documents
from compress.text.sources import Fault, read_file, text_files

# JSON may hold halves of a UTF-16 pair ("\ud800"), which no encoding and no tokenizer takes.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Rows that are named where some cannot be used, and characters of what is said of each.
NAMED, SAID = 3, 160
# Messages of a chat as one text; ValueError where they make none.
Render = Callable[[list[Any]], str]


def no_template(_: list[Any]) -> str:
    """Refuses messages where there is no tokenizer to render them."""
    raise InputError("messages need a chat template; here every row needs a text")


def read_documents(data: Path | None, render: Render = no_template) -> list[str]:
    """Texts of a file or directory, one of every row; None is the embedded text.

    A row has a ``text``, or ``messages`` that ``render`` makes one of. Rows that cannot be used are
    left out, counted and the first of them named. Texts of white space alone are left out, and a
    lone surrogate becomes the replacement character.

    Raises:
        InputError: there is no such file, or nothing in it can be used.
    """
    if data is None:
        return embedded_documents()
    documents, faults, rows = list[str](), list[str](), 0
    for file in text_files(data):
        for where, row in read_file(file):
            rows += 1
            found = row if isinstance(row, Fault) else text_of(row, render)
            if isinstance(found, Fault):
                faults.append(f"{where} {found.reason}"[:SAID])
            elif found.strip():
                documents.append(LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", found))
    named = "; ".join(faults[:NAMED])
    if not documents:
        said = f": {named}" if faults else '; a row looks like {"text": "..."}'
        raise InputError(f"{data} holds no documents{said}")
    if faults:
        note(f"{data}: {len(faults)} of {rows} rows cannot be used and are left out: {named}")
    return documents


def text_of(row: Mapping[str, Any], render: Render) -> str | Fault:
    """The text of a row."""
    if isinstance(text := row.get("text"), str):
        return text
    if not isinstance(messages := row.get("messages"), list):
        return Fault('has no text; a row looks like {"text": "..."}')
    try:
        return render(messages)
    except ValueError as error:
        return Fault(f"has messages that the chat template does not take: {error}")


def pieces(text: str, characters: int) -> Iterator[str]:
    """A text in pieces of at most so many characters, cut after white space where there is some."""
    start = 0
    while start < len(text):
        end = start + characters
        if end < len(text):
            space = max(text.rfind(white, start, end) for white in " \n")
            end = space + 1 if space > start else end
        yield text[start:end]
        start = end
