"""What llama and the families that came of it share: attention and a gated FFN in every layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture, Attention, Block
from compress.model.families import settings
from compress.model.families.family import (
    Config,
    Family,
    Section,
    Site,
    by_layer,
    fixed_keys,
    read_block,
)
from compress.model.families.settings import Kind
from compress.model.layout import Part, Slot

MODEL = {
    "model.embed_tokens.weight": Slot(shape="vocab hidden", fused="embedding"),
    "model.norm.weight": Slot(shape="hidden", normalizes=("hidden",)),
    "lm_head.weight": Slot(shape="vocab hidden", fused="head"),
}
ATTENTION = {
    "input_layernorm.weight": Slot(shape="hidden", normalizes=("hidden",)),
    "self_attn.q_proj.weight": Slot(shape="(kv_head query head_dim) hidden", fused="qkv"),
    "self_attn.k_proj.weight": Slot(shape="(kv_head head_dim) hidden", fused="qkv"),
    "self_attn.v_proj.weight": Slot(shape="(kv_head head_dim) hidden", fused="qkv"),
    "self_attn.o_proj.weight": Slot(shape="hidden (kv_head query head_dim)", fused="o"),
}
QKV_BIASES = {
    "self_attn.q_proj.bias": Slot(shape="(kv_head query head_dim)"),
    "self_attn.k_proj.bias": Slot(shape="(kv_head head_dim)"),
    "self_attn.v_proj.bias": Slot(shape="(kv_head head_dim)"),
}
# One norm for all heads, which no cut makes narrower.
QK_NORMS = {
    "self_attn.q_norm.weight": Slot(shape="head_dim", normalizes=("head_dim",)),
    "self_attn.k_norm.weight": Slot(shape="head_dim", normalizes=("head_dim",)),
}
FFN_NORM = {"post_attention_layernorm.weight": Slot(shape="hidden", normalizes=("hidden",))}
FFN = FFN_NORM | {
    "mlp.gate_proj.weight": Slot(shape="ffn hidden", fused="gate_up"),
    "mlp.up_proj.weight": Slot(shape="ffn hidden", fused="gate_up"),
    "mlp.down_proj.weight": Slot(shape="hidden ffn", fused="down"),
}


def experts(module: str, reading: str | None = None, writing: str | None = None) -> dict[str, Slot]:
    """The gated experts of a module, which holds all that read as one, gate first.

    ``reading`` and ``writing`` are the tensors on disk, where all experts are stacked there too.
    """
    gate, up = (
        Slot(
            shape="expert_ffn hidden",
            fused="experts_up",
            place=f"{module}.gate_up_proj",
            part=Part(number=number, of=2),
            stack=reading,
        )
        for number in range(2)
    )
    place = f"{module}.down_proj"
    down = Slot(shape="hidden expert_ffn", fused="experts_down", place=place, stack=writing)
    matrices = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return {f"{module}.{{expert}}.{name}.weight": slot for name, slot in matrices.items()}


EXPERTS = experts("mlp.experts")
SITES = {
    "attention": Site(mixer="self_attn", norm="input_layernorm", pair=True),
    "mla": Site(mixer="self_attn", norm="input_layernorm", pair=True),
    "ffn": Site(mixer="mlp", norm="post_attention_layernorm"),
    "moe": Site(mixer="mlp", norm="post_attention_layernorm", router="mlp.gate"),
}
READS = (
    settings.COMMON
    | dict.fromkeys(("num_key_value_heads", "head_dim"), settings.SIZE.or_null)
    | dict.fromkeys(("rope_parameters", "rope_scaling"), settings.TABLE.or_null)
    | dict.fromkeys(("partial_rotary_factor", "attention_dropout"), settings.NUMBER.or_null)
    | dict.fromkeys(("rope_theta", "original_max_position_embeddings"), settings.NUMBER)
    | {
        "num_hidden_layers": settings.LAYERS,
        "hidden_act": settings.ACTIVATION,
        "rms_norm_eps": settings.REAL,
        "attention_bias": settings.SWITCH,
        "layer_types": settings.NAMES.or_null,
    }
)
WINDOW = {"sliding_window": settings.SIZE.or_null}
# Layer types of transformers, by whether a layer's attention is limited to a window.
TYPES = {False: "full_attention", True: "sliding_attention"}


def read(
    config: Config,
    family: str,
    partial: Sequence[str] = ("default", "proportional"),
    second: Callable[[int], str] = lambda layer: "ffn",
    *,
    first: Callable[[int], str] = lambda layer: "attention",
    gated: bool = True,
) -> Architecture:
    """Architecture of a config; windows and missing positions are by layer where it says so.

    ``partial`` are the rope types that may turn a part of the channels only, ``first`` and
    ``second`` give the kinds of a layer's blocks, of which the second is ``gated`` or not.
    """
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    head_dim = settings.head_width(config)
    kv_heads = config.get("num_key_value_heads") or heads
    settings.require_divides(config, ("num_attention_heads", "num_key_value_heads"))
    settings.require_rope(config, head_dim, partial)
    if not -config["vocab_size"] <= (pad := config.get("pad_token_id") or 0) < config["vocab_size"]:
        raise InputError(f"pad_token_id {pad} is beyond vocab_size {config['vocab_size']}")
    kinds, turns = config.get("layer_types"), config.get("no_rope_layers")
    for key, listed in (("layer_types", kinds), ("no_rope_layers", turns)):
        if listed is not None and len(listed) != layers:
            raise InputError(f"{key} lists {len(listed)} layers, num_hidden_layers is {layers}")
    whole = {**config, "head_dim": head_dim, "num_key_value_heads": kv_heads}
    blocks: list[Block] = []
    for layer in range(layers):
        own: dict[str, Any] = {} if turns is None else {"rope": bool(turns[layer])}
        if "sliding_window" in config and kinds is not None:
            own["sliding_window"] = window_of(config, kinds[layer])
        for kind in (first(layer), second(layer)):
            blocks.append(read_block(whole | own, kind, layer, gated=gated))
    return Architecture(
        family=family,
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        tied=config.get("tie_word_embeddings", False),
        blocks=tuple(blocks),
    )


def window_of(config: Config, kind: str) -> int | None:
    """The window of a layer type; InputError on a type that is not known or lacks its window."""
    if kind not in TYPES.values():
        raise InputError(
            f"layer type {kind!r} is not supported; known: {', '.join(TYPES.values())}"
        )
    if kind == TYPES[False]:
        return None
    window: int | None = config["sliding_window"]
    if window is None:
        raise InputError(f"layer_types names {kind} layers, but no sliding_window is used")
    return window


def layer_types(architecture: Architecture) -> dict[str, list[Any]]:
    """``layer_types`` as the blocks say; a layer without attention has none that matters."""
    return {"layer_types": by_layer(architecture, lambda blocks: TYPES[windowed(blocks)])}


def windowed(blocks: Sequence[Block]) -> bool:
    """Whether a layer's attention is limited to a window."""
    return any(isinstance(block, Attention) and block.window is not None for block in blocks)


def write(config: Config, student: Architecture) -> dict[str, Any]:
    """Config keys of the whole student; the norm's eps follows a hidden cut (cut equals mask)."""
    return {
        "hidden_size": student.hidden,
        "num_hidden_layers": student.layers,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6) * config["hidden_size"] / student.hidden,
    }


def by_kind(**tables: Mapping[str, Slot]) -> Callable[[Block], Mapping[str, Slot]]:
    """The table of a block by its kind."""
    return lambda block: tables[block.kind]


def heads_divide(architecture: Architecture) -> bool:
    """Whether every block's heads divide the hidden size, as some config classes want."""
    attentions = (block for block in architecture.blocks if isinstance(block, Attention))
    return not any(architecture.hidden % (block.kv_head * block.query) for block in attentions)


def heads_fill(architecture: Architecture) -> bool:
    """Whether every block's heads are as wide as the hidden size gives them, rounded down."""
    attentions = (block for block in architecture.blocks if isinstance(block, Attention))
    return all(
        block.head_dim == architecture.hidden // (block.kv_head * block.query)
        for block in attentions
    )


def decoder(
    model_type: str,
    prefix: str,
    tensors: Callable[[Block], Mapping[str, Slot]],
    *,
    read: Callable[[Config], Architecture],
    reads: Mapping[str, Kind] = READS,
    normal: Callable[[Config], dict[str, Any]] = dict,
    refused: Mapping[str, bool] | None = None,
    fixed: Callable[[Block], dict[str, Any]] = fixed_keys,
    parts: Callable[[Block], dict[str, dict[str, Any]]] = lambda _: {},
    lists: Callable[[Architecture], dict[str, Any]] = lambda _: {},
    stock: Callable[[Architecture], bool] = lambda _: True,
    mtp: Callable[[Architecture], Iterable[Section]] = lambda _: (),
    unread: tuple[str, ...] = (),
    package: str | None = None,
) -> Family:
    """A family whose modules sit where llama's do; its classes begin with ``prefix``.

    ``package`` is what transformers calls its code where that is not the model type.
    """
    package = package or model_type
    module = f"transformers.models.{package}.modeling_{package}"
    return Family(
        model_type=model_type,
        normal=normal,
        reads=reads,
        refused=refused or {},
        read=read,
        model=MODEL,
        head="lm_head.weight",
        embedding="model.embed_tokens.weight",
        layer="model.layers.{layer}.",
        tensors=tensors,
        write=write,
        modules=(module, f"{prefix}ForCausalLM", f"{prefix}DecoderLayer"),
        final_norm="norm",
        sites=SITES,
        fixed=fixed,
        parts=parts,
        lists=lists,
        stock=stock,
        mtp=mtp,
        unread=unread,
    )
