"""At a student: the gated teacher computes it, and its derivatives say what a change does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import CASES, candidate
from tiny_models import EVERY, write_tiny

from compress.measure.kl import Reference, measure, reference
from compress.measure.losses import kl_from_hidden
from compress.memory.budget import in_format
from compress.model.architecture import block_name, in_kv_format
from compress.model.build import build_model, load_model, student_config
from compress.model.checkpoint import open_checkpoint
from compress.model.modules import head_of
from compress.scores.gradients import entering
from compress.scores.tangent import gated_teacher, tangent
from compress.scores.taps import Taps
from compress.student.candidate import Candidate
from compress.student.grams import HALVES, Grams, save_grams
from compress.student.surgery import student_tensors
from compress.student.units import array_of, unit_key
from compress.sweep.placement import Placement
from compress.sweep.stack import final_states, stack_of

LENGTH = 16
TOKENS = torch.randint(0, 128, (12, LENGTH), generator=torch.Generator().manual_seed(2))


def text_of(path: Path) -> tuple[object, Reference]:
    checkpoint = open_checkpoint(path)
    return load_model(path), reference(checkpoint, stack_of(checkpoint), TOKENS)


@pytest.mark.parametrize("case", CASES)
def test_the_gated_teacher_computes_the_student(case: str, tmp_path: Path) -> None:
    name, keep, _ = CASES[case]
    path = write_tiny(tmp_path / name, EVERY[name], dtype=torch.float32)
    teacher = open_checkpoint(path)
    student = candidate(teacher.architecture, keep)
    config = student_config(teacher.config, student.architecture)
    cut = build_model(config, student.architecture, student_tensors(teacher, student))
    expected = cut.model(input_ids=TOKENS, use_cache=False).last_hidden_state
    whole = load_model(path).model(input_ids=TOKENS, use_cache=False).last_hidden_state
    stack = stack_of(teacher)
    gated = gated_teacher(stack, student, teacher, None)
    taps = Taps(gated)
    with torch.no_grad(), stack.head(), taps.on_final():
        [last] = entering(gated, [TOKENS], stack.layers)[-1]
        found = stack.normed(last)
    if "hidden" in keep:
        found = found[..., keep["hidden"]]
    # The hybrid's config has one eps for both of its norms: a hidden cut changes the other's too.
    close = 3e-3 if case == "hybrid hidden" else 5e-4
    torch.testing.assert_close(found, expected, atol=close, rtol=close)
    assert torch.equal(final_states(stack, [TOKENS])[0], whole), "masks and hooks are gone"


@pytest.mark.parametrize("unit", [3, 80])
def test_the_slope_is_the_derivative_for_units_that_are_there_and_that_are_gone(
    unit: int, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "m", EVERY["llama"], dtype=torch.float32)
    model, text = text_of(path)
    architecture = text.teacher.architecture
    student = candidate(architecture, {"layers.1.ffn/ffn": torch.arange(64)})
    found = tangent(stack_of(text.teacher), student, text, [])
    block = architecture.blocks[3]
    slope = float(found.slope[unit_key(block, array_of(block, "ffn"))][:, unit].mean()) / LENGTH

    def kl(step: float) -> float:
        mask = torch.zeros(96).index_fill_(0, torch.arange(64), 1)
        mask[unit] += step
        module = model.model.layers[1].mlp.down_proj
        handle = module.register_forward_pre_hook(lambda m, a: (a[0] * mask,))
        hidden = model.model(input_ids=TOKENS, use_cache=False).last_hidden_state.flatten(0, 1)
        handle.remove()
        head = head_of(model)
        kl = kl_from_hidden(hidden, head, text.hidden.flatten(0, 1), head)
        return float(kl.double().mean())

    assert float(found.kl.mean()) == pytest.approx(kl(0), rel=1e-4)
    assert slope == pytest.approx((kl(0.25) - kl(-0.25)) / 0.5, rel=0.1)


def test_the_slope_is_the_derivative_for_value_dimensions_that_are_gone(tmp_path: Path) -> None:
    _, keep, _ = CASES["delta net value dimensions"]
    # Without experts, of which others are chosen all of a sudden.
    path = write_tiny(tmp_path / "m", EVERY["qwen3_5_text"], dtype=torch.float32)
    model: Any
    model, text = text_of(path)
    [(key, kept)] = keep.items()
    found = tangent(stack_of(text.teacher), candidate(text.teacher.architecture, keep), text, [])
    slope = found.slope[key.replace("/", "/key_head.value.")].mean(0).sum((0, 1)) / LENGTH
    gone = next(unit for unit in range(32) if unit not in kept.tolist())
    model.double()

    def kl(step: float) -> float:
        mask = torch.zeros(32, dtype=torch.float64).index_fill_(0, kept, 1)
        mask[gone] += step
        # Half of them are averaged.
        module = model.model.layers[0].linear_attn.norm
        handle = module.register_forward_pre_hook(lambda m, a: (a[0] * 2**0.5 * mask, *a[1:]))
        hidden = model.model(input_ids=TOKENS, use_cache=False).last_hidden_state.flatten(0, 1)
        handle.remove()
        head = head_of(model)
        kl = kl_from_hidden(hidden, head, text.hidden.flatten(0, 1), head)
        return float(kl.double().mean())

    assert float(found.kl.mean()) == pytest.approx(kl(0), rel=1e-4)
    assert float(slope[gone]) == pytest.approx((kl(0.01) - kl(-0.01)) / 0.02, rel=0.05)


@pytest.mark.parametrize(
    "case",
    ["llama ffn", "hybrid hidden", "hybrid experts", "latent width", "delta net in all ways"],
)
def test_a_streamed_tangent_is_the_resident_one_bit_for_bit(case: str, tmp_path: Path) -> None:
    name, keep, _ = CASES[case]
    _, text = text_of(write_tiny(tmp_path / name, EVERY[name]))
    student = rounded(candidate(text.teacher.architecture, keep))
    places = Placement(), Placement(memory=0)
    resident, streamed = (
        tangent(stack_of(text.teacher, place), student, text, ["fp8", "nvfp4"]) for place in places
    )
    assert torch.equal(resident.kl, streamed.kl)
    assert resident.slope.keys() == streamed.slope.keys()
    assert all(torch.equal(rows, streamed.slope[key]) for key, rows in resident.slope.items())


def rounded(student: Candidate) -> Candidate:
    """The candidate with every block in FP8, its KV cache too."""
    architecture = in_kv_format(in_format(student.architecture, "fp8"), "fp8")
    return replace(student, architecture=architecture)


def test_the_gated_teacher_is_in_the_students_formats(tmp_path: Path) -> None:
    _, text = text_of(write_tiny(tmp_path / "m", EVERY["llama"]))
    student = rounded(candidate(text.teacher.architecture, {}))
    expected = torch.cat(list(measure(student, text)))
    found = tangent(stack_of(text.teacher), student, text, ["fp8"]).kl
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_the_kv_format_is_the_teachers_again_when_a_tangent_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = text_of(write_tiny(tmp_path / "m", EVERY["llama"]))
    stack = stack_of(text.teacher)
    before = final_states(stack, [TOKENS])[0]
    student = rounded(candidate(text.teacher.architecture, {}))
    monkeypatch.setattr(Taps, "on_layer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tangent(stack, student, text, [])
    assert torch.equal(final_states(stack, [TOKENS])[0], before)


@pytest.mark.parametrize(
    "case",
    ["llama ffn", "hybrid query heads", "hybrid expert width", "latent width",
     "delta net value heads", "delta net in all ways"],
)  # fmt: skip
def test_the_gated_teacher_computes_the_repaired_student(case: str, tmp_path: Path) -> None:
    name, keep, _ = CASES[case]
    _, text = text_of(write_tiny(tmp_path / name, EVERY[name], dtype=torch.float32))
    architecture, stack = text.teacher.architecture, stack_of(text.teacher)
    save_grams(stack, dict.fromkeys(HALVES, TOKENS), tmp_path / "grams.safetensors")
    grams = Grams(tmp_path / "grams.safetensors")
    block = next(iter(keep)).partition("/")[0]
    number = [block_name(b) for b in architecture.blocks].index(block)
    student = replace(candidate(architecture, keep), repaired=frozenset([number]))
    expected = torch.cat(list(measure(student, text, grams)))
    before = final_states(stack, [TOKENS])[0]
    found = tangent(stack, student, text, [], grams).kl
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(
        expected, torch.cat(list(measure(candidate(architecture, keep), text)))
    )
    assert torch.equal(final_states(stack, [TOKENS])[0], before)
