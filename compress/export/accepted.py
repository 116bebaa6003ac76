"""Whether a target loads a student that is there, by the table of targets."""

from compress.core.errors import InputError
from compress.export.targets import (
    EVERY_AXIS,
    LOADERS,
    Loader,
    Target,
    has_windows,
    loader_of,
)
from compress.formats.table import FORMATS, Format
from compress.model.architecture import Architecture, Block, kv_text, sizes
from compress.model.build import is_plain, is_whole, weight_formats
from compress.searches.space import EMBEDDING, EXPERTS
from compress.student.units import AXES


def check_target(architecture: Architecture, target: Target) -> None:
    """InputError when the target does not load this student, with who does."""
    family, windowed = architecture.family, has_windows(architecture)
    loaders = {name: loader_of(name, family, windowed=windowed) for name in LOADERS}
    reasons = {name: reason(architecture, loader) for name, loader in loaders.items()}
    asked = loader_of(target, family, windowed=windowed)
    if (refused := reason(architecture, asked)) is not None:
        others = " or ".join(name for name, found in reasons.items() if found is None)
        raise InputError(f"target {target!r} takes {refused}; use --target {others}")


def differing(architecture: Architecture) -> list[str]:
    """Axes whose sizes differ between blocks of one kind."""
    first: dict[str, dict[str, int]] = {}
    found: dict[str, None] = {}
    for block in architecture.blocks:
        own = sizes(block)
        alike = first.setdefault(block.kind, own)
        found |= {axis: None for axis in AXES[block.kind] if own.get(axis) != alike.get(axis)}
    return list(found)


def expert_formats(block: Block) -> set[Format]:
    """The formats of a block's routed experts; none where it has none or all of it is BF16."""
    return {format for group, format in block.formats if group.startswith(EXPERTS)}


def reason(architecture: Architecture, loader: Loader) -> str | None:
    """What a loader takes, where this student is something else; None where it is that."""
    if loader.families is not None and architecture.family not in loader.families:
        return f"{', '.join(loader.families)}, not {architecture.family}"
    plain = is_plain(architecture)
    if not plain:
        if foreign := [axis for axis in differing(architecture) if axis not in loader.uneven]:
            return f"blocks of one size of {foreign[0]}, which differs in this student"
        if loader.removes == "layer" and not is_whole(architecture):
            return "whole layers only, and this student has halves of some"
        if not loader.uneven:
            return f"what the config class of {architecture.family} expresses, not these sizes"
    if loader.first and architecture.blocks[0].kind != loader.first:
        kind = architecture.blocks[0].kind
        return f"students that begin with {loader.first}, and this one begins with {kind}"
    if loader.expert_formats is not None:
        experts = [expert_formats(block) for block in architecture.blocks]
        if refused := [each for each in experts if not each <= set(loader.expert_formats)]:
            return (
                f"routed experts in {', '.join(loader.expert_formats)} only, and this student has "
                f"{', '.join(sorted(refused[0]))} ones"
            )
        if any(len(each) > 1 for each in experts):
            return "one format for all matrices of a layer's routed experts"
    formats = set(weight_formats(architecture).values())
    kv_formats = set(architecture.kv_formats.values())
    told = len(kv_formats) <= 1 or loader.kv_scope == "block"
    known = loader.formats + (loader.even_formats if plain else ())
    if not (formats <= set(known) and told and kv_formats <= set(loader.kv_formats)):
        one = "a KV format for all blocks" if loader.kv_scope == "global" else "KV formats"
        return (
            f"{', '.join(loader.formats)} only, with {one} of {', '.join(loader.kv_formats)}; this "
            f"student has {', '.join(sorted(formats | {'bf16'}))} weights and "
            f"{kv_text(architecture)} KV"
        )
    for group, format in architecture.outside_formats:
        known = loader.embedding_formats if group == EMBEDDING else loader.head_formats
        known = loader.tied_formats if architecture.tied else known
        if format not in known:
            return f"the {group} in {', '.join(known)} only, and this student has it in {format}"
    rounding = {format for format in formats if FORMATS[format].rounds_inputs}
    if loader.uneven != EVERY_AXIS and rounding and formats - rounding:
        return (
            "formats that round inputs or formats that do not, and this student has "
            f"{min(rounding)} and {min(formats - rounding)}"
        )
    return None
