"""What stock readers make of exports: families by layouts by formats, measured.

``OMP_NUM_THREADS=2 python -m benchmarks.served --vllm-python PATH --llama-python PATH``: for each
family a teacher (``--model`` for llama, random weights for the others, which is enough to see a
wrong layout), students with equal and with different blocks (narrower FFNs; of a llama two halves
of layers are gone), in BF16, in one format and in several at once; each is exported for ``vllm``
and read back by transformers and vLLM, or exported for ``llama.cpp`` and read back by that.
``apart`` is the largest difference of log-probabilities as a share of their range, ``KL`` what it
costs, nats per token, ``greedy`` how many generated tokens are the measured student's. What is
there is not made again: the same command continues. tests/servers/make_environments.sh makes the
two Pythons.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import arguments, report
from compress.core.errors import CompressError
from compress.core.files import read_json, write_json
from compress.core.terminal import note
from compress.export.predictions import Comparison
from compress.export.readers import Reader
from compress.export.student import export_student
from compress.export.targets import Target
from compress.export.verify import verify
from compress.formats.table import Format, by_group
from compress.model.architecture import Architecture, Ffn, to_json
from compress.model.build import student_config
from compress.model.checkpoint import Checkpoint, in_bf16, open_checkpoint, write_checkpoint
from compress.model.families import linear_groups, stored_parameters
from compress.model.find import resolve_model
from compress.searches.space import EXPERTS

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256, "initializer_range": 0.1,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
MAMBA = {
    "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 16,
    "conv_kernel": 4, "chunk_size": 16,
}  # fmt: skip
EXPERTS_OF = {"n_routed_experts": 8, "moe_shared_expert_intermediate_size": 64}
HYBRID = ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention", "mlp"]
TEACHERS: dict[str, dict[str, Any] | None] = {
    "llama": None,
    "qwen3": {"model_type": "qwen3"},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 32,
               "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 8, "decoder_sparse_step": 1, **ROUTED},
    "nemotron_h": {"model_type": "nemotron_h", "layers_block_type": HYBRID, **MAMBA},
    "nemotron_h moe": {"model_type": "nemotron_h", "layers_block_type": [*HYBRID[:5], "moe"],
                       **MAMBA, **EXPERTS_OF, **ROUTED},
}  # fmt: skip
# Of linear groups in turn; routed experts stay in BF16.
MIXES: dict[str, Sequence[Format]] = {
    "bf16": ["bf16"], "fp8": ["fp8"], "nvfp4": ["nvfp4"], "int4": ["int4"],
    "mixed": ["fp8", "nvfp4", "bf16"], "q8_0": ["q8_0"],
}  # fmt: skip
SERVED = {"llama": ("bf16", "fp8", "nvfp4", "int4", "mixed")}
UNEVEN = ("llama", "nemotron_h", "nemotron_h moe")
COLUMNS = ["family", "blocks", "formats", "target", "reader", "apart", "KL", "greedy", "wrong"]


def main() -> None:
    """Read back what is missing and report."""
    settings = arguments(
        __doc__ or "",
        "smollm2-135m",
        families={"default": ",".join(TEACHERS), "help": "comma-separated"},
        vllm_python={"type": Path, "help": "a Python that has vLLM"},
        llama_python={"type": Path, "help": "a Python that has llama-cpp-python"},
    )
    rows = [row for family in settings.families.split(",") for row in rows_of(settings, family)]
    report("served", settings, {}, COLUMNS, rows)


def rows_of(settings: argparse.Namespace, family: str) -> Iterator[dict[str, Any]]:
    """A row for every student of a family and reader."""
    home: Path = settings.out / "served" / family.replace(" ", "_")
    checkpoint = open_checkpoint(teacher(settings, family, home / "teacher"))
    mixes = SERVED.get(family, ("bf16", "mixed"))
    blocks = ("even", "uneven") if family in UNEVEN else ("even",)
    for shape, mix in itertools.product(blocks, mixes):
        yield from read_back(settings, checkpoint, (family, shape, mix, "vllm"), home)
    if family == "llama" and settings.llama_python:
        for shape, mix in itertools.product(blocks, ("bf16", "q8_0")):
            yield from read_back(settings, checkpoint, (family, shape, mix, "llama.cpp"), home)


def read_back(
    settings: argparse.Namespace,
    checkpoint: Checkpoint,
    case: tuple[str, str, str, Target],
    home: Path,
) -> list[dict[str, Any]]:
    """Export a student and read it with every reader of its target; a row a reader."""
    family, shape, mix, target = case
    about = {"family": family, "blocks": shape, "formats": mix, "target": target}
    file = home / f"{shape}-{mix}-{target}.json"
    if file.is_file():
        rows: list[dict[str, Any]] = read_json(file)
        return rows
    made = in_turn(uneven(checkpoint.architecture) if shape == "uneven" else
                   checkpoint.architecture, MIXES[mix])  # fmt: skip
    source, out = home / f"student-{shape}", home / f"{shape}-{mix}-{target}"
    if not source.is_dir():
        write_cut(checkpoint, made, source)
    python = {"vllm": settings.vllm_python, "llama.cpp": settings.llama_python}[target]
    readers: list[tuple[Reader, Path | None]] = [("compress", None)]
    readers += [("transformers", None)] if target == "vllm" else []
    readers += [(target, python)] if python else []
    rows = []
    try:
        export_student(source, out, made, target, {})
        for reader, path in readers:
            rows.append(about | found(out, reader, path))
    except CompressError as error:
        rows = [about | {"reader": "export", "wrong": str(error)}]
    for row in rows:
        note(str(row))
    write_json(file, rows)
    return rows


def found(out: Path, reader: Reader, python: Path | None) -> dict[str, Any]:
    """What a reader makes of an export."""
    try:
        [seen] = verify(out, {reader: python})
    except CompressError as error:
        return {"reader": reader, "wrong": str(error)}
    return {"reader": seen.reader, "apart": seen.difference, "KL": seen.kl, "greedy": greedy(seen)}


def greedy(seen: Comparison) -> str:
    """How many tokens were equal, of how many, and where that ends at ties."""
    ties = f", {seen.ties} ties" if seen.ties else ""
    return f"{seen.greedy[0]} of {seen.greedy[1]}{ties}"


def teacher(settings: argparse.Namespace, family: str, home: Path) -> Path:
    """The directory of a family's teacher, made now if it is not there."""
    config = TEACHERS[family]
    if config is None:
        return resolve_model(settings.model)
    if not home.is_dir():
        torch.manual_seed(settings.seed)
        make: Any = AutoModelForCausalLM.from_config
        model_type, sizes = config["model_type"], SIZES | config
        if "layers_block_type" in sizes:
            sizes = {key: value for key, value in sizes.items() if key != "num_hidden_layers"}
        model = make(AutoConfig.for_model(**sizes), dtype=torch.bfloat16)
        note(f"{family}: random {model_type} of {model.num_parameters()} parameters")
        model.save_pretrained(home)
    return home


def uneven(whole: Architecture) -> Architecture:
    """FFNs of several widths; of a llama two halves of layers are gone."""
    step, widest = 0, max(block.ffn for block in whole.blocks if isinstance(block, Ffn))
    blocks = []
    for block in whole.blocks:
        if isinstance(block, Ffn):
            block = dataclasses.replace(block, ffn=widest - 64 * (step % 4))
            step += 1
        blocks.append(block)
    if whole.family == "llama":
        del blocks[5], blocks[2]
    return dataclasses.replace(whole, blocks=tuple(blocks))


def in_turn(whole: Architecture, formats: Sequence[Format]) -> Architecture:
    """The architecture with formats on its linear groups in turn, routed experts in BF16."""
    turn = itertools.cycle(formats)

    def chosen(group: str) -> Format:
        return "bf16" if group.startswith(EXPERTS) else next(turn)

    blocks = tuple(
        dataclasses.replace(
            block,
            formats=by_group({g: chosen(g) for g in linear_groups(block, whole.family)}),
        )
        for block in whole.blocks
    )
    return dataclasses.replace(whole, blocks=blocks)


def write_cut(checkpoint: Checkpoint, made: Architecture, out: Path) -> None:
    """Write a BF16 student: of every tensor that is left, its first rows and columns."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for each in stored_parameters(made):
            yield each.name, checkpoint[each.name][tuple(map(slice, each.shape))]

    plain = in_turn(made, ["bf16"])
    config = student_config(checkpoint.config, plain)
    stored = in_bf16(tensors(), plain)
    write_checkpoint(out, stored, config, checkpoint.path, to_json(plain))


if __name__ == "__main__":
    main()
