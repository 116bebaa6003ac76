"""The text that every Python carries, for where no other is given."""

import ast
import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo",
    "ensurepip", "__pycache__",
}  # fmt: skip

SHORTEST = 200
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


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
