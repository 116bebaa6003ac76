"""Where work is done, as numbers; no torch."""

import os
import time
from dataclasses import dataclass

from compress.memory.devices import Device

# Bytes of the host's memory that a process has before it reads a model.
PROCESS = 350 * 2**20
# Of the memory that work may take, what weights may hold on to; the rest is for what is made of
# them: states in flight, errors and matrices of a layer, cut blocks.
RESIDENT_SHARE = 1 / 3
# What products reach of a machine's peak.
SHARE_OF_PEAK = 0.4


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where work is done: what it may take there, operations a second, bytes of a number.

    An accelerator's memory is not the host's.
    """

    name: str
    memory: int
    flops: float
    number_bytes: int
    accelerator: bool = False

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that may stay there."""
        return int(RESIDENT_SHARE * self.memory)


def free_memory() -> int:
    """Bytes of this machine's memory that are available, as the kernel counts them."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def preset_machine(device: Device) -> Machine:
    """One of the presets, which works in BF16."""
    return Machine(
        name=device.name, memory=device.visible_bytes, number_bytes=2,
        flops=SHARE_OF_PEAK * device.tflops * 1e12, accelerator=True,
    )  # fmt: skip


def this_machine(memory: int | None = None) -> Machine:
    """The CPU that this runs on, which works in fp32, with its free memory unless told.

    It is timed for a moment.
    """
    import numpy as np

    square = np.ones((256, 256), dtype=np.float32)
    square @ square
    best, began = 1.0, time.perf_counter()
    while (start := time.perf_counter()) - began < 0.05:
        square @ square
        best = min(best, time.perf_counter() - start)  # others may work here as well
    peak = 2 * 256**3 / best
    return Machine(
        name="this CPU", memory=free_memory() if memory is None else memory,
        flops=SHARE_OF_PEAK * peak, number_bytes=4,
    )  # fmt: skip
