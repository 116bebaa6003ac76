"""The model families, and the one way to find one. Adding a family is one file of tables."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

from compress.core.errors import InputError
from compress.formats.table import Format, GroupFormats, by_group
from compress.model.architecture import Architecture, Block, sizes
from compress.model.families.deepseek_v3 import DEEPSEEK_V3
from compress.model.families.family import Family, Section
from compress.model.families.gemma3 import GEMMA3
from compress.model.families.glm4_moe import GLM4_MOE
from compress.model.families.gpt_oss import GPT_OSS
from compress.model.families.granitemoehybrid import GRANITEMOEHYBRID
from compress.model.families.lfm2 import LFM2
from compress.model.families.llama import LLAMA
from compress.model.families.ministral3 import MINISTRAL3
from compress.model.families.mistral import MINISTRAL, MISTRAL
from compress.model.families.nemotron import NEMOTRON
from compress.model.families.nemotron_h import NEMOTRON_H
from compress.model.families.nemotron_nas import NEMOTRON_NAS
from compress.model.families.olmo2 import OLMO2, OLMO3
from compress.model.families.phi3 import PHI3
from compress.model.families.qwen2 import QWEN2
from compress.model.families.qwen3 import QWEN3
from compress.model.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from compress.model.families.qwen3_moe import QWEN3_MOE
from compress.model.families.qwen3_next import QWEN3_NEXT
from compress.model.families.settings import EXPERTS, require
from compress.model.families.smollm3 import SMOLLM3
from compress.model.families.wrapper import WRAPPERS, text_config
from compress.model.layout import Parameter, Slot, shape

DENSE = (
    *(LLAMA, GEMMA3, MISTRAL, MINISTRAL, MINISTRAL3, NEMOTRON, OLMO2, OLMO3, PHI3),
    *(QWEN2, QWEN3, SMOLLM3),
)
MIXED = (
    *(DEEPSEEK_V3, GLM4_MOE, GRANITEMOEHYBRID, QWEN3_MOE, QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE),
    *(GPT_OSS, LFM2, NEMOTRON_H, NEMOTRON_NAS),
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (*DENSE, *MIXED)}


def family_of(model_type: str) -> Family:
    """The family of a ``model_type``; InputError lists the known ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join((*FAMILIES, *WRAPPERS))
        raise InputError(f"model_type {model_type!r} is not supported; known: {known}")
    return FAMILIES[model_type]


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the family's model code reads of a config, under its own names, of the right kinds.

    All else says how others run the model (attention kernels, output flags, dtypes, quantization
    that was undone, code of the checkpoint): it is left out.
    """
    if "model_type" not in config:
        raise InputError("config.json has no model_type")
    config = text_config(config)
    family = family_of(config["model_type"])
    own = family.normal(config)
    found = {key: own[key] for key in family.reads if key in own}
    require(found, EXPERTS)
    require(found, family.reads)
    return found


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Architecture of a Hugging Face config; InputError on what the tables cannot express.

    Of a multimodal model it is that of its text model.
    """
    settings = settings_of(config)
    family = family_of(text_config(config)["model_type"])
    for key, refused in family.refused.items():
        if settings.get(key) is refused:
            said = f"{key}={str(refused).lower()}"
            raise InputError(f"{said} is not supported for {family.model_type} models")
    try:
        return family.read(settings)
    except KeyError as error:
        raise InputError(f"config.json has no {error.args[0]} ({family.model_type})") from error


def parameters(architecture: Architecture) -> Iterator[Parameter]:
    """Every tensor of a model, in a stable order, under the names on disk.

    What is stacked over experts there comes expert by expert.
    """
    family = family_of(architecture.family)
    yield from of_section(("", dict(outside(architecture)), None), architecture)
    for number, block in enumerate(architecture.blocks):
        section = family.layer.format(layer=block.layer), family.tensors(block), block
        yield from of_section(section, architecture, number)


def outside(architecture: Architecture) -> Iterator[tuple[str, Slot]]:
    """The tensors outside the blocks, by their names on disk; a tied head is none of its own.

    One that is folded leaves nothing for the final norm to fold.
    """
    family, folded = family_of(architecture.family), folds_head(architecture)
    for name, slot in family.model.items():
        if name != family.head or not architecture.tied:
            yield name, replace(slot, normalizes=()) if folded else slot


def folds_head(architecture: Architecture) -> bool:
    """Whether a hidden cut scales the head: it is tied to an embedding that is folded."""
    family = family_of(architecture.family)
    return architecture.tied and bool(family.model[family.embedding].times_root)


def mtp_parameters(architecture: Architecture) -> Iterator[Parameter]:
    """The tensors of layers that predict further tokens, which a checkpoint has besides."""
    for section in family_of(architecture.family).mtp(architecture):
        yield from of_section(section, architecture)


def stored_parameters(architecture: Architecture) -> Iterator[Parameter]:
    """Every tensor of a checkpoint: those of the model, then those besides."""
    yield from parameters(architecture)
    yield from mtp_parameters(architecture)


def of_section(
    section: Section, architecture: Architecture, number: int | None = None
) -> Iterator[Parameter]:
    """The tensors of a section of a checkpoint; ``number`` is the block's that it is."""
    prefix, table, block = section
    shared = {"hidden": architecture.hidden, "vocab": architecture.vocab}
    axis_sizes = shared if block is None else shared | sizes(block)
    for name, slot in table.items():
        for expert in experts_of(name, block):
            yield Parameter(
                name=prefix + name.format(expert=expert),
                slot=slot,
                sizes=axis_sizes,
                block=number,
                expert=expert,
                stack=prefix + slot.stack if slot.stack else None,
            )


def experts_of(name: str, block: Block | None) -> Sequence[int | None]:
    """The experts that have a tensor of this name in a table; [None] where it is not theirs."""
    return range(sizes(block)["expert"]) if block and "{expert}" in name else [None]


def count_parameters(architecture: Architecture) -> int:
    """Number of parameters, the router's correction bias included, tied embeddings once.

    Those of layers that predict further tokens are counted.
    """
    hidden, family = architecture.hidden, architecture.family
    inside = sum(block_count(block, hidden, family) for block in architecture.blocks)
    further = sum(parameter.count for parameter in mtp_parameters(architecture))
    return outside_count(architecture) + inside + further


# A search asks for the same few hundred blocks hundreds of thousands of times.
@lru_cache(maxsize=2**16)
def linear_groups(block: Block, family: str) -> tuple[str, ...]:
    """The groups of a block's linear layers that share a format, in the order of the table."""
    slots = family_of(family).tensors(block).values()
    return tuple(dict.fromkeys(slot.fused for slot in slots if slot.fused))


def outside_groups(architecture: Architecture) -> tuple[str, ...]:
    """The embedding, and a head of its own: what outside the blocks has a format."""
    return tuple(slot.fused for _, slot in outside(architecture) if slot.fused)


def in_one_format(block: Block, family: str, format: Format) -> GroupFormats:
    """The formats of a block of which all groups have the same."""
    return by_group(dict.fromkeys(linear_groups(block, family), format))


@lru_cache(maxsize=2**16)
def block_count(block: Block, hidden: int, family: str) -> int:
    """Parameters of one block."""
    axis_sizes = {"hidden": hidden} | sizes(block)
    return sum(
        len(experts_of(name, block)) * prod(shape(slot.shape, axis_sizes))
        for name, slot in family_of(family).tensors(block).items()
    )


@lru_cache(maxsize=2**16)
def block_active(block: Block, hidden: int, family: str) -> int:
    """Parameters of one block that one token uses: of the routed experts only ``top_k``."""
    axis_sizes = {"hidden": hidden} | sizes(block)
    return sum(
        (axis_sizes["top_k"] if "{expert}" in name else 1) * prod(shape(slot.shape, axis_sizes))
        for name, slot in family_of(family).tensors(block).items()
    )


def outside_count(architecture: Architecture) -> int:
    """Parameters outside the blocks: embedding, head unless tied, final norm."""
    axis_sizes = {"hidden": architecture.hidden, "vocab": architecture.vocab}
    return sum(prod(shape(slot.shape, axis_sizes)) for _, slot in outside(architecture))


def count_active(architecture: Architecture) -> int:
    """Parameters that one token uses, tied embeddings once."""
    hidden, family = architecture.hidden, architecture.family
    inside = sum(block_active(block, hidden, family) for block in architecture.blocks)
    return outside_count(architecture) + inside
