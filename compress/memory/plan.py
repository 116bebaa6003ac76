"""What a model takes, what fits, and which budget binds: pure arithmetic on config.json."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from compress.formats.table import FORMATS, KV_FORMATS, WEIGHT_ONLY, Format, KvFormat
from compress.memory.budget import Budget, in_format, in_head_format, resolve_budget
from compress.memory.devices import Device
from compress.memory.footprint import (
    Deployment,
    Footprint,
    block_takes,
    footprint,
    largest_batch,
    largest_context,
)
from compress.memory.stored import AsStored, as_stored
from compress.model.architecture import Architecture, cached, in_kv_format
from compress.model.config import is_export, read_config
from compress.model.families import count_active, count_parameters
from compress.model.families.wrapper import text_config, text_note
from compress.model.weights import planned_architecture


@dataclass(frozen=True, kw_only=True)
class Option:
    """The model with all blocks in one format; limits as a plan has them."""

    format: Format
    kv_format: KvFormat
    footprint: Footprint
    largest_context: int | None
    largest_batch: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer to ``compress plan``.

    ``largest_context`` at the batch size and ``largest_batch`` at the context are None without a
    budget, or where nothing limits them.
    ``quantized``: it is one of our quantized exports, whatever it is planned in. ``stored`` is what
    any quantized model is on disk, and ``served`` its bytes as it is.
    """

    architecture: Architecture
    quantized: bool
    stored: AsStored | None
    served: Footprint | None
    deployment: Deployment
    footprint: Footprint
    largest_context: int | None
    largest_batch: int | None
    options: tuple[Option, ...]
    budget: Budget | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether the model is within the budget; None without a budget."""
        return None if self.budget is None else self.footprint.total <= self.budget.bytes

    def to_json(self) -> dict[str, Any]:
        """The object that ``plan --json`` prints."""
        model = self.architecture
        return {
            "family": model.family,
            "layers": model.layers,
            "parameters": {"total": count_parameters(model), "active": count_active(model)},
            "bytes": asdict(self.footprint) | {"total": self.footprint.total},
            "budget": None if self.budget is None else self.budget.bytes,
            "fits": self.fits,
            "largest_context": self.largest_context,
            "largest_batch": self.largest_batch,
        } | ({"stored": self.stored_json()} if self.stored else {})

    def stored_json(self) -> dict[str, Any]:
        """What the model is on disk, of a quantized one."""
        assert self.stored
        total = self.served.total if self.served else None
        return {"formats": self.stored.formats, "weights": self.stored.weights, "total": total}


def options_of(
    architecture: Architecture, deployment: Deployment, budget: Budget | None
) -> Iterator[Option]:
    """Every weight format that a block takes with every KV format; one without attention."""
    has_cache = any(cached(block) for block in architecture.blocks)
    family, hidden = architecture.family, architecture.hidden
    for format in WEIGHT_ONLY:
        if not any(block_takes(block, hidden, family, format) for block in architecture.blocks):
            continue
        for kv_format in KV_FORMATS if has_cache else KV_FORMATS[:1]:
            changed = in_kv_format(in_format(architecture, format), kv_format)
            limits = changed, deployment, budget.bytes if budget else 0
            yield Option(
                format=format,
                kv_format=kv_format,
                footprint=footprint(changed, deployment),
                largest_context=largest_context(*limits) if budget else None,
                largest_batch=largest_batch(*limits) if budget else None,
            )


def notes_of(
    config: Mapping[str, Any], architecture: Architecture, context: int | None, limit: Budget | None
) -> Iterator[str]:
    """What a reader has to know about a plan besides its numbers and formats.

    ``context`` is the longest that the plan speaks of; None if it has no limit.
    """
    device = limit.device if limit else None
    if said := text_note(config):
        yield f"this is {said}"
    trained = text_config(config).get("max_position_embeddings")
    if trained and (context is None or context > trained):
        yield f"config.json says that the model is made for {trained:,} tokens, whatever fits"
    if device and device.count > 1:
        yield f"{device.name}: assumes that weights and caches split evenly"


def refusals(architecture: Architecture, formats: Iterable[Format]) -> Iterator[str]:
    """A line for each of these formats that blocks cannot be in."""
    family, hidden, blocks = architecture.family, architecture.hidden, architecture.blocks
    for format in formats:
        if refused := sum(not block_takes(block, hidden, family, format) for block in blocks):
            inputs = f"inputs no multiple of {FORMATS[format].group}"
            count = "1 block" if refused == 1 else f"{refused} blocks"
            verb = "stays" if refused == 1 else "stay"
            yield f"{count} cannot be {format} ({inputs}) and {verb} bf16"


def make_plan(
    model: Path,
    deployment: Deployment,
    *,
    budget: int | Fraction | None = None,
    device: Device | None = None,
    format: Format | None = None,
    kv_format: KvFormat | None = None,
    head_format: Format | None = None,
    mtp: bool = True,
) -> Plan:
    """Plan the model of a directory or a config.json.

    ``format``, ``head_format`` and ``kv_format`` ask what it would take in another precision than
    its files say, without ``mtp`` what it takes where nobody predicts further tokens.
    """
    config = read_config(model)
    architecture = planned_architecture(model, config)
    if not mtp:
        architecture = replace(architecture, mtp=())
    stored = as_stored(model, config)
    limit = resolve_budget(architecture, deployment, budget, device)
    planned = architecture if format is None else in_format(architecture, format)
    if head_format is not None:
        planned = in_head_format(planned, head_format)
    if kv_format is not None:
        planned = in_kv_format(planned, kv_format)
    longest = largest_context(planned, deployment, limit.bytes) if limit else 0
    spoken_of = None if longest is None else max(longest, deployment.context)
    return Plan(
        architecture=planned,
        quantized=is_export(model, config),
        stored=stored,
        served=stored.served(architecture, deployment) if stored and stored.weights else None,
        deployment=deployment,
        footprint=footprint(planned, deployment),
        largest_context=longest if limit else None,
        largest_batch=largest_batch(planned, deployment, limit.bytes) if limit else None,
        options=tuple(options_of(architecture, deployment, limit)),
        budget=limit,
        notes=(
            *notes_of(config, planned, spoken_of, limit),
            *refusals(planned, [format] if format else []),
        ),
    )
