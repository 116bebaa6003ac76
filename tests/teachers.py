"""Tiny teachers with what a search knows of them."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.export.targets import Target, restricted
from compress.measure.kl import Reference, measure, reference
from compress.memory.budget import teacher_bytes
from compress.memory.footprint import Deployment
from compress.model.architecture import to_json
from compress.model.build import disk_tensors
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.scores.contributions import contributions
from compress.scores.costs import Scores
from compress.scores.kv import kv_costs
from compress.scores.outside import outside_costs
from compress.scores.replay import removal_costs
from compress.searches.problem import Problem
from compress.searches.proposals import candidate_of, seeds
from compress.searches.space import load_space, of_teacher
from compress.searches.study import StudySettings, Trial
from compress.student.candidate import Candidate
from compress.sweep.stack import Stack, stack_of

LENGTH = 16
DEPLOYMENT = Deployment(context=64)
TOKENS = torch.randint(0, 128, (16, LENGTH), generator=torch.Generator().manual_seed(5))


class Teacher:
    """A tiny teacher with its scores and its predictions on a text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.architecture = self.checkpoint.architecture
        formats = ["fp8", "nvfp4", "q8_0", "q4_0"]
        found = contributions(stack_of(self.checkpoint), TOKENS[:4], 2, formats)
        exact = removal_costs(stack_of(self.checkpoint), TOKENS[:4])
        kv = kv_costs(stack_of(self.checkpoint), TOKENS[:4])
        beside = outside_costs(stack_of(self.checkpoint), TOKENS[:4], formats)
        self.scores = Scores(found, exact, kv, LENGTH, beside)
        self.text: Reference = reference(self.checkpoint, stack_of(self.checkpoint), TOKENS)
        self.bytes = teacher_bytes(self.architecture, DEPLOYMENT)

    def problem(self, space: str, share: float, target: Target = "compress") -> Problem:
        return self.within(space, int(self.bytes * share), target)

    def within(self, space: str, budget: int, target: Target = "compress") -> Problem:
        offered, _ = of_teacher(load_space(space), self.architecture)
        loaded = restricted(offered, target, self.architecture.family, tied=self.architecture.tied)
        return Problem(self.architecture, self.scores, loaded, DEPLOYMENT, budget)

    def measure(self, candidate: Candidate) -> Iterator[Tensor]:
        return measure(candidate, self.text)


def stack_with(checkpoint: Checkpoint, model: PreTrainedModel) -> Stack:
    """The stack of a checkpoint with the weights of a model, which a test has changed."""
    tensors = dict(disk_tensors(model, checkpoint.architecture))
    return Stack(checkpoint.config, checkpoint.architecture, lambda each: tensors[each.name])


def invented(candidate: Candidate) -> Iterator[Tensor]:
    """Figures per sequence that a candidate's architecture decides and no model is built for.

    For laws of studies, whose moves and stops depend on figures and not on where they are from.
    """
    seed = zlib.crc32(to_json(candidate.architecture).encode())
    generator = torch.Generator().manual_seed(seed)
    level, spread = torch.rand(1, generator=generator), torch.rand(len(TOKENS), generator=generator)
    yield from (0.2 + level + 0.5 * spread).split(4)


def first_candidates(problem: Problem) -> list[Candidate]:
    return [
        candidate_of(problem, "x", number, proposal)
        for number, proposal in enumerate(seeds(problem))
    ]


def settings(journal: Path, trials: int, seed: int = 0) -> StudySettings:
    return StudySettings(
        name="joint", kind="joint", trials=trials, journal=journal,
        tokens_per_sequence=LENGTH, seed=seed,
    )  # fmt: skip


def shown(trials: list[Trial]) -> list[object]:
    return [(t.candidate.id, t.candidate.architecture, t.values, t.complete) for t in trials]
