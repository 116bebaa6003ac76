"""How the inner knapsack and the cost of scoring grow with a model's depth.

``python -m benchmarks.scale``; random models of equal width are built in memory and written to a
temporary directory, so that nothing but depth differs. Contributions cost a forward pass and one
backward pass per label draw, whatever the depth, each linear in it. Replays run what comes after
every block: per token they are quadratic, and the deeper a model is, the fewer rows they may take.
"All scores" is what the product computes: contributions, replays, activations and the KV format.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Clock, Cost, arguments, metered, report
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint, write_checkpoint
from compress.model.families import parameters, read_architecture
from compress.run.recipe import check
from compress.run.score import scores_of
from compress.scores.contributions import contributions
from compress.searches.knapsack import Knapsack, Limit, Solution, solve

BLOCKS, OPTIONS = 200, 80
PARTS = ("contributions", "all scores")
DEPTHS = (8, 16, 32, 64)
VOCAB, LENGTH = 512, 64
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}


def knapsack(seed: int, share: float, *, limited: bool) -> Knapsack:
    """A problem of the size of a large model: costs fall with bytes, convexly, with noise."""
    draw = np.random.default_rng(seed)
    kept = np.sort(draw.random((BLOCKS, OPTIONS)))[:, ::-1]
    worth = np.exp(draw.normal(0, 1.5, (BLOCKS, 1)))
    costs = worth * (1 - kept) ** 2 * np.exp(draw.normal(0, 0.2, kept.shape))
    amounts = np.round(kept * 1e8 * draw.uniform(0.5, 2.0, (BLOCKS, 1)))
    active = np.round(amounts * draw.uniform(0.2, 0.6, kept.shape))

    def bound(values: Any) -> int:
        low, high = values.min(1).sum(), values.max(1).sum()
        return int(low + share * (high - low))

    limits = [Limit(list(active), bound(active))] if limited else []
    return Knapsack(list(costs), list(amounts), bound(amounts), limits=limits)


def solved(seed: int, share: float, *, limited: bool) -> dict[str, Any]:
    """Seconds and gap of one problem."""
    problem, clock = knapsack(seed, share, limited=limited), Clock()
    solution = solve(problem)
    seconds = clock.seconds
    assert isinstance(solution, Solution)
    return {
        "part": "knapsack",
        "what": f"{BLOCKS} x {OPTIONS}, {'bytes and active' if limited else 'bytes'}, {share:.0%}",
        "seconds": seconds,
        "gap": solution.gap,
    }


def scored(depth: int, tokens: int, draws: int) -> list[dict[str, Any]]:
    """Seconds and token-forwards of the contributions and of all scores of a depth."""
    config = LLAMA | {"num_hidden_layers": depth}
    generator = torch.Generator().manual_seed(depth)
    made = read_architecture(config)
    weights = (
        (p.name, torch.randn(p.shape, generator=generator).mul(0.05).bfloat16())
        for p in parameters(made)
    )
    text = torch.randint(0, VOCAB, (tokens // LENGTH, LENGTH), generator=generator)
    recipe, rows = check({"draws": draws}, "settings"), []
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "model", weights, config, None)
        model = load_model(Path(folder) / "model")
        checkpoint = open_checkpoint(Path(folder) / "model")
        for part in PARTS:
            cost, clock = Cost(), Clock()
            with metered(model, cost):
                if part == "contributions":
                    contributions(model, checkpoint.architecture, text, draws, ["fp8", "nvfp4"])
                else:
                    scores_of(checkpoint, model, text, recipe, Path(folder) / "parts")
            rows.append(
                {
                    "part": part,
                    "what": f"{depth} layers",
                    "depth": depth,
                    "seconds": clock.seconds,
                    "token_forwards": cost.token_forwards,
                    # A token through a model of this depth is that many layers' work.
                    "token_layers": cost.token_forwards * depth,
                }
            )
    return rows


def exponent(rows: list[dict[str, Any]], key: str) -> float:
    """The slope of a figure against depth, both in logarithms, by least squares."""
    depths = [math.log(row["depth"]) for row in rows]
    return float(np.polyfit(depths, [math.log(row[key]) for row in rows], 1)[0])


def main() -> None:
    """Time knapsacks of a large model's size, then scoring of ever deeper models."""
    settings = arguments(
        __doc__ or "",
        "embedded",
        tokens={"type": int, "default": 2048, "help": "scored (default: %(default)s)"},
        draws={"type": int, "default": 4, "help": "label draws (default: %(default)s)"},
    )
    rows = [
        solved(settings.seed, share, limited=limited)
        for limited in (False, True)
        for share in (0.3, 0.5, 0.7)
    ]
    # The first pass pays for what torch sets up once.
    scored(2, settings.tokens, 1)
    for depth in DEPTHS:
        rows += scored(depth, settings.tokens, settings.draws)
    facts = {
        f"exponent of {part}, {key}": exponent([row for row in rows if row["part"] == part], key)
        for part in PARTS
        for key in ("seconds", "token_layers")
    }
    report("scale", settings, facts, ("part", "what", "seconds", "token_forwards", "gap"), rows)


if __name__ == "__main__":
    main()
