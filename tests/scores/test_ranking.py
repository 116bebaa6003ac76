"""Every ranking puts what is dead last, and depends on neither batches nor their order."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import EVERY, TINY, write_tiny
from torch import Tensor

from compress.core.errors import InputError
from compress.memory.footprint import Deployment
from compress.model.architecture import Architecture
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.scores.contributions import contributions
from compress.scores.costs import (
    Scores,
    choose,
    option_cost,
    priority,
    top,
)
from compress.scores.ranking import activation_importance, activation_scores, require_ranked
from compress.scores.replay import removal_costs
from compress.searches.problem import Problem
from compress.searches.space import Option, load_space
from compress.student.candidate import Ranking
from compress.sweep.placement import Placement
from compress.sweep.stack import Stack, final_states, stack_of
from teachers import stack_with

LENGTH = 16
TOKENS = torch.randint(0, 128, (12, LENGTH), generator=torch.Generator().manual_seed(3))
RANKINGS: tuple[Ranking, ...] = ("contribution", "activation", "router")
# Axis, block number in the hybrid, and which of its units is dead, as an index of the scores.
DEAD: tuple[tuple[str, int | None, tuple[int, ...]], ...] = (
    ("hidden", None, (7,)),
    ("channel", 0, (3,)),
    ("head", 0, (1, 2)),
    ("expert", 1, (4,)),
    ("expert_ffn", 1, (2, 9)),
    ("shared_ffn", 1, (11,)),
    ("kv_head", 2, (1,)),
    ("query", 2, (0, 1)),
    ("ffn", 3, (5,)),
)


def kill(model: Any) -> None:
    """Units that put out nothing; a query head, whose values others share, hardly anything."""
    mamba, moe, attention, ffn = (layer.mixer for layer in model.model.layers[:4])
    heads = torch.arange(8 * 16).view(2, 4, 16)
    for dead in (heads[1, 2], heads[:, :, 3].flatten()):
        mamba.in_proj.weight[128 + dead] = 0
        mamba.conv1d.bias[dead] = 0
    moe.experts.down_proj[4] = 0
    moe.experts.up_proj[2, 9] = 0
    moe.shared_experts.up_proj.weight[11] = 0
    attention.v_proj.weight[16:32] = 0
    # It attends to all tokens alike, so that their values nearly cancel; the next one to few.
    attention.q_proj.weight[16:32] = 0
    attention.q_proj.weight[:16] *= 8
    attention.o_proj.weight[:, 16:32] = 0
    ffn.up_proj.weight[5] = 0
    for norm in (*(layer.norm for layer in model.model.layers), model.model.norm_f):
        norm.weight[7] = 0
    model.model.layers[4].mixer.out_proj.weight.zero_()


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stack, Architecture, Scores]:
    # All experts are routed to: one that never is would be dead too.
    config = TINY["hybrid"] | {"num_experts_per_tok": 6}
    path = write_tiny(tmp_path_factory.mktemp("rank") / "m", config, dtype=torch.float32)
    checkpoint, model = open_checkpoint(path), load_model(path)
    kill(model)
    architecture, stack = checkpoint.architecture, stack_with(checkpoint, model)
    found = contributions(stack, TOKENS, 4, [])
    exact = removal_costs(stack, TOKENS)
    rankings = activation_scores(stack, TOKENS)
    return stack, architecture, Scores(found, exact, {}, LENGTH, rankings=rankings)


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize(("axis", "number", "dead"), DEAD)
def test_a_dead_unit_ranks_last(
    scored: Any, ranking: Ranking, axis: str, number: int | None, dead: tuple[int, ...]
) -> None:
    _, architecture, scores = scored
    block = None if number is None else architecture.blocks[number]
    values = priority(scores, block, axis, ranking)[dead[:-1]]
    assert values.argmin() == dead[-1]
    others = values[torch.arange(len(values)) != dead[-1]]
    assert others.min() > 1.5 * values[dead[-1]]


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize(("axis", "number", "dead"), DEAD[1:])
def test_a_dead_unit_goes_first(
    scored: Any, ranking: Ranking, axis: str, number: int, dead: tuple[int, ...]
) -> None:
    _, architecture, scores = scored
    block = architecture.blocks[number]
    size = priority(scores, block, axis, ranking).shape[-1]
    kept = choose(scores, block, {axis: size - 1}, ranking)[axis][dead[:-1]]
    assert kept.tolist() == [unit for unit in range(size) if unit != dead[-1]]


def test_a_dead_layer_costs_nothing(scored: Any) -> None:
    _, _, scores = scored
    assert min(scores.removals, key=lambda name: scores.removals[name]) == "layers.4.mamba"
    assert scores.removals["layers.4.mamba"] == pytest.approx(0, abs=1e-6)


def test_batches_and_their_order_do_not_matter(scored: Any) -> None:
    stack, _, scores = scored
    order = torch.randperm(len(TOKENS), generator=torch.Generator().manual_seed(1))
    again = activation_scores(stack, TOKENS[order], batch=5)
    assert again.keys() == scores.rankings.keys()
    for key, values in again.items():
        torch.testing.assert_close(values, scores.rankings[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("memory", [0, 300_000])
def test_streamed_says_what_resident_does(tiny: Path, memory: int) -> None:
    checkpoint = open_checkpoint(tiny)
    resident = activation_scores(stack_of(checkpoint), TOKENS)
    streamed = activation_scores(stack_of(checkpoint, Placement(memory=memory)), TOKENS)
    assert streamed.keys() == resident.keys()
    for key, values in resident.items():
        assert torch.equal(streamed[key], values), key


def test_bf16_agrees(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    exact = activation_scores(stack_of(checkpoint), TOKENS)
    found = activation_scores(stack_of(checkpoint, Placement(dtype=torch.bfloat16)), TOKENS)
    for key, values in exact.items():
        assert found[key].dtype == torch.float32
        # Tokens may go to other experts.
        bound = 0.15 if "expert" in key or "router" in key else 0.02
        assert float((found[key] - values).norm()) < bound * float(values.norm()), key


def test_activations_are_means_over_tokens_and_norms_over_sequences(scored: Any) -> None:
    stack, architecture, scores = scored
    caught: list[torch.Tensor] = []
    linear = stack.model.model.layers[3].mixer.down_proj
    handle = linear.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    final_states(stack, [TOKENS])
    handle.remove()
    found = priority(scores, architecture.blocks[3], "ffn", "activation")
    torch.testing.assert_close(found, caught[0].abs().mean(1).norm(dim=0))


def test_mamba_heads_are_ranked_by_the_channels_that_stay(scored: Any) -> None:
    _, architecture, scores = scored
    mamba = architecture.blocks[0]
    found = choose(scores, mamba, {"head": 2, "channel": 4}, "activation")
    units = scores.rankings["layers.0.mamba/group.head.channel"]
    values = units[:, :, found["channel"]].square().sum(2)
    assert torch.equal(found["head"], values.topk(2, dim=1).indices.sort(1).values)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_search_keeps_what_its_ranking_puts_first(scored: Any, ranking: Ranking) -> None:
    _, architecture, scores = scored
    problem = Problem(
        architecture, scores, load_space("joint"), Deployment(context=64), 10**9, ranking=ranking
    )
    hidden = priority(scores, None, "hidden", ranking)
    assert torch.equal(problem.hidden_keep(20), top(hidden, 20))
    for axis, number, _ in DEAD[1:]:
        block = architecture.blocks[number or 0]
        count = max(1, priority(scores, block, axis, ranking).shape[-1] // 2)
        option = Option(((axis, count),))
        keep = problem.keep_of(number or 0, option)
        assert torch.equal(keep[axis], top(priority(scores, block, axis, ranking), count))
        # What they cost is the same estimate, whoever chose them.
        assert problem.cost(number or 0, option)[0] == option_cost(scores, block, keep, ())


def test_router_saliency_does_not_count_how_often_an_expert_is_chosen(tmp_path: Path) -> None:
    config = TINY["hybrid"] | {"num_experts_per_tok": 2}
    path = write_tiny(tmp_path / "m", config, dtype=torch.float32)
    checkpoint, model = open_checkpoint(path), load_model(path)
    architecture = checkpoint.architecture
    moe = architecture.blocks[1]
    gate = model.model.layers[1].mixer.gate
    # Rarely chosen; its output is the largest when it is. Another is never chosen.
    gate.e_score_correction_bias[3] = -0.35
    gate.e_score_correction_bias[0] = -9
    model.model.layers[1].mixer.experts.down_proj[3] *= 4
    found = activation_scores(stack_with(checkpoint, model), TOKENS)
    scores = Scores({}, {}, {}, LENGTH, rankings=found)
    assert priority(scores, moe, "expert", "router").argmax() == 3
    assert activation_importance(found, moe, "expert", {}).argmax() != 3
    assert priority(scores, moe, "expert", "router")[0] == 0


def test_the_router_ranks_nothing_in_a_model_without_experts(tiny_llama: Path) -> None:
    architecture = open_checkpoint(tiny_llama).architecture
    require_ranked(architecture, "activation")
    with pytest.raises(InputError, match="ranks experts"):
        require_ranked(architecture, "router")


@torch.no_grad()
def test_units_of_heads_normed_alone_are_what_the_output_projection_reads(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY["qwen3_next"], dtype=torch.float32)
    found = activation_scores(stack_of(open_checkpoint(path)), TOKENS, batch=3)
    model: Any = load_model(path)
    layer, seen = model.model.layers[0], dict[str, Tensor]()
    # The shared expert is given the tokens of all sequences in a row.
    read = {"delta/key_head.value.value_dim": layer.linear_attn.out_proj}
    read["moe/shared_ffn"] = layer.mlp.shared_expert.down_proj
    for key, module in read.items():
        module.register_forward_pre_hook(lambda _, args, key=key: seen.update({key: args[0]}))
    model(TOKENS)
    for key, values in seen.items():
        means = values.reshape(*TOKENS.shape, -1).abs().mean(1)
        own = found[f"layers.0.{key}"]
        torch.testing.assert_close(own.flatten(), means.norm(dim=0), atol=1e-5, rtol=1e-4)
