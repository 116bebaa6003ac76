"""Cuts of the tiny models, one for every axis, and the masks that they equal."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.model.architecture import Architecture
from compress.student.candidate import Candidate, student_architecture

Keep = dict[str, Tensor]


def candidate(teacher: Architecture, keep: Keep) -> Candidate:
    keep = {"blocks": torch.arange(len(teacher.blocks))} | keep
    return Candidate(
        id="x",
        kind="prune",
        keep=keep,
        architecture=student_architecture(teacher, keep, {}, {}),
    )


def some(*shape: int, of: int) -> Tensor:
    """Kept indices: for each leading position another choice of the last dimension's size."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randperm(of, generator=generator)[: shape[-1]].sort().values for _ in range(99)]
    return rows[0] if len(shape) == 1 else torch.stack(rows[: shape[0]])


def masked(model: PreTrainedModel, module: str, zero: Tensor) -> None:
    """Set input features of a module to zero."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].clone().index_fill_(-1, zero, 0), *args[1:])

    model.get_submodule(module).register_forward_pre_hook(hook)


def dropped(kept: Tensor, size: int) -> Tensor:
    return torch.tensor([i for i in range(size) if i not in kept.tolist()])


def heads(kept: Tensor, parents: int, size: int, width: int) -> Tensor:
    """Flat features of the dropped (parent, unit) pairs, each ``width`` features wide."""
    alive = {(p, int(u)) for p in range(parents) for u in kept[p]}
    units = [p * size + u for p in range(parents) for u in range(size) if (p, u) not in alive]
    return torch.tensor([unit * width + i for unit in units for i in range(width)])


def mask_hidden(model: PreTrainedModel, kept: Tensor) -> None:
    gone = dropped(kept, model.config.hidden_size)
    for name, module in model.named_modules():
        if type(module).__name__.endswith("RMSNorm"):
            masked(model, name, gone)
        elif type(module).__name__.endswith("RMSNormGated"):
            # The hybrid's config has one eps for both norms: a hidden cut changes this one too.
            module.variance_epsilon *= model.config.hidden_size / len(kept)


def mask_gated_norm(model: PreTrainedModel, name: str, gone: Tensor, ratio: float) -> None:
    """Zero the gated norm's input; its eps scales with the width so that the fold is exact."""
    masked(model, name, gone)
    norm = model.get_submodule(name)
    norm.variance_epsilon = norm.variance_epsilon * ratio


def mask_experts(model: PreTrainedModel, name: str, gone: Tensor) -> None:
    model.get_submodule(name).e_score_correction_bias[gone] = -torch.inf


def mask_expert_ffn(model: PreTrainedModel, name: str, kept: Tensor) -> None:
    weights = model.get_submodule(name).down_proj
    alive = torch.zeros_like(weights)
    for expert, rows in enumerate(kept):
        alive[expert][:, rows] = 1
    weights.mul_(alive)


FFN, QUERY, GROUP, HIDDEN = some(64, of=96), some(2, 1, of=2), some(1, of=2), some(48, of=64)
HEAD, CHANNEL = some(2, 3, of=4), some(8, of=16)
EXPERT, WIDTH, SHARED = some(4, of=6), some(6, 16, of=32), some(32, of=48)
LATENT = some(16, of=32)
VALUE, VALUE_DIM = some(2, 1, of=2), some(16, of=32)
Mask = Callable[[PreTrainedModel], object]
CASES: dict[str, tuple[str, Keep, Mask]] = {
    "llama ffn": (
        "llama",
        {"layers.1.ffn/ffn": FFN},
        lambda m: masked(m, "model.layers.1.mlp.down_proj", dropped(FFN, 96)),
    ),
    "llama query heads": (
        "llama",
        {"layers.0.attention/query": QUERY},
        lambda m: masked(m, "model.layers.0.self_attn.o_proj", heads(QUERY, 2, 2, 16)),
    ),
    "llama KV group": (
        "llama",
        {"layers.2.attention/kv_head": GROUP},
        lambda m: masked(m, "model.layers.2.self_attn.o_proj", heads(GROUP[None], 1, 2, 32)),
    ),
    "llama hidden": ("llama", {"hidden": HIDDEN}, lambda m: mask_hidden(m, HIDDEN)),
    "llama attention removed": (
        "llama",
        {"blocks": torch.tensor([1, 2, 3, 4, 5])},
        lambda m: masked(m, "model.layers.0.self_attn.o_proj", torch.arange(64)),
    ),
    "llama layer removed": (
        "llama",
        {"blocks": torch.tensor([0, 1, 4, 5])},
        lambda m: (
            masked(m, "model.layers.1.self_attn.o_proj", torch.arange(64)),
            masked(m, "model.layers.1.mlp.down_proj", torch.arange(96)),
        ),
    ),
    "hybrid hidden": ("hybrid", {"hidden": HIDDEN}, lambda m: mask_hidden(m, HIDDEN)),
    "hybrid ffn": (
        "hybrid",
        {"layers.3.ffn/ffn": FFN},
        lambda m: masked(m, "model.layers.3.mixer.down_proj", dropped(FFN, 96)),
    ),
    "hybrid query heads": (
        "hybrid",
        {"layers.2.attention/query": QUERY},
        lambda m: masked(m, "model.layers.2.mixer.o_proj", heads(QUERY, 2, 2, 16)),
    ),
    "hybrid Mamba heads": (
        "hybrid",
        {"layers.0.mamba/head": HEAD},
        lambda m: mask_gated_norm(m, "model.layers.0.mixer.norm", heads(HEAD, 2, 4, 16), 3 / 4),
    ),
    "hybrid Mamba channels": (
        "hybrid",
        {"layers.4.mamba/channel": CHANNEL},
        lambda m: mask_gated_norm(
            m, "model.layers.4.mixer.norm", heads(CHANNEL.expand(8, -1), 8, 16, 1), 1 / 2
        ),
    ),
    "hybrid experts": (
        "hybrid",
        {"layers.1.moe/expert": EXPERT},
        lambda m: mask_experts(m, "model.layers.1.mixer.gate", dropped(EXPERT, 6)),
    ),
    "hybrid expert width": (
        "hybrid",
        {"layers.1.moe/expert_ffn": WIDTH},
        lambda m: mask_expert_ffn(m, "model.layers.1.mixer.experts", WIDTH),
    ),
    "hybrid shared expert": (
        "hybrid",
        {"layers.1.moe/shared_ffn": SHARED},
        lambda m: masked(m, "model.layers.1.mixer.shared_experts.down_proj", dropped(SHARED, 48)),
    ),
    "latent width": (
        "nemotron_h_latent",
        {"layers.1.moe/latent": LATENT, "layers.1.moe/expert_ffn": WIDTH},
        lambda m: (
            masked(m, "model.layers.1.mixer.experts", dropped(LATENT, 32)),
            masked(m, "model.layers.1.mixer.fc2_latent_proj", dropped(LATENT, 32)),
            mask_expert_ffn(m, "model.layers.1.mixer.experts", WIDTH),
        ),
    ),
    "delta net value heads": (
        "qwen3_5_text",
        {"layers.0.delta/value": VALUE},
        lambda m: masked(m, "model.layers.0.linear_attn.out_proj", heads(VALUE, 2, 2, 32)),
    ),
    "delta net key heads": (
        "qwen3_next",
        {"layers.2.delta/key_head": GROUP},
        lambda m: masked(m, "model.layers.2.linear_attn.out_proj", heads(GROUP[None], 1, 2, 64)),
    ),
    "delta net value dimensions": (
        "qwen3_next",
        {"layers.0.delta/value_dim": VALUE_DIM},
        lambda m: mask_gated_norm(
            m, "model.layers.0.linear_attn.norm", dropped(VALUE_DIM, 32), 1 / 2
        ),
    ),
    "delta net in all ways": (
        "qwen3_5_moe_text",
        {
            "layers.0.delta/key_head": GROUP,
            "layers.0.delta/value": VALUE[:1],
            "layers.0.delta/value_dim": VALUE_DIM,
        },
        lambda m: (
            mask_gated_norm(m, "model.layers.0.linear_attn.norm", dropped(VALUE_DIM, 32), 1 / 2),
            masked(m, "model.layers.0.linear_attn.out_proj", heads(GROUP[None], 1, 2, 64)),
            masked(
                m,
                "model.layers.0.linear_attn.out_proj",
                heads(VALUE[:1].expand(2, -1), 2, 2, 32),
            ),
        ),
    ),
    "gated attention": (
        "qwen3_5_text",
        {"layers.1.attention/query": QUERY},
        lambda m: masked(m, "model.layers.1.self_attn.o_proj", heads(QUERY, 2, 2, 16)),
    ),
    "shared expert with a gate": (
        "qwen3_next",
        {"layers.1.moe/shared_ffn": SHARED},
        lambda m: masked(m, "model.layers.1.mlp.shared_expert.down_proj", dropped(SHARED, 48)),
    ),
    "hybrid block removed": (
        "hybrid",
        {"blocks": torch.tensor([0, 1, 2, 4])},
        lambda m: masked(m, "model.layers.3.mixer.down_proj", torch.arange(96)),
    ),
}
