"""Whole layers cost what they cost given those that went before; the path resumes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import QUICK, TINY, write_tiny
from transformers import PreTrainedModel

from compress.core.errors import InputError
from compress.measure.kl import measure, reference
from compress.memory.footprint import Deployment
from compress.model.architecture import Attention
from compress.model.build import load_model
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.run import score as scoring
from compress.run.bench import Bench
from compress.run.directory import Run
from compress.run.recipe import Recipe
from compress.run.score import affordable_rows, depth_file, score
from compress.run.session import Session
from compress.scores.contributions import contributions
from compress.scores.costs import Scores
from compress.scores.depth import (
    Depth,
    Shortened,
    greedy,
    layer_costs,
    load_depth,
    path_forwards,
    path_steps,
)
from compress.scores.replay import removal_costs
from compress.searches.baselines import predicted
from compress.searches.problem import Globals, Problem
from compress.searches.proposals import key_of, neutral, seeds, unconditional
from compress.searches.space import load_space
from compress.student.candidate import Candidate, student_architecture
from teachers import Teacher as Searched

TOKENS = torch.randint(0, 128, (6, 16), generator=torch.Generator().manual_seed(11))
MIXERS = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "mlp",
          "full_attention", "moe"]  # fmt: skip
DEEP = {
    "llama": TINY["llama"] | {"num_hidden_layers": 7},
    "hybrid": TINY["hybrid"] | {"layers_block_type": MIXERS},
}
Teacher = tuple[Checkpoint, PreTrainedModel, Depth]


@pytest.fixture(scope="module", params=sorted(DEEP))
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    path = write_tiny(tmp_path_factory.mktemp("depth") / "m", DEEP[request.param])
    checkpoint, model = open_checkpoint(path), load_model(path)
    return checkpoint, model, layer_costs(model, checkpoint.architecture, TOKENS)


def kl_without(checkpoint: Checkpoint, model: PreTrainedModel, gone: set[int]) -> float:
    """Measured KL of the student of surgery that lacks these layers."""
    architecture = checkpoint.architecture
    alive = [n for n, block in enumerate(architecture.blocks) if block.layer not in gone]
    keep = {"blocks": torch.tensor(alive)}
    student = student_architecture(architecture, keep, {}, "bf16")
    candidate = Candidate(id="", kind="", architecture=student, keep=keep)
    text = reference(checkpoint, model, TOKENS)
    return float(torch.cat(list(measure(candidate, text))).mean())


def test_a_prefix_of_the_path_adds_up_to_the_student_without_its_layers(teacher: Teacher) -> None:
    checkpoint, model, depth = teacher
    assert len(depth.path) == len(depth.costs) // 2 > 2
    for count in range(1, len(depth.path) + 1):
        prefix = depth.path[:count]
        measured = kl_without(checkpoint, model, set(prefix))
        assert sum(depth.costs[n] for n in prefix) == pytest.approx(measured, rel=1e-4)


def test_the_cheapest_layer_alone_goes_first(teacher: Teacher) -> None:
    checkpoint, model, depth = teacher
    alone = {layer: kl_without(checkpoint, model, {layer}) for layer in depth.costs}
    first = depth.path[0]
    assert first == min(alone, key=lambda layer: alone[layer])
    assert depth.costs[first] == pytest.approx(alone[first], rel=1e-4)


def test_chunks_of_the_text_do_not_matter(teacher: Teacher) -> None:
    checkpoint, model, depth = teacher
    again = layer_costs(model, checkpoint.architecture, TOKENS, chunk=6)
    assert again.path == depth.path
    for layer, cost in depth.costs.items():
        assert again.costs[layer] == pytest.approx(cost, rel=1e-3, abs=1e-5)


def test_a_path_runs_only_what_comes_after(teacher: Teacher) -> None:
    checkpoint, model, depth = teacher
    runs: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_: runs.append(1)) for layer in model.model.layers
    ]
    layer_costs(model, checkpoint.architecture, TOKENS, chunk=len(TOKENS))
    for handle in handles:
        handle.remove()
    # The teacher once; what comes after a layer is taken as half, and is at most all.
    passes = len(runs) / len(depth.costs) - 1
    assert passes < path_forwards(checkpoint.architecture) * 2


def test_a_deep_model_gets_fewer_rows_and_enough_to_tell_an_error() -> None:
    rows = torch.zeros(32, 64)
    assert affordable_rows(rows, 1024, forwards=6, most=6) == 16
    assert affordable_rows(rows, 1024, forwards=24, most=6) == 8
    assert affordable_rows(rows, 1024, forwards=960, most=6) == 4
    assert affordable_rows(rows, 64, forwards=960, most=6) == 1


def test_a_layer_that_does_nothing_goes_first_and_costs_nothing(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", DEEP["llama"])
    model = load_model(path)
    model.model.layers[3].mlp.down_proj.weight.zero_()
    model.model.layers[3].self_attn.o_proj.weight.zero_()
    depth = layer_costs(model, open_checkpoint(path).architecture, TOKENS)
    assert depth.path[0] == 3
    assert depth.costs[3] == pytest.approx(0, abs=1e-6)
    assert min(cost for layer, cost in depth.costs.items() if layer != 3) > 1e-3


def test_the_last_attention_stays_however_cheap(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", TINY["hybrid"])
    model, architecture = load_model(path), open_checkpoint(path).architecture
    [last] = [b.layer for b in architecture.blocks if isinstance(b, Attention)]
    model.model.layers[last].mixer.o_proj.weight.zero_()
    depth = layer_costs(model, architecture, TOKENS)
    assert depth.costs[last] == pytest.approx(0, abs=1e-6)
    assert len(depth.path) == 2
    assert last not in depth.path


def test_neighbours_of_what_went_are_scored_again_and_others_are_not() -> None:
    """Layers 1 and 2 do the same work: either is cheap, both are not."""
    alone = {0: 0.9, 1: 0.1, 2: 0.2, 3: 0.4, 4: 0.5}
    asked: list[tuple[int, ...]] = []

    def cost(gone: tuple[int, ...]) -> float:
        asked.append(gone)
        return sum(alone[layer] for layer in gone) + (2.0 if {1, 2} <= set(gone) else 0.0)

    depth = greedy(range(5), {0, 4}, cost, 2)
    assert depth.path == (1, 3)
    assert depth.costs == pytest.approx({0: 0.9, 1: 0.1, 2: 2.2, 3: 0.4, 4: 0.5})
    # Alone, then the first and the neighbours it leaves, then the second and its own.
    assert asked[5:] == [(1,), (1, 0), (1, 2), (1, 3), (1, 3, 2), (1, 3, 4)]


def test_a_killed_path_continues_with_what_it_found(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, model, depth = teacher
    known, run, kl_of = tmp_path / "known.json", list[int](), Shortened.kl_without
    # In the midst of the path: past the layers alone.
    finished = len(depth.costs) + 2
    last = [finished]

    def counted(self: Shortened, layer: int) -> float:
        if len(run) in last:
            raise KeyboardInterrupt
        run.append(layer)
        return kl_of(self, layer)

    monkeypatch.setattr(Shortened, "kl_without", counted)
    with pytest.raises(KeyboardInterrupt):
        layer_costs(model, checkpoint.architecture, TOKENS, known=known)
    run.clear()
    last.clear()
    seen: list[tuple[int, int]] = []
    again = layer_costs(
        model, checkpoint.architecture, TOKENS, known=known,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert again == depth
    steps = path_steps(checkpoint.architecture)
    assert seen == [(step + 1, steps) for step in range(steps)]
    resumed = len(run)
    run.clear()
    layer_costs(model, checkpoint.architecture, TOKENS)
    assert resumed == len(run) - finished


def test_depth_survives_the_disk(tmp_path: Path) -> None:
    depth = Depth(path=(3, 1), costs={0: 0.5, 1: 0.25, 3: -1e-3})
    depth.save(tmp_path / "depth.json")
    assert load_depth(tmp_path / "depth.json") == depth


def test_where_only_layers_go_their_removal_costs_the_marginal(teacher: Teacher) -> None:
    checkpoint, model, depth = teacher
    architecture = checkpoint.architecture
    found = contributions(model, architecture, TOKENS[:2], 1, [])
    scores = Scores(found, removal_costs(model, architecture, TOKENS), {}, TOKENS.shape[1])
    space = load_space("minipuzzle")
    problem = Problem(architecture, scores, space, Deployment(context=64), 2**30, depth=depth.costs)
    chosen = Globals()
    groups = problem.groups(chosen)
    costs = problem.knapsack(groups, chosen).costs
    whole = [options[0] for options in groups]
    for number, options in enumerate(groups):
        layer = architecture.blocks[options[0][0][0]].layer
        assert all(option.removed for _, option in options[-1])
        assert costs[number][-1] == pytest.approx(depth.costs[layer])
        picked = [*whole[:number], options[-1], *whole[number + 1 :]]
        assert predicted(problem, picked, chosen) == pytest.approx(depth.costs[layer])
    # The path is what the knapsack predicts of it: its exact KL.
    gone = [
        options[-1] if architecture.blocks[options[0][0][0]].layer in depth.path else options[0]
        for options in groups
    ]
    measured = kl_without(checkpoint, model, set(depth.path))
    assert predicted(problem, gone, chosen) == pytest.approx(measured, rel=1e-4)
    additive = replace(problem, depth=None, costs={})
    assert predicted(additive, gone, chosen) != pytest.approx(measured, rel=0.05)


def test_only_spaces_of_whole_layers_compute_it_once_for_all_processes(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = QUICK | {"model": str(tiny_llama), "data": str(text_file)}
    session = Session(Run(tmp_path), Recipe.model_validate(settings))
    scores = score(session)
    text = reference(session.checkpoint, session.model, TOKENS[:1])
    bench, file = Bench(session, scores, text), tmp_path / "scores" / "depth.json"
    puzzle = load_space("puzzle").model_copy(update={"repair": False})
    assert bench.problem(puzzle).depth is None
    assert not file.exists()
    first = bench.problem(load_space("minitron")).depth
    assert first == load_depth(file).costs
    assert list(file.parent.glob("depth*")) == [file]
    computed: list[str] = []

    def counted(*arguments: object, **named: object) -> Depth:
        computed.append("")
        return Depth(path=(), costs={})

    monkeypatch.setattr(scoring, "layer_costs", counted)
    # A worker's bench, and then other text.
    assert Bench(session, scores, text).problem(load_space("minipuzzle")).depth == first
    assert not computed
    depth_file(session.deployed(replay_tokens=64))
    assert computed


def test_a_search_begins_with_the_best_choice_of_single_removals_too(tiny_llama: Path) -> None:
    teacher = Searched(tiny_llama)
    problem = teacher.problem("minipuzzle", 0.7)
    layers = range(teacher.architecture.layers)
    # On the path the last layers cost nothing; alone they cost what they cost.
    path = replace(problem, depth={layer: 1.0 / (layer + 1) for layer in layers}, costs={})
    first = [key_of(path, proposal) for _, proposal in seeds(path)]
    alone = seeds(problem)[0][1]
    assert key_of(problem, alone) in first
    assert unconditional(problem, neutral(problem)) == []


@pytest.mark.parametrize("text", ["[]", '{"path": [1]}', '{"path": [1], "costs": {"a": 1}}', "{"])
def test_a_broken_file_of_layers_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "depth.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"depth\.json"):
        load_depth(file)
