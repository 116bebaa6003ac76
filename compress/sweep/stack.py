"""A model as its layers: each brought to where the arithmetic is, used, and let go.

Layers run as transformers' own forward calls them: what it hands to each (masks, positions, rotary
embeddings) is recorded once for a shape of the input, with layers that do nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from compress.model.architecture import Architecture
from compress.model.build import generates, input_scales, set_kv_formats, skeleton
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.model.config import architecture_of, beside, read_config
from compress.model.families import parameters
from compress.model.fill import empty, fill
from compress.model.inputs import round_inputs
from compress.model.layout import Parameter
from compress.model.modules import Head, final_norm, head_of, scaled_embeddings
from compress.sweep.placement import REFERENCE, Placement, return_free_memory

# B sequences, T tokens, D hidden.
Call = Mapping[str, Any]
Read = Callable[[Parameter], Tensor]


class Recorded(Exception):
    """Raised past the last layer, when all that a forward hands to its layers is known."""


class Stack:
    """A model on a placement, its weights brought in when a layer is visited, its KV as decided.

    ``model`` is transformers' own; outside ``layer`` its parameters may be on ``meta``. What fits
    into the placement stays once it is there: embedding, final norm and head first, then layers
    from the first on; the others are read again at every visit. ``read`` gives the tensor of a
    parameter of ``architecture``, ``scales`` are those of inputs (``round_inputs``).
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        architecture: Architecture,
        read: Read,
        placement: Placement = REFERENCE,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.architecture, self.read, self.placement = architecture, read, placement
        self.model: Any = skeleton(config, architecture)
        set_kv_formats(self.model, architecture)
        round_inputs(self.model, architecture, scales)
        for module in self.model.modules():
            for name in module._non_persistent_buffers_set:
                module._buffers[name] = getattr(module, name).to(placement.device)
        self.parts: dict[int | None, list[Parameter]] = {None: []}
        for parameter in parameters(architecture):
            block = parameter.block
            layer = None if block is None else architecture.blocks[block].layer
            self.parts.setdefault(layer, []).append(parameter)
        self.stays = set(staying(self.parts, placement))
        self.there: set[int | None] = set()
        self.calls: dict[tuple[int, ...], list[Call]] = {}

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.parts) - 1

    @contextmanager
    def part(self, number: int | None) -> Iterator[None]:
        """A layer's weights, or with None those of embedding, final norm and head, in place."""
        if number not in self.there:
            self.bring(number, [(each, self.read(each)) for each in self.parts[number]])
        try:
            yield
        finally:
            if number not in self.stays:
                self.there.discard(number)
                empty(self.model, self.architecture, self.parts[number])
                return_free_memory()

    def bring(self, number: int | None, tensors: Iterable[tuple[Parameter, Tensor]]) -> None:
        """Fill a part."""
        place = self.placement
        fill(self.model, self.architecture, tensors, place.device, place.dtype)
        if number is None and self.architecture.tied:
            self.model.tie_weights()
        self.there.add(number)

    def release(self) -> None:
        """Let every layer's weights go, those too that would stay; a visit brings them again."""
        for number in [number for number in self.there if number is not None]:
            self.there.discard(number)
            empty(self.model, self.architecture, self.parts[number])

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """A layer with its weights in place."""
        with self.part(number):
            yield self.model.model.layers[number]

    @contextmanager
    def head(self) -> Iterator[Head]:
        """The output head with its weight in place."""
        with self.part(None):
            yield head_of(self.model)

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The model with all of its weights in place, whether they fit the placement or not."""
        with ExitStack() as stack:
            for number in self.parts:
                stack.enter_context(self.part(number))
            yield self.model

    def visits(self, numbers: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        """These layers in turn, in place one at a time; the next one is read meanwhile."""
        coming: Future[list[tuple[Parameter, Tensor]]] | None = None
        with ThreadPoolExecutor(1) as reader:
            for at, number in enumerate(numbers):
                if coming is not None:
                    self.bring(number, coming.result())
                coming = None
                following = numbers[at + 1] if at + 1 < len(numbers) else None
                if following is not None and following not in self.there:
                    coming = reader.submit(self.staged, following)
                with self.layer(number) as layer:
                    yield number, layer

    def staged(self, number: int) -> list[tuple[Parameter, Tensor]]:
        """A layer's tensors on their way to the device: there it only waits for the copy."""
        on_cuda = self.placement.device.type == "cuda"
        tensors = ((each, self.read(each)) for each in self.parts[number])
        return [(each, t.pin_memory() if on_cuda and t.is_cpu else t) for each, t in tensors]

    def outside(self, group: str) -> Parameter:
        """The embedding, or the head where it is one of its own."""
        [parameter] = [each for each in self.parts[None] if each.slot.fused == group]
        return parameter

    def embed(self, ids_BT: Tensor, table: Tensor | None = None) -> Tensor:
        """What enters the first layer, [B, T, D]; only the rows that are asked for are read.

        ``table`` [V, D] is another embedding than its own.
        """
        table = self.read(self.outside("embedding")) if table is None else table
        ids, places = torch.unique(ids_BT.to(table.device), return_inverse=True)
        place = self.placement
        rows = table[ids].to(place.device, place.dtype)
        return scaled_embeddings(self.model, embedding(places.to(place.device), rows))

    def run(self, number: int, layer: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """A layer's output [B, T, D] as the model's own forward calls it, without a cache."""
        output = layer(hidden_BTD, **self.called(hidden_BTD)[number])
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def called(self, hidden_BTD: Tensor) -> list[Call]:
        """What the model's forward hands to every layer besides hidden states of this shape."""
        key = tuple(hidden_BTD.shape[:2])
        if key not in self.calls:
            self.calls[key] = recorded(self.model, hidden_BTD)
        return self.calls[key]

    def normed(self, hidden_BTD: Tensor) -> Tensor:
        """The final norm, which is in place inside ``head()``."""
        found: Tensor = final_norm(self.model)(hidden_BTD)
        return found


def staying(parts: Mapping[int | None, Sequence[Parameter]], place: Placement) -> Iterator[Any]:
    """The parts whose weights stay where they are once they are there, first come first served."""
    left = place.resident_bytes
    if left is None:
        yield from parts
        return
    for number, tensors in parts.items():
        left -= part_bytes(tensors, place.dtype)
        if left < 0:
            return
        yield number


def part_bytes(tensors: Iterable[Parameter], dtype: torch.dtype) -> int:
    """Bytes of parameters in a dtype; what has to be fp32 is."""
    return sum(each.count * (4 if each.slot.float32 else dtype.itemsize) for each in tensors)


def recorded(model: Any, hidden_BTD: Tensor) -> list[Call]:
    """What a model's forward hands to each of its layers, besides the hidden states."""
    calls: list[Call] = []
    last = len(model.model.layers)

    def record(hidden_states: Tensor, **call: Any) -> Tensor:
        calls.append(call)
        if len(calls) == last:
            raise Recorded
        return hidden_states

    with ExitStack() as stack:
        for layer in model.model.layers:
            layer.forward = record
            stack.callback(delattr, layer, "forward")
        try:
            model.model(inputs_embeds=hidden_BTD.detach(), use_cache=False)
        except Recorded:
            return calls
    raise AssertionError("a forward that does not call its layers")


def stack_of(
    checkpoint: Checkpoint,
    placement: Placement = REFERENCE,
    served: Architecture | None = None,
) -> Stack:
    """The stack of a checkpoint on disk; ``served`` is its architecture with its formats."""

    def read(parameter: Parameter) -> Tensor:
        return checkpoint[parameter.name]

    architecture = served or checkpoint.architecture
    scales = input_scales(checkpoint, architecture)
    stack = Stack(checkpoint.config, architecture, read, placement, scales)
    generates(stack.model, checkpoint.path)
    return stack


def stack_at(path: Path, placement: Placement = REFERENCE) -> Stack:
    """The stack of a directory, its KV caches in the formats that are written beside its config."""
    return stack_of(open_checkpoint(path), placement, served_as(path))


def served_as(path: Path) -> Architecture | None:
    """The architecture that is written beside a config, with its formats; None where none is."""
    return architecture_of(path, read_config(path)) if beside(path).is_file() else None


@torch.no_grad()
def final_states(stack: Stack, batches: Sequence[Tensor]) -> list[Tensor]:
    """Hidden states [B, T, D] after the final norm of batches of token ids [B, T]."""
    hidden = [stack.embed(ids) for ids in batches]
    for number, layer in stack.visits(range(stack.layers)):
        for batch, states in enumerate(hidden):
            hidden[batch] = stack.run(number, layer, states)
    with stack.head():
        return [stack.normed(states) for states in hidden]
