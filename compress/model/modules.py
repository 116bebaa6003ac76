"""Where weights, experts, head and norms sit in a torch model.

Models are those that ``build_model`` gives, or transformers' own of the same family: the base model
is ``model.model`` and its layers ``model.model.layers``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.model.architecture import Architecture, Block
from compress.model.families import family_of
from compress.model.layout import Slot

# N tokens, V vocabulary, D hidden, B sequences, T tokens of one.
# What layers call a mixer's first argument, where they name it.
HIDDEN_STATES = "hidden_states"


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


def setting(model: Any, key: str) -> float | None:
    """A number of a model's config; None where its class does not declare it: no code reads it."""
    declared = any(field.name == key for field in fields(model.config))
    return getattr(model.config, key) if declared else None


def head_of(model: Any) -> Head:
    """The output head of a model, as its config scales and caps it."""
    scale = (setting(model, "logit_scale") or 1.0) / (setting(model, "logits_scaling") or 1.0)
    weight = model.get_output_embeddings().weight
    return Head(weight, scale, setting(model, "final_logit_softcapping"))


def scaled_embeddings(model: Any, rows: Tensor) -> Tensor:
    """Rows of the embedding [..., D] as a model's first layer reads them."""
    root: float | None = getattr(model.get_input_embeddings(), "scalar_embed_scale", None)
    if root is not None:
        # Rounded, as transformers does it.
        rows = rows * torch.tensor(root, dtype=rows.dtype, device=rows.device)
    times = setting(model, "embedding_multiplier")
    return rows if times is None else rows * times


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


def mixers_of(model: Any, block: Block) -> list[Any]:
    """The modules that compute a block's branch, which is the sum of what they put out."""
    site = family_of(model.config.model_type).sites[block.kind]
    return [getattr(layer_of(model, block), name) for name in site.mixers]


def attention_of(model: Any, block: Block) -> Any:
    """The module that reads an attention block's cache."""
    return mixers_of(model, block)[0]


def router_of(model: Any, block: Block) -> Any:
    """The module that chooses a block's experts."""
    site = family_of(model.config.model_type).sites[block.kind]
    return layer_of(model, block).get_submodule(site.router)


def norm_of(model: Any, block: Block) -> Any | None:
    """The norm that feeds a block's mixers; None where they read the residual stream itself."""
    norm = family_of(model.config.model_type).sites[block.kind].norm
    return getattr(layer_of(model, block), norm) if norm else None


def readers_of(model: Any, block: Block) -> list[Any]:
    """The modules of a block that read the residual stream: its norm, or mixers without one."""
    norm = norm_of(model, block)
    return [norm] if norm is not None else mixers_of(model, block)


def post_of(model: Any, block: Block) -> Any | None:
    """The norm between a block's mixer and the residual stream; None where there is none."""
    post = family_of(model.config.model_type).sites[block.kind].post
    return getattr(layer_of(model, block), post) if post else None


def branch_of(model: Any, block: Block) -> list[Any]:
    """The modules of a block's branch in their order: norm, mixers and post, those there are."""
    modules = (norm_of(model, block), *mixers_of(model, block), post_of(model, block))
    return [module for module in modules if module is not None]


def with_hidden(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a module of a branch whose hidden states are changed."""
    if args:
        return (change(args[0]), *args[1:]), dict(kwargs)
    return args, {**kwargs, HIDDEN_STATES: change(kwargs[HIDDEN_STATES])}


def after(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
    """A hook that calls ``see`` with what a module puts out."""
    return module.register_forward_hook(lambda module, args, output: see(output))


def seeing(model: Any, block: Block, see: Callable[[Tensor], None]) -> Iterator[RemovableHandle]:
    """Put on hooks that call ``see`` with what a block's mixers read, [B, T, D], in every forward.

    Its gradient is that of this block alone, also where the mixers read the residual stream.
    """
    if (norm := norm_of(model, block)) is not None:
        yield after(norm, see)
        return

    def own(hidden_BTD: Tensor) -> Tensor:
        view_BTD = hidden_BTD.view_as(hidden_BTD)
        see(view_BTD)
        return view_BTD

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_hidden(args, kwargs, own)

    for mixer in mixers_of(model, block):
        yield mixer.register_forward_pre_hook(hook, with_kwargs=True)


def weights_of(
    model: Any, architecture: Architecture, block: Block
) -> dict[str, tuple[Tensor, Slot]]:
    """The block's quantizable weights [out, in] with their slots, by module name in the layer."""
    layer = layer_of(model, block)
    plain = slots_of(architecture, block, experts=False)
    found = {name: (layer.get_submodule(name).weight, slot) for name, slot in plain.items()}
    for name, slot in slots_of(architecture, block, experts=True).items():
        path, _, leaf = str(slot.place).rpartition(".")
        for expert, larger in enumerate(getattr(layer.get_submodule(path), leaf)):
            found[name.format(expert=expert)] = (slot.part.view(larger), slot)
    return found


def slots_of(architecture: Architecture, block: Block, *, experts: bool) -> dict[str, Slot]:
    """The block's quantizable weights by module name in the layer: the experts' or all others."""
    table = family_of(architecture.family).tensors(block)
    return {
        name.removesuffix(".weight"): slot
        for name, slot in table.items()
        if slot.fused is not None and ("{expert}" in name) == experts
    }
