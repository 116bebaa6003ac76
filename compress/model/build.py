"""Build and load the torch model of an Architecture, from transformers' own classes.

A layer that differs from the config is the stock layer class constructed with a changed copy of the
config; a removed half of a layer is a module that returns zero.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from compress.core.errors import InputError
from compress.formats.kv import format_of, set_kv_format
from compress.formats.packed import stored_names
from compress.formats.table import FORMATS, Format
from compress.model.architecture import Architecture, Block, group_format
from compress.model.checkpoint import GENERATION, Checkpoint, open_checkpoint
from compress.model.config import architecture_of, read_config
from compress.model.families import family_of, parameters, settings_of
from compress.model.families.family import Family
from compress.model.families.wrapper import text_config
from compress.model.fill import fill, part_of, place_of, require_filled
from compress.model.headers import stored_tensors
from compress.model.inputs import round_inputs
from compress.model.kernels import modeling
from compress.model.layout import Parameter
from compress.model.modules import attention_of


class Removed(nn.Module):
    """A mixer that was removed: adds nothing to the residual stream.

    A cache hears of its tokens all the same, a zero for each, because model code asks a layer of
    its choice how many there are. A ``pair`` returns no attention weights beside the branch.
    """

    def __init__(self, layer: int, pair: bool) -> None:
        super().__init__()
        self.layer_idx, self.pair = layer, pair

    def forward(
        self, hidden_states: Tensor, *_: object, past_key_values: Any = None, **__: object
    ) -> Tensor | tuple[Tensor, None]:
        """A zero that broadcasts."""
        if past_key_values is not None:
            batch, tokens, _hidden = hidden_states.shape
            held = hidden_states.new_zeros(batch, 1, tokens, 1)
            past_key_values.update(held, held, self.layer_idx)
        nothing = hidden_states.new_zeros(())
        return (nothing, None) if self.pair else nothing


# Keys of a teacher's config that a student's would not be true of, or that say how somebody ran it.
ELSEWHERE = (
    *("auto_map", "quantization_config", "compression_config", "quantization", "torch_dtype"),
    *("per_layer_config", "block_configs"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
    *("_attn_implementation_internal", "output_attentions", "output_hidden_states", "return_dict"),
    *("use_return_dict", "transformers_weights", "_name_or_path", "time_step_limit"),
)


def layers_of(architecture: Architecture) -> dict[int, list[Block]]:
    """Blocks by layer number."""
    layers = itertools.groupby(architecture.blocks, key=lambda block: block.layer)
    return {layer: list(blocks) for layer, blocks in layers}


def shared_settings(architecture: Architecture) -> dict[str, Any]:
    """Config keys that blocks fix, each with the value of the first block that has it."""
    fixed, backwards = family_of(architecture.family).fixed, reversed(architecture.blocks)
    return {key: value for block in backwards for key, value in fixed(block).items()}


def is_plain(architecture: Architecture) -> bool:
    """Whether one config of the family describes every layer, so that stock loaders build it."""
    family, shared = family_of(architecture.family), shared_settings(architecture)
    agree = (family.fixed(block).items() <= shared.items() for block in architecture.blocks)
    return is_whole(architecture) and all(agree) and family.stock(architecture)


def is_whole(architecture: Architecture) -> bool:
    """Whether every layer has a block in all of its places."""
    halves = len(places_of(family_of(architecture.family)))
    return all(len(blocks) == halves for blocks in layers_of(architecture).values())


def places_of(family: Family) -> list[tuple[str, ...]]:
    """The places of a layer that a block can have, by the norms there."""
    return list(dict.fromkeys(site.norms for site in family.sites.values()))


def student_config(teacher_config: Mapping[str, Any], student: Architecture) -> dict[str, Any]:
    """config.json of a BF16 student: the family's own if it can express it, else nested in ours."""
    family = family_of(student.family)
    base = family.normal(own_config(teacher_config, student))
    written = shared_settings(student) | family.write(base, student) | family.lists(student)
    written["tie_word_embeddings"] = student.tied
    written["architectures"] = base.get("architectures") or [family.modules[1]]
    left_out = list(ELSEWHERE)
    if (depth := base.get("num_hidden_layers")) != student.layers:
        # Lists by layer that nobody writes anew would speak of other layers.
        lists = (key for key, value in base.items() if isinstance(value, list))
        left_out += [key for key in lists if len(base[key]) == depth]
    base = {key: value for key, value in base.items() if key not in left_out} | written
    if is_plain(student):
        return base
    return {"model_type": "compress", "architectures": base["architectures"], "base_config": base}


def own_config(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The config of an architecture's family in one that nests it or is written for a server.

    Servers have model types of their own for layers that differ.
    """
    own = text_config(config.get("base_config", config))
    return {**own, "model_type": architecture.family}


def build_model(
    config: Mapping[str, Any],
    architecture: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The torch model, in eval mode, holding ``tensors`` (names on disk) in ``dtype``.

    ``config`` is what ``student_config`` gives, or any config of the family with its sizes.
    InputError where the tensors are not those of the architecture.
    """
    model = skeleton(config, architecture)
    known = {parameter.name: parameter for parameter in parameters(architecture)}
    found = ((known[name], tensor) for name, tensor in tensors)
    fill(model, architecture, found, torch.device("cpu"), dtype)
    model.tie_weights()
    require_filled(model)
    return model


def skeleton(config: Mapping[str, Any], architecture: Architecture) -> PreTrainedModel:
    """The torch model without weights: parameters are on ``meta``, frozen, in eval mode.

    What is no weight (rotary frequencies) is on the CPU.
    """
    # That torch runs without a model's kernels is no news here.
    silence: Any = transformers_logging
    silence.set_verbosity_error()
    family = family_of(architecture.family)
    model_name = family.modules[1]
    stock: type[PreTrainedModel] = getattr(modeling(architecture.family), model_name)
    built = built_config(own_config(config, architecture), architecture)
    built.architectures = [model_name]
    with torch.device("meta"), no_init_weights():
        model: Any = stock(built)
        set_layers(model, architecture)
    for part in model.modules():
        if names := part._non_persistent_buffers_set:
            # Its weights, as of an embedding that is scaled, stay where they are.
            empty = {name: torch.empty_like(part._buffers[name], device="cpu") for name in names}
            part._buffers.update(empty)
            model._init_weights(part)
    model.eval().requires_grad_(False)
    assert isinstance(model, PreTrainedModel)
    return model


def built_config(config: Mapping[str, Any], architecture: Architecture) -> PreTrainedConfig:
    """The family's transformers config, of what its model code reads."""
    settings = copy.deepcopy(settings_of(config)) | shared_settings(architecture)
    settings["tie_word_embeddings"] = architecture.tied
    # Where no table says so, names for layers of students that are no more.
    settings.pop("layer_types", None)
    family = family_of(architecture.family)
    lists = family.lists(architecture)
    settings |= {key: value for key, value in lists.items() if key in family.reads}
    taken = family.taken(settings)
    try:
        built = AutoConfig.for_model(
            family.classes or architecture.family, attn_implementation=family.attention, **taken
        )
    except (StrictDataclassError, KeyError) as error:
        raise InputError(f"config.json: {' '.join(str(error).split())}") from error
    built.hidden_size = settings["hidden_size"]
    family.settled(built)
    return built


def set_layers(model: Any, architecture: Architecture) -> None:
    """Replace the layers that differ from the model's config, and drop what was removed."""
    family = family_of(architecture.family)
    layer_class = getattr(modeling(architecture.family), family.modules[2])
    places = places_of(family)

    def built(number: int, settings: Mapping[str, Any]) -> Any:
        changed = copy.deepcopy(model.config)
        for key, value in settings.items():
            setattr(changed, key, value)
        family.settled(changed)
        return layer_class(changed, number)

    for number, blocks in layers_of(architecture).items():
        settings = {key: value for block in blocks for key, value in family.fixed(block).items()}
        if any(getattr(model.config, key) != value for key, value in settings.items()):
            model.model.layers[number] = built(number, settings)
        layer = model.model.layers[number]
        for part, keys in (item for block in blocks for item in family.parts(block).items()):
            layer.set_submodule(part, built(number, keys).get_submodule(part))
        there = {family.sites[block.kind].norms for block in blocks}
        for norms in (each for each in places if each not in there):
            sites = (site for site in family.sites.values() if site.norms == norms)
            site = next(s for s in sites if getattr(layer, s.mixer, None) is not None)
            for mixer in site.mixers:
                setattr(layer, mixer, Removed(number, site.pair))
            for norm in norms:
                setattr(layer, norm, nn.Identity())


def disk_tensors(
    model: PreTrainedModel, architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a built model under their names on disk, fused experts one by one."""
    state = model.state_dict()
    for parameter in parameters(architecture):
        yield parameter.name, part_of(parameter, state[place_of(parameter, architecture)])


def weight_formats(architecture: Architecture) -> dict[str, Format]:
    """The format of every quantized weight, by its name on disk."""
    formats = {each.name: weight_format(architecture, each) for each in parameters(architecture)}
    return {name: format for name, format in formats.items() if format != "bf16"}


def weight_format(architecture: Architecture, parameter: Parameter) -> Format:
    """The format of one of an architecture's parameters."""
    if parameter.block is None:
        return dict(architecture.outside_formats).get(parameter.slot.fused or "", "bf16")
    return group_format(architecture.blocks[parameter.block], parameter.slot.fused)


def input_scales(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, Tensor]:
    """The stored scales of what weights are multiplied with, by the weights' names on disk."""
    formats = weight_formats(architecture)
    rounding = {name: f for name, f in formats.items() if FORMATS[f].rounds_inputs}
    stored = stored_tensors(checkpoint.path, checkpoint.config) if rounding else {}
    return {n: checkpoint.read(stored[stored_names(n, f)[-1]]) for n, f in rounding.items()}


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a directory: plain Hugging Face, heterogeneous, or quantized by us or others.

    InputError on what ``open_checkpoint`` refuses.
    """
    checkpoint = open_checkpoint(path)
    return build_model(checkpoint.config, checkpoint.architecture, checkpoint.items(), dtype)


def load(path: str | Path) -> PreTrainedModel:
    """A torch model with transformers' ``forward`` and ``generate``, fp32, from any directory.

    Plain Hugging Face checkpoints, heterogeneous students, and quantized exports (dequantized,
    rounding inputs and reading an FP8 KV cache where that was decided); ``generate`` as the
    directory says.
    """
    directory = Path(path)
    model, served = load_model(directory), architecture_of(directory, read_config(directory))
    generates(model, directory)
    set_kv_formats(model, served)
    round_inputs(model, served, input_scales(open_checkpoint(directory), served))
    return model


def set_kv_formats(model: PreTrainedModel, architecture: Architecture) -> None:
    """Make every attention layer of a model read its cache in the format of its block."""
    for number, kv_format in architecture.kv_formats.items():
        attention = attention_of(model, architecture.blocks[number])
        if kv_format != format_of(attention):
            set_kv_format(attention, kv_format)


def generates(model: PreTrainedModel, directory: Path) -> None:
    """Let a model generate as its directory says."""
    if (directory / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
