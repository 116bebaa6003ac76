"""The README.md of an export: where it comes from, what was measured, how to load it."""

from collections.abc import Mapping
from typing import Any

from compress.export.targets import SERVERS
from compress.formats.table import FORMATS, formats_text
from compress.model.architecture import (
    Architecture,
    Block,
    block_name,
    kv_format_of,
    kv_text,
    sizes,
)
from compress.model.build import is_plain
from compress.model.families import count_parameters

LOADING = {
    "transformers": (
        "`AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype='bfloat16')`, or `compress.load`; "
        "weights in formats need the package compressed-tensors."
    ),
    "vllm": (
        "vLLM, or transformers: `AutoModelForCausalLM.from_pretrained(DIRECTORY, "
        "dtype='bfloat16')`, which reads weights in formats where the package compressed-tensors "
        "is installed. `compress.load` gives a dequantized torch model."
    ),
    "llama.cpp": "`llama-server -m DIRECTORY/model.gguf`, and whatever else reads GGUF.",
    "compress": "`compress.load(DIRECTORY)`. Stock loaders refuse it: they cannot express it.",
}
CODE = (
    "Its layers differ. vLLM has the model class, but wants a configuration class: install "
    "compress-workbench beside vLLM (`pip install --no-deps`), or add `--trust-remote-code`. "
    "transformers takes both classes from the files here: `trust_remote_code=True`."
)
ACTIVATIONS = "Formats are those of weights; activations are BF16, in servers as measured."
ROUNDING = (
    "Layers in formats that end in `_a4` or `_a8` round what they read too, by its `input_scale`, "
    "in servers as measured."
)
KV = "The plan assumes an FP8 KV cache: serve it with one (vLLM: `--kv-cache-dtype fp8`)."
MIXED_KV = "KV caches differ by layer: `compress.load` reads each in its format, as measured."


def model_card(
    name: str, architecture: Architecture, facts: Mapping[str, Any], card: Mapping[str, Any]
) -> str:
    """The card as Markdown.

    Values of ``card`` that are mappings become tables of their own, lists lines of a shell.
    """
    stock = "transformers" in facts["reader"]
    summary = {
        "family": architecture.family,
        "parameters": count_parameters(architecture),
        "bytes of weights": facts["bytes"],
        "formats": ", ".join(facts["formats"]),
        "KV cache": kv_text(architecture),
        **{key: value for key, value in card.items() if not isinstance(value, Mapping | list)},
    }
    parts = [f"# {name}", "A smaller language model made by `compress`."]
    parts.append(table("", "value", summary))
    for key, value in card.items():
        if isinstance(value, Mapping):
            parts += [f"## {key.replace('_', ' ').capitalize()}", table("", "value", value)]
        elif isinstance(value, list) and value:
            parts += [f"## {key.capitalize()}", "\n".join(["```", *value, "```"])]
    parts += ["## Loading", LOADING["transformers" if stock else facts["target"]]]
    if facts["target"] in SERVERS and not is_plain(architecture):
        parts.append(CODE)
    parts.append(
        f"Verified after writing with {facts['reader']}: log-probabilities of random token rows "
        f"differ by {facts['logit_difference']:.1e} of their range; bytes are as planned."
    )
    if set(facts["formats"]) != {"bf16"}:
        rounding = any(FORMATS[format].rounds_inputs for format in architecture.formats)
        parts.append(ROUNDING if rounding else ACTIVATIONS)
    if kv_formats := set(architecture.kv_formats.values()) - {"bf16"}:
        parts.append(KV if kv_formats == set(architecture.kv_formats.values()) else MIXED_KV)
    blocks = {block_name(block): block_text(block) for block in architecture.blocks}
    if architecture.outside_formats:
        blocks["outside"] = formats_text(architecture.outside_formats)
    parts += ["## Blocks", table("block", "format and sizes", blocks)]
    return "\n\n".join(parts) + "\n"


def block_text(block: Block) -> str:
    """A block's formats and sizes."""
    kv_format = kv_format_of(block)
    held = "" if kv_format is None else f"{kv_format} KV; "
    return f"{formats_text(block.formats)}; {held}" + ", ".join(
        f"{a} {size}" for a, size in sizes(block).items()
    )


def table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    """A Markdown table of two columns."""
    cells = {key: str(value).replace("|", "\\|").replace("\n", " ") for key, value in rows.items()}
    lines = [f"| {key} | {cell} |" for key, cell in cells.items()]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *lines])
