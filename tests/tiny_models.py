"""Tiny models, small enough to print: a llama and a hybrid with all four kinds of block.

And a search of seconds on them.
"""

import json
import math
import os
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from compress.model.checkpoint import write_checkpoint
from compress.model.families import read_architecture, stored_parameters
from compress.model.layout import Parameter

VOCAB = 128
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "dtype": "bfloat16",
}
HYBRID = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "chunk_size": 16,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
TINY = {"llama": LLAMA, "hybrid": HYBRID}
DENSE = LLAMA | {"num_hidden_layers": 4, "pad_token_id": 0, "tie_word_embeddings": False}
# Windows that texts of a test outgrow, on two layers of four.
MIXED = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "max_position_embeddings": 512,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "llama_4_scaling_beta": 0.1,
}
YARN_OF_DEEPSEEK = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
}
YARN_OF_OLMO = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.2,
}
LONGROPE = {"short_factor": [1.0, 1.5, 1.0, 1.0, 2.0, 3.0], "long_factor": [4.0] * 6}


def tiny_config(model_type: str, prefix: str, *without: str, **keys: object) -> dict[str, object]:
    """A tiny config of a family, ``without`` some of llama's keys."""
    own = {"model_type": model_type, "architectures": [f"{prefix}ForCausalLM"]}
    return {key: value for key, value in (DENSE | own | keys).items() if key not in without}


# Every family besides, with all that it can have and llama has not.
MORE: dict[str, dict[str, object]] = {
    "qwen2": tiny_config("qwen2", "Qwen2", "head_dim", use_sliding_window=True, **MIXED),
    "qwen3": tiny_config("qwen3", "Qwen3", head_dim=20, use_sliding_window=True, **MIXED),
    "mistral": tiny_config("mistral", "Mistral", head_dim=None, sliding_window=6),
    "ministral": tiny_config("ministral", "Ministral", head_dim=24, **MIXED),
    "ministral3": tiny_config("ministral3", "Ministral3", rope_parameters=YARN),
    "lfm2": tiny_config(
        "lfm2",
        "Lfm2",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        norm_eps=1e-5,
        conv_L_cache=3,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention"] * 2,
    ),
    "nemotron": tiny_config("nemotron", "Nemotron", "rms_norm_eps", norm_eps=1e-5, head_dim=24),
    "olmo2": tiny_config("olmo2", "Olmo2", head_dim=24),
    "olmo3": tiny_config("olmo3", "Olmo3", "head_dim", rope_scaling=YARN_OF_OLMO, **MIXED),
    "phi3": tiny_config(
        "phi3",
        "Phi3",
        "head_dim",
        sliding_window=9,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=64,
        rope_scaling={"type": "longrope"} | LONGROPE,
    ),
    "smollm3": tiny_config(
        "smollm3", "SmolLM3", "head_dim", "tie_word_embeddings", no_rope_layers=[1, 0, 1, 0]
    ),
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
MORE["qwen3_moe"] = tiny_config(
    "qwen3_moe", "Qwen3Moe", num_experts=6, decoder_sparse_step=1, mlp_only_layers=[2], **ROUTED
)
MORE["glm4_moe"] = tiny_config(
    "glm4_moe",
    "Glm4Moe",
    n_routed_experts=6,
    n_shared_experts=2,
    first_k_dense_replace=2,
    routed_scaling_factor=1.5,
    attention_bias=True,
    use_qk_norm=True,
    num_nextn_predict_layers=1,
    **ROUTED,
)
MORE["nemotron_h_latent"] = HYBRID | {"moe_latent_size": 32, "num_nextn_predict_layers": 1}
GEMMA = {
    "head_dim": 24,
    "sliding_window_pattern": 2,
    "sliding_window": 6,
    "query_pre_attn_scalar": 20,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
MORE["gemma3"] = tiny_config("gemma3_text", "Gemma3", "tie_word_embeddings", **GEMMA)
MORE["gemma3_untied"] = tiny_config("gemma3_text", "Gemma3", final_logit_softcapping=30.0, **GEMMA)
DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
}
SHARED = {"num_experts": 6, "shared_expert_intermediate_size": 48} | ROUTED
MORE["qwen3_next"] = tiny_config(
    "qwen3_next", "Qwen3Next", mlp_only_layers=[2], decoder_sparse_step=1, **DELTA, **SHARED
)
MORE["qwen3_5_text"] = tiny_config("qwen3_5_text", "Qwen3_5", **DELTA)
MORE["qwen3_5_moe_text"] = tiny_config(
    "qwen3_5_moe_text", "Qwen3_5Moe", "intermediate_size", **DELTA, **SHARED
)
MORE["deepseek_v3"] = tiny_config(
    "deepseek_v3",
    "DeepseekV3",
    "head_dim",
    num_key_value_heads=4,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,
    rope_scaling=YARN_OF_DEEPSEEK,
    n_routed_experts=6,
    n_shared_experts=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=2,
    routed_scaling_factor=1.5,
    num_nextn_predict_layers=1,
    **ROUTED,
)
MORE["granitemoehybrid"] = tiny_config(
    "granitemoehybrid",
    "GraniteMoeHybrid",
    "head_dim",
    tie_word_embeddings=True,
    layers_block_type=["mamba", "attention"] * 2,
    num_local_experts=0,
    shared_intermediate_size=96,
    mamba_n_heads=8,
    mamba_n_groups=2,
    mamba_d_state=16,
    mamba_chunk_size=16,
    embedding_multiplier=3.0,
    residual_multiplier=0.7,
    attention_multiplier=0.2,
    logits_scaling=2,
)
# Another model of the same family: experts, and positions.
MORE["granitemoehybrid_moe"] = MORE["granitemoehybrid"] | {
    "num_local_experts": 6,
    "intermediate_size": 32,
    "shared_intermediate_size": 48,
    "position_embedding_type": "rope",
    "tie_word_embeddings": False,
}
MORE["gpt_oss"] = tiny_config(
    "gpt_oss",
    "GptOss",
    intermediate_size=32,
    num_local_experts=6,
    num_experts_per_tok=2,
    sliding_window=6,
    swiglu_limit=2.0,
    rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                     "original_max_position_embeddings": 8, "truncate": False},
)  # fmt: skip
EVERY = TINY | MORE


def drawn(parameter: Parameter, generator: torch.Generator) -> Tensor:
    """Random weights that make a model whose blocks all matter."""
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.slot.normalizes:
        return 1 - parameter.slot.offset + 0.1 * noise
    if parameter.name.endswith("A_log"):
        return torch.log(1 + 3 * torch.rand(parameter.shape, generator=generator))
    if len(parameter.shape) == 1:
        return 0.1 * noise
    fan_in = math.prod(parameter.shape[1:])
    return noise * (0.3 if "embed" in parameter.name else 1.5 / math.sqrt(fan_in))


def write_tiny(
    directory: Path, config: dict[str, object], seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A whole checkpoint of random weights with a character tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = (
        (p.name, drawn(p, generator).to(torch.float32 if p.slot.float32 else dtype))
        for p in stored_parameters(read_architecture(config))
    )
    write_checkpoint(directory, tensors, config, None, dtype=dtype)
    characters = {chr(code): code - 30 for code in range(32, 127)}
    vocabulary = {"<|end|>": 0, "<unk>": 1, **characters, "\n": 97}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"eos_token": "<|end|>", "unk_token": "<unk>"}'
    )
    return directory


def words(seed: int, count: int) -> str:
    """Text with something to learn: a few words, again and again."""
    draw = random.Random(seed)
    known = ["small", "model", "weights", "in", "a", "budget", "of", "bytes", "keep", "what", "is"]
    return " ".join(draw.choice(known) for _ in range(count)) + "."


def write_words(file: Path) -> None:
    """JSONL text that fills every split of a tiny run."""
    file.write_text("".join(json.dumps({"text": words(n, 60)}) + "\n" for n in range(400)))


# A search of seconds on a tiny model.
QUICK = {
    "target": "compress", "budget": "36%", "space": "joint", "context": "64", "sequence_length": 32,
    "score_tokens": 256, "score_length": 32, "draws": 2, "replay_tokens": 128, "repair_tokens": 256,
    "calibration_tokens": 512, "select_tokens": 160, "final_tokens": 256, "trials": 6,
    "finalists": 1, "short_distill_tokens": 256, "distill_batch_tokens": 128, "distill_length": 32,
}  # fmt: skip


def search_arguments(model: Path, run: Path, text: Path) -> list[str]:
    """What follows ``compress`` on the command line of a quick search."""
    flags = [part for key, value in (QUICK | {"data": text, "run": run}).items()
             for part in (f"--{key.replace('_', '-')}", str(value))]  # fmt: skip
    return ["search", str(model), *flags]


def search_command(model: Path, run: Path, text: Path) -> list[str]:
    """The command line of a quick search."""
    return [sys.executable, "-m", "compress.cli", *search_arguments(model, run, text)]


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
