"""Files that appear whole or not at all, JSON, fingerprints of inputs and of files."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.core.errors import InputError

PARTIAL = ".partial"


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """The sha256 of the inputs as canonical JSON; key order does not matter."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in UTF-8; odd bytes of a path stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; InputError names the file when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def digests(files: Iterable[Path], known: Path) -> dict[str, str]:
    """The sha256 of every file by its path.

    ``known`` keeps them: a file is read again only where its size, times or inode have changed.
    """
    before = read_json(known) if known.is_file() else {}
    found: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} does not exist")
        path, facts = str(file.absolute()), file.stat()
        stamp = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
        found[path] = before.get(path)
        if found[path] is None or found[path]["stamp"] != stamp:
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            found[path] = {"stamp": stamp, "sha256": digest}
    if before | found != before:
        write_json(known, before | found)
    return {path: entry["sha256"] for path, entry in found.items()}


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill beside ``path``; renamed to it at the end, removed on an error.

    What stood at ``path`` stays until the new one is whole. What a killed process left is cleared.
    """
    partial, old = (path.with_name(path.name + suffix) for suffix in (PARTIAL, ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            # A directory cannot be renamed onto one that is not empty.
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
