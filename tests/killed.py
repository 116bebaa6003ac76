"""Commands in processes of their own, killed where they are about to write."""

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from optuna.storages.journal import JournalFileBackend

from compress import cli

# Its processes begin with everything imported, and none of them with the threads of a test.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["compress.run.stages"])


def kind_of(path: str, text: str) -> str:
    """What a file is, whatever number, digest, candidate, block or linear group it is of.

    All files of a directory that has no name yet are one kind; of a state it is what is signed.
    """
    kind = re.sub(r"[0-9a-f]{12,}|\d+", "#", re.sub(r"\.partial/.*", ".partial/", path))
    kind = re.sub(r"layers\.#\.\w+", "layers.#", kind)
    kind = re.sub(r"(rounded-#/#)-\w+", r"\1", kind)
    return f"{kind} {' '.join(json.loads(text))}" if kind == "state.json" else kind


def dying(arguments: Sequence[str], run: Path, log: Path) -> None:
    """A command that is killed at its first write of a kind that is not yet in the log.

    A file is killed before it takes its name, a line of a journal when half of it is written.
    """
    torch.set_num_threads(1)
    said = os.open(log.with_name("said"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    known = set(log.read_text().splitlines()) if log.is_file() else set()

    def die(kind: str) -> None:
        with log.open("a") as file:
            file.write(kind + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def named(how: Any) -> Any:
        def write(path: Path, target: Path) -> Path:
            text = path.read_text() if path.suffixes[-2:-1] == [".json"] else ""
            if (kind := kind_of(os.path.relpath(target, run), text)) not in known:
                die(kind)
            made: Path = how(path, target)
            return made

        return write

    append = JournalFileBackend.append_logs

    def appended(backend: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        for line in logs:
            if (kind := f"journal: {line['op_code']}") not in known:
                with Path(backend._file_path).open("a") as file:
                    file.write(json.dumps(line)[:20])
                die(kind)
        append(backend, logs)

    Path.replace, Path.rename = named(Path.replace), named(Path.rename)
    JournalFileBackend.append_logs = appended
    cli.app(list(arguments), standalone_mode=False)


def killed_at_every_write(arguments: Sequence[str], run: Path, log: Path) -> list[str]:
    """Search again and again until nothing kills it: every kind of write did once, as listed."""
    while True:
        process = SERVER.Process(target=dying, args=(arguments, run, log))
        process.start()
        process.join()
        if process.exitcode == 0:
            return log.read_text().splitlines()
        assert process.exitcode == -signal.SIGKILL, log.with_name("said").read_text()
        last = log.read_text().splitlines()[-1]
        assert last.startswith("state.json") or not (run / "candidates.json").exists()
