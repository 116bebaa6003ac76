"""Exact costs of a block's options from cached hidden states: run only what comes after them.

A block is decoupled from the rest: what its output projection reads is computed once, every option
is a mask on that, and the options go through the rest of the model together, stacked along the
batch. Sequences are added until each option's mean is known well enough.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.measure.losses import log_probabilities
from compress.model.architecture import Architecture, Block, Mamba, Moe, block_name
from compress.model.families import family_of
from compress.model.modules import final_hidden, head_of
from compress.model.tensor_files import save_tensors
from compress.scores.contributions import Progress
from compress.student.masks import alive
from compress.student.units import Units, projections

# What an option keeps of its block by axis; None when the block goes.
Keep = Mapping[str, Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When a mean is known well enough: its standard error is below either bound.

    ``absolute`` is in nats per token, ``relative`` a share of the mean; never before ``least``
    sequences, of which one standard deviation can be told.
    """

    absolute: float = 0.0
    relative: float = 0.0
    least: int = 4

    def reached(self, kl: Tensor) -> bool:
        """Whether the sequences' KLs [n] are enough."""
        if len(kl) < max(self.least, 2):
            return False
        error = float(kl.std()) / math.sqrt(len(kl))
        return error <= max(self.absolute, self.relative * float(kl.mean()))


NEVER = Stop(least=2**31)


@dataclass
class Text:
    """What the teacher computes on chunks of sequences, each when it is first asked for.

    The input of every layer is held in memory: tokens x hidden x layers numbers.
    """

    model: Any
    chunks: tuple[Tensor, ...]
    found: dict[int, tuple[list[Tensor], Tensor]] = field(default_factory=dict)

    def chunk(self, number: int) -> tuple[list[Tensor], Tensor]:
        """Hidden states [sequences, T, D] entering each layer, and the final normed ones."""
        if number not in self.found:
            tokens = self.chunks[number]
            with entering(self.model.model.layers) as caught:
                final = final_hidden(self.model, tokens)
            self.found[number] = caught, final
        return self.found[number]


@contextmanager
def entering(layers: Iterable[Any]) -> Iterator[list[Tensor]]:
    """Inputs of the layers in the order in which they run while the context is open."""
    caught: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
        for layer in layers
    ]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def replayable(block: Block, keep: Keep) -> bool:
    """Whether an option is a mask on what the output projection reads: no routed expert changes."""
    return keep is None or not (isinstance(block, Moe) and set(keep) - {"shared_ffn"})


@torch.no_grad()
def option_costs(
    model: Any,
    architecture: Architecture,
    tokens: Tensor,
    options: Mapping[int, Mapping[str, Keep]],
    stop: Stop = NEVER,
    chunk: int = 4,
    progress: Progress = lambda done, total: None,
    directory: Path | None = None,
) -> dict[int, dict[str, Tensor]]:
    """KL(teacher || student) in nats per token of single options, on every sequence that was run.

    Args:
        model: the teacher in fp32, in eval mode.
        architecture: the teacher's.
        tokens: [sequences, T]; an option that ``stop`` never settles is run on all of them.
        options: what is kept, by block number and a name of the option.
        stop: an option runs on no further sequences once its mean is known well enough.
        chunk: sequences added at a time.
        progress: called with blocks done and in total.
        directory: keeps every finished block, so that a killed replay continues there.

    Returns:
        By block number and name the KLs [sequences run] in the order of ``tokens``.

    Raises:
        ValueError: an option that changes routed experts.
    """
    for number, keeps in options.items():
        block = architecture.blocks[number]
        if refused := [key for key, keep in keeps.items() if not replayable(block, keep)]:
            raise ValueError(f"{block_name(block)}: {refused[0]} changes routed experts")
    text = Text(model, torch.split(tokens, chunk))
    found: dict[int, dict[str, Tensor]] = {}
    for done, (number, keeps) in enumerate(options.items()):
        block = architecture.blocks[number]
        part = directory / f"{block_name(block)}.safetensors" if directory else None
        if part is not None and part.is_file():
            found[number] = load_file(part)
        else:
            found[number] = block_costs(text, architecture, block, keeps, stop)
            if part is not None:
                save_tensors(found[number], part)
        progress(done + 1, len(options))
    return found


def removal_costs(
    model: Any,
    architecture: Architecture,
    tokens: Tensor,
    stop: Stop = NEVER,
    progress: Progress = lambda done, total: None,
    directory: Path | None = None,
) -> dict[str, float]:
    """Exact KL of removing each block alone, nats per token, by its name; see ``option_costs``."""
    options = {number: {"removed": None} for number in range(len(architecture.blocks))}
    found = option_costs(
        model, architecture, tokens, options, stop, progress=progress, directory=directory
    )
    return {
        block_name(architecture.blocks[number]): float(costs["removed"].mean())
        for number, costs in found.items()
    }


def block_costs(
    text: Text, architecture: Architecture, block: Block, keeps: Mapping[str, Keep], stop: Stop
) -> dict[str, Tensor]:
    """KLs [sequences run] of one block's options by name."""
    found = {key: torch.zeros(0) for key in keeps}
    unsettled = list(keeps)
    for number in range(len(text.chunks)):
        kl = chunk_costs(text, number, architecture, block, [keeps[key] for key in unsettled])
        for key, more in zip(unsettled, kl, strict=True):
            found[key] = torch.cat([found[key], more])
        unsettled = [key for key in unsettled if not stop.reached(found[key])]
        if not unsettled:
            break
    return found


def chunk_costs(
    text: Text, number: int, architecture: Architecture, block: Block, keeps: list[Keep]
) -> Tensor:
    """KLs [options, sequences] of one block's options on a chunk."""
    inputs, final = text.chunk(number)
    model, hidden = text.model, inputs[block.layer]
    branches = branch_outputs(model, architecture, block, hidden, keeps)
    with computed(model, architecture, block.layer, branches):
        layers = range(block.layer, len(model.model.layers))
        student = run_layers(model, layers, hidden.repeat(len(keeps), 1, 1))
    head = head_of(model)
    teacher = log_probabilities(final, head)
    probability = teacher.exp()
    kl = [
        (probability * (teacher - log_probabilities(one, head))).sum(-1).mean(-1)
        for one in student.chunk(len(keeps))
    ]
    return torch.stack(kl)


def run_layers(model: Any, numbers: Iterable[int], hidden: Tensor) -> Tensor:
    """Final normed hidden state of the model with only some layers, from the first one's input."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[number] for number in numbers])
    try:
        output: Tensor = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    finally:
        model.model.layers = layers
    return output


@contextmanager
def computed(
    model: Any, architecture: Architecture, layer: int, branches: Mapping[str, Tensor]
) -> Iterator[None]:
    """The layer with the branches of some kinds of block given instead of run."""
    sites = family_of(architecture.family).sites
    mixers = []
    for kind, branch in branches.items():
        mixer = getattr(model.model.layers[layer], sites[kind].mixer)
        # Attention also returns its weights, which nobody reads.
        output = (branch, None) if kind == "attention" else branch
        mixer.forward = lambda *args, output=output, **kwargs: output
        mixers.append(mixer)
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.forward  # the class's own shows again


def branch_outputs(
    model: Any, architecture: Architecture, block: Block, hidden: Tensor, keeps: list[Keep]
) -> dict[str, Tensor]:
    """What the layer's branches up to this block's add, [options * sequences, T, D], by kind.

    The branch of this block has its options' units only; those before it are the teacher's.
    """
    family, layer = family_of(architecture.family), model.model.layers[block.layer]
    units, name = masked_site(architecture, block)
    caught: dict[str, tuple[Any, ...]] = {}
    outputs: dict[str, Any] = {}
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda module, args: caught.update(inner=args)
        )
    ]
    kinds = [other.kind for other in architecture.blocks if other.layer == block.layer]
    kinds = kinds[: kinds.index(block.kind) + 1]
    for kind in kinds:
        handles.append(
            getattr(layer, family.sites[kind].mixer).register_forward_hook(
                lambda module, args, output, kind=kind: outputs.update({kind: output})
            )
        )
    try:
        run_layers(model, [block.layer], hidden)
    finally:
        for handle in handles:
            handle.remove()
    plain = {kind: out[0] if isinstance(out, tuple) else out for kind, out in outputs.items()}
    own = plain[block.kind]
    kept = [
        torch.zeros_like(own)
        if keep is None
        else masked_branch(layer, block, name, caught["inner"], own, alive(block, units, keep))
        for keep in keeps
    ]
    found: dict[str, Tensor] = {kind: plain[kind].repeat(len(keeps), 1, 1) for kind in kinds[:-1]}
    return found | {block.kind: torch.cat(kept)}


def masked_site(architecture: Architecture, block: Block) -> tuple[Units, str]:
    """The unit array whose mask is a cut of a block, and the module of the layer that reads it."""
    found = projections(architecture, block)
    return next((found.units, found.masked) for found in found if found.expert is None)


def masked_branch(
    layer: Any, block: Block, name: str, inner: tuple[Tensor, ...], own: Tensor, mask: Tensor
) -> Tensor:
    """The branch's output when the units where ``mask`` is 0 are gone; ``own`` is the whole one."""
    read = layer.get_submodule(name)
    width = inner[0].shape[-1]
    features = mask.flatten().repeat_interleave(width // mask.numel())
    if isinstance(block, Mamba):
        # Fewer units under the norm's mean: surgery scales its weight by c = sqrt(n / n'), which
        # this is, eps included.
        groups = mask.flatten(1)
        count = (groups.shape[1] / groups.sum(1)).sqrt().repeat_interleave(groups.shape[1])
        projected: Tensor = layer.mixer.out_proj(read(inner[0] * (features * count), *inner[1:]))
        return projected
    masked: Tensor = read(inner[0] * features)
    return own - read(inner[0]) + masked if isinstance(block, Moe) else masked
