"""Configs of published models, cut to the keys that fix their sizes."""

from typing import Any

HYBRID_8B: dict[str, Any] = {
    "model_type": "nemotron_h",
    "vocab_size": 131072,
    "hidden_size": 4096,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "tie_word_embeddings": False,
}
HYBRID_12B = HYBRID_8B | {
    "hidden_size": 5120,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    "intermediate_size": 20480,
    "num_attention_heads": 40,
    "mamba_head_dim": 80,
}
HYBRID_9B = HYBRID_12B | {
    "hidden_size": 4480,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "intermediate_size": 15680,
}
HYBRID_30B = HYBRID_8B | {
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_key_value_heads": 2,
    "mamba_num_heads": 64,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
}
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
SMOLLM2 = LLAMA_8B | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 36,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
QWEN3_06B = QWEN3_8B | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "max_window_layers": 28,
    "tie_word_embeddings": True,
}
QWEN25_05B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "max_window_layers": 21,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
MISTRAL_7B: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
PHI4_MINI: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 48,
        "long_factor": [1.0] * 48,
    },
    "sliding_window": 262144,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SMOLLM3_3B: dict[str, Any] = {
    "model_type": "smollm3",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
}
PUBLISHED = {
    "Nemotron-H-8B": (HYBRID_8B, 8_100_852_736),
    "Nemotron-Nano-12B-v2": (HYBRID_12B, 12_310_001_152),
    "Nemotron-Nano-9B-v2": (HYBRID_9B, 8_888_227_328),
    "Nemotron-3-Nano-30B-A3B": (HYBRID_30B, 31_577_940_288),
    "Llama-3.1-8B": (LLAMA_8B, 8_030_261_248),
    "Llama-3.2-1B": (LLAMA_1B, 1_235_814_400),
    "SmolLM2-135M": (SMOLLM2, 134_515_008),
    "Qwen3-8B": (QWEN3_8B, 8_190_735_360),
    "Qwen3-0.6B": (QWEN3_06B, 596_049_920),
    "Qwen2.5-0.5B": (QWEN25_05B, 494_032_768),
    "Mistral-7B-v0.3": (MISTRAL_7B, 7_248_023_552),
    "Phi-4-mini": (PHI4_MINI, 3_836_021_760),
    "SmolLM3-3B": (SMOLLM3_3B, 3_075_098_624),
}
