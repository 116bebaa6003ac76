"""What was exported is a model again: eval and plan take it as it is, a search dequantized."""

from pathlib import Path

import pytest
import torch
from exports import with_experts
from quantized import with_formats
from tiny_models import TINY, write_tiny

from compress import load
from compress.export.student import export_student, token_rows
from compress.export.targets import Target
from compress.formats.table import Format
from compress.memory.footprint import Deployment, footprint
from compress.memory.plan import make_plan
from compress.model.checkpoint import open_checkpoint
from compress.run.directory import Run
from compress.run.evaluate import Asked, evaluate
from compress.run.recipe import check
from compress.run.session import Session

EVAL = {"sequence_length": 32, "final_tokens": 128}


@pytest.mark.parametrize(("format", "target"), [("nvfp4", "vllm"), ("mxfp4", "compress")])
@pytest.mark.parametrize("family", list(TINY))
def test_eval_measures_our_exports_as_load_reads_them(
    tmp_path: Path,
    text_file: Path,
    family: str,
    format: Format,
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    # An even shared expert, which blocks of 32 need.
    config = TINY[family] | {"moe_shared_expert_intermediate_size": 64}
    teacher, out = write_tiny(tmp_path / "teacher", config), tmp_path / "out"
    mixed = with_formats(open_checkpoint(teacher).architecture, [format, "bf16"])
    architecture = with_experts(mixed, format)
    export_student(teacher, out, architecture, target, {})
    recipe = check({"model": str(teacher), "data": str(text_file), **EVAL}, "test")
    found = evaluate([str(teacher), str(out)], Asked(), recipe)["models"][str(out)]
    assert found["bytes"] == footprint(architecture, recipe.deployment).total
    assert found["kl"] > 0
    session = Session(Run(tmp_path / "run"), recipe.changed(model=str(out)))
    rows = token_rows(architecture)
    with torch.no_grad(), session.stack.whole() as model:
        assert torch.equal(model(rows).logits, load(out)(rows).logits)
    assert session.architecture == session.checkpoint.architecture
    assert session.architecture.formats == {"bf16"}
    assert format.upper() in session.note
    plan = make_plan(out, Deployment(context=64))
    assert plan.quantized
    assert plan.footprint == footprint(architecture, Deployment(context=64))
