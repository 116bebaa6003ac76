"""Nemotron-H Puzzle: Nemotron-H whose layers have sizes of their own (``block_configs``)."""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import NemotronHConfig


@strict
class NemotronHPuzzleConfig(NemotronHConfig):
    """Nemotron-H's settings and, per layer, those that differ there."""

    model_type = "nemotron_h_puzzle"

    block_configs: list[dict[str, Any]] | None = None

    def get_nemotron_h_config_for_layer(self, layer: int) -> "NemotronHPuzzleConfig":
        """The settings of one layer; vLLM asks for them by this name.

        Layers beyond the last, which predict further tokens, have the common ones.
        """
        own = copy.copy(self)
        for entry in self.block_configs[layer : layer + 1]:
            for key, value in entry.items():
                setattr(own, key, value)
        return own
