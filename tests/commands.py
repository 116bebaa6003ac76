"""Commands as a user gives them: their exit code, and what they import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import compress
from compress.cli import main

# Whatever it is called for, importing these takes seconds.
HEAVY = ("torch", "transformers", "scipy", "optuna", "matplotlib", "modelopt")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def in_fresh_process(*arguments: str) -> tuple[str, set[str], float]:
    """Output of a command, the heavy packages it imported, and its seconds."""
    code = (
        "import sys; from compress.cli import main\n"
        "try: main()\n"
        f"finally: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    begun = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(compress.__file__).parent.parent)},
    )
    imported = json.loads(done.stderr.splitlines()[-1].replace("'", '"'))
    # Seconds of work, not of waiting for a core that other tests use.
    ended = os.times()
    seconds = ended.children_user + ended.children_system
    return done.stdout, set(imported), seconds - begun.children_user - begun.children_system
