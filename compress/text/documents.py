"""Documents of a JSONL file, or the text that every Python carries."""

import ast
import importlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from compress.core.errors import InputError

SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo",
    "ensurepip", "__pycache__",
}  # fmt: skip


SHORTEST = 200


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def read_documents(path: Path | None) -> list[str]:
    """Documents of a JSONL file with a ``text`` in every row; None is the embedded text.

    Raises:
        InputError: the file is missing, empty, or a row (named by its line) has no text.
    """
    if path is None:
        return embedded_documents()
    if not path.is_file():
        raise InputError(f"{path} does not exist; data is a JSONL file with a text in every row")
    documents = []
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    documents.append(text_of(line, f"{path}:{number}"))
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text: {error}") from error
    if not documents:
        raise InputError(f"{path} holds no documents; data is a JSONL file with a text in each row")
    return documents


def text_of(line: str, where: str) -> str:
    """The text of one JSONL row."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f'{where} has no text; a row looks like {{"text": "..."}}')
    return str(row["text"])


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
