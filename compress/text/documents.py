"""Documents of a JSONL file, or the text that every Python carries."""

import ast
import codecs
import importlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.core.errors import InputError

SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo",
    "ensurepip", "__pycache__",
}  # fmt: skip

SHORTEST = 200
# JSON may hold halves of a UTF-16 pair ("\ud800"), which no encoding and no tokenizer takes.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def read_documents(path: Path | None) -> list[str]:
    """Texts of a JSONL file, one in the ``text`` of every row; None is the embedded text.

    Texts of white space alone are left out, and a lone surrogate becomes the replacement character.

    Raises:
        InputError: the file is missing or empty, or a row (named by its line) has no text.
    """
    if path is None:
        return embedded_documents()
    if not path.is_file():
        raise InputError(f"{path} does not exist; data is a JSONL file with a text in every row")
    documents = []
    for where, row in read_rows(path):
        if not isinstance(text := row.get("text"), str):
            raise InputError(f'{where} has no text; a row looks like {{"text": "..."}}')
        if text.strip():
            documents.append(LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text))
    if not documents:
        raise InputError(f"{path} holds no documents; data is a JSONL file with a text in each row")
    return documents


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSONL file, each with its file and line; blank lines are left out.

    Raises:
        InputError: a line is not UTF-8 or no JSON object.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise InputError(f"{where} is not UTF-8 text: {error}") from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f'{where} is no row; one looks like {{"text": "..."}}')
            yield where, row


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


def embedded_documents() -> list[str]:
    """Python's help topics and the docstrings of its standard library, a document per module.

    The same Python version gives the same documents in the same order; another one gives slightly
    other text. Modules are parsed, not imported.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    root = Path(sysconfig.get_path("stdlib"))
    modules = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    documents = [topics[name] for name in sorted(topics)]
    documents += [
        "\n\n".join(docstrings((root / module).read_bytes()))
        for module in modules
        if SKIPPED.isdisjoint(module.split("/"))
    ]
    return [text for text in documents if len(text) >= SHORTEST]


def docstrings(source: bytes) -> Iterator[str]:
    """Docstrings of a module and of everything in it, from the top; none if it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        # Templates and deliberately broken files live among the modules; they have no docstrings.
        return
    nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if text := ast.get_docstring(node):
            yield text
