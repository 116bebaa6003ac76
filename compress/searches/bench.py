"""What the candidates of one search share, and the rows they become."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.architecture import to_json
from compress.candidate import Candidate
from compress.families import count_parameters
from compress.grams import Grams
from compress.model import is_plain
from compress.repair import repair_ratio
from compress.runs import fingerprint
from compress.scores import Scores
from compress.scoring import REPAIR, gram_file
from compress.scoring import STAGE as SCORE
from compress.searches.measure import Reference, measure
from compress.searches.problem import Problem, total_bytes
from compress.searches.study import StudySettings, Trial, explore
from compress.session import Session
from compress.show import progress
from compress.space import Space


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured candidate of a run."""

    trial: Trial
    kind: str
    finalist: bool = False
    selected: bool = False
    distilled_kl: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A row of ``candidates.json``; KL in nats per token on the selection text."""
        trial, architecture = self.trial, self.trial.candidate.architecture
        spread = float(np.std(trial.values, ddof=1)) if len(trial.values) > 1 else 0.0
        return {
            "id": trial.candidate.id,
            "kind": self.kind,
            "bytes": trial.bytes,
            "parameters": count_parameters(architecture),
            "predicted_kl": trial.predicted,
            "measured_kl": trial.kl,
            "measured_se": spread / len(trial.values) ** 0.5,
            "measured_sequences": len(trial.values),
            "distilled_kl": self.distilled_kl,
            "finalist": self.finalist,
            "selected": self.selected,
            "repaired": sorted(trial.candidate.repaired),
            "stock": is_plain(architecture) and architecture.formats == {"bf16"},
            "architecture": json.loads(to_json(architecture)),
        }


@dataclass(frozen=True)
class Bench:
    """Where candidates are measured: the session, the teacher's scores and the selection text."""

    session: Session
    scores: Scores
    text: Reference

    @cached_property
    def grams(self) -> Grams:
        """What repair needs; computed when a problem first repairs."""
        return gram_file(self.session)

    def measure(self, candidate: Candidate) -> Iterator[Tensor]:
        """Per-sequence KL of a candidate, a batch at a time."""
        return measure(candidate, self.text, self.grams if candidate.repaired else None)

    def problem(self, space: Space, *, blind_to_rounding: bool = False) -> Problem:
        """The search problem of a space."""
        session = self.session
        return Problem(
            session.architecture,
            self.scores,
            space,
            session.deployment,
            session.budget.bytes,
            blind_to_rounding,
            partial(repair_ratio, session.checkpoint, self.grams) if space.repair else None,
        )

    def explored(self, problem: Problem, study: str, trials: int) -> list[Row]:
        """The rows of one study, named ``kind`` or ``kind-variant``.

        Raises:
            Infeasible: nothing in the problem's space fits the budget.
        """
        run, recipe = self.session.run, self.session.recipe
        # Trials that measured something else, under other settings, belong to another study.
        measured = fingerprint(
            {
                "score": run.fingerprint(SCORE),
                "repair": run.fingerprint(REPAIR) if problem.space.repair else None,
                "space": problem.space.model_dump(mode="json"),
                "blind": problem.blind_to_rounding,
                "budget": problem.budget,
                "deployment": asdict(problem.deployment),
                "select_tokens": recipe.select_tokens,
            }
        )
        settings = StudySettings(
            name=f"{study}@{measured[:12]}",
            kind=study,
            trials=trials,
            journal=run.path / "study" / "journal.log",
            tokens_per_sequence=recipe.sequence_length,
            seed=recipe.seed,
        )
        with progress(f"search: {study}", trials) as advance:
            found = explore(
                problem,
                settings,
                self.measure,
                lambda best: advance(1, f"best KL {best:.4f}"),
            )
        return [Row(trial=trial, kind=study.partition("-")[0]) for trial in found]

    def measured(self, candidate: Candidate, predicted: float) -> Row:
        """The row of a candidate outside any study."""
        values = torch.cat(list(self.measure(candidate))).tolist()
        trial = Trial(
            candidate=candidate,
            bytes=total_bytes(candidate, self.session.deployment),
            predicted=predicted,
            values=tuple(values),
            complete=True,
        )
        return Row(trial=trial, kind=candidate.kind)
