"""Who reads an export besides us, and how each is asked.

A reader is a file of this package that runs in a process of its own, under a Python that has its
package: ``python FILE REQUEST``. REQUEST is a JSON file, the answer ``answer.json`` beside it::

    request   directory, rows [R][T], prompt, top, own_code, device
    answer    reader, dtype, text [R][T - 1], ids and values [R][T - 1][top], greedy [R][T - prompt]

    timings   directory, tokens, prompt, generate, repeats, own_code, device
    answer    reader, prompt_seconds, token_seconds, peak_bytes

``text`` are log-probabilities of each row's tokens after the first, ``ids`` and ``values`` the
likeliest tokens there and theirs, ``greedy`` what is generated after the first ``prompt`` tokens.
``own_code`` lets it run the Python files of the directory, which are ours. The reader of this
Python is called without a process.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.core.errors import InputError, VerificationFailed
from compress.core.files import read_json
from compress.export.predictions import TOP, Predictions, from_json
from compress.export.readers import Reader
from compress.model.config import CONFIG
from compress.model.find import shipped

# Of the reader that is no stock one, and is asked for in this process.
OWN = "compress.load"


@dataclass(frozen=True, kw_only=True)
class Process:
    """A stock reader.

    Attributes:
        file: what runs under its Python.
        package: what that Python imports.
    """

    file: str
    package: str


READERS: Mapping[Reader, Process] = {
    "transformers": Process(file="transformers_reader.py", package="transformers"),
    "vllm": Process(file="vllm_reader.py", package="vllm"),
    "llama.cpp": Process(file="llama_cpp_reader.py", package="llama_cpp"),
}


def installed(name: Reader, python: Path | None) -> bool:
    """Whether a reader can be asked: by a Python that was named, or by this one."""
    return python is not None or find_spec(READERS[name].package) is not None


def require_installed(name: Reader, python: Path | None) -> None:
    """InputError where a reader cannot be asked."""
    if not installed(name, python):
        raise InputError(
            f"{READERS[name].package} is not installed here; name a Python that has it with "
            "--reader-python"
        )


def ask(
    name: Reader, directory: Path, rows_RT: Tensor, prompt: int, python: Path | None, device: str
) -> Predictions:
    """What a reader predicts from the files of a directory alone.

    Raises:
        InputError: no such Python, or it does not have the reader's package.
        VerificationFailed: the reader does not load the directory, with what it says.
    """
    require_installed(name, python)
    request = {
        "directory": str(directory.absolute()), "rows": rows_RT.tolist(), "prompt": prompt,
        "top": TOP, "own_code": has_own_code(directory), "device": device,
    }  # fmt: skip
    return from_json(here(name, request) if python is None else there(name, request, python))


def has_own_code(directory: Path) -> bool:
    """Whether a directory has Python files, which are ours.

    Only what was written by this version is ever run; VerificationFailed on any other.
    """
    config = read_json(directory / CONFIG)
    files = {file.name: file for file in directory.rglob("*.py")}
    for name, file in files.items():
        own = shipped("remote_code") / name
        if file.parent != directory or not own.is_file() or own.read_bytes() != file.read_bytes():
            raise VerificationFailed(f"other code: {name} is no file that this version exports")
    for entry in config.get("auto_map", {}).values():
        for said in [entry] if isinstance(entry, str) else entry:
            # NAME--FILE.CLASS is a file of another repository.
            if said is not None and f"{said.rpartition('.')[0]}.py" not in files:
                raise VerificationFailed(f"other code: auto_map names {said}, which is not here")
    return bool(files)


def timed(
    name: Reader,
    directory: Path,
    tokens: Sequence[int],
    generate: int,
    repeats: int,
    python: Path | None,
    device: str,
) -> Any:
    """Seconds that a reader takes, in a process of its own; InputError as ``ask``."""
    require_installed(name, python)
    own_code = "auto_map" in read_json(directory / CONFIG) and has_own_code(directory)
    request = {
        "directory": str(directory.absolute()), "tokens": list(tokens), "prompt": len(tokens),
        "generate": generate, "repeats": repeats, "own_code": own_code,
        "device": device,
    }  # fmt: skip
    return there(name, request, python or Path(sys.executable))


def here(name: Reader, request: Mapping[str, Any]) -> Any:
    """The answer of a reader of this Python."""
    reader: Any = import_module(f"compress.export.readers.{Path(READERS[name].file).stem}")
    said = io.StringIO()
    try:
        # Progress bars of seconds.
        with redirect_stderr(said):
            return reader.read(request)
    except Exception as error:
        # Whatever stops a loader, the directory is not what it reads.
        raise VerificationFailed(f"{name} does not read it: {error}") from error


def there(name: Reader, request: Mapping[str, Any], python: Path) -> Any:
    """The answer of a reader of another Python."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "request.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        code = [str(python), str(Path(__file__).with_name(READERS[name].file)), str(asked)]
        try:
            done = subprocess.run(code, capture_output=True, text=True, env=surroundings())
        except OSError as error:
            raise InputError(f"{python} cannot be run: {error.strerror}") from error
        if done.returncode:
            raise failure(name, python, done.stderr)
        return read_json(asked.with_name("answer.json"))


def surroundings() -> dict[str, str]:
    """The environment of another Python: no network, and no packages of ours."""
    left = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**left, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def failure(name: Reader, python: Path, said: str) -> InputError | VerificationFailed:
    """Why a reader gave no answer: the last line of what it said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["nothing"]
    if f"No module named '{READERS[name].package}'" in lines[-1]:
        return InputError(f"{python} has no {READERS[name].package}; see --reader-python")
    return VerificationFailed(f"{name} does not read it: {lines[-1]}")
