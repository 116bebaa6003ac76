"""The laws that every family keeps: a row of ``tiny_models.EVERY`` is all that a new one adds."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import Keep, candidate
from exports import with_experts
from quantized import with_formats, with_outside
from safetensors import safe_open
from students import cuts_of, student_model, uneven, without
from tiny_models import EVERY, write_tiny
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from compress.export.student import export_student
from compress.export.targets import loader_of
from compress.formats.table import Format
from compress.measure.kl import measure, reference
from compress.memory.footprint import Deployment, footprint, mtp_weight_bytes, weight_bytes
from compress.memory.plan import make_plan
from compress.model.architecture import (
    Architecture,
    block_name,
    from_json,
    in_kv_format,
    to_json,
)
from compress.model.build import is_plain, load_model, student_config
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.model.families import (
    count_parameters,
    family_of,
    mtp_parameters,
    read_architecture,
)
from compress.model.layout import Parameter, parse
from compress.model.modules import final_hidden, head_of
from compress.model.stacks import stored_shapes
from compress.scores.contributions import contributions
from compress.scores.costs import top
from compress.student.masks import masked, masked_final
from compress.student.surgery import prune
from compress.student.units import projections, read_by_experts, unit_key
from compress.sweep.placement import Placement
from compress.sweep.stack import Stack, final_states, stack_of

AUTO: Any = AutoModelForCausalLM
# Longer than the windows of the tiny models, and than what their positions were made for.
TOKENS = torch.randint(1, 128, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=EVERY)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def teacher(family: str, tmp_path: Path) -> Checkpoint:
    """In fp32 on disk, so that folded norms are not rounded to bf16."""
    return open_checkpoint(write_tiny(tmp_path / family, EVERY[family], dtype=torch.float32))


def logits(model: Any) -> Tensor:
    found: Tensor = head_of(model).logits(final_hidden(model, TOKENS))
    return found


def stock(path: Path) -> Any:
    return AUTO.from_pretrained(path, dtype=torch.float32).eval()


def test_every_tensor_that_transformers_saves_is_in_the_table(family: str, tmp_path: Path) -> None:
    # It saves no layers that predict further tokens.
    architecture = replace(read_architecture(EVERY[family]), mtp=())
    config = AutoConfig.for_model(**deepcopy(EVERY[family]))  # transformers writes into it
    AUTO.from_config(config).save_pretrained(tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as reader:
        found = {name: tuple(reader.get_slice(name).get_shape()) for name in reader.offset_keys()}
    assert {name: shape for name, shape, _ in stored_shapes(architecture)} == found
    assert from_json(to_json(architecture)) == architecture


def test_a_loaded_model_is_that_of_transformers(family: str, teacher: Checkpoint) -> None:
    ours, theirs = load_model(teacher.path), stock(teacher.path)
    assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
    held = sum(parameter.numel() for parameter in theirs.parameters())
    biases = sum(b.numel() for name, b in theirs.named_buffers() if "correction_bias" in name)
    # Layers that predict further tokens are in files only.
    further = sum(parameter.count for parameter in mtp_parameters(teacher.architecture))
    assert count_parameters(teacher.architecture) == held + biases + further


def test_a_config_that_is_written_says_the_same(teacher: Checkpoint, family: str) -> None:
    written = student_config(EVERY[family], teacher.architecture)
    assert read_architecture(written) == teacher.architecture


@pytest.mark.parametrize("memory", [None, 0])
def test_a_sweep_gives_what_the_model_does(teacher: Checkpoint, memory: int | None) -> None:
    [found] = final_states(stack_of(teacher, Placement(memory=memory)), [TOKENS])
    with torch.no_grad():
        assert torch.equal(found, final_hidden(load_model(teacher.path), TOKENS))


def masked_logits(stack: Stack, keep: Keep) -> Tensor:
    """What the teacher says under the masks of a student."""
    hidden = stack.embed(TOKENS)
    for number, layer in stack.visits(range(stack.layers)):
        with masked(stack, number, keep):
            hidden = stack.run(number, layer, hidden)
    with stack.head() as head, masked_final(stack, keep):
        return head.logits(stack.normed(hidden))


@torch.no_grad()
def test_cutting_equals_masking_on_every_axis(family: str, tmp_path: Path) -> None:
    # One eps of a config serves norms over other axes too, which a hidden cut moves.
    small = {key: 1e-8 for key in ("rms_norm_eps", "layer_norm_epsilon") if key in EVERY[family]}
    path = write_tiny(tmp_path / family, EVERY[family] | small, dtype=torch.float32)
    teacher = open_checkpoint(path)
    stack = stack_of(teacher)
    whole = masked_logits(stack, {})
    for keep in cuts_of(teacher.architecture):
        expected, found = masked_logits(stack, keep), logits(student_model(teacher, keep))
        assert (expected - whole).abs().max() > 1e-2, list(keep)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4, msg=str(list(keep)))


@torch.no_grad()
def test_a_trial_measures_the_student_that_is_written(teacher: Checkpoint) -> None:
    text = reference(teacher, stack_of(teacher), TOKENS)
    whole = logits(load_model(teacher.path)).log_softmax(-1)
    for keep in (next(cuts_of(teacher.architecture)), uneven(teacher.architecture)):
        cut = logits(student_model(teacher, keep)).log_softmax(-1)
        expected = (whole.exp() * (whole - cut)).sum(-1).mean(1)
        found = torch.cat(list(measure(candidate(teacher.architecture, keep), text)))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_every_routing_group_keeps_as_many_experts(tmp_path: Path) -> None:
    grouped = {"n_routed_experts": 12, "n_group": 2, "topk_group": 1}
    for name in ("hybrid", "glm4_moe", "deepseek_v3"):
        path = write_tiny(tmp_path / name, EVERY[name] | grouped, dtype=torch.float32)
        teacher = open_checkpoint(path)
        block = next(block for block in teacher.architecture.blocks if block.kind == "moe")
        # The best are all of one group.
        kept = top(torch.arange(12.0), 6, groups=2)
        assert kept.tolist() == [3, 4, 5, 9, 10, 11]
        keep = {f"{block_name(block)}/expert": kept}
        found = logits(student_model(teacher, keep))
        stack = stack_of(teacher)
        torch.testing.assert_close(found, masked_logits(stack, keep), atol=2e-4, rtol=2e-4)
        assert (found - masked_logits(stack, {})).abs().max() > 1e-2


def test_units_that_nothing_reads_are_worth_nothing(teacher: Checkpoint) -> None:
    architecture, dead = teacher.architecture, {}
    kinds = {block.kind: block for block in reversed(architecture.blocks)}
    for block in kinds.values():
        prefix = family_of(architecture.family).layer.format(layer=block.layer)
        for projection in projections(architecture, block):
            if projection.expert in (None, 0):
                dead[prefix + projection.name] = block, projection

    def read(parameter: Parameter) -> Tensor:
        tensor = teacher[parameter.name].clone()
        if parameter.name in dead:
            tensor[:, : dead[parameter.name][1].features] = 0
        elif reads_latent(architecture, parameter):
            tensor[:, 0] = 0
        return tensor

    stack = Stack(teacher.config, architecture, read)
    found = contributions(stack, TOKENS, 1, ["fp8"])
    assert all(bool(values.isfinite().all()) for values in found.values())
    for block, projection in dead.values():
        values = found[unit_key(block, projection.units)].flatten(1)
        assert not values[:, 0].any()
        assert values[:, 1:].any()
    for block in architecture.blocks:
        for projection in projections(architecture, block):
            if projection.slot.fused:
                key = f"{unit_key(block, projection.units)}/{projection.slot.fused}/fp8"
                assert found[key].any()


def reads_latent(architecture: Architecture, parameter: Parameter) -> bool:
    """Whether an expert's matrix reads units that another projection reads too."""
    if parameter.block is None or parameter.expert is None:
        return False
    units = read_by_experts(architecture, architecture.blocks[parameter.block])
    return units is not None and parse(parameter.slot.shape)[-1].products == (units.axes,)


def test_a_student_in_formats_is_exported_and_read_back(
    teacher: Checkpoint, tmp_path: Path
) -> None:
    student = candidate(teacher.architecture, uneven(teacher.architecture))
    prune(teacher, student, tmp_path / "student")
    formats: list[Format] = ["nvfp4", "fp8", "bf16"]
    architecture = with_outside(with_formats(student.architecture, formats), "nvfp4", "fp8")
    # It is read back and compared with the student whose weights are rounded.
    export_student(tmp_path / "student", tmp_path / "export", architecture, "compress", {})
    assert load_model(tmp_path / "export")(TOKENS).logits.isfinite().all()


@torch.no_grad()
def test_stock_transformers_reads_a_quantized_student(
    teacher: Checkpoint, family: str, tmp_path: Path
) -> None:
    loader = loader_of("transformers", family_of(teacher.architecture.family).model_type)
    formats: list[Format] = ["fp8", "nvfp4", "bf16"] if "fp8" in loader.formats else ["bf16"]
    experts: Format = "fp8" if "fp8" in (loader.expert_formats or ()) else "bf16"
    architecture = with_experts(with_formats(teacher.architecture, formats), experts)
    prune(teacher, candidate(teacher.architecture, {}), tmp_path / "student")
    export_student(tmp_path / "student", tmp_path / "export", architecture, "transformers", {})
    ours, theirs = load_model(tmp_path / "export"), AUTO.from_pretrained(tmp_path / "export")
    # Codes become weights when they are first used.
    assert theirs(TOKENS).logits.isfinite().all()
    found = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        # The library multiplies an NVFP4 code and its scales in another order.
        torch.testing.assert_close(
            found[name].bfloat16(), parameter.bfloat16(), atol=0, rtol=2**-7, msg=name
        )


def test_an_uneven_student_is_written_read_and_continues_text(
    teacher: Checkpoint, tmp_path: Path
) -> None:
    keep = uneven(teacher.architecture)
    prune(teacher, candidate(teacher.architecture, keep), tmp_path / "student")
    model, memory = load_model(tmp_path / "student"), student_model(teacher, keep)
    for parameter in memory.parameters():
        parameter.copy_(parameter.bfloat16())
    torch.testing.assert_close(model(TOKENS).logits, memory(TOKENS).logits)
    for prompt in (TOKENS[:1, :4], TOKENS[:, :20]):
        cached, plain = (
            model.generate(
                prompt, max_new_tokens=9, do_sample=False, use_cache=use, eos_token_id=-1
            )
            for use in (True, False)
        )
        assert torch.equal(cached, plain)


def test_a_cache_gives_what_the_whole_text_does(teacher: Checkpoint) -> None:
    # One lacks an attention block, the other what its first layer begins with.
    for keep in (uneven(teacher.architecture), without(teacher.architecture, 0)):
        model = student_model(teacher, keep)
        cache = None
        steps = []
        for token in TOKENS.split(1, dim=1):
            output = model(token, past_key_values=cache, use_cache=True)
            cache, _ = output.past_key_values, steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, 1), model(TOKENS).logits, atol=2e-4, rtol=2e-4)


def test_stock_loaders_read_a_student_with_fewer_layers(
    teacher: Checkpoint, family: str, tmp_path: Path
) -> None:
    gone = teacher.architecture.blocks[0].layer
    blocks = enumerate(teacher.architecture.blocks)
    keep = without(teacher.architecture, *(n for n, block in blocks if block.layer == gone))
    student = candidate(teacher.architecture, keep)
    prune(teacher, student, tmp_path / "student")
    assert is_plain(student.architecture)
    ours = load_model(tmp_path / "student")
    assert torch.equal(ours(TOKENS).logits, stock(tmp_path / "student")(TOKENS).logits)


def test_the_plan_counts_the_bytes_of_the_weights(family: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY[family])
    with safe_open(path / "model.safetensors", framework="pt") as reader:
        written = sum(reader.get_tensor(name).nbytes for name in reader.offset_keys())
    plan = make_plan(path, Deployment(context=1))
    assert weight_bytes(plan.architecture) == plan.footprint.weights
    assert written == plan.footprint.weights + mtp_weight_bytes(plan.architecture)


@pytest.mark.parametrize("tokens", [4, 30])
def test_the_plan_counts_the_bytes_of_caches(family: str, tokens: int, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY[family])
    deployment = Deployment(context=tokens, batch_size=2, ssm_format="fp32")
    taken = make_plan(path, deployment).footprint
    model: Any = load_model(path, torch.bfloat16)
    for cache in (
        StaticCache(config=model.config, max_cache_len=tokens),
        DynamicCache(config=model.config),
    ):
        model(TOKENS[:, :tokens], past_key_values=cache, use_cache=True)
        assert cached_tokens(cache, tokens) == taken.kv_cache
        assert cached_states(cache) == (taken.ssm_state, taken.conv_state)
    architecture = make_plan(path, deployment).architecture
    half = footprint(in_kv_format(architecture, "fp8"), deployment)
    assert 2 * half.kv_cache == taken.kv_cache


def cached_tokens(cache: Any, tokens: int) -> int:
    """Bytes of a cache's keys and values, of as many tokens as servers hold.

    Once a text has outgrown a window, a dynamic cache lets the token go that the next one will not
    see: one less than the window.
    """
    held = 0
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None:
            continue
        one = (layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[-2]
        outgrown = isinstance(layer, DynamicSlidingWindowLayer) and tokens >= layer.sliding_window
        held += one * (layer.keys.shape[-2] + outgrown)
    return held


def cached_states(cache: Any) -> tuple[int, int]:
    """Bytes of a cache's recurrent states, and of its convolution states as servers hold them.

    transformers allocates as many columns as the kernel has, of which the next token reads all but
    the first.
    """
    recurrent = columns = 0
    for layer in cache.layers:
        for state in getattr(layer, "recurrent_states", {}).values():
            recurrent += 0 if state is None else state.nbytes
        for state in getattr(layer, "conv_states", {}).values():
            columns += 0 if state is None else state[..., 1:].numel() * state.element_size()
    return recurrent, columns
