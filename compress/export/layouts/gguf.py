"""GGUF: one file for llama.cpp, with the student's codes and scales, and its tokenizer.

Layers that are alike are a stock architecture of llama.cpp. Where FFNs, query heads or KV groups
differ, or half of a layer is gone, a llama is its architecture ``deci``, which has these sizes by
layer. Two things of it are not obvious: a layer that has an attention and no FFN loses its
attention there without a word, so that such an FFN is 64 neurons of zeros; and the tensor scales of
NVFP4 are not read in its FFNs, so that a ``deci`` has no NVFP4 (``targets.py``).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress.core.errors import InputError
from compress.core.files import write_text
from compress.export.layouts.ggml import TYPES
from compress.export.layouts.gguf_tokenizer import add_tokenizer
from compress.export.layouts.stock import OWN
from compress.export.layouts.student import Student, Weight, weight_specs
from compress.formats.table import FORMATS
from compress.model.architecture import Architecture, Attention, Ffn, to_json
from compress.model.build import built_config, is_plain, layers_of
from compress.model.config import ARCHITECTURE, CONFIG, architecture_of, read_config
from compress.model.layout import Parameter
from compress.sweep.placement import Placement
from compress.sweep.stack import Stack

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
FREQUENCIES = "rope_freqs.weight"
# Neurons of an FFN that stands for none.
NONE = 64
# Of every tensor's place in the file, in bytes.
ALIGNMENT = 32
# Rotary embeddings of which a config changes nothing but the frequencies.
SCALED = ("llama3", "linear")


@dataclass(frozen=True)
class Stock:
    """llama.cpp's name of a family, and of its students whose layers differ.

    ``turned`` says that rotary pairs are neighbours among the rows of queries and keys there, not
    a half of the head apart.
    """

    even: str
    uneven: str | None = None
    turned: bool = False


FAMILIES: Mapping[str, Stock] = {
    "llama": Stock("llama", "deci", turned=True),
    "mistral": Stock("llama", turned=True),
    "qwen2": Stock("qwen2"),
    "qwen3": Stock("qwen3"),
}


@dataclass(frozen=True)
class Held:
    """A tensor of the file: its name, GGML type, shape, and its bytes (U8), on ``meta`` too."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: Tensor


def write_gguf(student: Student, directory: Path) -> None:
    """Write a student as ``model.gguf`` into a directory that is there; a weight at a time is held.

    Raises:
        InputError: the package ``gguf`` is missing, or llama.cpp has no name for the student's
            tokenizer or positions.
    """
    if find_spec("gguf") is None:
        raise InputError('writing GGUF needs the package gguf: python -m pip install -e ".[gguf]"')
    from gguf import GGMLQuantizationType, GGUFWriter

    architecture = student.architecture
    writer = GGUFWriter(directory / FILE, name_of(architecture))
    add_sizes(writer, architecture)
    writer.add_layer_norm_rms_eps(student.config["rms_norm_eps"])
    writer.add_context_length(student.config["max_position_embeddings"])
    further = [*positions(writer, student), *stand_ins(architecture)]
    add_tokenizer(writer, student.source, architecture.vocab)
    places, end = dict[str, int](), 0
    for each in chain(tensors_of(weight_specs(architecture), architecture), further):
        kind = GGMLQuantizationType[each.type]
        # The type of numpy has a say in bytes only.
        writer.add_tensor_info(each.name, each.shape, np.dtype("f4"), each.data.nbytes, kind)
        places[each.name], end = end, end + aligned(each.data.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    [file] = writer.fout or []
    start = aligned(file.tell())
    for each in chain(tensors_of(student.weights, architecture), further):
        file.seek(start + places.pop(each.name))
        file.write(each.data.cpu().contiguous().numpy().data)
    assert not places, f"{next(iter(places))} is missing"
    file.truncate(start + end)
    writer.close()
    write_text(directory / ARCHITECTURE, to_json(architecture))
    write_text(directory / CONFIG, json.dumps(OWN.config(student.config, architecture), indent=2))


def aligned(count: int) -> int:
    """Bytes with those that follow up to the next tensor's place."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def name_of(architecture: Architecture) -> str:
    """What llama.cpp calls the architecture."""
    stock = FAMILIES[architecture.family]
    found = stock.even if is_plain(architecture) else stock.uneven
    assert found, f"{architecture.family} is even in llama.cpp"
    return found


def add_sizes(writer: "GGUFWriter", architecture: Architecture) -> None:
    """Write the sizes of the blocks: one number of each, or of ``deci`` one a layer."""
    layers = layers_of(architecture).values()
    ffns = [sum(b.ffn for b in blocks if isinstance(b, Ffn)) or NONE for blocks in layers]
    found = [[b for b in blocks if isinstance(b, Attention)] for blocks in layers]
    groups = [sum(block.kv_head for block in blocks) for blocks in found]
    heads = [sum(block.kv_head * block.query for block in blocks) for blocks in found]
    plain = is_plain(architecture)
    writer.add_block_count(architecture.layers)
    writer.add_embedding_length(architecture.hidden)
    writer.add_vocab_size(architecture.vocab)
    writer.add_feed_forward_length(ffns[0] if plain else ffns)
    writer.add_head_count(heads[0] if plain else heads)
    writer.add_head_count_kv(groups[0] if plain else groups)
    writer.add_key_length(head_dim(architecture))
    writer.add_value_length(head_dim(architecture))
    writer.add_rope_dimension_count(head_dim(architecture))


def head_dim(architecture: Architecture) -> int:
    """The width of a head, which is one for all layers."""
    return next(b.head_dim for b in architecture.blocks if isinstance(b, Attention))


def positions(writer: "GGUFWriter", student: Student) -> Iterator[Held]:
    """Write the base of rotary embeddings; what frequencies are divided by is a tensor.

    InputError on rotary embeddings that differ in more.
    """
    config: Any = built_config(student.config, student.architecture)
    said, width = config.rope_parameters, head_dim(student.architecture)
    kind, part = said["rope_type"], said.get("partial_rotary_factor") or 1
    writer.add_rope_freq_base(said["rope_theta"])
    if part != 1 or kind not in ("default", *SCALED):
        raise InputError(f"GGUF files are not written with rotary embeddings of type {kind!r}")
    if kind in SCALED:
        plain = said["rope_theta"] ** -(torch.arange(0, width, 2) / width)
        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        yield floats(FREQUENCIES, plain / frequencies)


def stand_ins(architecture: Architecture) -> Iterator[Held]:
    """Tensors of FFNs that are gone, of zeros, where layers differ."""
    hidden = architecture.hidden
    for layer, blocks in layers_of(architecture).items():
        if any(isinstance(block, Ffn) for block in blocks):
            continue
        yield floats(f"blk.{layer}.ffn_norm.weight", torch.ones(hidden))
        for name, shape in (
            ("gate", (NONE, hidden)), ("up", (NONE, hidden)), ("down", (hidden, NONE)),
        ):  # fmt: skip
            zeros = torch.zeros(shape, dtype=torch.bfloat16).view(torch.uint8)
            yield Held(f"blk.{layer}.ffn_{name}.weight", TYPES["bf16"].name, shape, zeros)


def floats(name: str, values: Tensor) -> Held:
    """A tensor in fp32."""
    return Held(name, "F32", tuple(values.shape), values.float().contiguous().view(torch.uint8))


def tensors_of(weights: Iterable[Weight], architecture: Architecture) -> Iterator[Held]:
    """The tensors of the file that hold weights."""
    named = names_in(architecture)
    for weight in weights:
        name, parts = named(weight.name), weight.parts
        if turns(weight.name, architecture):
            parts = tuple(neighbours(part, head_dim(architecture)) for part in parts)
        codes = parts[0]
        if codes.dim() == 1 or codes.dtype == torch.float32:
            yield floats(name, codes)
            continue
        kind, bits = TYPES[weight.format], codes.shape[-1] * codes.itemsize * 8
        shape = (*codes.shape[:-1], bits // FORMATS[weight.format].bits)
        if shape[-1] % kind.block:
            raise InputError(
                f"{weight.name} has {shape[-1]} inputs: {weight.format} is in blocks of "
                f"{kind.block} in a GGUF file"
            )
        yield Held(name, kind.name, shape, kind.packed(*parts))
        if weight.format == "nvfp4":
            yield floats(scale_of(name), parts[2].reshape(1))


def names_in(architecture: Architecture) -> Callable[[str], str]:
    """What a tensor of the family is called in the file."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    own = name_of(architecture)
    known = get_tensor_name_map(
        next(number for number, name in MODEL_ARCH_NAMES.items() if name == own),
        architecture.layers,
    )

    def named(name: str) -> str:
        stem, _, kind = name.rpartition(".")
        return f"{known[stem]}.{kind}"

    return named


def scale_of(name: str) -> str:
    """The name of what a matrix of NVFP4 is multiplied by."""
    return name.removesuffix("weight") + "scale"


def turns(name: str, architecture: Architecture) -> bool:
    """Whether the rows of a weight have another order in the file."""
    rotary = ".q_proj." in name or ".k_proj." in name
    return rotary and FAMILIES[architecture.family].turned


def neighbours(part: Tensor, width: int) -> Tensor:
    """Rows of heads so wide with the two of a rotary pair next to each other."""
    if not part.dim():
        return part  # a scale of the tensor
    return part.reshape(-1, 2, width // 2, *part.shape[1:]).transpose(1, 2).reshape(part.shape)


def values_in(directory: Path, architecture: Architecture) -> Callable[[Parameter], Tensor]:
    """What gives the fp32 values of a student's weights, as the package ``gguf`` reads them."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    found = {tensor.name: tensor for tensor in GGUFReader(directory / FILE).tensors}
    named, width = names_in(architecture), head_dim(architecture)

    def values(parameter: Parameter) -> Tensor:
        name = named(parameter.name)
        numbers = torch.tensor(dequantize(found[name].data, found[name].tensor_type))
        if (scale := found.get(scale_of(name))) is not None:
            numbers *= float(scale.data[0])
        if turns(parameter.name, architecture):
            pairs = numbers.reshape(-1, width // 2, 2, *numbers.shape[1:])
            numbers = pairs.transpose(1, 2)
        return numbers.reshape(parameter.shape)

    return values


def stack_in(directory: Path, placement: Placement) -> Stack:
    """The student of a directory with a GGUF file as its layers."""
    config = read_config(directory)
    architecture = architecture_of(directory, config)
    values = values_in(directory, architecture)

    def placed(parameter: Parameter) -> Tensor:
        return values(parameter).to(placement.device)

    return Stack(config["base_config"], architecture, placed, placement)


def planned_bytes(architecture: Architecture) -> int:
    """Bytes of the tensors that a file has of a student's weights."""
    weights = tensors_of(weight_specs(architecture), architecture)
    return sum(each.data.nbytes for each in chain(weights, stand_ins(architecture)))


def tensor_bytes(directory: Path) -> int:
    """Bytes of the tensors in a file, without those of rotary embeddings."""
    from gguf import GGUFReader

    tensors = GGUFReader(directory / FILE).tensors
    return sum(int(tensor.n_bytes) for tensor in tensors if tensor.name != FREQUENCIES)
