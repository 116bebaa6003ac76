"""Where weights, experts, head and norms sit in a torch model.

Models are those that ``build_model`` gives, or transformers' own of the same family: the base model
is ``model.model`` and its layers ``model.model.layers``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from compress.model.architecture import Architecture, Block
from compress.model.families import family_of
from compress.model.layout import Slot

# N tokens, V vocabulary, D hidden.

EXPERT = ".{expert}."
BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Head:
    """From final hidden states to logits, ``c * tanh(s * h @ W.T / c)``: the only way there.

    ``scale`` s multiplies the product (Granite, Cohere), ``softcap`` c bounds it (Gemma).
    """

    weight: Tensor  # [V, D]
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in fp32, whatever the inputs and the surrounding autocast.

        Not to be differentiated through: the losses know their gradients.
        """
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return self.capped(product(hidden_ND, self.weight))

    def at(self, hidden_ND: Tensor, tokens_N: Tensor) -> Tensor:
        """The logit of one token each, [N] in fp64."""
        rows_ND = self.weight[tokens_N]
        return self.capped((hidden_ND.double() * rows_ND.double()).sum(-1))

    def capped(self, product: Tensor) -> Tensor:
        """Logits of products ``h @ W.T``."""
        logits = product if self.scale == 1 else product * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def slope(self, logits_NV: Tensor) -> Tensor:
        """Derivative of logits in the product ``h @ W.T``, [N, V] or one number for all."""
        if self.softcap is None:
            return logits_NV.new_full((), self.scale)
        return (1 - (logits_NV / self.softcap).square()) * self.scale

    def to(self, device: torch.device) -> "Head":
        """The same head on a device."""
        return Head(self.weight.to(device), self.scale, self.softcap)


def product(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """X W^T in fp32. Two BF16 matrices are multiplied as they are, summed in fp32, off the CPU."""
    both = {x_ND.dtype, weight_VD.dtype}
    if both == {torch.bfloat16} and x_ND.device.type != "cpu":
        found: Tensor = torch.mm(x_ND.flatten(0, -2), weight_VD.T, out_dtype=torch.float32)
        return found.view(*x_ND.shape[:-1], -1)
    return x_ND.float() @ weight_VD.float().T


def head_of(model: Any) -> Head:
    """The output head of a model, as its config scales and caps it."""
    # What the config's class does not declare its model code does not read.
    declared = {field.name for field in fields(model.config)}

    def setting(key: str) -> float | None:
        return getattr(model.config, key) if key in declared else None

    scale = (setting("logit_scale") or 1.0) / (setting("logits_scaling") or 1.0)
    weight = model.get_output_embeddings().weight
    return Head(weight, scale, setting("final_logit_softcapping"))


def final_hidden(model: Any, ids_BT: Tensor) -> Tensor:
    """Hidden states [B, T, D] after the final norm, without a cache."""
    hidden_BTD: Tensor = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD


def final_norm(model: Any) -> nn.Module:
    """The norm that the head reads from."""
    norm: nn.Module = getattr(model.model, family_of(model.config.model_type).final_norm)
    return norm


def layer_of(model: Any, block: Block) -> Any:
    """The layer module that a block is in."""
    return model.model.layers[block.layer]


def mixer_of(model: Any, block: Block) -> Any:
    """The module that computes a block's branch."""
    site = family_of(model.config.model_type).sites[block.kind]
    return getattr(layer_of(model, block), site.mixer)


def norm_of(model: Any, block: Block) -> Any:
    """The norm that feeds a block."""
    site = family_of(model.config.model_type).sites[block.kind]
    return getattr(layer_of(model, block), site.norm)


def post_of(model: Any, block: Block) -> Any | None:
    """The norm between a block's mixer and the residual stream; None where there is none."""
    post = family_of(model.config.model_type).sites[block.kind].post
    return getattr(layer_of(model, block), post) if post else None


def branch_of(model: Any, block: Block) -> list[Any]:
    """The modules of a block's branch in their order: norm, mixer and, where there is one, post."""
    post = post_of(model, block)
    return [norm_of(model, block), mixer_of(model, block), *([post] if post else [])]


def weights_of(
    model: Any, architecture: Architecture, block: Block
) -> dict[str, tuple[Tensor, Slot]]:
    """The block's quantizable weights [out, in] with their slots, by module name in the layer."""
    layer = layer_of(model, block)
    plain = slots_of(architecture, block, experts=False)
    found = {name: (layer.get_submodule(name).weight, slot) for name, slot in plain.items()}
    for name, slot in slots_of(architecture, block, experts=True).items():
        path, _, matrix = name.partition(EXPERT)
        part = slot.part
        stacked = getattr(layer.get_submodule(path), part.whole if part else matrix)
        for expert, whole in enumerate(stacked):
            own = whole.chunk(part.of)[part.number] if part else whole
            found[name.format(expert=expert)] = (own, slot)
    return found


def fused_experts(model: Any, architecture: Architecture, block: Block) -> Any | None:
    """The module of a block's routed experts, their weights stacked; None if it has none.

    It is called with flattened tokens [n, D], chosen experts and their weights [n, top-k].
    """
    layer = layer_of(model, block)
    paths = [name.partition(EXPERT)[0] for name in slots_of(architecture, block, experts=True)]
    return layer.get_submodule(paths[0]) if paths else None


def routed(
    module: Any, x: Tensor, index: Tensor, weight: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each of the fused experts its tokens [t], their neurons [t, width] and weights [t, 1].

    The arguments are those that the module is called with.
    """
    for expert in range(len(module.down_proj)):
        token, choice = torch.where(index == expert)
        read = [x[token] @ matrix.T for matrix in readers(module, expert)]
        yield token, neurons(module, read), weight[token, choice, None]


def readers(module: Any, expert: int) -> tuple[Tensor, ...]:
    """What one of the fused experts reads with, in the order of its table: up, or gate and up."""
    gated: Tensor | None = getattr(module, "gate_up_proj", None)
    return (module.up_proj[expert],) if gated is None else gated[expert].chunk(2)


def neurons(module: Any, read: Sequence[Tensor]) -> Tensor:
    """Neurons of an expert from what its ``readers`` give."""
    first: Tensor = module.act_fn(read[0])
    return first if len(read) == 1 else first * read[1]


@contextmanager
def routing_among(router: Any, kept: Tensor) -> Iterator[None]:
    """A router whose other experts are not there, as their score before the choice is -inf.

    Inside the visit of its layer: it changes what the layer's weights are.
    """
    bias: Tensor | None = getattr(router, BIAS, None)
    if bias is not None:
        gone = torch.ones_like(bias, dtype=torch.bool)
        gone[kept.to(bias.device)] = False
        setattr(router, BIAS, bias.masked_fill(gone, -torch.inf))
    else:
        # Scores are a softmax over all, which has to be over fewer.
        weight = router.weight

        def among(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            index = kept.to(weight.device)
            router._parameters["weight"] = weight[index]
            try:
                logits, scores, chosen = type(router).forward(router, hidden)
            finally:
                router._parameters["weight"] = weight
            return logits, scores, index[chosen]

        router.forward = among
    try:
        yield
    finally:
        if bias is not None:
            setattr(router, BIAS, bias)
        else:
            del router.forward  # the class's own shows again


def slots_of(architecture: Architecture, block: Block, *, experts: bool) -> dict[str, Slot]:
    """The block's quantizable weights by module name in the layer: the experts' or all others."""
    table = family_of(architecture.family).tensors(block)
    return {
        name.removesuffix(".weight"): slot
        for name, slot in table.items()
        if slot.fused is not None and ("{expert}" in name) == experts
    }
