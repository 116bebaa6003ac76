"""Who a student is for, and what each of them loads."""

from typing import Literal, get_args

from compress.searches.space import Space

Target = Literal["compress", "transformers", "vllm"]


TARGETS: tuple[Target, ...] = get_args(Target)


def restricted(space: Space, target: Target) -> Space:
    """The space with only what the target's loader builds from a config.

    Stock loaders want one value per width and whole layers; stock transformers no formats besides.
    """
    if target == "compress":
        return space
    axes = {name: axis.model_copy(update={"scope": "global"}) for name, axis in space.axes.items()}
    remove = "layer" if space.remove == "block" else space.remove
    formats = ("bf16",) if target == "transformers" else space.formats
    kv_formats = ("bf16",) if target == "transformers" else space.kv_formats
    return space.model_copy(
        update={"axes": axes, "remove": remove, "formats": formats, "kv_formats": kv_formats}
    )
