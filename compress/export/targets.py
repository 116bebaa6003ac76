"""Who a student is for, and what each of them loads."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from compress.core.errors import InputError
from compress.formats.table import FORMATS, KV_FORMATS, Format, KvFormat
from compress.memory.devices import Device
from compress.model.families import family_of
from compress.searches.space import Space

Target = Literal["compress", "transformers", "vllm"]


@dataclass(frozen=True, kw_only=True)
class Loader:
    """What a loader builds: weight and KV formats, and blocks that differ (``uneven``).

    ``kv_scope`` says whether its layout has a KV format for every block or one for all.
    ``mtp`` says whether it drafts with layers that predict further tokens.
    """

    formats: tuple[Format, ...]
    kv_formats: tuple[KvFormat, ...]
    uneven: bool
    kv_scope: Literal["global", "block"] = "global"
    mtp: bool = False


# vLLM reads formats by its ModelOpt loader.
LOADERS: Mapping[Target, Loader] = {
    "compress": Loader(
        formats=tuple(FORMATS), kv_formats=KV_FORMATS, uneven=True, kv_scope="block"
    ),
    "transformers": Loader(formats=("bf16",), kv_formats=("bf16",), uneven=False),
    "vllm": Loader(
        formats=("bf16", *(name for name, row in FORMATS.items() if row.modelopt)),
        kv_formats=KV_FORMATS,
        uneven=False,
        mtp=True,
    ),
}


def loader_of(target: Target, family: str) -> Loader:
    """What a target loads of a family."""
    loader = LOADERS[target]
    if target == "compress" or family_of(family).served_quantized:
        return loader
    return replace(loader, formats=("bf16",))


def restricted(space: Space, target: Target, family: str) -> Space:
    """The space with only what the target's loader builds from a config of a family.

    Stock loaders want one value per width, whole layers and one KV format. A loader of BF16 only
    leaves the other formats of a space out; InputError where a loader of several does not know one.
    """
    loader = loader_of(target, family)
    update: dict[str, object] = {}
    if loader.kv_scope == "global":
        update["kv_scope"] = "global"
    if not loader.uneven:
        whole = {"scope": "global"}
        update["axes"] = {k: axis.model_copy(update=whole) for k, axis in space.axes.items()}
        update["stock"] = True
        update["remove"] = "layer" if space.remove == "block" else space.remove
    if loader.formats == ("bf16",):
        kv_formats = tuple(f for f in space.kv_formats if f in loader.kv_formats)
        update |= {"formats": loader.formats, "kv_formats": kv_formats or loader.kv_formats[:1]}
    elif foreign := [format for format in space.formats if format not in loader.formats]:
        raise InputError(
            f"target {target!r} loads {', '.join(loader.formats)}, the space lists {foreign[0]}; "
            "use --target compress or a space without it"
        )
    return space.model_copy(update=update)


def served_by(space: Space, device: Device | None) -> tuple[Space, str | None]:
    """The space with only the KV formats that the device runs, and a line that says what is out.

    InputError where none is left.
    """
    if device is None or set(space.kv_formats) <= set(device.kv_formats):
        return space, None
    left = tuple(format for format in space.kv_formats if format in device.kv_formats)
    gone = ", ".join(format for format in space.kv_formats if format not in device.kv_formats)
    if not left:
        raise InputError(
            f"the space asks for {gone} KV caches, which no backend is sure to run on "
            f"{device.name}; list {' or '.join(device.kv_formats)} in kv_formats, or leave "
            "--device out and give its memory as --budget"
        )
    line = f"{gone} KV caches are left out: no backend is sure to run them on {device.name}"
    return space.model_copy(update={"kv_formats": left}), line
