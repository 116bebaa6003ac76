"""Layers that predict further tokens (MTP): kept along a hidden cut and counted, or dropped."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import HIDDEN, candidate, mask_hidden
from published import PUBLISHED
from quantized import with_formats
from safetensors.torch import load_file, save_file
from tiny_models import EVERY, write_tiny
from torch import Tensor
from torch.nn.functional import rms_norm

from compress.core.errors import InputError
from compress.core.files import read_json
from compress.export.student import export_student
from compress.memory.footprint import Deployment, footprint, mtp_weight_bytes, weight_bytes
from compress.model.architecture import Architecture, from_json, to_json
from compress.model.build import build_model, load_model, student_config
from compress.model.checkpoint import open_checkpoint
from compress.model.families import (
    count_parameters,
    mtp_parameters,
    read_architecture,
    stored_parameters,
)
from compress.student.surgery import mtp_tensors, prune

WEIGHTS = "model.safetensors"
TOKENS = torch.arange(1, 13).view(2, 6)
FAMILIES = ["nemotron_h_latent", "glm4_moe", "deepseek_v3"]
EPS = 1e-8


def logits(path: Path) -> Tensor:
    found: Tensor = load_model(path)(TOKENS).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_they_do_not_change_what_a_model_computes(family: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY[family])
    before = logits(path)
    architecture = open_checkpoint(path).architecture
    assert architecture.mtp
    assert from_json(to_json(architecture)) == architecture
    # transformers does not write them.
    names = {parameter.name for parameter in mtp_parameters(architecture)}
    tensors = load_file(path / WEIGHTS)
    model = {name: tensor for name, tensor in tensors.items() if name not in names}
    assert len(tensors) == len(model) + len(names)
    save_file(model, path / WEIGHTS, {"format": "pt"})
    assert torch.equal(load_model(path)(TOKENS).logits, before)
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture == replace(architecture, mtp=())
    written = student_config(checkpoint.config, checkpoint.architecture)
    assert written["num_nextn_predict_layers"] == 0
    assert read_architecture(written) == checkpoint.architecture


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_of_them_is_refused(family: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY[family])
    tensors = load_file(path / WEIGHTS)
    lost = next(name for name in tensors if name.endswith("eh_proj.weight"))
    save_file({k: t for k, t in tensors.items() if k != lost}, path / WEIGHTS)
    with pytest.raises(InputError, match=f"has no tensor {lost}"):
        open_checkpoint(path)
    other = lost.replace("eh_proj", "other")
    save_file(tensors | {other: torch.ones(2)}, path / WEIGHTS)
    with pytest.raises(InputError, match=f"holds tensor {other}, which no table of"):
        open_checkpoint(path)


def test_more_steps_than_servers_take_are_left_out(tmp_path: Path) -> None:
    config = EVERY["nemotron_h_latent"] | {"num_nextn_predict_layers": 2}
    path = write_tiny(tmp_path / "m", config)
    tensors = load_file(path / WEIGHTS)
    save_file(tensors | {"mtp.layers.0.norm.weight": torch.ones(2)}, path / WEIGHTS)
    checkpoint = open_checkpoint(path)
    assert not checkpoint.architecture.mtp
    written = student_config(checkpoint.config, checkpoint.architecture)
    assert written["num_nextn_predict_layers"] == 0


def drafted(
    config: Mapping[str, Any], architecture: Architecture, mtp: Mapping[str, Tensor]
) -> tuple[Any, Tensor]:
    """The layers of a hybrid that predict further tokens as a model, and what joins its inputs."""
    blocks, hidden = architecture.mtp, architecture.hidden
    alone = replace(architecture, blocks=blocks, mtp=())
    own = {"backbone.embeddings.weight": torch.zeros(architecture.vocab, hidden)}
    own["lm_head.weight"] = own["backbone.embeddings.weight"]
    own["backbone.norm_f.weight"] = mtp[f"mtp.layers.{len(blocks) - 1}.final_layernorm.weight"]
    joining = ("enorm.", "hnorm.", "eh_proj.", "final_layernorm.")
    own |= {
        name.replace("mtp.", "backbone."): tensor
        for name, tensor in mtp.items()
        if not any(part in name for part in joining)
    }
    return build_model(student_config(config, alone), alone, own.items()), joined(mtp, hidden)


def joined(mtp: Mapping[str, Tensor], hidden: int) -> Any:
    """What the first of these layers reads, of embeddings and final states."""
    first = "mtp.layers.0."

    def join(embedded: Tensor, state: Tensor, eps: float) -> Tensor:
        normed = (
            rms_norm(each, [each.shape[-1]], mtp[f"{first}{name}.weight"], eps)
            for each, name in ((embedded, "enorm"), (state, "hnorm"))
        )
        return torch.cat(list(normed), -1) @ mtp[f"{first}eh_proj.weight"].T

    return join


@torch.no_grad()
def test_a_hidden_cut_of_them_equals_its_mask(tmp_path: Path) -> None:
    config = EVERY["nemotron_h_latent"] | {"layer_norm_epsilon": EPS}
    teacher = open_checkpoint(write_tiny(tmp_path / "m", config, dtype=torch.float32))
    student = candidate(teacher.architecture, {"hidden": HIDDEN})
    draw = torch.Generator().manual_seed(5)
    embedded, state = torch.randn(2, 2, 9, 64, generator=draw)
    cut, join = drafted(config, student.architecture, dict(mtp_tensors(teacher, student)))
    found = cut.model(inputs_embeds=join(embedded[..., HIDDEN], state[..., HIDDEN], EPS * 64 / 48))
    masked, join = drafted(config, teacher.architecture, dict(teacher.mtp()))
    mask_hidden(masked, HIDDEN)
    mask = torch.zeros(64).index_fill_(0, HIDDEN, 1)
    # Norms are all that reads the stream.
    expected = masked.model(inputs_embeds=join(embedded * mask, state * mask, EPS))
    torch.testing.assert_close(
        found.last_hidden_state, expected.last_hidden_state[..., HIDDEN], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_keeps_or_drops_them(family: str, tmp_path: Path) -> None:
    teacher = open_checkpoint(write_tiny(tmp_path / "m", EVERY[family]))
    gone = teacher.architecture.blocks[-1].layer
    kept = [n for n, b in enumerate(teacher.architecture.blocks) if b.layer != gone]
    student = candidate(teacher.architecture, {"blocks": torch.tensor(kept), "hidden": HIDDEN})
    prune(teacher, student, tmp_path / "kept")
    found = open_checkpoint(tmp_path / "kept")
    assert found.architecture.mtp == teacher.architecture.mtp
    assert read_architecture(found.config) == found.architecture
    dropped = replace(student, architecture=replace(student.architecture, mtp=()))
    prune(teacher, dropped, tmp_path / "dropped")
    found = open_checkpoint(tmp_path / "dropped")
    assert not found.architecture.mtp
    ours, theirs = (load_model(tmp_path / name)(TOKENS).logits for name in ("kept", "dropped"))
    assert torch.equal(ours, theirs)


def matches(module: str, target: str) -> bool:
    """Whether a group of compressed-tensors names a module."""
    is_pattern = target.startswith("re:")
    return bool(re.match(target[3:], module)) if is_pattern else target == module


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_holds_them_in_bf16(family: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY[family])
    architecture = with_formats(open_checkpoint(path).architecture, ["nvfp4"])
    export_student(path, tmp_path / "out", architecture, "vllm", {})
    [file] = (tmp_path / "out").glob("*.safetensors")
    found = load_file(file)
    before = load_file(path / WEIGHTS)
    for parameter in mtp_parameters(architecture):
        assert torch.equal(found[parameter.name], before[parameter.name])
    config = read_json(tmp_path / "out" / "config.json")
    assert config["num_nextn_predict_layers"] == 1
    # Servers quantize the modules that a group targets, by name or by a class of modules.
    groups = config["quantization_config"]["config_groups"].values()
    targets = [target for group in groups for target in group["targets"]]
    # Classes call the stem of a Nemotron-H "model", its checkpoints "backbone".
    modules = {name.rpartition(".")[0].replace("backbone.", "model.") for name in before}
    further = {parameter.name.rpartition(".")[0] for parameter in mtp_parameters(architecture)}
    named = {module for module in modules if any(matches(module, target) for target in targets)}
    assert named
    assert named.isdisjoint(further)
    assert all(target in named or target.startswith("re:^") for target in targets)
    assert load_model(tmp_path / "out")(TOKENS).logits.isfinite().all()


def test_their_weights_and_their_cache_are_counted() -> None:
    architecture = read_architecture(EVERY["nemotron_h_latent"])
    without = replace(architecture, mtp=())
    served = Deployment(context=100, batch_size=3)
    taken, less = footprint(architecture, served), footprint(without, served)
    assert taken.total - less.total == taken.mtp
    assert taken.mtp == mtp_weight_bytes(architecture) + 2 * 2 * 16 * 2 * 100 * 3
    assert taken.weights == less.weights == weight_bytes(architecture)


def test_published_counts_with_them() -> None:
    config, count = PUBLISHED["Nemotron-3-Super-120B-A12B"]
    whole = read_architecture(config | {"num_nextn_predict_layers": 1})
    further = list(mtp_parameters(whole))
    stored = list(stored_parameters(whole))
    assert len(stored) == 42_683
    assert sum(parameter.slot.float32 for parameter in stored) == 41
    air, _ = PUBLISHED["GLM-4.5-Air"]
    further_air = air | {"num_nextn_predict_layers": 1}
    assert count_parameters(read_architecture(further_air)) == 110_468_824_832
    assert count_parameters(whole) == 123_611_033_088 == count + sum(p.count for p in further)
