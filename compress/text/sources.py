"""Where texts come from: JSONL, Parquet and plain text, gzip of them, directories, and the hub."""

import codecs
import gzip
import importlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from compress.core.errors import InputError
from compress.core.files import PARTIAL
from compress.core.terminal import note

ROWS, PARQUET, PLAIN, GZIP = (".jsonl", ".ndjson", ".json"), ".parquet", (".txt", ".md"), ".gz"
KINDS = (*ROWS, PARQUET, *PLAIN)
HUB = "hf:"
# Owner/name, then a revision, a configuration and a split, each if it is not the usual one.
HUB_TEXT = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^\s:/]+))?(?:/([\w.-]+))?(?::([\w.]+))?")
COLUMNS = ("text", "messages")
# Of a hub data set as much is read: enough for every split, and a copy that a run can keep.
HUB_CHARACTERS = 2**26
UNREADABLE = (OSError, EOFError, ValueError, zlib.error)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row, as the rest of a sentence that begins with its place."""

    reason: str


Stream = BinaryIO | gzip.GzipFile
Row = tuple[str, dict[str, Any] | Fault]  # its place, by file and line, and what it holds


def is_hub_text(data: str) -> bool:
    """Whether a source is a data set of the hub, ``hf:owner/name[@revision][/config][:split]``."""
    return data.startswith(HUB)


def require_text(data: str) -> None:
    """InputError where a source is none; what is in it, or on the hub, is not looked at."""
    if not is_hub_text(data):
        text_files(Path(data))
    elif not HUB_TEXT.fullmatch(data):
        raise InputError(f"{data} names no data set; one is hf:owner/name, hf:owner/name:split")


def text_files(data: Path) -> list[Path]:
    """The file, or of a directory all files that hold text, in the order of their names.

    InputError where there is none.
    """
    if data.is_file():
        return [data]
    known = ", ".join(KINDS)
    if not data.is_dir():
        raise InputError(
            f"{data} does not exist; data is a file ({known}, or {GZIP} of one), a directory of "
            f"them, or {HUB}owner/name of the hub"
        )
    found = [file for file in sorted(data.rglob("*")) if file.is_file() and kind_of(file) in KINDS]
    if not found:
        raise InputError(f"{data} holds no file with text; known are {known}, and {GZIP} of them")
    return found


def kind_of(file: Path) -> str:
    """The ending that says what is in a file, whether it is compressed or not."""
    return (file.with_suffix("") if file.suffix == GZIP else file).suffix.lower()


def read_file(file: Path) -> Iterator[Row]:
    """The rows of a file, what is wrong with it as the last one; plain text is one row."""
    if kind_of(file) == PARQUET:
        yield from read_parquet(file)
        return
    read = read_plain if kind_of(file) in PLAIN else read_lines
    try:
        with file.open("rb") as raw, gzip.open(raw, "rb") if file.suffix == GZIP else raw as stream:
            yield from read(file, stream)
    except UNREADABLE as error:
        yield str(file), Fault(f"cannot be read: {first_line(error)}")


def read_plain(file: Path, stream: Stream) -> Iterator[Row]:
    """A file as one text."""
    try:
        yield str(file), {"text": stream.read().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield str(file), Fault(f"is not UTF-8 text: {error}")


def read_lines(file: Path, stream: Stream) -> Iterator[Row]:
    """Objects of lines of JSON; blank lines are left out."""
    for number, line in enumerate(stream, 1):
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            yield where, Fault(f"is not UTF-8 text: {error}")
        except (ValueError, RecursionError) as error:
            yield where, Fault(f"is not JSON: {error}")
        else:
            no_row = Fault('is no row; one looks like {"text": "..."}')
            yield where, row if isinstance(row, dict) else no_row


def read_parquet(file: Path) -> Iterator[Row]:
    """Rows of a Parquet file."""
    if file.suffix == GZIP:
        yield str(file), Fault("cannot be read: Parquet is compressed inside, not by gzip")
        return
    try:
        rows = streamed("parquet", data_files=str(file), split="train")
        for number, row in enumerate(rows, 1):
            yield f"{file}:{number}", dict(row)
    except Exception as error:  # pyarrow and datasets raise what they like
        yield str(file), Fault(f"cannot be read: {first_line(error)}")


def read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSONL file, each with its file and line; blank lines are left out.

    InputError where a line is not UTF-8 or no JSON object.
    """
    with file.open("rb") as stream:
        for where, row in read_lines(file, stream):
            if isinstance(row, Fault):
                raise InputError(f"{where} {row.reason}")
            yield where, row


def fetch_text(data: str, to: Path) -> Path:
    """A JSONL file with the first rows of a hub data set, which is fetched where it is not there.

    At most ``HUB_CHARACTERS``. InputError where the hub has no such data set, or does not answer.
    """
    if to.is_file():
        return to
    require_text(data)
    note(f"reading {data}, at most {HUB_CHARACTERS:,} characters")
    partial = to.with_name(to.name + PARTIAL)
    to.parent.mkdir(parents=True, exist_ok=True)
    characters = 0
    try:
        with partial.open("w", encoding="utf-8") as stream:
            for row in hub_rows(data):
                line = json.dumps({key: row[key] for key in COLUMNS if key in row})
                stream.write(line + "\n")
                characters += len(line)
                if characters >= HUB_CHARACTERS:
                    break
        partial.replace(to)
    finally:
        partial.unlink(missing_ok=True)
    return to


def hub_rows(data: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a hub data set as they come."""
    match = HUB_TEXT.fullmatch(data)
    assert match
    name, revision, config, split = match.groups()
    try:
        yield from streamed(name, name=config, split=split or "train", revision=revision)
    except Exception as error:  # datasets, pyarrow, and what reads the network raise what they like
        raise InputError(f"{data} is not to be had: {first_line(error)}") from error


def streamed(path: str, **which: str | None) -> Iterable[Mapping[str, Any]]:
    """Rows of a data set, as ``datasets`` reads them one after the other."""
    datasets: Any = importlib.import_module("datasets")
    rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(path, streaming=True, **which)
    return rows


def first_line(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
