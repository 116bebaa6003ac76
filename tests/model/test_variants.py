"""What transformers makes of the configs that families come with, older names and silences too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import EVERY, write_tiny
from transformers import AutoModelForCausalLM

from compress.core.errors import InputError
from compress.model.build import load_model, student_config
from compress.model.families import read_architecture

AUTO: Any = AutoModelForCausalLM
TOKENS = torch.randint(1, 128, (2, 30), generator=torch.Generator().manual_seed(1))
GONE = "no such key"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
MROPE = {
    "rope_type": "default",
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.25,
    "mrope_interleaved": True,
    "mrope_section": [11, 11, 10],
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"rope_theta": 1e6, "rope_scaling": YARN}),
    ("qwen3", {"layer_types": GONE, "max_window_layers": 2}),
    ("qwen3", {"layer_types": None, "use_sliding_window": False}),
    ("qwen3", {"head_dim": GONE, "num_attention_heads": 2, "num_key_value_heads": 1}),
    ("qwen2", {"layer_types": GONE, "max_window_layers": 1, "rope_theta": 1e6}),
    ("qwen2", {"head_dim": 24}),
    ("mistral", {"sliding_window": None, "head_dim": GONE}),
    ("mistral", {"sliding_window": GONE, "head_dim": 24}),
    ("ministral", {"layer_types": None}),
    ("ministral3", {"rope_parameters": GONE, "sliding_window": 5}),
    ("phi3", {"rope_scaling": None, "partial_rotary_factor": GONE, "sliding_window": None}),
    ("phi3", {"original_max_position_embeddings": 16}),
    ("smollm3", {"no_rope_layers": GONE, "no_rope_layer_interval": 3}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": False}),
    ("nemotron", {"partial_rotary_factor": 1.0, "head_dim": GONE, "hidden_act": "relu2"}),
    ("nemotron", {"norm_eps": GONE, "head_dim": None}),
    ("lfm2", {"block_auto_adjust_ff_dim": True, "block_ff_dim": 150, "block_multiple_of": 16}),
    ("lfm2", {"block_auto_adjust_ff_dim": GONE, "block_ffn_dim_multiplier": 0.3}),
    ("lfm2", {"layer_types": GONE, "full_attn_idxs": [0, 3], "tie_embedding": False}),
    ("lfm2", {"layer_types": GONE, "head_dim": 24}),
    ("olmo2", {"head_dim": GONE, "num_key_value_heads": None, "rms_norm_eps": GONE}),
    ("olmo2", {"rope_scaling": YARN, "rope_theta": 5e5}),
    ("olmo3", {"layer_types": GONE, "rope_theta": 1e4}),
    ("olmo3", {"rope_scaling": None, "rope_parameters": {"full_attention": YARN}, "head_dim": 24}),
    ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": None, "decoder_sparse_step": 2}),
    ("qwen3_moe", {"num_experts": GONE, "num_local_experts": 4, "num_experts_per_tok": 3}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6}),
    ("gemma3", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
    ("gemma3", {"sliding_window_pattern": GONE, "rope_theta": GONE, "rope_local_base_freq": GONE}),
    ("gemma3", {"rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": 16}),
    (
        "gemma3",
        {
            "rope_scaling": None,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 500.0}},
            "hidden_activation": "gelu",
            "query_pre_attn_scalar": GONE,
            "final_logit_softcapping": 30.0,
        },
    ),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "first_k_dense_replace": 0}),
    ("deepseek_v3", {"rope_scaling": None, "n_group": 1, "num_experts_per_tok": 3}),
    ("deepseek_v3", {"n_routed_experts": 9, "n_group": 3, "topk_group": 2, "head_dim": 8}),
    ("qwen3_next", {"layer_types": GONE, "full_attention_interval": 2, "decoder_sparse_step": 2}),
    (
        "qwen3_next",
        {"mlp_only_layers": None, "norm_topk_prob": False, "partial_rotary_factor": GONE},
    ),
    ("qwen3_next", {"rope_parameters": YARN | {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}),
    ("qwen3_next", {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3}),
    ("qwen3_5_text", {"layer_types": None, "rope_parameters": MROPE}),
    ("qwen3_5_text", {"linear_num_key_heads": 1, "linear_value_head_dim": 8, "head_dim": 24}),
    ("qwen3_5_moe_text", {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}),
    ("qwen3_5_moe_text", {"tie_word_embeddings": True, "num_key_value_heads": GONE}),
    ("glm4_moe", {"attention_bias": False, "use_qk_norm": False, "first_k_dense_replace": 0}),
    ("glm4_moe", {"n_group": 3, "topk_group": 2, "partial_rotary_factor": 0.25}),
    ("gpt_oss", {"attention_bias": False, "swiglu_limit": GONE, "layer_types": GONE}),
    ("gpt_oss", {"num_local_experts": GONE, "num_experts": 4, "rope_parameters": GONE}),
    ("gpt_oss", {"head_dim": 24, "sliding_window": 8, "swiglu_alpha": 1.5}),
    ("granitemoehybrid", {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1}),
    ("granitemoehybrid", {"layers_block_type": GONE, "layer_types": ["full_attention"] * 4}),
    ("granitemoehybrid", {"mamba_d_head": "auto", "position_embedding_type": "rope"}),
    ("granitemoehybrid", {"position_embedding_type": "nope", "rope_theta": 10000}),
    ("granitemoehybrid_moe", {"num_experts_per_tok": 1, "rope_theta": 1e6, "mamba_expand": 2}),
]


def variant(family: str, change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (EVERY[family] | change).items() if value != GONE}


@pytest.mark.parametrize(("family", "change"), VARIANTS, ids=str)
def test_what_transformers_loads_computes_the_same(
    family: str, change: dict[str, Any], tmp_path: Path
) -> None:
    config = variant(family, change)
    path = write_tiny(tmp_path / "m", config)
    stock = AUTO.from_pretrained(path, dtype=torch.float32).eval()
    assert torch.equal(load_model(path)(TOKENS).logits, stock(TOKENS).logits)
    architecture = read_architecture(config)
    assert read_architecture(student_config(config, architecture)) == architecture


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias=true is not supported"),
        ("qwen3", {"use_sliding_window": False}, "no sliding_window is used"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention' is not supp"),
        ("qwen2", {"layer_types": ["full_attention"]}, "lists 1 layers, num_hidden_layers is 4"),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 1]}, "not a list of 0 and 1"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "not one of phi3 models"),
        ("phi3", {"partial_rotary_factor": 1.0}, "short_factor has 6 numbers"),
        ("ministral3", {"rope_parameters": {"rope_type": "default"}}, "llama_4_scaling_beta"),
        ("nemotron", {"num_key_value_heads": GONE}, "no num_key_value_heads"),
        ("olmo3", {"rope_parameters": YARN}, "rope_parameters of olmo3 are by layer type"),
        (
            "olmo3",
            {"rope_scaling": {"type": "linear"}},
            "rope type 'linear' needs factor|factor is",
        ),
        ("lfm2", {"layer_types": ["conv", "mamba"] * 2}, "unknown layer type 'mamba'"),
        (
            "lfm2",
            {
                "block_auto_adjust_ff_dim": True,
                "intermediate_size": 1,
                "block_ffn_dim_multiplier": None,
            },
            "intermediate_size 1 leaves no FFN",
        ),
        ("nemotron", {"mlp_bias": True}, "mlp_bias=true is not supported"),
        ("qwen3_next", {"num_experts_per_tok": 7}, "num_experts_per_tok 7 is above num_experts 6"),
        (
            "qwen3_next",
            {"layer_types": ["mamba"] * 4},
            "'mamba' is not supported; known: linear_at",
        ),
        ("qwen3_5_text", {"linear_num_value_heads": 3}, "3 is not a multiple of linear_num_key"),
        ("qwen3_5_text", {"layer_types": GONE, "full_attention_interval": 0}, "from 1 to"),
        ("qwen3_5_text", {"num_hidden_layers": 5}, "lists 4 layers, num_hidden_layers is 5"),
        ("qwen3_5_text", {"partial_rotary_factor": -0.5}, "-0.5 is not between 0 and 1"),
        ("qwen3_5_moe_text", {"attention_bias": True}, "attention_bias=true is not supported"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok 7 is above num_experts 6"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "2 is not num_attention_heads 4"),
        ("deepseek_v3", {"head_dim": 16}, "head_dim 16 is not qk_rope_head_dim 8"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim 7 is odd"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=true is not supported"),
        ("deepseek_v3", {"n_group": 6}, "leaves n_routed_experts 6 no two of a group"),
        ("glm4_moe", {"n_group": 4}, "n_routed_experts 6 is not a multiple of n_group 4"),
        (
            "gemma3",
            {"attention_bias": True},
            "attention_bias=true is not supported",
        ),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true is"),
        ("gemma3", {"sliding_window": None}, "no sliding_window is used"),
        ("gemma3", {"partial_rotary_factor": 0.5}, "with partial_rotary_factor 0.5 is not supp"),
        ("gemma3", {"rope_parameters": {"full_attention": 3}}, "full_attention is 3, not a table"),
        ("gpt_oss", {"swiglu_limit": 7}, "not a number with a decimal point"),
        ("gpt_oss", {"num_experts_per_tok": 7}, "is above num_local_experts 6"),
        ("granitemoehybrid", {"mamba_n_heads": 7, "mamba_d_head": 16}, "are not mamba_expand 2 of"),
        ("granitemoehybrid", {"layers_block_type": ["conv"] * 4}, "unknown layer type 'conv'"),
        ("granitemoehybrid", {"time_step_limit": [0.0, 0.5]}, "it is .0, infinity"),
        ("granitemoehybrid_moe", {"num_experts_per_tok": 7}, "is above num_local_experts 6"),
        ("mistral", {"num_hidden_layers": 10**12}, "not a whole number from 1 to 9999"),
    ],
    ids=str,
)
def test_what_nobody_can_run_is_refused(family: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_architecture(variant(family, change))
