"""Who a student is for, and what each of them loads of a family: a table that the search reads."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from compress.core.errors import InputError
from compress.formats.table import FORMATS, KV_FORMATS, WEIGHT_ONLY, Format, KvFormat
from compress.memory.devices import Device
from compress.model.architecture import Architecture, window
from compress.model.families import family_of
from compress.searches.space import Space
from compress.student.units import AXES

Target = Literal["vllm", "transformers", "llama.cpp", "compress"]
SERVERS: tuple[Target, ...] = ("vllm", "transformers")
EVERY_AXIS = tuple({axis: None for axes in AXES.values() for axis in axes})


@dataclass(frozen=True, kw_only=True)
class Loader:
    """What a target builds of a family.

    Attributes:
        formats: of weights inside blocks; ``even_formats`` besides where all layers are alike,
            ``expert_formats`` where those of routed experts are fewer, and one for all of a layer.
        head_formats: of a head of its own; ``embedding_formats`` of the embedding then, and
            ``tied_formats`` of one that is both.
        kv_formats: of caches; ``kv_scope`` says whether every block has one or all the same.
        uneven: axes whose sizes may differ from layer to layer.
        windows: whether attention may be limited to windows where layers differ.
        removes: what may be gone as a whole: layers, or a half of one.
        first: the kind of block that a student has to begin with.
        multiple: of which widths are one, where a size of its own is not; 1 asks for nothing.
        mtp: whether it drafts with layers that predict further tokens.
        families: those that it loads; None: all.
    """

    formats: tuple[Format, ...]
    expert_formats: tuple[Format, ...] | None = None
    head_formats: tuple[Format, ...] = ("bf16",)
    embedding_formats: tuple[Format, ...] = ("bf16",)
    tied_formats: tuple[Format, ...] = ("bf16",)
    kv_formats: tuple[KvFormat, ...]
    kv_scope: Literal["global", "block"] = "global"
    uneven: tuple[str, ...] = ()
    windows: bool = True
    removes: Literal["layer", "block"] = "layer"
    first: str | None = None
    multiple: int = 1
    mtp: bool = False
    even_formats: tuple[Format, ...] = ()
    families: tuple[str, ...] | None = None


# GGML has no 8-bit floats, and blocks of 32 where int4 has groups of 128.
GGUF_FORMATS: tuple[Format, ...] = ("bf16", "q8_0", "q4_0", "mxfp4")
# What each loads of any family.
LOADERS: Mapping[Target, Loader] = {
    "vllm": Loader(
        formats=("bf16", "fp8", "nvfp4", "int4", "fp8_a8", "nvfp4_a4"),
        # Its kernels for experts in FP8 round activations too.
        expert_formats=("bf16", "nvfp4", "int4", "fp8_a8", "nvfp4_a4"),
        head_formats=("bf16", "fp8", "nvfp4", "int4"),
        kv_formats=KV_FORMATS,
        mtp=True,
    ),
    "transformers": Loader(
        formats=("bf16", "fp8", "nvfp4", "int4"),
        # NVFP4 and one format of several are read wrong, without an error (5.23).
        expert_formats=("bf16", "fp8"),
        head_formats=("bf16", "fp8", "nvfp4", "int4"),
        kv_formats=KV_FORMATS,
    ),
    "llama.cpp": Loader(
        families=("llama", "mistral", "qwen2", "qwen3"),
        formats=GGUF_FORMATS,
        even_formats=("nvfp4",),
        head_formats=GGUF_FORMATS,
        embedding_formats=GGUF_FORMATS,
        tied_formats=GGUF_FORMATS,
        kv_formats=("bf16",),
        multiple=64,
    ),
    "compress": Loader(
        formats=tuple(FORMATS),
        head_formats=WEIGHT_ONLY,
        embedding_formats=WEIGHT_ONLY,
        tied_formats=WEIGHT_ONLY,
        kv_formats=KV_FORMATS,
        kv_scope="block",
        uneven=EVERY_AXIS,
        removes="block",
    ),
}
# What is otherwise of a family. Uneven students are DeciLM, whose query heads are one number, whose
# first layer has attention and which knows no windows, and Nemotron-H Puzzle
# (``layouts/uneven.py``), of which vLLM's Mamba layers are alike and its experts were not run: it
# has no CPU kernels for them.
DECILM: Mapping[str, Any] = {
    "uneven": ("ffn",),
    "windows": False,
    "removes": "block",
    "first": "attention",
}
PUZZLE: Mapping[str, Any] = {"uneven": ("ffn", "kv_head", "query")}
EVERY_PUZZLE: Mapping[str, Any] = {"uneven": EVERY_AXIS}
# Of llama.cpp, which has no scales of NVFP4 in its FFNs (``layouts/gguf.py``).
DECI: Mapping[str, Any] = {**DECILM, "uneven": ("ffn", "query", "kv_head")}
# Experts are stacked on disk, where readers know no scales of theirs.
STACKED: Mapping[str, Any] = {"expert_formats": ("bf16",)}
FAMILIES: Mapping[tuple[Target, str], Mapping[str, Any]] = {
    **{(t, family): DECILM for t in SERVERS for family in ("llama", "mistral", "qwen2")},
    ("vllm", "nemotron_h"): PUZZLE,
    ("transformers", "nemotron_h"): EVERY_PUZZLE,
    **{(t, "granitemoehybrid"): STACKED for t in SERVERS},
    ("llama.cpp", "llama"): DECI,
}


def loader_of(target: Target, family: str, *, windowed: bool = False) -> Loader:
    """What a target loads of a family; InputError on a target that is none.

    Some take models with windows only where all layers are alike.
    """
    if target not in LOADERS:
        raise InputError(f"target {target!r} is not among {', '.join(LOADERS)}")
    loader = replace(LOADERS[target], **FAMILIES.get((target, family), {}))
    if windowed and not loader.windows:
        loader = replace(loader, uneven=(), removes="layer", first=None)
    if target in ("compress", "llama.cpp") or family_of(family).served_quantized:
        return loader
    return replace(loader, formats=("bf16",), head_formats=("bf16",), expert_formats=None)


def restricted(
    space: Space, target: Target, family: str, *, tied: bool, windowed: bool = False
) -> Space:
    """The space with only what the target's loader builds from a config of a family.

    Axes that may not differ from layer to layer are one for all. Formats of the head that the
    loader does not know are left out, which it has from the embedding where they are ``tied``. A
    loader of BF16 only leaves the other formats of a space out; InputError where a loader of
    several does not know one.
    """
    loader = loader_of(target, family, windowed=windowed)
    if loader.families is not None and family not in loader.families:
        raise InputError(
            f"target {target!r} loads {', '.join(loader.families)}, and this is {family}; "
            "use another --target"
        )
    known = loader.tied_formats if tied else loader.head_formats
    heads = tuple(format for format in space.head_formats if format in known)
    # An embedding has formats of the head's where the loader does not know fewer.
    free = tied or set(heads) <= set(loader.embedding_formats)
    embeddings = None if free else loader.embedding_formats
    whole = {"scope": "global"}
    update: dict[str, object] = {
        "axes": {
            axis: choice if axis in loader.uneven else choice.model_copy(update=whole)
            for axis, choice in space.axes.items()
        },
        "head_formats": heads or known[:1],
        "embedding_formats": narrowed(space.embedding_formats, embeddings),
        "expert_formats": narrowed(space.expert_formats, loader.expert_formats),
        "first": loader.first or space.first,
        "stock": space.stock or not loader.uneven,
    }
    if loader.kv_scope == "global":
        update["kv_scope"] = "global"
    if loader.removes == "layer" and space.remove == "block":
        update["remove"] = "layer"
    kv_formats = tuple(f for f in space.kv_formats if f in loader.kv_formats)
    update["kv_formats"] = kv_formats or loader.kv_formats[:1]
    if loader.formats == ("bf16",):
        update["formats"] = loader.formats
    elif foreign := [format for format in space.formats if format not in loader.formats]:
        raise InputError(
            f"target {target!r} loads {', '.join(loader.formats)}, the space lists {foreign[0]}; "
            "use --target compress or a space without it"
        )
    return space.model_copy(update=update)


def narrowed(
    listed: tuple[Format, ...] | None, known: tuple[Format, ...] | None
) -> tuple[Format, ...] | None:
    """The listed formats that are known, or the first known one; None stands for any."""
    if listed is None or known is None:
        return listed or known
    return tuple(format for format in listed if format in known) or known[:1]


def has_windows(architecture: Architecture) -> bool:
    """Whether any block sees the tokens of a window only."""
    return any(map(window, architecture.blocks))


def served_by(space: Space, device: Device | None) -> tuple[Space, str | None]:
    """The space with only the formats that the device runs, and a line that says what is out.

    InputError where none is left.
    """
    gone = [format for format in space.formats if device and not device.runs(format)]
    if device is None or not gone:
        return space, None
    left = tuple(format for format in space.formats if format not in gone)
    if not left:
        raise InputError(
            f"the space asks for {', '.join(gone)}, which {device.name} has no products for; list "
            "formats of weights alone, or leave --device out and give its memory as --budget"
        )
    line = f"{', '.join(gone)} left out: {device.name} has no products of such numbers"
    return space.model_copy(update={"formats": left}), line
