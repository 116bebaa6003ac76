"""A model as a residual stream and a list of blocks: pure data, no torch.

Field names are axis names: the same word is the table's axis, the score's key and the YAML key.
``query`` counts query heads per KV head, ``head`` Mamba heads per group and ``value`` value heads
per key head, because those are the numbers that every group of a layer shares.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    with_config,
)

from compress.core.errors import InputError
from compress.core.settings import first_fault
from compress.formats.table import KV_FORMATS, Format, GroupFormats, KvFormat, by_group, used_in

# As JSON has them: a number is no text, and what is not known is an error.
STRICT = ConfigDict(extra="forbid", strict=True)
# An object in JSON.
Formats = Annotated[
    GroupFormats,
    BeforeValidator(lambda found: tuple(found.items()) if isinstance(found, dict) else found),
    AfterValidator(lambda found: by_group(dict(found))),
    PlainSerializer(dict),
]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention: ``kv_head`` groups of ``query`` heads of ``head_dim``.

    ``window`` limits how many tokens it sees; without ``rope`` it knows no positions. ``qkv_bias``
    and ``qk_norm`` say what a config may choose to have, in families where it may. ``formats`` are
    those of its linear groups, as of every block, ``kv_format`` is that of its cache.
    """

    kind: Literal["attention"] = "attention"
    layer: int
    kv_head: int
    query: int
    head_dim: int
    window: int | None = None
    rope: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    formats: Formats = ()
    kv_format: KvFormat = "bf16"


@dataclass(frozen=True, kw_only=True)
class Mla:
    """Multi-head latent attention: ``query`` heads that share one latent of keys and values.

    A head's queries and keys have ``nope_dim`` numbers without positions and ``rope_dim`` with;
    those of the keys with positions are shared too. ``q_rank`` is the width that queries are made
    from; None: they are made from the residual stream.
    """

    kind: Literal["mla"] = "mla"
    layer: int
    query: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    kv_rank: int
    q_rank: int | None
    formats: Formats = ()
    kv_format: KvFormat = "bf16"


@dataclass(frozen=True, kw_only=True)
class Ffn:
    """A dense feed-forward block of ``ffn`` neurons; gated ones have a third matrix."""

    kind: Literal["ffn"] = "ffn"
    layer: int
    ffn: int
    gated: bool
    formats: Formats = ()


@dataclass(frozen=True, kw_only=True)
class Moe:
    """Routed experts and a shared one, if ``shared_ffn`` is not None; gated as an FFN is.

    A router chooses ``top_k`` experts from the best ``top_group`` of ``routing_group`` groups.
    ``latent`` is the experts' input width if projected.
    """

    kind: Literal["moe"] = "moe"
    layer: int
    expert: int
    expert_ffn: int
    shared_ffn: int | None
    top_k: int
    routing_group: int = 1
    top_group: int = 1
    latent: int | None = None
    gated: bool = False
    formats: Formats = ()

    @property
    def fewest_experts(self) -> int:
        """Fewest that leave it ``top_k`` to choose; groups are told apart by their best two."""
        of_group = 1 if self.routing_group == 1 else 2
        return self.routing_group * max(of_group, -(-self.top_k // self.top_group))


@dataclass(frozen=True, kw_only=True)
class Mamba:
    """Mamba-2: ``group`` groups of ``head`` heads of ``channel`` channels; B and C per group."""

    kind: Literal["mamba"] = "mamba"
    layer: int
    group: int
    head: int
    channel: int
    state: int
    kernel: int
    formats: Formats = ()


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Gated delta rule: ``key_head`` heads of ``key_dim``, each with its ``value`` value heads.

    Every value head keeps a state of ``key_dim`` by ``value_dim``.
    """

    kind: Literal["delta"] = "delta"
    layer: int
    key_head: int
    value: int
    key_dim: int
    value_dim: int
    kernel: int
    formats: Formats = ()


@dataclass(frozen=True, kw_only=True)
class ShortConv:
    """A gated convolution over ``kernel`` tokens with ``inner`` channels, which nothing cuts."""

    kind: Literal["conv"] = "conv"
    layer: int
    inner: int
    kernel: int
    formats: Formats = ()


Block = Attention | Mla | Ffn | Moe | Mamba | DeltaNet | ShortConv


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that search, memory, surgery, model building and export have to agree on.

    ``blocks`` are in the order of execution; ``layer`` of a block is the number its tensors carry
    on disk, so that a llama layer is two blocks of one number. ``outside_formats`` are those of the
    embedding and of a head of its own. ``mtp`` are those of layers that
    predict further tokens (MTP), if it has them: servers draft with them, nothing of ours does.
    """

    family: str
    vocab: int
    hidden: int
    tied: bool
    blocks: tuple[Annotated[Block, Field(discriminator="kind")], ...]
    outside_formats: Formats = ()
    mtp: tuple[Annotated[Block, Field(discriminator="kind")], ...] = ()

    @property
    def layers(self) -> int:
        """Number of layers on disk."""
        return len({block.layer for block in self.blocks})

    @property
    def formats(self) -> set[Format]:
        """The number formats its blocks use, and those of embedding and head that are not BF16."""
        inside = {format for block in self.blocks for format in used_in(block.formats)}
        return inside | used_in(self.outside_formats) - {"bf16"}

    @property
    def kv_formats(self) -> dict[int, KvFormat]:
        """The KV format of every block that has a cache, by the block's number."""
        found = ((n, kv_format_of(block)) for n, block in enumerate(self.blocks))
        return {number: kv_format for number, kv_format in found if kv_format is not None}


JSON = TypeAdapter(Architecture)


def in_kv_format(architecture: Architecture, kv_format: KvFormat) -> Architecture:
    """The architecture with every KV cache in one format."""
    change: dict[str, Any] = {"kv_format": kv_format}

    def changed(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        return tuple(
            block if kv_format_of(block) is None else dataclasses.replace(block, **change)
            for block in blocks
        )

    own, mtp = changed(architecture.blocks), changed(architecture.mtp)
    return dataclasses.replace(architecture, blocks=own, mtp=mtp)


def without_formats(architecture: Architecture) -> Architecture:
    """The architecture with all weights and KV caches in BF16."""
    blocks = tuple(dataclasses.replace(block, formats=()) for block in architecture.blocks)
    plain = dataclasses.replace(architecture, blocks=blocks, outside_formats=())
    return in_kv_format(plain, KV_FORMATS[0])


def group_format(block: Block, group: str | None) -> Format:
    """The format of a linear group of a block; BF16 of what is in none."""
    return dict(block.formats)[group] if group and block.formats else "bf16"


def kv_format_of(block: Block) -> KvFormat | None:
    """The KV format of a block; None where it has no cache that grows with the context."""
    found: KvFormat | None = getattr(block, "kv_format", None)
    return found


def kv_text(architecture: Architecture) -> str:
    """The KV formats in words: ``fp8``, or ``fp8 in 3 of 8 blocks`` where the others are BF16."""
    found = list(architecture.kv_formats.values())
    other = [kv_format for kv_format in found if kv_format != KV_FORMATS[0]]
    if len(set(found)) <= 1:
        return found[0] if found else KV_FORMATS[0]
    return f"{other[0]} in {len(other)} of {len(found)} blocks"


def block_name(block: Block) -> str:
    """The name that scores, candidates and reports use, such as ``layers.7.ffn``."""
    return f"layers.{block.layer}.{block.kind}"


def sizes(block: Block) -> dict[str, int]:
    """Axis sizes of a block, by axis name."""
    return {
        field.name: value
        for field in dataclasses.fields(block)
        if field.name != "layer" and type(value := getattr(block, field.name)) is int
    }


def cached(block: Block) -> int:
    """Numbers that a cache holds of a block for each token; 0 of one that has no cache."""
    if isinstance(block, Attention):
        return 2 * block.kv_head * block.head_dim
    return block.kv_rank + block.rope_dim if isinstance(block, Mla) else 0


def window(block: Block) -> int | None:
    """How many tokens of a cache a block sees; None: all."""
    return block.window if isinstance(block, Attention) else None


def to_json(architecture: Architecture) -> str:
    """The architecture as JSON; ``from_json`` gives it back without loss."""
    return JSON.dump_json(architecture, indent=1).decode()


def loaded(text: str) -> Any:
    """What a text of JSON holds; InputError where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"architecture.json is not JSON: {error}") from error


def from_json(text: str) -> Architecture:
    """Read what ``to_json`` wrote; InputError on unknown, missing or wrong fields.

    A ``kv_format`` of the whole, as was written once, is that of every attention block.
    """
    found = loaded(text)
    if isinstance(found, dict) and "kv_format" in found:
        own, blocks = {"kv_format": found.pop("kv_format")}, found.get("blocks")
        for block in blocks if isinstance(blocks, list) else ():
            if isinstance(block, dict) and block.get("kind") == "attention":
                block |= own
        text = json.dumps(found)
    try:
        return JSON.validate_json(text)
    except ValidationError as error:
        raise InputError(f"architecture.json is not one of ours: {first_fault(error)}") from error
