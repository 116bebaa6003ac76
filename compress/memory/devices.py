"""Device presets: the memory a card really offers and the formats that kernels run on it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from compress.core.errors import InputError
from compress.formats.table import FORMATS, Format

# Where the work on a model is done, which is not where its student is served.
Compute = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """``count`` equal cards. ``visible_bytes`` is what they offer together.

    ``capability`` is the compute capability, 86 for 8.6; ``tflops`` are dense products in BF16
    with fp32 sums, by its data sheet.
    """

    name: str
    visible_bytes: int
    tflops: float
    capability: int
    count: int = 1

    def runs(self, format: Format) -> bool:
        """Whether servers have products for a format there."""
        return self.capability >= FORMATS[format].capability


def card(name: str, visible_gib: float, tflops: float, capability: int) -> Device:
    """One card; ``visible_gib`` is rounded down to whole bytes."""
    visible = int(visible_gib * 2**30)
    return Device(name=name, visible_bytes=visible, tflops=tflops, capability=capability)


# Visible memory is what the driver leaves a process, ECC and reserved pages gone, and so below the
# figure on the box: what torch names as total capacity when it runs out of memory. Machines differ
# by about .1 GiB; the lower figure seen is used. Assumptions, not measured here: everything but
# a10g; a100-40, a100-80, h100, h200 and b200 are from memory.
#
# Weights of every format of the table run from Ampere on (Marlin kernels: weight-only, dequantized
# inside the kernel where the card has no such arithmetic); those that round inputs need products of
# such numbers (``formats/table.py``). ``export/serving.py`` says what a server
# needs to be told.
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        card("a10g", 22.06, 70, 86),
        card("l4", 22.03, 60, 89),
        card("l40s", 44.39, 181, 89),
        card("rtx4090", 23.52, 165, 89),
        card("rtx5090", 31.36, 209, 120),
        card("a100-40", 39.38, 312, 80),
        card("a100-80", 79.10, 312, 80),
        card("h100", 79.10, 989, 90),
        card("h200", 139.72, 989, 90),
        card("b200", 178.35, 2250, 100),
    )
}


def find_device(text: str) -> Device:
    """The device of "a10g" or "8xh100"; InputError lists the known ones.

    Several cards count as one memory: it assumes that a server splits weights and cache evenly.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(.+)", text.strip().lower())
    if not found or found[2] not in DEVICES:
        raise InputError(
            f"device {text!r} is not known; known: {', '.join(DEVICES)}, and counts such as 8xh100"
        )
    one, count = DEVICES[found[2]], int(found[1] or 1)
    name = one.name if count == 1 else f"{count}x{one.name}"
    return replace(
        one, name=name, visible_bytes=count * one.visible_bytes, tflops=count * one.tflops,
        count=count,
    )  # fmt: skip
