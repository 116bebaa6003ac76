"""DeciLM for transformers, which has none: llama's modules in layers of their own sizes."""

import copy
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaRMSNorm,
)

from .configuration_decilm import DeciLMConfig


class DeciLMDecoderLayer(LlamaDecoderLayer):
    """A layer with the halves that its entry names."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        nn.Module.__init__(self)
        attention, ffn = (config.block_configs[layer_idx][half] for half in ("attention", "ffn"))
        own = copy.copy(config)
        if not attention.no_op:
            own.num_key_value_heads = config.num_attention_heads // attention.n_heads_in_group
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = LlamaAttention(own, layer_idx)
            for name in ("q_proj", "k_proj", "v_proj") if config.qkv_bias else ():
                width = getattr(self.self_attn, name).out_features
                setattr(self.self_attn, name, nn.Linear(config.hidden_size, width))
        if not ffn.no_op:
            own.intermediate_size = ffn.intermediate_size
            self.post_attention_layernorm = LlamaRMSNorm(
                config.hidden_size, eps=config.rms_norm_eps
            )
            self.mlp = LlamaMLP(own)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """What the halves add."""
        if hasattr(self, "self_attn"):
            branch, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + branch
        if hasattr(self, "mlp"):
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class DeciLMForCausalLM(LlamaForCausalLM):
    """Llama with these layers."""

    config_class = DeciLMConfig
    _no_split_modules = ("DeciLMDecoderLayer",)

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        numbers = range(config.num_hidden_layers)
        self.model.layers = nn.ModuleList(DeciLMDecoderLayer(config, n) for n in numbers)
        self.post_init()
