"""How well scores rank single decisions: predicted against exact KL, by kind and width.

The scores are those of the product with its default recipe; what they cost is counted in forward
passes of the teacher over the scored tokens. Exact KL is one decision at a time, by suffix replay
in fp32, on scored tokens and on fresh text. Every finished block is kept beside the output: a
killed run continues, and ``--strata`` does a part.

    python -m benchmarks.fidelity --data train.jsonl --eval-data val.jsonl
"""

import json
import shutil
import signal
import sys
import zlib
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.common import Clock, Cost, Subject, arguments, metered, report, subject
from compress.core.errors import InputError
from compress.core.files import read_json, write_json
from compress.formats.fake import fake_quantize_block
from compress.formats.table import Format
from compress.model.architecture import Architecture, Block, block_name, sizes
from compress.model.families import in_one_format
from compress.model.modules import weights_of
from compress.run.recipe import Recipe, check
from compress.run.score import scores_of
from compress.scores.costs import Scores, choose, importance, option_cost, removed
from compress.scores.costs import load_scores as load
from compress.scores.replay import Keep, Variant, replayed, variant
from compress.student.units import axes_in
from compress.sweep.stack import Stack

WIDTHS = 16  # FFN widths in sixteenths of the whole
COLUMNS = (
    "stratum", "n", "cost", "same", "fresh", "predicted/exact", "estimate only",
)  # fmt: skip


@dataclass(frozen=True)
class Stratum:
    """One decision that every block of a kind can take: units of an axis that go, or a format."""

    kind: str
    axis: str | None = None
    sixteenths: int = 0  # of the axis that are kept; 0: all but one unit
    format: Format = "bf16"
    removed: bool = False

    def keep(self, scores: Scores, block: Block) -> Keep:
        """What the decision keeps of a block."""
        if self.removed:
            return None
        if self.axis is None:
            return {}
        size = sizes(block)[self.axis]
        count = size * self.sixteenths // WIDTHS if self.sixteenths else size - 1
        return choose(scores, block, {self.axis: count})


STRATA: Mapping[str, Stratum] = {
    "FFN 25 %": Stratum("ffn", "ffn", 4),
    "FFN 75 %": Stratum("ffn", "ffn", 12),
    "FFN 87.5 %": Stratum("ffn", "ffn", 14),
    "a query head of every group": Stratum("attention", "query"),
    "a KV group": Stratum("attention", "kv_head"),
    "FFN FP8": Stratum("ffn", format="fp8"),
    "FFN NVFP4": Stratum("ffn", format="nvfp4"),
    "attention NVFP4": Stratum("attention", format="nvfp4"),
    # Not by default: what they would tell is close to the above, and each takes minutes.
    "attention FP8": Stratum("attention", format="fp8"),
    "FFN 37.5 %": Stratum("ffn", "ffn", 6),
    "FFN 62.5 %": Stratum("ffn", "ffn", 10),
    "attention removed": Stratum("attention", removed=True),
    "FFN removed": Stratum("ffn", removed=True),
}
DEFAULT = 10


def main() -> None:
    """Score, replay every stratum exactly, compare."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    settings = arguments(
        __doc__,
        "smollm2-135m",
        strata={"help": "with commas between: " + ", ".join(STRATA).replace("%", "%%")},
        exact_tokens={"type": int, "default": 1024, "help": "tokens of an exact KL, on each text"},
        draws={"type": int, "help": "label draws instead of the recipe's"},
    )
    wanted = settings.strata.split(",") if settings.strata else list(STRATA)[:DEFAULT]
    if unknown := [name for name in wanted if name not in STRATA]:
        raise InputError(f"unknown stratum {unknown[0]!r}; known: {', '.join(STRATA)}")
    settings.out.mkdir(parents=True, exist_ok=True)
    clock, found = Clock(), subject(settings)
    asked = {"seed": settings.seed} | ({"draws": settings.draws} if settings.draws else {})
    recipe = check(asked, "settings")
    scores, facts = scored(settings, found, recipe)
    architecture = found.checkpoint.architecture
    texts = {
        "same": found.rows("score", recipe.score_tokens, scores.length)[
            : settings.exact_tokens // scores.length
        ],
        "fresh": found.rows("final", settings.exact_tokens, scores.length),
    }
    file = settings.out / "fidelity-exact.json"
    exact = {
        name: exact_costs(found.stack, rows, scores, wanted, file, name)
        for name, rows in texts.items()
    }
    rows = [row(name, scores, architecture, exact) for name in wanted]
    ranked = [(r["same"], r["fresh"]) for r in rows if r["cost"] == "estimated"]
    facts |= {
        "strata estimated": len(ranked),
        "Spearman on the same tokens, median": median(same for same, _ in ranked),
        "Spearman on the same tokens, minimum": min(same for same, _ in ranked),
        "Spearman on fresh text, median": median(fresh for _, fresh in ranked),
        "Spearman on fresh text, minimum": min(fresh for _, fresh in ranked),
        "exact KL": f"{settings.exact_tokens} tokens: of the scored ones (same), of final (fresh)",
        "seconds of this run": round(clock.seconds),
    }
    report("fidelity", settings, facts, COLUMNS, rows)


def scored(settings: Namespace, found: Subject, recipe: Recipe) -> tuple[Scores, dict[str, Any]]:
    """The product's scores and what they cost, computed once per settings."""
    asked = [settings.model, str(settings.data), recipe.model_dump()]
    stem = f"fidelity-{zlib.crc32(json.dumps(asked).encode()):08x}"
    file, about = settings.out / f"{stem}.safetensors", settings.out / f"{stem}.json"
    if not about.is_file():
        cost, clock = Cost(), Clock()
        rows = found.rows("score", recipe.score_tokens, recipe.score_length)
        parts, spent = settings.out / f"{stem}-parts", settings.out / f"{stem}-spent.json"
        cost.add(read_json(spent) if spent.is_file() else 0.0)
        try:
            with metered(found.stack.model, cost):
                scores = scores_of(found.stack, rows, recipe, parts)
        finally:
            # A continued scoring counts what the interruption threw away as well.
            write_json(spent, cost.token_forwards)
        decisions = decided(scores, found.checkpoint.architecture)
        scores.save(file)
        write_json(about, {
            "scored text": f"{rows.numel()} tokens of split score in rows of {rows.shape[1]}, "
            f"{recipe.draws} draws",
            "seed": recipe.seed,
            "replayed": f"at most {recipe.replay_tokens} tokens; {len(scores.removals)} removals",
            "cost in teacher forwards": round(cost.token_forwards / rows.numel(), 2),
            "decisions": decisions,
            "seconds of scoring": round(clock.seconds),
        })  # fmt: skip
        shutil.rmtree(parts)
        spent.unlink()
    return load(file), read_json(about)


def decided(scores: Scores, architecture: Architecture) -> int:
    """How many single decisions have a cost: removals, heads, groups, widths and formats."""
    costs: list[float] = []
    for block in architecture.blocks:
        costs.append(removed(scores, block))
        for axis in axes_in(block):
            size = sizes(block)[axis]
            if size < 2 * WIDTHS:
                costs += importance(scores, block, axis).flatten().tolist()
                continue
            for part in range(1, WIDTHS):
                keep = choose(scores, block, {axis: size * part // WIDTHS})
                costs.append(option_cost(scores, block, keep, ()))
        whole = (in_one_format(block, architecture.family, f) for f in ("fp8", "nvfp4"))
        costs += [option_cost(scores, block, {}, formats) for formats in whole]
    return len(costs)


def exact_costs(
    stack: Stack, rows: Tensor, scores: Scores, wanted: list[str], file: Path, name: str
) -> dict[str, dict[str, float]]:
    """Exact KL by stratum and block on one text; what the file knows is not run again."""
    known: dict[str, float] = read_json(file) if file.is_file() else {}
    found: dict[str, dict[str, float]] = {stratum: {} for stratum in wanted}
    for number, block in enumerate(stack.architecture.blocks):
        mine = {s: STRATA[s] for s in wanted if STRATA[s].kind == block.kind}
        keeps = {s: stratum.keep(scores, block) for s, stratum in mine.items()}
        keys = {s: identity(name, rows, block, s, keep) for s, keep in keeps.items()}
        variants = {
            key: changed(stack, number, keeps[stratum], mine[stratum].format)
            for stratum, key in keys.items()
            if key not in known
        }
        if variants:
            exact = replayed(stack, rows, variants)
            known |= {key: float(kl.mean()) for key, kl in exact.items()}
            write_json(file, known)
        for stratum, key in keys.items():
            found[stratum][block_name(block)] = known[key]
    return found


def changed(stack: Stack, number: int, keep: Keep, format: Format) -> Variant:
    """The teacher with one block cut and in a format."""
    cut = variant(stack, number, keep)
    [(layer, without)] = cut.changes.items()

    @contextmanager
    def change() -> Iterator[None]:
        with rounded(stack.model, stack.architecture, number, format), without():
            yield

    return cut if format == "bf16" else Variant({layer: change})


def identity(text: str, rows: Tensor, block: Block, stratum: str, keep: Keep) -> str:
    """What an exact KL is of: text, block, stratum, and the indices kept."""
    indices = b"".join(index.numpy().tobytes() for index in (keep or {}).values())
    digest = zlib.crc32(indices, zlib.crc32(rows.numpy().tobytes()))
    return f"{text}/{block_name(block)}/{stratum}/{digest:08x}"


@contextmanager
def rounded(model: Any, architecture: Architecture, number: int, format: Format) -> Iterator[None]:
    """The model with one block's weights as they come out of a format, inside its layer's visit."""
    weights = weights_of(model, architecture, architecture.blocks[number])
    plain = {name: weight.clone() for name, (weight, _) in weights.items()}
    fused = {name: slot.fused for name, (_, slot) in weights.items()}
    formats = in_one_format(architecture.blocks[number], architecture.family, format)
    # A format is of the BF16 weights on disk, whose values these fp32 ones have.
    for name, value in fake_quantize_block(plain, fused, formats).items():
        weights[name][0].copy_(value)
    try:
        yield
    finally:
        for name, value in plain.items():
            weights[name][0].copy_(value)


def row(
    name: str,
    scores: Scores,
    architecture: Architecture,
    exact: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, Any]:
    """One line of the table; the last column ranks without the removals."""
    stratum = STRATA[name]
    variants = [scores, replace(scores, removals={})]
    blocks = [block for block in architecture.blocks if block.kind == stratum.kind]
    predicted: list[list[float]] = []
    for each in variants:
        costs = []
        for block in blocks:
            keep = stratum.keep(scores, block)
            costs.append(
                removed(each, block)
                if keep is None
                else option_cost(
                    each, block, keep, in_one_format(block, architecture.family, stratum.format)
                )
            )
        predicted.append(costs)
    same, fresh = ([exact[t][name][block_name(b)] for b in blocks] for t in ("same", "fresh"))
    ratio = torch.tensor(predicted[0]) / torch.tensor(same)
    return {
        "stratum": name,
        "n": len(blocks),
        "cost": "exact" if stratum.removed else "estimated",
        "same": spearman(predicted[0], same),
        "fresh": spearman(predicted[0], fresh),
        "predicted/exact": float(ratio.log().mean().exp()),
        "estimate only": spearman(predicted[1], same),
        "predicted KL": dict(zip(map(block_name, blocks), predicted[0], strict=True)),
        "exact KL": dict(zip(map(block_name, blocks), same, strict=True)),
        "exact KL, fresh": dict(zip(map(block_name, blocks), fresh, strict=True)),
    }


def spearman(one: list[float], other: list[float]) -> float:
    """Rank correlation."""
    return float(spearmanr(one, other).statistic)


if __name__ == "__main__":
    main()
