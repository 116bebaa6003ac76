"""The budget that binds: bytes, a share of the teacher's, or what a device offers."""

from dataclasses import dataclass, replace
from fractions import Fraction

from compress.core.errors import InputError
from compress.core.quantities import format_bytes
from compress.formats.table import FORMATS, WEIGHT_ONLY, Format, by_group
from compress.memory.devices import Device
from compress.memory.footprint import Deployment, block_takes, footprint
from compress.model.architecture import Architecture, without_formats
from compress.model.families import in_one_format, outside_groups


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes that a student may take, and where they come from: the smaller of two binds."""

    bytes: int
    asked: int | None = None
    device: Device | None = None

    @property
    def description(self) -> str:
        """Both limits where both are given, the binding one first."""
        limits = []
        if self.asked is not None:
            limits.append((self.asked, f"budget {format_bytes(self.asked)}"))
        if self.device is not None:
            visible = self.device.visible_bytes
            limits.append((visible, f"{self.device.name} offers {format_bytes(visible)}"))
        texts = [text for _, text in sorted(limits)]
        return texts[0] + (f" (binds; {texts[1]})" if len(texts) > 1 else "")


def in_format(architecture: Architecture, format: Format) -> Architecture:
    """The architecture with every block in one format; blocks that cannot take it stay BF16."""
    hidden, family = architecture.hidden, architecture.family
    blocks = (
        replace(block, formats=in_one_format(block, family, format))
        if block_takes(block, hidden, family, format)
        else replace(block, formats=())
        for block in architecture.blocks
    )
    return replace(architecture, blocks=tuple(blocks))


def in_head_format(architecture: Architecture, format: Format) -> Architecture:
    """The architecture with its head and its embedding in a format; InputError if they refuse."""
    if format not in WEIGHT_ONLY:
        known = ", ".join(WEIGHT_ONLY)
        raise InputError(f"{format} rounds what a layer reads; embedding and head take {known}")
    FORMATS[format].require((architecture.vocab, architecture.hidden))
    formats = by_group(dict.fromkeys(outside_groups(architecture), format))
    return replace(architecture, outside_formats=formats)


def teacher_bytes(architecture: Architecture, deployment: Deployment) -> int:
    """Bytes of the model with BF16 weights and a 16-bit KV cache: what a share is a share of."""
    return footprint(without_formats(architecture), deployment).total


def resolve_budget(
    architecture: Architecture,
    deployment: Deployment,
    limit: int | Fraction | None,
    device: Device | None,
) -> Budget | None:
    """The budget that binds; None when neither a limit nor a device is given.

    ``limit`` is bytes, or a share of the architecture's in BF16.
    """
    if isinstance(limit, Fraction):
        limit = int(limit * teacher_bytes(architecture, deployment))
    limits = [limit] if limit is not None else []
    limits += [device.visible_bytes] if device else []
    return Budget(bytes=min(limits), asked=limit, device=device) if limits else None
