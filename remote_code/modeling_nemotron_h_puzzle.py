"""Nemotron-H Puzzle for transformers, which has none: its layers, each of its own sizes."""

from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock, NemotronHForCausalLM

from .configuration_nemotron_h_puzzle import NemotronHPuzzleConfig

# Without it names on disk match no module, and weights stay random without a word.
register_checkpoint_conversion_mapping(
    NemotronHPuzzleConfig.model_type,
    get_checkpoint_conversion_mapping("nemotron_h"),
    overwrite=True,
)


class NemotronHPuzzleForCausalLM(NemotronHForCausalLM):
    """Nemotron-H with these layers."""

    config_class = NemotronHPuzzleConfig

    def __init__(self, config: NemotronHPuzzleConfig) -> None:
        super().__init__(config)
        settings = map(config.get_nemotron_h_config_for_layer, range(config.num_hidden_layers))
        self.model.layers = nn.ModuleList(NemotronHBlock(own, n) for n, own in enumerate(settings))
        self.post_init()
