"""Text to packed rows of tokens. Without a file, the text is the one that every Python carries."""

import ast
import hashlib
import importlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compress.errors import InputError

Split = Literal["train", "score", "select", "final"]
SPLITS: tuple[Split, ...] = get_args(Split)
# Upper ends of the splits on the unit interval that a document's hash falls into.
ENDS = (0.85, 0.90, 0.95, 1.0)
SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo",
    "ensurepip", "__pycache__",
}  # fmt: skip
SHORTEST = 200
# Characters of a piece per token of a row: English has 4 to 5 a token, so a piece is about a row.
PIECE_CHARACTERS = 6
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


def split_documents(documents: Sequence[str]) -> dict[Split, list[str]]:
    """Documents by split, each decided by the hash of its own text: 85, 5, 5 and 5 per cent."""
    splits: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        place = int.from_bytes(digest[:6], "big") / 2**48
        splits[next(s for s, end in zip(SPLITS, ENDS, strict=True) if place < end)].append(text)
    return splits


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model directory; InputError if it has none or no end-of-text token."""
    if not (path / "tokenizer.json").is_file():
        raise InputError(f"{path} has no tokenizer.json; copy the tokenizer of the model into it")
    try:
        Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{path / 'tokenizer.json'} is corrupt: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer in {path} cannot be read: {error}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer in {path} has no eos_token; documents are joined with it")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


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


def pack(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    tokens: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Rows of ``length`` tokens, int64: documents shuffled, each followed by EOS, cut into rows.

    With ``tokens``, the first rows that hold at least so many, of pieces of documents that are
    little longer than a row: a few thousand tokens then come from as many documents as they can,
    not from one book. Otherwise every whole row.

    Raises:
        InputError: there are fewer tokens than that.
    """
    rows = None if tokens is None else -(-tokens // length)
    texts = list(documents)
    if rows is not None:
        texts = [p for text in documents for p in pieces(text, PIECE_CHARACTERS * length)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    needed = length if rows is None else rows * length
    stream: list[int] = []
    for index in order.tolist():
        if rows is not None and len(stream) >= needed:
            break
        stream += tokenizer.encode(texts[index], add_special_tokens=False, verbose=False)
        stream.append(tokenizer.eos_token_id)
    if len(stream) < needed:
        raise InputError(
            f"the text gives {len(stream)} tokens in {len(documents)} documents of this split, "
            f"{needed} are needed; give more text or ask for fewer tokens"
        )
    rows = len(stream) // length if rows is None else rows
    return torch.tensor(stream[: rows * length]).view(rows, length)
