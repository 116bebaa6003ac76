"""What linear layers read: the magnitudes that input scales are taken from."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.model.architecture import Architecture
from compress.model.modules import weights_of

CALIBRATION_ROWS, CALIBRATION_TOKENS = 8, 64
Group = tuple[int, str]  # a block's number and one of its fused groups


class Watch(TorchFunctionMode):
    """While it is on, notes the largest input magnitude of every fused group's products.

    ``groups`` has the group of a weight by where its data are: experts are parts of one tensor.
    """

    def __init__(self, groups: Mapping[int, Group]) -> None:
        super().__init__()
        self.groups, self.amax = groups, dict[Group, Tensor]()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The call as it is."""
        if func is nn.functional.linear and (group := self.groups.get(args[1].data_ptr())):
            amax = args[0].abs().amax()
            self.amax[group] = torch.maximum(amax, self.amax.get(group, amax))
        return func(*args, **(kwargs or {}))


def input_ranges(model: Any, architecture: Architecture, rows: Tensor) -> dict[Group, Tensor]:
    """The largest magnitude that the layers of every fused group read over token rows, fp32 []."""
    groups = {
        weight.data_ptr(): (number, str(slot.fused))
        for number, block in enumerate(architecture.blocks)
        for weight, slot in weights_of(model, architecture, block).values()
    }
    watch = Watch(groups)
    with torch.no_grad(), watch:
        model(input_ids=rows, use_cache=False)
    return watch.amax


def token_rows(architecture: Architecture, seed: int = 0) -> Tensor:
    """Token rows drawn uniformly from the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    shape = (CALIBRATION_ROWS, CALIBRATION_TOKENS)
    return torch.randint(architecture.vocab, shape, generator=generator)
