"""What a model takes, what fits, and which budget binds: pure arithmetic on config.json."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress.architecture import FORMATS, KV_FORMATS, Architecture, Attention, Format, KvFormat
from compress.config import architecture_of, read_config
from compress.devices import Device, find_device
from compress.families import count_active, count_parameters
from compress.memory import Deployment, Footprint, block_takes, footprint, largest_context
from compress.units import format_bytes, parse_bytes, parse_share


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


@dataclass(frozen=True, kw_only=True)
class Option:
    """The model with all blocks in one format; ``largest_context`` as in memory.py."""

    format: Format
    kv_format: KvFormat
    footprint: Footprint
    largest_context: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer to ``compress plan``; ``largest_context`` is None without a budget or a limit."""

    architecture: Architecture
    deployment: Deployment
    footprint: Footprint
    largest_context: int | None
    options: tuple[Option, ...]
    budget: Budget | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether the model is within the budget; None without a budget."""
        return None if self.budget is None else self.footprint.total <= self.budget.bytes

    def to_json(self) -> dict[str, Any]:
        """The object that ``plan --json`` prints."""
        return {
            "family": self.architecture.family,
            "layers": self.architecture.layers,
            "parameters": {
                "total": count_parameters(self.architecture),
                "active": count_active(self.architecture),
            },
            "bytes": asdict(self.footprint) | {"total": self.footprint.total},
            "budget": None if self.budget is None else self.budget.bytes,
            "fits": self.fits,
            "largest_context": self.largest_context,
        }


def in_format(architecture: Architecture, format: Format) -> Architecture:
    """The architecture with every block in one format; blocks that cannot take it stay BF16."""
    return replace(
        architecture,
        blocks=tuple(
            replace(block, format=format)
            if block_takes(block, architecture.hidden, architecture.family, format)
            else replace(block, format="bf16")
            for block in architecture.blocks
        ),
    )


def teacher_bytes(architecture: Architecture, deployment: Deployment) -> int:
    """Bytes of the model with BF16 weights and a 16-bit KV cache: what a share is a share of."""
    whole = replace(in_format(architecture, "bf16"), kv_format="bf16")
    return footprint(whole, deployment).total


def resolve_budget(
    architecture: Architecture, deployment: Deployment, budget: str | None, device: str | None
) -> Budget | None:
    """The budget that binds; None when neither a budget nor a device is given.

    Args:
        architecture: The teacher, which percentages refer to.
        deployment: How it is served.
        budget: Bytes ("22GiB") or a share ("70%") of the teacher's in BF16.
        device: A preset ("a10g", "8xh100").
    """
    preset = None if device is None else find_device(device)
    asked = None
    if budget is not None:
        share = parse_share(budget)
        if share is None:
            asked = parse_bytes(budget, "budget")
        else:
            asked = int(share * teacher_bytes(architecture, deployment))
    limits = [asked] if asked is not None else []
    limits += [preset.visible_bytes] if preset else []
    return Budget(bytes=min(limits), asked=asked, device=preset) if limits else None


def options_of(
    architecture: Architecture, deployment: Deployment, budget: Budget | None
) -> Iterator[Option]:
    """Every weight format with every KV format; without attention only the first KV format."""
    has_cache = any(isinstance(block, Attention) for block in architecture.blocks)
    for format in FORMATS:
        for kv_format in KV_FORMATS if has_cache else KV_FORMATS[:1]:
            changed = replace(in_format(architecture, format), kv_format=kv_format)
            yield Option(
                format=format,
                kv_format=kv_format,
                footprint=footprint(changed, deployment),
                largest_context=(
                    largest_context(changed, deployment, budget.bytes) if budget else None
                ),
            )


def notes_of(
    config: Mapping[str, Any], architecture: Architecture, context: int | None, limit: Budget | None
) -> Iterator[str]:
    """What a reader has to know about a plan besides its numbers.

    ``context`` is the longest that the plan speaks of; None if it has no limit.
    """
    device = limit.device if limit else None
    trained = config.get("max_position_embeddings")
    if trained and (context is None or context > trained):
        yield f"config.json says that the model is made for {trained:,} tokens, whatever fits"
    family, hidden, blocks = architecture.family, architecture.hidden, architecture.blocks
    for format in FORMATS:
        if refused := sum(not block_takes(block, hidden, family, format) for block in blocks):
            yield f"{refused} blocks cannot be {format} (inputs no multiple of 16) and stay bf16"
    foreign = "quantization_config" in config and architecture.formats == {"bf16"}
    if foreign:
        yield "config.json names a quantization that is not ours; planned as bf16"
    if device and architecture.kv_format not in device.kv_formats:
        yield f"no backend is sure to run a {architecture.kv_format} KV cache on {device.name}"
    if device and device.count > 1:
        yield f"{device.name}: assumes that weights and caches split evenly"


def make_plan(
    model: Path,
    deployment: Deployment,
    *,
    budget: str | None = None,
    device: str | None = None,
    format: Format | None = None,
    kv_format: KvFormat | None = None,
) -> Plan:
    """Plan the model of a directory or a config.json.

    ``format`` and ``kv_format`` ask what it would take in another precision; without them the model
    is planned as its files say.
    """
    config = read_config(model)
    architecture = architecture_of(model, config)
    limit = resolve_budget(architecture, deployment, budget, device)
    planned = architecture if format is None else in_format(architecture, format)
    if kv_format is not None:
        planned = replace(planned, kv_format=kv_format)
    longest = largest_context(planned, deployment, limit.bytes) if limit else 0
    spoken_of = None if longest is None else max(longest, deployment.context)
    return Plan(
        architecture=planned,
        deployment=deployment,
        footprint=footprint(planned, deployment),
        largest_context=longest if limit else None,
        options=tuple(options_of(architecture, deployment, limit)),
        budget=limit,
        notes=tuple(notes_of(config, planned, spoken_of, limit)),
    )
