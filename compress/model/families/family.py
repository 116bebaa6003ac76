"""What a family has to say: config <-> Architecture, its tensors, and where its modules sit."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compress.model.architecture import (
    Architecture,
    Attention,
    Block,
    DeltaNet,
    Ffn,
    Mamba,
    Mla,
    Moe,
    ShortConv,
)
from compress.model.families.settings import Kind
from compress.model.layout import Slot

Config = Mapping[str, Any]
# What a section's names begin with on disk, its table, and the block whose sizes it has besides.
Section = tuple[str, Mapping[str, Slot], Block | None]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a kind of block sits inside a transformers layer module.

    ``mixer`` computes the branch; ``norm`` feeds it, None: the residual stream itself does;
    ``post`` is the norm, if any, that its output goes through before it is added; ``beside`` is
    another module that reads what the mixer does and whose output is added to its own. All are
    attributes of the layer. Kinds of the same norms take turns. A ``pair`` returns something else
    beside its branch. ``router`` is the path of the module that chooses experts.
    """

    mixer: str
    norm: str | None = None
    post: str | None = None
    pair: bool = False
    beside: str | None = None
    router: str | None = None

    @property
    def mixers(self) -> tuple[str, ...]:
        """The modules that compute the branch, as the sum of what they put out."""
        return (self.mixer,) if self.beside is None else (self.mixer, self.beside)

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of the branch, by which its place in a layer is known."""
        return tuple(filter(None, (self.norm, self.post)))


def by_layer(architecture: Architecture, entry: Callable[[list[Block]], Any]) -> list[Any]:
    """An entry for every layer, of its blocks."""
    layers = itertools.groupby(architecture.blocks, key=lambda block: block.layer)
    return [entry(list(blocks)) for _, blocks in layers]


def read_block(config: Config, kind: str, layer: int, *, gated: bool) -> Block:
    """One block of a config; KeyError where it lacks a key."""
    if kind == "attention":
        kv_heads = config["num_key_value_heads"]
        return Attention(
            layer=layer,
            kv_head=kv_heads,
            query=config["num_attention_heads"] // kv_heads,
            head_dim=config["head_dim"],
            window=config.get("sliding_window"),
            rope=config.get("rope", True),
            qkv_bias=config.get("qkv_bias", False),
            qk_norm=config.get("qk_norm", False),
        )
    if kind == "mla":
        return Mla(
            layer=layer,
            query=config["num_attention_heads"],
            nope_dim=config["qk_nope_head_dim"],
            rope_dim=config["qk_rope_head_dim"],
            v_dim=config["v_head_dim"],
            kv_rank=config["kv_lora_rank"],
            q_rank=config["q_lora_rank"],
        )
    if kind == "conv":
        return ShortConv(layer=layer, inner=config["hidden_size"], kernel=config["conv_L_cache"])
    if kind == "ffn":
        return Ffn(layer=layer, ffn=config["intermediate_size"], gated=gated)
    if kind == "mamba":
        groups = config["n_groups"]
        return Mamba(
            layer=layer,
            group=groups,
            head=config["mamba_num_heads"] // groups,
            channel=config["mamba_head_dim"],
            state=config["ssm_state_size"],
            kernel=config["conv_kernel"],
        )
    if kind == "delta":
        key_heads = config["linear_num_key_heads"]
        return DeltaNet(
            layer=layer,
            key_head=key_heads,
            value=config["linear_num_value_heads"] // key_heads,
            key_dim=config["linear_key_head_dim"],
            value_dim=config["linear_value_head_dim"],
            kernel=config["linear_conv_kernel_dim"],
        )
    return Moe(
        layer=layer,
        expert=config["n_routed_experts"],
        expert_ffn=config["moe_intermediate_size"],
        shared_ffn=config["moe_shared_expert_intermediate_size"],
        top_k=config["num_experts_per_tok"],
        routing_group=config.get("n_group", 1),
        top_group=config.get("topk_group", 1),
        latent=config.get("moe_latent_size"),
        gated=gated,
    )


def fixed_keys(block: Block) -> dict[str, Any]:
    """Config keys that one block fixes; a student is plain when all its layers agree on them."""
    if isinstance(block, Attention):
        return {
            "num_attention_heads": block.kv_head * block.query,
            "num_key_value_heads": block.kv_head,
            "head_dim": block.head_dim,
        }
    if isinstance(block, ShortConv):
        return {}
    if isinstance(block, Mla):
        return dict.fromkeys(("num_attention_heads", "num_key_value_heads"), block.query)
    if isinstance(block, Ffn):
        return {"intermediate_size": block.ffn}
    if isinstance(block, Mamba):
        return {"mamba_num_heads": block.group * block.head, "mamba_head_dim": block.channel}
    if isinstance(block, DeltaNet):
        return {
            "linear_num_key_heads": block.key_head,
            "linear_num_value_heads": block.key_head * block.value,
            "linear_value_head_dim": block.value_dim,
        }
    return {
        "n_routed_experts": block.expert,
        "moe_intermediate_size": block.expert_ffn,
        "moe_shared_expert_intermediate_size": block.shared_ffn,
    } | ({} if block.latent is None else {"moe_latent_size": block.latent})


def heads_wide(own: dict[str, Any]) -> dict[str, Any]:
    """Settings with the hidden size that heads fill.

    Some classes want it (transformers 5.23), although the model code does not need it.
    """
    if not own.get("head_dim"):
        return own
    return own | {"hidden_size": own["num_attention_heads"] * own["head_dim"]}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family. Tensor names are those of the checkpoint on disk.

    ``normal`` is a config under the family's own names, ``reads`` the keys that its model code
    reads and their kinds: the others are ignored; ``refused`` are switches that no table expresses.
    ``write`` gives the keys that the whole architecture fixes, ``lists`` those that speak of layers
    by their numbers, ``fixed`` those that a block fixes, ``parts`` those that modules of its layer
    need to be other than ``fixed`` says. ``modules`` is where transformers keeps the family: module
    path, model class, layer class; ``stock`` says whether its config class takes an architecture
    whose layers agree. ``whole_hidden`` says why the hidden size of a student stays its teacher's.
    ``attention`` is transformers' name of what computes it. ``taken`` gives settings that differ in
    what its config class checks, and pass there, and ``settled`` puts right on a config what
    follows from the true ones. Without ``served_quantized`` stock servers do not know quantized
    weights by the table's names.
    ``kernels`` are the functions there that packages for a GPU replace, where they can be imported.
    """

    model_type: str
    normal: Callable[[Config], dict[str, Any]]
    reads: Mapping[str, Kind]
    refused: Mapping[str, bool]
    read: Callable[[Config], Architecture]
    model: Mapping[str, Slot]
    head: str
    embedding: str
    layer: str
    tensors: Callable[[Block], Mapping[str, Slot]]
    write: Callable[[Config, Architecture], dict[str, Any]]
    modules: tuple[str, str, str]
    final_norm: str
    sites: Mapping[str, Site]
    attention: Literal["sdpa", "eager"] = "sdpa"
    fixed: Callable[[Block], dict[str, Any]] = fixed_keys
    kernels: tuple[str, ...] = ()
    parts: Callable[[Block], dict[str, dict[str, Any]]] = lambda _: {}
    lists: Callable[[Architecture], dict[str, Any]] = lambda _: {}
    stock: Callable[[Architecture], bool] = lambda _: True
    whole_hidden: str | None = None
    taken: Callable[[dict[str, Any]], dict[str, Any]] = heads_wide
    settled: Callable[[Any], None] = lambda _: None
    served_quantized: bool = True
    mtp: Callable[[Architecture], Iterable[Section]] = lambda _: ()
    # The model type whose config class it has in transformers, if not its own.
    classes: str | None = None
    # Tensors on disk that transformers leaves out, by the beginning of their names; ``{layers}`` is
    # the number of layers. Of those that ``mtp`` does not name, a student has none.
    unread: tuple[str, ...] = ()
