"""Puzzle's released models: llama layers of their own sizes, some of one half only."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import candidate, some
from quantized import with_formats
from tiny_models import DENSE, write_tiny
from torch import Tensor

from compress.core.errors import InputError
from compress.export.student import export_student
from compress.memory.footprint import Deployment, footprint
from compress.model.architecture import Attention, Ffn
from compress.model.build import build_model, load_model, student_config
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.model.families import read_architecture
from compress.scores.contributions import contributions
from compress.student.surgery import prune
from compress.sweep.stack import stack_of

TOKENS = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(1))


def layer(group: int | None, **ffn: Any) -> dict[str, Any]:
    """An entry; without heads in a group or a width that half is left out."""
    attention = {"no_op": group is None, "n_heads_in_group": group, "replace_with_linear": False}
    return {"attention": attention, "ffn": {"no_op": not ffn, "sparsify": None, **ffn}}


LAYERS = [
    layer(2, intermediate_size=96),
    layer(None, ffn_mult=1.5),
    layer(4),
    layer(1, intermediate_size=48),
]
NAS = DENSE | {
    "model_type": "nemotron-nas",
    "architectures": ["DeciLMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
    "num_key_value_heads": None,
    "intermediate_size": None,
    "block_configs": LAYERS,
}


@pytest.fixture
def teacher(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path / "m", NAS, dtype=torch.float32))


def test_halves_have_the_sizes_that_their_entries_say() -> None:
    architecture = read_architecture(NAS)
    found = [
        (block.layer, block.kv_head, block.query)
        for block in architecture.blocks
        if isinstance(block, Attention)
    ]
    assert found == [(0, 2, 2), (2, 1, 4), (3, 4, 1)]
    widths = {block.layer: block.ffn for block in architecture.blocks if isinstance(block, Ffn)}
    # A multiplier is of 2/3 of the hidden size, rounded up to 256.
    assert widths == {0: 96, 1: 256, 3: 48}
    assert read_architecture(student_config(NAS, architecture)["base_config"]) == architecture
    cache = footprint(architecture, Deployment(context=100)).kv_cache
    assert cache == sum(2 * kv_head * 16 * 2 * 100 for _, kv_head, _ in found)


def widened(teacher: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a llama whose layers are all whole, that computes the same."""
    found = {name: teacher[name] for name in teacher.tensors if "layers" not in name}
    for number in range(4):
        prefix = f"model.layers.{number}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{norm}.weight"] = torch.ones(64)
        for name in ("q", "k", "v", "o"):
            found[f"{prefix}self_attn.{name}_proj.weight"] = torch.zeros(64, 64)
        for name, shape in (("gate", (256, 64)), ("up", (256, 64)), ("down", (64, 256))):
            found[f"{prefix}mlp.{name}_proj.weight"] = torch.zeros(shape)
    groups = {b.layer: b.query for b in teacher.architecture.blocks if isinstance(b, Attention)}
    for name in (name for name in teacher.tensors if "layers" in name):
        tensor = teacher[name]
        if "k_proj" in name or "v_proj" in name:
            query = groups[int(name.split(".")[2])]
            tensor = tensor.view(-1, 16, 64).repeat_interleave(query, 0).flatten(0, 1)
        place = tuple(slice(size) for size in tensor.shape)
        found[name][place] = tensor
    return found


def test_it_computes_what_a_llama_with_zeros_does(teacher: Checkpoint) -> None:
    config = DENSE | {"num_key_value_heads": 4, "intermediate_size": 256}
    llama = build_model(config, read_architecture(config), widened(teacher).items())
    torch.testing.assert_close(load_model(teacher.path)(TOKENS).logits, llama(TOKENS).logits)


def test_it_is_scored_cut_quantized_and_read_back(teacher: Checkpoint, tmp_path: Path) -> None:
    scores = contributions(stack_of(teacher), TOKENS, 1, ["fp8"])
    assert all(bool(rows.isfinite().all()) for rows in scores.values())
    blocks = torch.tensor([0, 1, 2, 4, 5])
    keep = {"blocks": blocks, "hidden": some(48, of=64), "layers.1.ffn/ffn": some(128, of=256)}
    prune(teacher, candidate(teacher.architecture, keep), tmp_path / "student")
    student = open_checkpoint(tmp_path / "student").architecture
    assert student.layers == 3
    architecture = with_formats(student, ["nvfp4", "fp8", "bf16"])
    export_student(tmp_path / "student", tmp_path / "out", architecture, "compress", {})
    assert load_model(tmp_path / "out")(TOKENS).logits.isfinite().all()
    model = load_model(tmp_path / "student")
    cached, plain = (
        model.generate(TOKENS, max_new_tokens=5, do_sample=False, use_cache=use, eos_token_id=-1)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)
    with pytest.raises(InputError, match=r"takes blocks of one size of ffn.*--target compress$"):
        export_student(tmp_path / "student", tmp_path / "out", student, "vllm", {})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (layer(3, intermediate_size=96), "n_heads_in_group 3 does not divide num_attention_heads"),
        (layer(None), "layer 1 of block_configs has neither attention nor ffn"),
        (layer(2, replace_with_linear=True), "ffn of layer 1 has replace_with_linear: not supp"),
        (layer(2, ffn_mult=-1.0), "ffn_mult is -1.0, not a number above 0"),
        (layer(2, intermediate_size=None), "neither intermediate_size nor ffn_mult"),
        ({"attention": {}}, "not a list of tables of attention and ffn"),
    ],
    ids=str,
)
def test_what_llama_cannot_compute_is_refused(entry: dict[str, Any], said: str) -> None:
    changed = [LAYERS[0], entry, *LAYERS[2:]]
    with pytest.raises(InputError, match=said):
        read_architecture(NAS | {"block_configs": changed})
    with pytest.raises(InputError, match="lists 3 layers, num_hidden_layers is 4"):
        read_architecture(NAS | {"block_configs": LAYERS[:3]})
