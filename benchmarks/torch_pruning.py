"""Another tool: Torch-Pruning's students and ours, at equal bytes of the same teacher.

    pip install --no-deps torch-pruning        # 1.6.1; the extra "bench" has it
    python -m benchmarks.torch_pruning --data train.jsonl --eval-data val.jsonl

Torch-Pruning (Fang et al. 2023, DepGraph) ranks the channels of dependency groups by the magnitude
of their weights or by |weight x gradient| of the language modelling loss on the rows that we score
on. ``local`` gives every layer the same FFN width, ``global`` ranks the neurons of all layers
together; ``heads`` removes a third of the query heads besides, alike in every KV group. Its global
head ratio counts KV heads as query heads under grouped queries and then removes nothing, so that
there is no global student with fewer heads. Hidden channels stay in all students.

Ours: the local FFN width with our ranking, and the first answer of the knapsack (no search, no
measurement). Bytes are those of BF16 weights; nothing is trained.
"""

import copy
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Clock, Subject, arguments, report, shown, subject
from compress.core.terminal import note
from compress.measure.estimates import difference, exponential
from compress.measure.evaluation import Metrics, Predicted, in_batches, on_text, row_bytes
from compress.memory.footprint import Deployment, block_bytes, footprint
from compress.model.architecture import Architecture, Ffn, block_name
from compress.model.build import build_model, student_config
from compress.model.modules import final_hidden, head_of
from compress.scores.contributions import contributions
from compress.scores.costs import Scores, choose
from compress.scores.replay import removal_costs
from compress.searches.problem import Problem
from compress.searches.proposals import candidate_of, decode, globals_of
from compress.searches.space import load_space
from compress.student.candidate import Candidate, student_architecture
from compress.student.surgery import student_tensors
from compress.text.tokenizer import load_tokenizer

# A key-value cache of one token: the budget is one of weights.
DEPLOYMENT = Deployment(context=1)
HEADS = 1 / 3
# Widths are pruned in a scope only if something of it is to go; head dimensions never do.
HARDLY = 1e-9


@dataclass(frozen=True)
class Rival:
    """One of Torch-Pruning's ways: its criterion, its scope, and whether query heads go."""

    criterion: str
    everywhere: bool
    heads: bool = False

    @property
    def name(self) -> str:
        """How the table calls it."""
        scope = "global" if self.everywhere else "local"
        return f"torch-pruning {self.criterion} {scope}{' heads' if self.heads else ''}"


RIVALS = (
    Rival("taylor", False), Rival("taylor", True), Rival("taylor", False, True),
    Rival("magnitude", False), Rival("magnitude", True), Rival("magnitude", False, True),
)  # fmt: skip


def installed() -> Any:
    """The package; without it, one line that says how to get it."""
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        raise SystemExit("Torch-Pruning is missing: pip install --no-deps torch-pruning") from error


def gradients(model: Any, rows: Tensor, batch: int = 4) -> dict[str, Tensor]:
    """Gradient of the mean next-token loss of the rows for every weight of a linear layer."""
    weights = {
        f"{name}.weight": module.weight
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Linear)
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    with torch.enable_grad():
        for part in torch.split(rows, batch):
            (model(input_ids=part, labels=part).loss * len(part) / len(rows)).backward()
    found = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    for weight in weights.values():
        weight.requires_grad_(False)
        weight.grad = None
    return found


def pruned(teacher: Any, found: Mapping[str, Tensor], rival: Rival, target: int) -> Any:
    """A copy of a llama model that Torch-Pruning has cut to ``target`` parameters in its blocks."""
    tool = installed()
    model = copy.deepcopy(teacher).requires_grad_(True)
    # Fused attention has no graph to follow.
    model.config._attn_implementation = "eager"
    for name, gradient in found.items():
        model.model.get_parameter(name).grad = gradient.clone()
    layers, config = model.model.layers, model.config
    heads: dict[nn.Module, int] = {}
    for layer in layers:
        heads[layer.self_attn.q_proj] = config.num_attention_heads
        heads[layer.self_attn.k_proj] = config.num_key_value_heads
        heads[layer.self_attn.v_proj] = config.num_key_value_heads
    gates = [layer.mlp.gate_proj for layer in layers]
    neuron = 3 * config.hidden_size
    left = target - (attention_parameters(model) if not rival.heads else two_thirds(model))
    share = left // neuron / (len(layers) * config.intermediate_size)
    scopes = {tuple(gates): 1 - share} if rival.everywhere else dict.fromkeys(gates, 1 - share)
    importances = {
        "taylor": tool.importance.GroupTaylorImportance,
        "magnitude": tool.importance.GroupMagnitudeImportance,
    }
    pruner = tool.pruner.BasePruner(
        model,
        torch.zeros(1, 8, dtype=torch.long),
        importances[rival.criterion](),
        global_pruning=rival.everywhere,
        pruning_ratio=HARDLY,
        pruning_ratio_dict=scopes,
        ignored_layers=[model.model.embed_tokens, model.lm_head],
        num_heads=heads,
        # Its defaults are dictionaries that all pruners share and change.
        in_channel_groups={},
        out_channel_groups={},
        prune_num_heads=rival.heads,
        prune_head_dims=False,
        head_pruning_ratio=HEADS if rival.heads else 0.0,
        forward_fn=lambda model, tokens: model(input_ids=tokens, use_cache=False).logits,
    )
    pruner.step()
    for layer in layers:
        attention = layer.self_attn
        kept = attention.q_proj.out_features // attention.head_dim
        attention.num_key_value_groups = kept // config.num_key_value_heads
    config._attn_implementation = teacher.config._attn_implementation
    model.zero_grad(set_to_none=True)
    return model.requires_grad_(False)


def attention_parameters(model: Any) -> int:
    """Parameters of a llama model's blocks besides the FFN matrices."""
    return sum(
        int(weight.numel())
        for name, weight in model.model.layers.named_parameters()
        if ".mlp." not in name
    )


def two_thirds(model: Any) -> int:
    """The same with a third fewer query heads, as many in every KV group."""
    config = model.config
    per_group = config.num_attention_heads // config.num_key_value_heads
    gone = -(-per_group // 3) * config.num_key_value_heads * config.head_dim
    return attention_parameters(model) - int(
        2 * gone * config.hidden_size * len(model.model.layers)
    )


def block_parameters(model: Any) -> int:
    """Parameters of the layers."""
    return sum(int(weight.numel()) for weight in model.model.layers.parameters())


def uniform_ffn(architecture: Architecture, scores: Scores, target: int) -> Candidate:
    """Our FFN neurons, the same width everywhere, within ``target`` parameters of the blocks."""
    hidden = architecture.hidden
    widths = [block.ffn for block in architecture.blocks if isinstance(block, Ffn)]
    total = sum(block_bytes(b, hidden, architecture.family) for b in architecture.blocks) // 2
    gone = -(-(total - target) // (3 * hidden * len(widths)))
    keep = {"blocks": torch.arange(len(architecture.blocks))}
    for block in architecture.blocks:
        if isinstance(block, Ffn):
            kept = choose(scores, block, {"ffn": block.ffn - gone})["ffn"]
            keep[f"{block_name(block)}/ffn"] = kept
    student = student_architecture(architecture, keep, {}, {})
    return Candidate(id="uniform", kind="uniform", architecture=student, keep=keep)


def knapsack(
    architecture: Architecture, scores: Scores, target: int, space: str
) -> tuple[Candidate, float]:
    """The knapsack's first answer within ``target`` parameters of the blocks; its predicted KL."""
    hidden = architecture.hidden
    blocks = sum(block_bytes(b, hidden, architecture.family) for b in architecture.blocks)
    budget = footprint(architecture, DEPLOYMENT).total - blocks + 2 * target
    problem = Problem(architecture, scores, load_space(space), DEPLOYMENT, budget)
    proposal = decode(problem, globals_of(problem, {}))
    if proposal is None:
        raise SystemExit(f"no student of space {space} fits {budget} bytes")
    return candidate_of(problem, "knapsack", 0, proposal), proposal.predicted


def scored(what: Subject, rows: Tensor) -> Scores:
    """Contributions of the rows, and exact removals of blocks on the first of them."""
    settings = what.settings
    found = contributions(what.stack, rows, settings.draws, [], settings.seed)
    exact = removal_costs(what.stack, rows[: settings.replay_rows])
    return Scores(found, exact, {}, rows.shape[1])


def students(what: Subject, share: float, scores: Scores, found: Mapping[str, Tensor]) -> Iterator[
    tuple[str, Any, float | None]
]:  # fmt: skip
    """Name, model and predicted KL of every student that keeps a share of the blocks."""
    architecture = what.checkpoint.architecture
    target = int(share * block_parameters(what.model))
    best, predicted = knapsack(architecture, scores, target, what.settings.space)
    ours = {
        "ours knapsack": (best, predicted),
        "ours local": (uniform_ffn(architecture, scores, target), None),
    }
    for name, (candidate, cost) in ours.items():
        tensors = student_tensors(what.checkpoint, candidate)
        config = student_config(what.checkpoint.config, candidate.architecture)
        yield name, build_model(config, candidate.architecture, tensors), cost
    for rival in RIVALS:
        yield rival.name, pruned(what.model, found, rival, target), None


@torch.no_grad()
def predictions(model: Any, rows_RT: Tensor) -> Predicted:
    """What a model predicts of rows."""
    hidden = [final_hidden(model, rows) for rows in in_batches(rows_RT)]
    return Predicted(hidden, head_of(model))


def main() -> None:
    """Measure all students at every share."""
    settings = arguments(
        __doc__ or "",
        "smollm2-135m",
        shares={"type": float, "nargs": "*", "default": [0.7, 0.5], "help": "of the blocks kept"},
        space={"default": "puzzle", "help": "space of our knapsack"},
        score_tokens={"type": int, "default": 2048},
        draws={"type": int, "default": 4},
        replay_rows={"type": int, "default": 4},
        tokens={"type": int, "default": 4096, "help": "final tokens that students are measured on"},
    )
    installed()
    what, clock = subject(settings), Clock()
    if what.checkpoint.architecture.family != "llama":
        raise SystemExit(f"{settings.model} is not a llama model, which this benchmark prunes")
    rows, final = what.rows("score", settings.score_tokens), what.rows("final", settings.tokens)
    scores, begun = scored(what, rows), Clock()
    scoring = clock.seconds
    found = gradients(what.model, rows)
    facts: dict[str, Any] = {"seconds to score": scoring, "seconds of gradients": begun.seconds}
    text = predictions(what.model, final)
    sizes = row_bytes(final, load_tokenizer(what.path))
    measured: list[dict[str, Any]] = []
    for share in settings.shares:
        ours: Metrics = {}
        for name, model, predicted in students(what, share, scores, found):
            metrics = on_text(predictions(model, final), text, final, sizes)
            ours = ours or metrics
            change, error = difference(metrics["kl"], ours["kl"])
            perplexity = exponential(metrics["nats_per_token"])
            note(
                f"{share} {name}: KL {shown(metrics['kl'].value)} ± {shown(metrics['kl'].stderr)}, "
                f"perplexity {shown(perplexity.value)}, {clock.seconds:.0f} s"
            )
            measured.append(
                {"share": share, "student": name, "block parameters": block_parameters(model),
                 "kl": metrics["kl"].value, "stderr": metrics["kl"].stderr,
                 "knapsack minus it": change, "its stderr": error,
                 "perplexity": perplexity.value, "perplexity stderr": perplexity.stderr,
                 "predicted kl": predicted}
            )  # fmt: skip
    teacher = on_text(text, text, final, sizes)["nats_per_token"]
    facts |= {"teacher's perplexity": exponential(teacher).value, "seconds": clock.seconds}
    columns = ["share", "student", "block parameters", "kl", "stderr", "knapsack minus it",
               "its stderr", "perplexity"]  # fmt: skip
    report("torch_pruning", settings, facts, columns, measured)


if __name__ == "__main__":
    main()
