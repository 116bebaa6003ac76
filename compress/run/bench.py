"""What the candidates of one search share, and the rows they become."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from compress.core.files import fingerprint, read_json, write_json
from compress.core.terminal import note, progress
from compress.formats.table import Format
from compress.measure.kl import Reference, measure
from compress.model.build import is_plain
from compress.model.families import count_active, count_parameters
from compress.report.rows import Student
from compress.run.score import REPAIR, counted, gram_file, rounded_teacher
from compress.run.score import STAGE as SCORE
from compress.run.session import Session
from compress.run.students import is_cut, train_inputs
from compress.scores.costs import Scores
from compress.scores.reselect import moved, reselect
from compress.scores.tangent import Tangent, tangent, turn
from compress.searches.baselines import kind_of
from compress.searches.problem import Problem, total_bytes
from compress.searches.space import Space
from compress.searches.study import StudySettings, Trial, explore
from compress.student.candidate import Candidate
from compress.student.grams import Grams
from compress.student.repair import repair_ratios
from compress.student.surgery import load_candidate, save_candidate

# Of units chosen again: the KL of every sequence.
VALUES = "values.json"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured candidate of a run; ``reselected`` of its units are not its ranking's."""

    trial: Trial
    kind: str
    budget: int
    finalist: bool = False
    selected: bool = False
    reselected: int = 0
    distilled_kl: float | None = None
    distilled_tokens: int | None = None

    def student(self) -> Student:
        """What ``candidates.json`` says of it."""
        trial, architecture = self.trial, self.trial.candidate.architecture
        spread = float(np.std(trial.values, ddof=1)) if len(trial.values) > 1 else 0.0
        return Student(
            id=trial.candidate.id, kind=self.kind, budget=self.budget, bytes=trial.bytes,
            parameters=count_parameters(architecture), active_parameters=count_active(architecture),
            predicted_kl=trial.predicted, gap=trial.gap, measured_kl=trial.kl,
            measured_se=spread / len(trial.values) ** 0.5, measured_sequences=len(trial.values),
            distilled_kl=self.distilled_kl, distilled_tokens=self.distilled_tokens,
            finalist=self.finalist, selected=self.selected, reselected=self.reselected,
            repaired=tuple(sorted(trial.candidate.repaired)),
            stock=is_plain(architecture) and architecture.formats == {"bf16"},
            architecture=architecture,
        )  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where candidates are measured: the session, the teacher's scores and the selection text."""

    session: Session
    scores: Scores
    text: Reference

    def __post_init__(self) -> None:
        """Candidates are rounded as the recipe says."""
        self.text.store.rounded = rounded_teacher(self.session)

    @cached_property
    def grams(self) -> Grams:
        """What repair needs; computed when a problem first repairs."""
        return gram_file(self.session)

    @cached_property
    def slopes_text(self) -> Reference:
        """What tangents are taken on: training text, so that trials are judged on another one."""
        session, recipe = self.session, self.session.recipe
        rows = session.training_rows(2 * recipe.select_tokens, recipe.sequence_length)
        return session.reference(rows)

    def measure(self, candidate: Candidate, text: Reference | None = None) -> Iterator[Tensor]:
        """Per-sequence KL of a candidate on the selection or another text, a batch at a time."""
        return measure(candidate, text or self.text, self.grams if candidate.repaired else None)

    def problem(self, space: Space, *, blind_to_rounding: bool = False) -> Problem:
        """The search problem of a space."""
        session, recipe = self.session, self.session.recipe
        ratio = partial(repair_ratios, session.checkpoint, self.grams) if space.repair else None
        return Problem(
            session.whole, self.scores, space, recipe.deployment, session.budget.bytes,
            blind_to_rounding, recipe.active, recipe.ranking, ratio, recipe.speed,
        )  # fmt: skip

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
                "ranking": problem.ranking,
                "budget": problem.budget,
                "active": problem.active,
                "speed": asdict(problem.speed) if problem.speed else None,
                "mtp": bool(problem.teacher.mtp),
                "deployment": asdict(problem.deployment),
                "select_tokens": recipe.select_tokens,
            }
        )
        settings = StudySettings(
            name=f"{study}@{measured[:12]}", kind=study, trials=trials,
            journal=run.path / "study" / "journal.log",
            tokens_per_sequence=recipe.sequence_length, seed=recipe.seed,
        )  # fmt: skip
        with progress(f"search: {study}", trials) as advance:
            reached, formats = counted(advance), problem.space.formats
            found = explore(
                problem, settings, self.measure,
                progress=lambda done, best: reached(done, f"best KL {best:.4f}"),
                linearize=lambda at, n: self.tangent(at, turn(self.slopes_text, n), formats),
            )  # fmt: skip
            # Others may have measured the last ones.
            reached(len(found), f"best KL {found[0].kl:.4f}")
        kind = kind_of(study)
        return [Row(trial=trial, kind=kind, budget=problem.budget) for trial in found]

    def tangent(self, at: Candidate, text: Reference, formats: Iterable[Format]) -> Tangent:
        """The tangent at a candidate, of its units and of those of the formats that round."""
        rounding = [format for format in formats if format != "bf16"]
        grams = self.grams if at.repaired else None
        return tangent(self.session.stack, at, text, rounding, grams)

    def reselected(self, row: Row) -> Row:
        """The row with its units chosen again (``reselect``), as the recipe asks for.

        What was chosen is kept in the run, and read from there after a kill.
        """
        session, recipe, trial = self.session, self.session.recipe, row.trial
        rounds = recipe.reselect_rounds if recipe.ranking == "contribution" else 0
        if not (rounds and trial.complete and is_cut(session, trial.candidate)):
            return row
        candidate = trial.candidate
        inputs = fingerprint(
            train_inputs(session, candidate, 0)
            | {"score": session.run.fingerprint(SCORE), "rounds": rounds}
            | {"select_tokens": recipe.select_tokens, "values": trial.values}
        )
        directory = session.run.path / "study" / "reselected" / inputs[:16]
        if not (directory / VALUES).is_file():
            with progress(f"units of {candidate.id} chosen again, rounds", rounds) as advance:
                reached, begun = counted(advance), itertools.count()

                def linearize(at: Candidate, text: Reference) -> Tangent:
                    reached(next(begun), "")  # a round is over when the next begins
                    return self.tangent(at, text, sorted(at.architecture.formats))

                def measured(other: Candidate, text: Reference) -> Iterator[Tensor]:
                    for batch in self.measure(other, text):
                        advance(0, "")
                        yield batch

                texts = [turn(self.slopes_text, number, 2) for number in range(rounds)]
                made, values = reselect(
                    candidate, torch.tensor(trial.values), self.text, texts,
                    measured, linearize, self.scores,
                )  # fmt: skip
                reached(rounds, "")
            save_candidate(made, directory)
            write_json(directory / VALUES, values.tolist())
        made = replace(load_candidate(directory, candidate.kind), id=candidate.id)
        units = moved(candidate, made, session.architecture)
        found = replace(trial, candidate=made, values=tuple(read_json(directory / VALUES)))
        if units:
            note(
                f"{candidate.id}: {units} units chosen again, KL {trial.kl:.4f} before, "
                f"{found.kl:.4f} after"
            )
        return replace(row, trial=found, reselected=units)

    def measured(self, candidate: Candidate, predicted: float) -> Row:
        """The row of a candidate outside any study."""
        values = tuple(torch.cat(list(self.measure(candidate))).tolist())
        size = total_bytes(candidate, self.session.recipe.deployment)
        trial = Trial(
            candidate=candidate, bytes=size, predicted=predicted, values=values, complete=True
        )
        return Row(trial=trial, kind=candidate.kind, budget=self.session.budget.bytes)
