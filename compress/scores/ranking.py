"""Named alternatives to our importance: which units stay, ranked by what others measure.

Forward statistics only. Published aggregation throughout (Muralidharan et al. 2024, Minitron,
section 2.2, best of its table): mean of |activation| over the tokens of a sequence, then the L2
norm over sequences. What a decision costs is still predicted from contributions (``scores``).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.model.architecture import Architecture, Block, Mamba, Moe, block_name, sizes
from compress.model.layout import parse
from compress.model.modules import final_norm, layer_of, mixer_of, norm_of, slots_of
from compress.student.candidate import Ranking
from compress.student.units import unit_key, units_of

MAMBA_UNITS = ("group", "head", "channel")


def activation_scores(
    model: Any, architecture: Architecture, tokens: Tensor, batch: int = 8
) -> dict[str, Tensor]:
    """What one forward pass over [sequences, T] tokens says of every unit, fp32.

    Keys and shapes, ``<block>`` being the block's name:

    - ``hidden`` [hidden]: outputs of every residual norm, summed over the norms.
    - ``<block>/ffn``, ``<block>/shared_ffn`` [width] and ``<block>/expert_ffn`` [expert, width]:
      inputs of the down projection; an expert is 0 at tokens that are not routed to it.
    - ``<block>/query`` [kv_head, query]: L2 norm of a head's output at a token.
    - ``<block>/group.head.channel``: x of ``[z x B C dt] = in_proj(norm(X))``, from which the
      scores of Mamba's heads and channels are made (Taghibakhshi et al. 2025, Minitron-SSM).
    - ``<block>/expert`` [expert]: router weight times L2 norm of an expert's output at a token.
    - ``<block>/router`` [expert]: the same averaged over the tokens that are routed to the expert
      (Lasby et al. 2025, REAP); 0 for one that has none.

    Sums are in fp64: neither the batch size nor the order of sequences matters.
    """
    found = Forward(architecture, tokens.shape[1])
    with torch.no_grad(), found.attached(model):
        for rows in torch.split(tokens, batch):
            model.model(input_ids=rows, use_cache=False)
    return found.scores()


class Forward:
    """Hooks that add up, over the batches of a forward pass, what ``activation_scores`` returns."""

    def __init__(self, architecture: Architecture, length: int) -> None:
        self.architecture, self.length = architecture, length
        self.squares: dict[str, Tensor] = {}
        self.norms: dict[int, Tensor] = {}
        self.routed: dict[str, tuple[Tensor, Tensor]] = {}

    def scores(self) -> dict[str, Tensor]:
        """The sums as scores."""
        found = {key: square.sqrt().float() for key, square in self.squares.items()}
        found["hidden"] = torch.stack([s.sqrt() for s in self.norms.values()]).sum(0).float()
        for key, (total, count) in self.routed.items():
            found[key] = (total / count.clamp(min=1)).float()
        return found

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Hooks in place."""
        blocks = self.architecture.blocks
        norms = [final_norm(model), *(norm_of(model, block) for block in blocks)]
        handles = []
        for block in blocks:
            for name, slot in slots_of(self.architecture, block, experts=False).items():
                module, (out, into) = layer_of(model, block).get_submodule(name), parse(slot.shape)
                if isinstance(block, Mamba):
                    # Of its weights, in_proj alone writes units: z, then x.
                    if out.count(MAMBA_UNITS) == 2:
                        handles.append(module.register_forward_hook(self.tap_mamba(block)))
                elif units_of(into[0], block) is not None:
                    hook = self.tap_input(block, into[0])
                    handles.append(module.register_forward_hook(hook))
            if isinstance(block, Moe):
                experts = mixer_of(model, block).experts
                handles.append(experts.register_forward_pre_hook(self.tap_experts(block)))
        handles += [
            norm.register_forward_hook(self.tap_norm(number)) for number, norm in enumerate(norms)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, key: str, means: Tensor) -> None:
        """Add sequences' means [b, *units]."""
        square = means.double().square().sum(0)
        self.squares[key] = self.squares[key] + square if key in self.squares else square

    def tap_norm(self, number: int) -> Callable[..., None]:
        """Hook of a residual norm."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            square = output.abs().mean(1).double().square().sum(0)
            self.norms[number] = self.norms[number] + square if number in self.norms else square

        return hook

    def tap_input(self, block: Block, product: tuple[str, ...]) -> Callable[..., None]:
        """Hook of a linear module that reads units: neurons, or heads of ``head_dim`` each."""
        axis_sizes = sizes(block)
        shape = [axis_sizes[axis] for axis in product]

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            value = args[0].reshape(*args[0].shape[:2], *shape)
            if product[-1] == "head_dim":
                self.add(f"{block_name(block)}/query", l2(value, -1).mean(1))
            else:
                self.add(f"{block_name(block)}/{product[-1]}", value.abs().mean(1))

        return hook

    def tap_mamba(self, block: Mamba) -> Callable[..., None]:
        """Hook of a Mamba block's in_proj."""
        shape = (block.group, block.head, block.channel)
        width = block.group * block.head * block.channel

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            x = output[..., width : 2 * width].abs().mean(1)
            self.add(unit_key(block, MAMBA_UNITS), x.reshape(-1, *shape))

        return hook

    def tap_experts(self, block: Moe) -> Callable[..., None]:
        """Hook of the fused experts, which see flattened tokens; their outputs are made again."""
        name = block_name(block)

        def hook(module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
            x, index, weight = args
            sequences = len(x) // self.length
            neurons = x.new_zeros(sequences, block.expert, block.expert_ffn)
            saliency = x.new_zeros(sequences, block.expert)
            count = torch.zeros(block.expert, dtype=torch.float64)
            for expert in range(block.expert):
                token, choice = torch.where(index == expert)
                row = token // self.length
                inner = module.act_fn(x[token] @ module.up_proj[expert].T)
                norm = l2(inner @ module.down_proj[expert].T, -1)
                neurons[:, expert].index_add_(0, row, inner.abs())
                saliency[:, expert].index_add_(0, row, norm * weight[token, choice])
                count[expert] = len(token)
            self.add(f"{name}/expert_ffn", neurons / self.length)
            self.add(f"{name}/expert", saliency / self.length)
            total, before = self.routed.get(f"{name}/router", (torch.zeros(()), torch.zeros(())))
            self.routed[f"{name}/router"] = total + saliency.double().sum(0), before + count

        return hook


def activation_importance(
    found: Mapping[str, Tensor], block: Block | None, axis: str, keep: Mapping[str, Tensor]
) -> Tensor:
    """Scores of the units of an axis from ``activation_scores``, shaped as ``importance`` is.

    A KV group is the L2 norm of its heads (Minitron ranks none). A Mamba channel is the L2 norm
    over all heads, which share the ranking, and a Mamba head that over the kept channels.
    """
    if block is None:
        return found["hidden"]
    name = block_name(block)
    if axis == "kv_head":
        return l2(found[f"{name}/query"], 1)
    if isinstance(block, Mamba):
        units = found[unit_key(block, MAMBA_UNITS)]
        if axis == "channel":
            return l2(units.flatten(0, 1), 0)
        kept = keep.get("channel")
        return l2(units if kept is None else units[..., kept], -1)
    return found[f"{name}/{axis}"]


def l2(values: Tensor, dim: int) -> Tensor:
    """L2 norm over one dimension."""
    return values.square().sum(dim).sqrt()


def require_ranked(architecture: Architecture, ranking: Ranking) -> None:
    """Refuse a ranking that has nothing to rank in a model; InputError says which do."""
    if ranking == "router" and not any(isinstance(b, Moe) for b in architecture.blocks):
        raise InputError(
            "ranking router ranks experts and this teacher has none; "
            "--ranking contribution and activation rank every axis"
        )
