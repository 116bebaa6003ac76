"""Families that differ most: a tiny teacher, cut and rounded in one search, exported, read back.

``OMP_NUM_THREADS=1 python -m benchmarks.families``: for each family a teacher of the embedded text
(``compress pretrain``, a minute or two; the tokenizer is that of ``--model``), then ``compress
search --space joint`` and ``compress export``. At the same bytes: ``uniform``, the widest cut of
all blocks by one share, in BF16; and of the widest such cuts in FP8 and in NVFP4 the one that is
better on select text. KL to the teacher in nats per token of final text, as cut and after the same
short training where that helps; ``over`` is joint over that kind; ``logits`` the difference of what
was read back. What is there is not made again: the same command continues.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.common import arguments, report
from benchmarks.joint import BLIND, explored
from compress.core.errors import Infeasible
from compress.core.files import write_text
from compress.core.terminal import note
from compress.measure.estimates import mean_of
from compress.measure.kl import Reference, sequence_kl
from compress.memory.footprint import footprint
from compress.model.families import count_parameters
from compress.model.find import resolve_model
from compress.run import stages, students
from compress.run.bench import Bench, Row
from compress.run.directory import Run
from compress.run.recipe import check
from compress.run.rounding import untrained
from compress.run.score import score
from compress.run.search import search, selection_text
from compress.run.session import Session
from compress.searches.space import load_space
from compress.student.candidate import Candidate
from compress.sweep.stack import stack_at
from compress.train.pretrain import pretrain

SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 192,
    "max_position_embeddings": 1024, "tie_word_embeddings": True, "initializer_range": 0.05,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
                  "norm_topk_prob": True, "decoder_sparse_step": 1},
    "gemma3_text": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
                    "num_hidden_layers": 6, "sliding_window": 64, "query_pre_attn_scalar": 32},
    "qwen3_5_text": {"layer_types": ["linear_attention"] * 3 + ["full_attention"],
                     "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                     "linear_key_head_dim": 32, "linear_value_head_dim": 32,
                     "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5},
    "granitemoehybrid": {"layers_block_type": ["mamba", "mamba", "attention", "mamba"],
                         "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 48,
                         "shared_intermediate_size": 96, "mamba_n_heads": 6, "mamba_d_head": 32,
                         "mamba_n_groups": 2, "mamba_d_state": 16, "num_attention_heads": 3,
                         "num_key_value_heads": 1, "mamba_chunk_size": 32,
                         "position_embedding_type": "nope", "attention_multiplier": 0.18},
}  # fmt: skip
TRAINING = {"batch": 8, "length": 128, "learning_rate": 0.004, "warmup": 20, "weight_decay": 0.1}
# A cache of long texts, which no such teacher reads, would be most of the bytes.
SEARCH: dict[str, Any] = {
    "space": "joint", "baselines": "uniform", "context": "256", "draws": 4, "finalists": 1,
    "replay_tokens": 512, "distill_length": 128,
}  # fmt: skip
KEYS = ("data", "eval_data", "seed", "budget", "trials", "short_distill_tokens", "final_tokens")
STAGES = {"cut": untrained, "trained": students.latest}
COLUMNS = ["family", "parameters", "nats_per_token", "budget KiB", "kind", "KiB"]
COLUMNS += [key for stage in STAGES for key in (stage, f"{stage} se", f"over {stage}")] + ["logits"]


def main() -> None:
    """Run what is missing of every family and report."""
    settings = arguments(
        __doc__ or "",
        "embedded",
        families={"default": ",".join(FAMILIES), "help": "comma-separated"},
        steps={"type": int, "default": 200, "help": "of a teacher, 1,024 tokens each"},
        budget={"default": "35%"},
        trials={"type": int, "default": 16},
        short_distill_tokens={"type": int, "default": 16384},
        final_tokens={"type": int, "default": 16384},
    )
    rows = [row for family in settings.families.split(",") for row in rows_of(settings, family)]
    report("families", settings, {"search": SEARCH, "training": TRAINING}, COLUMNS, rows)


def rows_of(settings: argparse.Namespace, family: str) -> list[dict[str, Any]]:
    """A family's figures, a row per kind."""
    home: Path = settings.out / "families" / family
    about: dict[str, Any] = {"family": family, **teacher(settings, family, home)}
    given = {key: str(value) for key in KEYS if (value := getattr(settings, key)) is not None}
    asked = SEARCH | given | {"model": str(home / "teacher")}
    session = Session(Run(home / "run"), check(asked, "settings"))
    finalists = [row for row in search(session) if row.finalist]
    kinds = {row.kind: students.find_candidate(session, row.id)[0] for row in finalists}
    exported = stages.export(session.run, session.recipe, kinds["joint"].id)
    final = session.reference(session.rows("final", settings.final_tokens))
    about["parameters"] = count_parameters(session.architecture)
    about["budget KiB"] = session.budget.bytes / 1024
    kinds |= rounded_cut(session)
    rows = [about | measured(session, *each, final) for each in kinds.items()]
    [joint] = [row for row in rows if row["kind"] == "joint"]
    joint |= {"logits": exported["logit_difference"], "read by": exported["reader"]}
    return [row | {f"over {stage}": joint[stage] / row[stage] for stage in STAGES} for row in rows]


def teacher(settings: argparse.Namespace, family: str, home: Path) -> dict[str, float]:
    """Train the family's teacher, if it is not there; its held-out figures."""
    recipe = TRAINING | {
        "tokenizer": str(resolve_model(settings.model)),
        "data": settings.data and str(settings.data),
        "model": {"model_type": family} | SIZES | FAMILIES[family],
        "steps": settings.steps, "decay": settings.steps // 2, "seed": settings.seed,
    }  # fmt: skip
    write_text(home / "teacher.yaml", yaml.safe_dump(recipe, sort_keys=False))
    return pretrain(home / "teacher.yaml", home / "teacher")


def rounded_cut(session: Session) -> dict[str, Candidate]:
    """By its kind, the uniform cut in a format that is best on select text, trained; or none."""
    select, fresh = selection_text(session)
    bench, found = Bench(session, score(session), select), dict[str, Row]()
    for kind in BLIND:
        try:
            found[kind] = explored(bench, load_space("joint"), kind)[0]
        except Infeasible as error:
            note(f"{kind}: {error}")
    if not found:
        return {}
    best = min(found, key=lambda kind: found[kind].trial.kl)
    candidate, tokens = found[best].trial.candidate, session.recipe.short_distill_tokens
    students.trained(session, candidate, tokens, candidate.id + students.SHORT, fresh)
    return {best: candidate}


def measured(session: Session, kind: str, candidate: Candidate, final: Reference) -> dict[str, Any]:
    """Bytes of a candidate and its KL in its formats by stage."""
    made, served = candidate.architecture, session.recipe.deployment
    row: dict[str, Any] = {"kind": kind, "KiB": footprint(made, served).total / 1024}
    for stage, directory in STAGES.items():
        stack = stack_at(directory(session, candidate), session.placement)
        kl = mean_of(torch.cat(list(sequence_kl(stack, final))))
        row |= {stage: kl.value, f"{stage} se": kl.stderr}
    return row


if __name__ == "__main__":
    main()
