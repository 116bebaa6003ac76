"""Embedding and head in formats of their own: bytes, what they cost, and what is written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized import with_outside
from tiny_models import LLAMA, write_tiny

from compress.core.errors import Infeasible
from compress.export.student import export_student, round_student
from compress.measure.kl import measure, sequence_kl
from compress.memory.footprint import footprint, weight_bytes
from compress.model.families import outside_groups
from compress.searches.problem import Globals
from compress.searches.proposals import candidate_of, decode, require_feasible
from compress.student.assemble import stack_in_formats
from compress.student.candidate import Candidate
from compress.sweep.placement import REFERENCE
from compress.sweep.stack import stack_at
from teachers import DEPLOYMENT, TOKENS, Teacher


@pytest.fixture(scope="module", params=["tied", "untied"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    config = LLAMA | {"tie_word_embeddings": request.param == "tied"}
    return Teacher(write_tiny(tmp_path_factory.mktemp(request.param) / "m", config))


def test_what_a_format_costs_is_the_kl_of_that_student(teacher: Teacher) -> None:
    whole, keep = teacher.architecture, {"blocks": torch.arange(len(teacher.architecture.blocks))}
    costs = teacher.scores.outside
    assert {key.partition("/")[0] for key in costs} == {*outside_groups(whole)}
    for key, cost in costs.items():
        group, _, format = key.partition("/")
        own = (("embedding", "bf16"), (group, format)) if group == "head" else ((group, format),)
        if group == "embedding" and not whole.tied:
            own = (*own, ("head", "bf16"))
        made = replace(whole, outside_formats=own)
        student = stack_in_formats(teacher.checkpoint, made, REFERENCE)
        found = torch.cat(list(sequence_kl(student, teacher.text)))
        assert found[:4].mean() == pytest.approx(cost, rel=1e-3)
        # Assembled and measured beside the teacher itself, in either order.
        candidate = Candidate(id="x", kind="x", architecture=made, keep=keep)
        plain = replace(candidate, architecture=whole)
        for each in (plain, candidate, plain):
            values = torch.cat(list(measure(each, teacher.text)))
            expected = found if each is candidate else torch.zeros(len(found))
            torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-3)


def test_rounded_students_have_the_planned_bytes_and_are_read_back(
    teacher: Teacher, tmp_path: Path
) -> None:
    made = with_outside(teacher.architecture, "nvfp4", "fp8")
    assert made.formats == {"bf16", "nvfp4", "fp8"} - ({"fp8"} if made.tied else set())
    kl = {}
    for rounding in ("nearest", "second-order"):
        out = tmp_path / rounding
        round_student(teacher.path, out, made, TOKENS, rounding)
        assert sum(f.stat().st_size for f in out.glob("*.safetensors")) > weight_bytes(made)
        kl[rounding] = float(torch.cat(list(sequence_kl(stack_at(out), teacher.text))).mean())
        facts = export_student(out, tmp_path / f"{rounding}-export", made, "compress", {})
        assert facts["bytes"] == weight_bytes(made)
    nearest = stack_in_formats(teacher.checkpoint, made, REFERENCE)
    plain = float(torch.cat(list(sequence_kl(nearest, teacher.text))).mean())
    assert kl["nearest"] == pytest.approx(plain, rel=1e-4)
    assert kl["second-order"] < kl["nearest"]


def test_the_floor_of_a_budget_drops_with_the_head(teacher: Teacher) -> None:
    problem = teacher.problem("formats", 1.0)
    taken = problem.space.model_copy(update={"formats": ("nvfp4",), "kv_formats": ("fp8",)})
    alone = replace(problem, space=taken.model_copy(update={"head_formats": ("bf16",)}))
    least = decode(alone, Globals())
    assert least is not None
    floor = candidate_of(alone, "formats", 0, least)
    student = with_outside(floor.architecture, "nvfp4", "nvfp4")
    budget = footprint(student, DEPLOYMENT).total
    tight = replace(alone, budget=budget)
    with pytest.raises(Infeasible):
        require_feasible(tight)
    heads = taken.model_copy(update={"head_formats": ("bf16", "nvfp4")})
    tight = replace(tight, space=heads)
    require_feasible(tight)
    found = decode(tight, Globals())
    assert found is not None
    assert candidate_of(tight, "formats", 0, found).architecture == student
    added = sum(cost for key, cost in problem.known.outside.items() if "nvfp4" in key)
    assert found.predicted == pytest.approx(least.predicted + added)
