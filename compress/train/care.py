"""What is out of the ordinary in a training: skipped steps, spikes, and what happened when."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from compress.core.errors import InputError
from compress.core.terminal import note

EVENTS = "events.jsonl"
# Skipped steps in a row that end a training.
BAD_STEPS = 5
# A spike is so many standard deviations, and so much more, above the losses of the last steps.
DEVIATIONS, TIMES, WINDOW, FEWEST = 6.0, 1.1, 64, 16


class NotFinite(InputError):
    """A step whose loss or gradient is NaN or infinite: it must not change a weight."""


class Events:
    """What happens in a training, a line of JSON each in its directory; nothing without one."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def add(self, event: str, step: int, **facts: Any) -> None:
        """Write one down, with the time."""
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"time": round(time.time(), 3), "event": event, "step": step, **facts})
        with (self.directory / EVENTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def spike(self, losses: Sequence[float]) -> None:
        """Note where the last loss is a spike."""
        if is_spike(losses):
            self.add("spike", len(losses), loss=losses[-1])
            if self.directory is not None:
                note(f"the loss spikes at step {len(losses)}: {losses[-1]:.4g}")


def is_spike(losses: Sequence[float]) -> bool:
    """Whether the last loss stands out from those of the steps before it."""
    before = [loss for loss in losses[-WINDOW - 1 : -1] if not math.isnan(loss)]
    if len(before) < FEWEST or math.isnan(losses[-1]):
        return False
    usual = fmean(before)
    return losses[-1] > max(usual + DEVIATIONS * stdev(before), TIMES * usual)
