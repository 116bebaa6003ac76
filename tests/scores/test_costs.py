"""Contributions predict the KL of small changes and rank what is dead last."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from tiny_models import TINY, write_tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.formats.fake import fake_quantize_block
from compress.measure.losses import kl_from_hidden
from compress.model.architecture import Architecture, Block, block_name, sizes
from compress.model.build import load_model
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.model.families import in_one_format
from compress.model.modules import final_hidden, head_of, weights_of
from compress.scores.contributions import contributions
from compress.scores.costs import (
    Scores,
    change,
    choose,
    importance,
    kl_of,
    load_scores,
    option_cost,
    removed,
    saliency,
    whole,
)
from compress.student.units import UNITS, unit_key
from compress.sweep.stack import stack_of
from teachers import stack_with

LENGTH = 16
TOKENS = torch.randint(0, 128, (24, LENGTH), generator=torch.Generator().manual_seed(7))


def hidden_of(model: PreTrainedModel) -> Tensor:
    return final_hidden(model, TOKENS).flatten(0, 1)


def exact(model: PreTrainedModel, teacher: Tensor) -> float:
    head = head_of(model)
    return float(kl_from_hidden(hidden_of(model), head, teacher, head).mean())


@pytest.fixture(scope="module", params=["llama", "hybrid"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    # Every expert is always chosen: a router that flips is a jump that no gradient sees.
    config = TINY[request.param] | {"num_experts_per_tok": 6}
    path = write_tiny(tmp_path_factory.mktemp("scores") / "m", config, dtype=torch.float32)
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def scored(teacher: Checkpoint) -> tuple[PreTrainedModel, Architecture, Scores]:
    found = contributions(stack_of(teacher), TOKENS, 24, ["fp8", "nvfp4"])
    return load_model(teacher.path), teacher.architecture, Scores(found, {}, {}, LENGTH)


def test_the_prediction_is_second_order_exact_for_whole_blocks(scored) -> None:
    model, architecture, scores = scored
    teacher = hidden_of(model)
    for block in architecture.blocks:
        less = 0.02

        def hook(module: nn.Module, args: Any, output: Any, less: float = less) -> Any:
            if isinstance(output, tuple):
                return (output[0] * (1 - less), *output[1:])
            return output * (1 - less)

        layer = model.model.layers[block.layer]
        mixer = (
            {"attention": "self_attn", "ffn": "mlp"}[block.kind]
            if hasattr(layer, "self_attn")
            else "mixer"
        )
        handle = getattr(layer, mixer).register_forward_hook(hook)
        measured = exact(model, teacher)
        handle.remove()
        predicted = less**2 * kl_of(whole(scores, block), LENGTH)
        # 576 rows: the mean square has a relative standard error of about sqrt(2/576) = .06.
        assert predicted == pytest.approx(measured, rel=0.3), block_name(block)


def test_format_contributions_predict_the_kl_of_rounding(scored) -> None:
    model, architecture, scores = scored
    teacher = hidden_of(model)
    for block in architecture.blocks:
        formats = in_one_format(block, architecture.family, "fp8")
        weights = weights_of(model, architecture, block)
        exact_weights = {name: weight.clone() for name, (weight, _) in weights.items()}
        fused = {name: slot.fused for name, (_, slot) in weights.items()}
        for name, value in fake_quantize_block(exact_weights, fused, formats).items():
            weights[name][0].lerp_(value, 0.03)
        measured = exact(model, teacher)
        for name, value in exact_weights.items():
            weights[name][0].copy_(value)
        predicted = 0.03**2 * kl_of(change(scores, block, {}, formats), LENGTH)
        assert predicted == pytest.approx(measured, rel=0.35), block_name(block)


def neurons(architecture: Architecture) -> list[tuple[Block, str]]:
    """Blocks with an axis whose units are one number per token."""
    axes = ("ffn", "shared_ffn", "expert_ffn")
    return [(block, axis) for block in architecture.blocks for axis in axes if axis in sizes(block)]


def test_neurons_are_ranked_with_less_noise(teacher: Checkpoint) -> None:
    stack, architecture = stack_of(teacher), teacher.architecture
    halves = [Scores(contributions(stack, rows, 2, []), {}, {}, LENGTH) for rows in TOKENS.chunk(2)]
    for block, axis in neurons(architecture):
        noise = {
            ranked: spearmanr(*(ranked(half, block, axis).flatten() for half in halves)).statistic
            for ranked in (importance, saliency)
        }
        assert noise[saliency] > noise[importance] + 0.1, axis
    hidden = {
        ranked: spearmanr(*(ranked(half, None, "hidden") for half in halves)).statistic
        for ranked in (importance, saliency)
    }
    assert hidden[saliency] > hidden[importance]


def test_neurons_cost_what_their_contributions_say_on_average(scored) -> None:
    _, architecture, scores = scored
    for block, axis in neurons(architecture):
        estimate = saliency(scores, block, axis).mean()
        assert 0.5 < estimate / importance(scores, block, axis).mean() < 2, axis


def test_squares_of_neurons_are_those_of_the_activations(scored) -> None:
    model, architecture, scores = scored
    for block, axis in neurons(architecture):
        if axis != "ffn":
            continue
        layer = model.model.layers[block.layer]
        module = (layer.mlp if hasattr(layer, "mlp") else layer.mixer).down_proj
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(TOKENS)
        handle.remove()
        found = scores.contributions[f"{block_name(block)}/ffn/activation"]
        # 24 draws see the same activations.
        torch.testing.assert_close(found[0], 24 * seen[0].square().sum((0, 1)), rtol=1e-4, atol=0)


def test_silenced_units_rank_last_and_cost_nothing(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", TINY["hybrid"], dtype=torch.float32)
    model, checkpoint = load_model(path), open_checkpoint(path)
    layers, architecture = model.model.layers, checkpoint.architecture
    layers[3].mixer.down_proj.weight[:, 5] = 0
    layers[2].mixer.o_proj.weight[:, 16:32] = 0  # KV group 0, query head 1
    layers[0].mixer.out_proj.weight[:, 6 * 16 : 7 * 16] = 0  # group 1, head 2
    layers[1].mixer.experts.down_proj[4] = 0
    layers[1].mixer.shared_experts.down_proj.weight[:, 9] = 0
    scores = Scores(contributions(stack_with(checkpoint, model), TOKENS, 2, []), {}, {}, LENGTH)
    mamba, moe, attention, ffn = architecture.blocks[:4]
    assert importance(scores, ffn, "ffn").argmin() == 5
    assert importance(scores, attention, "query")[0].argmin() == 1
    assert importance(scores, mamba, "head")[1].argmin() == 2
    assert importance(scores, moe, "expert").argmin() == 4
    assert importance(scores, moe, "shared_ffn").argmin() == 9
    keep = choose(scores, ffn, {"ffn": 95})
    assert 5 not in keep["ffn"]
    assert option_cost(scores, ffn, keep, ()) == 0


def test_a_removal_costs_what_was_replayed_and_cuts_lead_there(scored) -> None:
    _, architecture, scores = scored
    block = next(block for block in architecture.blocks if block.kind == "ffn")
    name = block_name(block)
    keeps = {count: choose(scores, block, {"ffn": count}) for count in (16, 32, 48, 64, 80)}
    plain = {count: option_cost(scores, block, keep, ()) for count, keep in keeps.items()}
    whole_block = kl_of(whole(scores, block), LENGTH)
    anchored = replace(scores, removals={name: 3 * whole_block})
    assert removed(anchored, block) == 3 * whole_block
    cost = {count: option_cost(anchored, block, keep, ()) for count, keep in keeps.items()}
    for count, kept in keeps.items():
        share = plain[count] / whole_block
        assert cost[count] == pytest.approx(plain[count] * math.sqrt(1 + 2 * share), rel=1e-5)
        assert option_cost(replace(scores, removals={name: 0.0}), block, kept, ()) == 0
    assert cost[80] < cost[64] < cost[48] < cost[32] < cost[16] < 3 * whole_block
    # What a format adds is not scaled: it is the estimate's own.
    fp8 = in_one_format(block, architecture.family, "fp8")
    added = option_cost(anchored, block, keeps[64], fp8) - cost[64]
    unscaled = option_cost(scores, block, keeps[64], fp8) - plain[64]
    assert added == pytest.approx(unscaled, rel=1e-3)


def test_scores_survive_the_disk(scored, tmp_path: Path) -> None:
    _, architecture, scores = scored
    scores = replace(scores, removals={"layers.0.ffn": 0.1, "layers.1.attention": 0.2})
    scores.save(tmp_path / "scores.safetensors")
    again = load_scores(tmp_path / "scores.safetensors")
    assert again.removals == scores.removals
    assert again.contributions.keys() == scores.contributions.keys()
    block = architecture.blocks[0]
    key = unit_key(block, UNITS[block.kind][0])
    assert torch.equal(again.contributions[key], scores.contributions[key])
