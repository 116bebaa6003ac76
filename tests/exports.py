"""What exports are made of in tests: formats, by who serves them, and what their card tells."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantized import with_formats
from tokenizers import Tokenizer, models, pre_tokenizers

from compress.formats.table import WEIGHT_ONLY, Format, by_group
from compress.model.architecture import Architecture
from compress.model.checkpoint import open_checkpoint
from compress.searches.space import EXPERTS

QUANTIZED = [name for name in WEIGHT_ONLY if name != "bf16"]
SERVED: list[Format] = ["nvfp4", "int4", "fp8"]
MIXES: list[Sequence[Format]] = [*([name] for name in QUANTIZED), [*QUANTIZED, "bf16"]]
SERVED_MIXES: list[Sequence[Format]] = [["bf16"], ["nvfp4"], ["int4"], ["fp8", "nvfp4", "bf16"]]
CARD = {"command": "compress export tiny", "budget": "1 MiB", "measurements": {"measured_kl": 0.25}}


def with_experts(architecture: Architecture, format: Format) -> Architecture:
    """The architecture with routed experts in one format."""
    return replace(
        architecture,
        blocks=tuple(
            replace(
                block,
                formats=by_group(
                    {g: format if g.startswith(EXPERTS) else own for g, own in block.formats}
                ),
            )
            for block in architecture.blocks
        ),
    )


def architecture_of(path: Path, formats: Sequence[Format]) -> Architecture:
    return with_formats(open_checkpoint(path).architecture, formats)


def with_words(directory: Path) -> Path:
    """A model directory with a byte-level tokenizer, as llama.cpp has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:126]
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return directory
