"""Broken configs of every family: a plan of each is figures or one line, within a second.

``python -m benchmarks.mutations [--count 5000] [--seed 0] [--build]``; the configs are those of the
tests' tables. ``--build`` also builds the models that are planned, on the meta device, as all
commands but ``plan`` do; seconds are those of the plan.
"""

import argparse
import json
import random
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compress.core.errors import InputError
from compress.core.terminal import note, progress, table
from compress.memory.devices import find_device
from compress.memory.footprint import Deployment
from compress.memory.plan import Plan, make_plan
from compress.model.families import family_of
from compress.model.families.wrapper import text_config
from compress.report.plan import block_rows, option_row

VALUES: list[Any] = [
    *(
        0,
        1,
        2,
        -1,
        3,
        7,
        16,
        48,
        96,
        10**6,
        10**12,
        -(10**12),
        2**63,
        1.5,
        -0.5,
        float("nan"),
        float("inf"),
    ),
    *("", "abc", "8", None, True, False, [], [1], ["x"], [None], {}, {"a": 1}, [[]], [0, 1] * 50),
    *(["full_attention"], ["sliding_attention"] * 4, {"rope_type": "yarn"}, {"type": "linear"}),
]
SERVED = Deployment(context=4096, batch_size=3)
SLOWEST = 1.0
# Parts of larger models are the same, and take long to build.
MOST_BUILT = 64


def mutated(draw: random.Random, whole: Mapping[str, Any]) -> dict[str, Any]:
    """A config with one to three keys changed, added or gone."""
    config = dict(text_config(whole))
    known = sorted({*family_of(config["model_type"]).reads, *config})
    for _ in range(draw.randint(1, 3)):
        key = draw.choice(known)
        if draw.random() < 0.2:
            config.pop(key, None)
        else:
            config[key] = draw.choice(VALUES)
    if "text_config" in whole:
        return {**whole, "text_config": draw.choice([*VALUES, *[config] * 99])}
    return config


def answer(config: Mapping[str, Any], file: Path) -> Plan | str:
    """The plan of a config, or what is wrong with it; ``file`` is written anew."""
    file.write_text(json.dumps(config), encoding="utf-8")
    try:
        plan = make_plan(file, SERVED, device=find_device("l4"))
        # Whatever is printed of it.
        _ = list(block_rows(plan)), [option_row(option, plan) for option in plan.options]
    except InputError as error:
        return str(error)
    return plan


def fault(found: Plan | str) -> str | None:
    """What is wrong with an answer: lines where there should be one, or no figure of a model."""
    if isinstance(found, str):
        return "several lines" if "\n" in found else None
    said = found.to_json()
    figures = [*said["bytes"].values(), said["largest_context"], said["largest_batch"]]
    negative = any(figure is not None and figure < 0 for figure in figures)
    counts = said["parameters"]
    if negative or not 0 < counts["active"] <= counts["total"]:
        return f"figures {figures}, parameters {counts}"
    return None


def build(config: Mapping[str, Any], plan: Plan) -> None:
    """Build the model of a plan on the meta device; InputError where its parts do not agree."""
    from compress.model.build import skeleton

    if plan.architecture.layers <= MOST_BUILT:
        skeleton(config, plan.architecture)


@dataclass(frozen=True)
class Tried:
    """What became of a config: planned or refused, in how many seconds, with which fault."""

    family: str
    planned: bool
    seconds: float
    fault: str | None


def tried(family: str, config: Mapping[str, Any], file: Path, built: bool = False) -> Tried:
    """Plan a config, and build what was planned if that is asked for."""
    planned, begun = False, time.thread_time()
    seconds = wrong = None
    try:
        found = answer(config, file)
        seconds, wrong = time.thread_time() - begun, fault(found)
        if isinstance(found, Plan):
            planned = True
            if built:
                build(config, found)
    except InputError as error:
        wrong = fault(str(error))
    except Exception:
        wrong = traceback.format_exc()
    seconds = time.thread_time() - begun if seconds is None else seconds
    if wrong is None and seconds > SLOWEST:
        wrong = f"{seconds:.1f} s"
    return Tried(family, planned, seconds, wrong)


def main() -> None:
    """Try configs, print a table by family and the first fault of every kind, exit 1 on any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--build", action="store_true")
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    published, tiny = import_module("published"), import_module("tiny_models")
    configs = [*tiny.EVERY.values(), *(config for config, _ in published.PUBLISHED.values())]
    found: list[Tried] = []
    with TemporaryDirectory() as directory, progress("mutations", asked.count) as advance:
        for number in range(asked.count):
            draw = random.Random(asked.seed * 1_000_003 + number)
            whole = draw.choice(configs)
            config, family = mutated(draw, whole), text_config(whole)["model_type"]
            found.append(tried(family, config, Path(directory) / "config.json", asked.build))
            advance(1, "")
            if found[-1].fault:
                note(f"{json.dumps(config)}: {found[-1].fault}")
    table(
        f"{asked.count} mutated configs, seed {asked.seed}",
        ("family", "configs", "planned", "refused", "slowest", "faults"),
        [row(name, [each for each in found if each.family == name])
         for name in sorted({each.family for each in found})] + [row("all", found)],
    )  # fmt: skip
    sys.exit(any(each.fault for each in found))


def row(name: str, tries: Sequence[Tried]) -> tuple[str, ...]:
    """A line of the table."""
    planned = sum(each.planned for each in tries)
    slowest = max(each.seconds for each in tries)
    faults = sum(each.fault is not None for each in tries)
    counts = (len(tries), planned, len(tries) - planned)
    return name, *map(str, counts), f"{1000 * slowest:.0f} ms", str(faults)


if __name__ == "__main__":
    main()
