"""Distillation: memory and speed against full logits, and blocks alone against the whole student.

    python -m benchmarks.distil --data train.jsonl --eval-data val.jsonl

Students are FFN cuts of one width, neurons by the energy of what they add, repaired. *Loops*: a
step of 2 x 2,048 tokens for a student of about 70 % of the bytes, forward KL and AdamW in fp32, in
a process each: teacher and student forward, full logits and ``kl_div``, as users of transformers
and TRL write it; and ours, with the teacher's states stored before (what that took is counted
apart). Times are of the CPU, memory is the peak of anonymous memory. *Blocks*: a student of 50 % of
its blocks' bytes after so many tokens of training as a whole, block by block, and in sequence; KL
on final text. ``--parts loops`` or ``blocks`` does one of them.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import arguments, report, subject
from benchmarks.distil_loops import loops
from compress.core.terminal import note
from compress.measure.estimates import mean_of
from compress.measure.losses import kl_from_hidden
from compress.model.architecture import Ffn, block_name, sizes, to_json
from compress.model.build import disk_tensors, load_model, student_config
from compress.model.checkpoint import Checkpoint, in_bf16, open_checkpoint, write_checkpoint
from compress.model.families import count_parameters, parameters
from compress.model.layout import Parameter
from compress.model.modules import final_hidden, head_of
from compress.student.candidate import Candidate, student_architecture
from compress.student.grams import HALVES, Grams, save_grams
from compress.student.repair import prefix_of
from compress.student.surgery import prune
from compress.student.units import projections
from compress.sweep.placement import Placement
from compress.sweep.stack import Stack, stack_of
from compress.sweep.states import StoredStates, stored_states
from compress.train.distill import DistillSettings, Teacher, distill
from compress.train.local import Pair, local_distill

RIDGE = 0.1


def main() -> None:
    """Make the students, measure loops and blocks."""
    settings = arguments(
        __doc__ or "",
        "smollm2-135m",
        parts={"choices": ["both", "loops", "blocks"], "default": "both"},
        tokens={"type": int, "default": 16384},
        repair_tokens={"type": int, "default": 4096},
        final_tokens={"type": int, "default": 4096},
        learning_rate={"type": float, "default": 3e-4},
    )
    found = subject(settings)
    teacher, stack = found.checkpoint, stack_of(found.checkpoint)
    whole = count_parameters(teacher.architecture)
    shared = whole - sum(p.count for p in parameters(teacher.architecture) if p.block is not None)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        rows = found.rows("score", settings.repair_tokens)
        halves = {half: rows[start::2] for start, half in enumerate(HALVES)}
        save_grams(stack, halves, home / "grams.safetensors")
        grams = Grams(home / "grams.safetensors")
        if settings.parts != "blocks":
            candidate = candidate_of(teacher, width_of(teacher, 0.7, 0), grams)
            prune(teacher, candidate, home / "student")
            loops(settings, teacher, home / "student", home)
        if settings.parts != "loops":
            candidate = candidate_of(teacher, width_of(teacher, 0.5, shared), grams)
            prune(teacher, candidate, home / "cut")
            ffns = (
                n for n, block in enumerate(teacher.architecture.blocks) if isinstance(block, Ffn)
            )
            repaired = replace(candidate, repaired=frozenset(ffns))
            prune(teacher, repaired, home / "repaired", grams)
            texts = (
                found.rows("train", settings.tokens, 256),
                found.rows("final", settings.final_tokens),
            )
            work = Work(settings, teacher, stack, candidate, *texts, home)
            blocks(work, home / "cut", home / "repaired")


def candidate_of(teacher: Checkpoint, width: int, grams: Grams) -> Candidate:
    """Every FFN cut to the neurons that add most: energy times the norm of what they write."""
    model = teacher.architecture
    keep = {"blocks": torch.arange(len(model.blocks))}
    for block in model.blocks:
        if isinstance(block, Ffn):
            [projection] = projections(model, block)
            weight = teacher[prefix_of(model, block) + projection.name].float()
            energy = grams.both(projection.key).diagonal() * weight.square().sum(0)
            kept = energy.topk(width).indices.sort().values
            keep[f"{block_name(block)}/ffn"] = kept
    architecture = student_architecture(model, keep, {}, {})
    return Candidate(id=f"ffn-{width}", kind="prune", architecture=architecture, keep=keep)


def width_of(teacher: Checkpoint, share: float, fixed: int) -> int:
    """The widest FFN, in steps of 64, that leaves a share of all parameters but ``fixed`` ones."""
    model = teacher.architecture
    whole = max(sizes(block)["ffn"] for block in model.blocks if isinstance(block, Ffn))
    for width in range(whole, 0, -64):
        blocks = tuple(
            replace(block, ffn=width) if isinstance(block, Ffn) else block for block in model.blocks
        )
        left = count_parameters(replace(model, blocks=blocks)) - fixed
        if left <= share * (count_parameters(model) - fixed):
            return width
    raise SystemExit(f"no FFN width leaves {share:.0%}")


def written(
    teacher: Checkpoint, candidate: Candidate, tensors: Iterator[tuple[str, Tensor]], to: Path
) -> Path:
    """A student's checkpoint."""
    architecture = candidate.architecture
    config = student_config(teacher.config, architecture)
    write_checkpoint(to, in_bf16(tensors, architecture), config, None, to_json(architecture))
    return to


@dataclass(frozen=True)
class Work:
    """A candidate, where its students are written, and the text that they are made with."""

    settings: Any
    teacher: Checkpoint
    stack: Stack
    candidate: Candidate
    train: Tensor
    final: Tensor
    home: Path

    def asked(self, tokens: int) -> DistillSettings:
        """What either kind of training is told."""
        rate = self.settings.learning_rate
        return DistillSettings(
            tokens=tokens, batch_tokens=512, learning_rate=rate, seed=self.settings.seed
        )

    def states(self, rows: Tensor, name: str) -> StoredStates:
        """The teacher's states of a text."""
        return stored_states(self.stack, rows, self.home / f"{name}.safetensors")

    def local(self, tokens: int, begin: Path) -> Path:
        """The student whose cut blocks have learned alone."""
        checkpoint, model = open_checkpoint(begin), self.candidate.architecture

        def read(parameter: Parameter) -> Tensor:
            return checkpoint[parameter.name].clone()

        student = Stack(checkpoint.config, model, read, Placement(memory=0))
        pairs = [Pair(n, n) for n, block in enumerate(model.blocks) if isinstance(block, Ffn)]
        more = self.asked(tokens), self.home
        better: dict[str, Tensor] = {}
        for _, found in local_distill(self.stack, student, pairs, self.train, *more):
            better |= found.tensors
        tensors = ((name, better.get(name, tensor)) for name, tensor in checkpoint.items())
        return written(self.teacher, self.candidate, tensors, self.home / f"local-{tokens}")

    def whole(self, tokens: int, begin: Path) -> Path:
        """The student distilled as a whole."""
        model = load_model(begin)
        with self.stack.head() as head:
            taught = Teacher(self.states(self.train, "train"), head)
            distill(taught, model, self.train, self.asked(tokens))
        tensors = disk_tensors(model, self.candidate.architecture)
        return written(self.teacher, self.candidate, tensors, self.home / "whole")

    @torch.no_grad()
    def kl(self, student: Path) -> tuple[float, float | None]:
        """Mean KL on final text and its standard error over sequences."""
        model, states, found = load_model(student), self.states(self.final, "final"), list[float]()
        with self.stack.head() as head:
            for index in torch.split(torch.arange(len(self.final)), 8):
                hidden = final_hidden(model, self.final[index])
                teacher = states[index].float().flatten(0, 1)
                each = kl_from_hidden(hidden.flatten(0, 1), head_of(model), teacher, head)
                found += each.view(len(index), -1).mean(1).tolist()
        estimate = mean_of(found)
        return estimate.value, estimate.stderr


def blocks(work: Work, cut: Path, repaired: Path) -> None:
    """Train the student in every way that is compared, and measure each."""
    tokens, half = work.settings.tokens, work.settings.tokens // 2
    ways = ((tokens, 0), (0, tokens), (half, half), (tokens, tokens))
    rows: list[dict[str, Any]] = []

    def row(name: str, student: Path, seconds: float) -> None:
        value, error = work.kl(student)
        rows.append({"training": name, "KL": value, "se": error, "CPU s": seconds})
        note(json.dumps(rows[-1]))

    row("cut", cut, 0.0)
    row("cut and repaired", repaired, 0.0)
    alone: dict[int, tuple[Path, float]] = {0: (repaired, 0.0)}
    for local, whole in ways:
        begun = time.process_time()
        if local not in alone:
            alone[local] = work.local(local, repaired), time.process_time() - begun
            begun = time.process_time()
        begin, before = alone[local]
        after = work.whole(whole, begin) if whole else begin
        said = [f"blocks, {local} tokens"] * bool(local) + [f"whole, {whole} tokens"] * bool(whole)
        row("; ".join(said), after, before + time.process_time() - begun)
    facts = {"FFN width": sizes_of(work.candidate), "rows": len(work.train)}
    report("distil_blocks", work.settings, facts, ("training", "KL", "se", "CPU s"), rows)


def sizes_of(candidate: Candidate) -> int:
    """The FFN width of a candidate."""
    return next(block.ffn for block in candidate.architecture.blocks if isinstance(block, Ffn))


if __name__ == "__main__":
    main()
