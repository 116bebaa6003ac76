"""What a whole search costs, against the version before in the same run.

``python -m benchmarks.before_after --before PYTHON --what smollm2 --data TRAIN.jsonl``; PYTHON is
the interpreter of an environment with the other version installed. ``smollm2`` is the README's
search (``--space puzzle --budget 70%``, 100 trials and finalists; ``compress fetch smollm2-135m``
first), ``quickstart`` the shipped one. Versions run one after the other with one thread each: CPU
seconds, user and system, compare where the machine is not quiet. Stages are as progress tells them.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Clock, arguments, report
from compress.core.files import read_json

WHAT = {
    "smollm2": ["search", "smollm2-135m", "--space", "puzzle", "--budget", "70%", "--run", "run"],
    "quickstart": ["quickstart", "--run", "run"],
}
STAGE = re.compile(r"^(?P<stage>[^:]+(?:: [^:]+)?): (?P<done>\d+)/(?P<total>\d+), (?P<s>\d+) s")


def spent(python: str, words: list[str], home: Path) -> dict[str, Any]:
    """Run a command; CPU seconds, wall seconds, peak GiB, seconds by stage, the best KL."""
    clock = Clock()
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [python, "-m", "compress.cli", *words], cwd=home, stdout=log, stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    said = (home / "log").read_text()
    if status:
        raise SystemExit(f"{' '.join(words)} failed:\n{said[-2000:]}")
    run = next(home.glob("runs/*"))
    best = next(row for row in read_json(run / "candidates.json") if row["selected"])
    return {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "seconds": clock.seconds,
        "peak_gib": usage.ru_maxrss * 1024 / 2**30,
        "kl": best["measured_kl"],
        "distilled_kl": best["distilled_kl"],
        "stages": stages(said),
    }


def stages(said: str) -> dict[str, int]:
    """Wall seconds of every progress bar by its name, those of one name together."""
    found: dict[str, int] = {}
    for line in said.splitlines():
        if (match := STAGE.match(line)) and match["done"] == match["total"]:
            name = re.sub(r"-\d+", "", match["stage"])
            found[name] = found.get(name, 0) + int(match["s"])
    return found


def main() -> None:
    """Both versions, and the ratios."""
    settings = arguments(
        __doc__ or "",
        "embedded",
        before={"help": "interpreter of the version before; without it only this one runs"},
        what={"choices": list(WHAT), "default": "quickstart"},
    )
    words = list(WHAT[settings.what])
    if settings.data:
        words += ["--data", str(settings.data.absolute())]
    rows: list[dict[str, Any]] = []
    for version, python in (("before", settings.before), ("now", sys.executable)):
        if python:
            with tempfile.TemporaryDirectory() as home:
                rows.append({"version": version, **spent(python, words, Path(home))})
    facts: dict[str, Any] = {}
    if len(rows) == 2:
        keys = ("cpu_seconds", "seconds", "peak_gib", "kl", "distilled_kl")
        facts = {f"{key}, now over before": rows[1][key] / rows[0][key] for key in keys}
    for row in rows:
        facts |= {f"{row['version']}: {stage}": s for stage, s in row["stages"].items()}
    columns = ("version", "cpu_seconds", "seconds", "peak_gib", "kl", "distilled_kl")
    report(f"before-after-{settings.what}", settings, facts, columns, rows)


if __name__ == "__main__":
    main()
