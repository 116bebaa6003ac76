"""A checkpoint's tensors, checked against its family's table; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.core.files import read_json
from compress.model.architecture import Architecture
from compress.model.config import ARCHITECTURE, architecture_of
from compress.model.dequantize import Shape
from compress.model.families import family_of, mtp_parameters, parameters
from compress.model.families.wrapper import text_config, text_tensors
from compress.model.headers import FLOATS, INDEX, Stored, same_bytes, stored_tensors, weight_files
from compress.model.layout import Parameter, Part
from compress.model.quantized import (
    OF_ACTIVATIONS,
    Method,
    Quantized,
    held,
    method_of,
    part_name,
)
from compress.model.schemes import METHODS

KNOWN = f"known here are {', '.join(METHODS)}"
# Old llama checkpoints carry this buffer; it is recomputed and means nothing.
IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Slice:
    """One expert's weight of a stack of all of them."""

    stack: Stored | Quantized
    expert: int
    part: Part


@dataclass(frozen=True)
class Weights:
    """Every parameter's tensor, or tensors where it is quantized, and the architecture they tell.

    ``bytes`` is what the model's take on disk, with scales of activations.
    """

    architecture: Architecture
    tensors: Mapping[str, Stored | Quantized | Slice]
    bytes: int
    method: str | None = None

    @property
    def quantized(self) -> str:
        """The formats that weights are quantized in, and by whom; empty where none is."""
        found = (each.stack if isinstance(each, Slice) else each for each in self.tensors.values())
        formats = {each.scheme.format for each in found if isinstance(each, Quantized)}
        return f"{', '.join(sorted(formats))} by {self.method}" if formats else ""


def checked_weights(path: Path, config: Mapping[str, Any], architecture: Architecture) -> Weights:
    """The weights of a directory, all known and of the right shapes.

    As in transformers, tied matrices that are stored with different values are not tied, and
    either of them is enough where they are. Of a multimodal model only the text model's are read.
    InputError on a quantization that is not known, and on a tensor that is unknown, missing or
    misshaped.
    """
    stored = text_tensors(stored_tensors(path, config), config)
    method = method_of(path, text_config(config))
    try:
        return check_tensors(path, stored, architecture, method)
    except InputError as error:
        odd = next((each.dtype for each in stored.values() if each.dtype not in FLOATS), None)
        if (said := method.said if method else odd) is None:
            raise
        known = method is not None and method.name in METHODS
        raise refused(path, said, str(error) if known else KNOWN) from error


def refused(path: Path, said: str, reason: str) -> InputError:
    """The error for a quantized checkpoint that cannot be read."""
    take = "take the one in BF16"
    return InputError(f"{path}: this checkpoint is quantized ({said}); {take}: {reason}")


def require_known(path: Path, config: Mapping[str, Any], architecture: Architecture) -> None:
    """InputError where the index, before any weights are there, shows an unknown quantization.

    Then weights lack their plain names, or something more is stored under the name of one.
    """
    method = method_of(path, text_config(config))
    if method is None or method.name in METHODS or not (names := index_names(path)):
        return
    own = text_tensors(dict.fromkeys(names), config)
    plain = all(own.keys() & {each.name, each.stack} for each in parameters(architecture))
    if not plain or any(name.rpartition(".")[0] in own for name in own):
        raise refused(path, method.said, KNOWN)


def index_names(path: Path) -> list[str]:
    """Names of all tensors that the index has; none where there is no index."""
    index = read_json(path / INDEX) if (path / INDEX).is_file() else {}
    names = index.get("weight_map") if isinstance(index, dict) else None
    return list(names) if isinstance(names, dict) else []


def index_bytes(path: Path) -> int | None:
    """Bytes of all weights as the index has them, if there is one that says so."""
    index = read_json(path / INDEX) if (path / INDEX).is_file() else {}
    metadata = index.get("metadata") if isinstance(index, dict) else None
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return total if type(total) is int and total > 0 else None


def planned_weights(path: Path, config: Mapping[str, Any]) -> Weights | None:
    """The weights of a model where they are at hand and not of our own making; None elsewhere.

    InputError on what a search would refuse of weights that are all here.
    """
    if not path.is_dir() or (path / ARCHITECTURE).is_file() or not any(path.glob("*.safetensors")):
        return None
    from_hub = path.parent.name == "snapshots"
    if from_hub and not all(file.is_file() for file in weight_files(path, config)):
        return None  # a download that was broken off; a search would go on with it
    return checked_weights(path, config, architecture_of(path, config))


def planned_architecture(path: Path, config: Mapping[str, Any]) -> Architecture:
    """The architecture that a search would find: as the weights tell it where they are at hand.

    InputError on what a search would refuse of a config, or of weights that are all here.
    """
    if weights := planned_weights(path, config):
        return weights.architecture
    architecture = architecture_of(path, config)
    require_known(path, config, architecture)
    return architecture


def check_tensors(
    path: Path, stored: dict[str, Stored], architecture: Architecture, method: Method | None
) -> Weights:
    """``checked_weights`` of tensors that are at hand."""
    family = family_of(architecture.family)
    head, embedding = stored.get(family.head), stored.get(family.embedding)
    if architecture.tied and head and embedding and not same_bytes(head, embedding):
        architecture = replace(architecture, tied=False)
    if architecture.tied and head and not embedding:
        stored[family.embedding] = head
    mtp = list(mtp_parameters(architecture))
    if not any(parameter.name in stored for parameter in mtp):
        # transformers does not write them.
        architecture, mtp = replace(architecture, mtp=()), []
    starts = () if mtp else family.unread
    unread = tuple(start.format(layers=architecture.layers) for start in starts)
    left = {name: tensor for name, tensor in stored.items() if not name.startswith(unread)}
    claimed: dict[str, Stored | Quantized] = {}
    found: dict[str, Stored | Quantized | Slice] = {}
    for parameter in (*parameters(architecture), *mtp):
        name = parameter.name
        if weight := claim(path, name, parameter.shape, left, method):
            found[name] = claimed[name] = weight
            continue
        stack, shape = stack_of(parameter, architecture)
        if stack is None or parameter.expert is None or shape is None:
            raise InputError(f"{path} has no tensor {name}")
        if stack not in claimed:
            if (whole := claim(path, stack, shape, left, method)) is None:
                raise InputError(f"{path} has no tensor {parameter.stack or name}")
            claimed[stack] = whole
        found[name] = Slice(claimed[stack], parameter.expert, parameter.slot.part)
    if architecture.tied:
        left.pop(family.head, None)
    ignored = OF_ACTIVATIONS if method else ()
    beside = [left.pop(name) for name in list(left) if name.endswith(ignored)]
    if unknown := [name for name in sorted(left) if not name.endswith(IGNORED_SUFFIX)]:
        knows = f"which no table of {architecture.family} knows"
        raise InputError(f"{path} holds tensor {unknown[0]}, {knows}")
    further = {parameter.name for parameter in mtp}
    own = (each for name, each in claimed.items() if name not in further)
    total = sum(each.bytes for each in (*own, *beside))
    return Weights(architecture, found, total, method.name if method else None)


def stack_of(parameter: Parameter, architecture: Architecture) -> tuple[str | None, Shape | None]:
    """Name and shape of the tensor that all experts' may be stacked in; None where there is none.

    Where a family's own files have none it is that of the torch model, which transformers reads and
    some publish (Qwen3.5).
    """
    own = parameter.stack is not None or parameter.expert is None
    if not own and parameter.block is not None and parameter.slot.place:
        layer = architecture.blocks[parameter.block].layer
        prefix = family_of(architecture.family).layer.format(layer=layer)
        parameter = replace(parameter, stack=prefix + parameter.slot.place)
    return parameter.stack, parameter.stacked


def claim(
    path: Path, name: str, shape: Shape, left: dict[str, Stored], method: Method | None
) -> Stored | Quantized | None:
    """A tensor, taken from those that are left, or several where it is quantized; None if none is.

    InputError where it is misshaped.
    """
    if method and (weight := held(path, name, shape, left, method)):
        for part in weight.parts:
            del left[part_name(part, name)]
        return weight
    if name not in left:
        return None
    tensor = left.pop(name)
    if tensor.shape != shape:
        raise InputError(
            f"tensor {name} in {path} has shape {list(tensor.shape)}, its config says {list(shape)}"
        )
    if tensor.dtype not in FLOATS:
        raise InputError(f"tensor {name} in {path} is stored as {tensor.dtype}")
    return tensor
