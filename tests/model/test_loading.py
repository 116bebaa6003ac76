"""What transformers loads computes the same here; all else is one line, of plan already."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HYBRID, LLAMA, write_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.core.errors import InputError
from compress.measure.evaluation import on_text, predicted
from compress.memory.footprint import Deployment
from compress.memory.plan import make_plan
from compress.model.build import build_model, load_model, student_config
from compress.model.checkpoint import open_checkpoint
from compress.model.families import read_architecture
from compress.model.families.settings import ACTIVATIONS
from compress.model.find import resolve_model
from compress.model.modules import final_hidden, head_of
from compress.scores.contributions import contributions
from compress.sweep.stack import stack_of

TOKENS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(1))
GONE = "no such key"
WEIGHTS = "model.safetensors"
YARN = {"factor": 2.0, "original_max_position_embeddings": 256}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
SILENT = {"quant_method": "bitsandbytes", "load_in_4bit": True}
SAME = [
    {"head_dim": GONE},
    {"head_dim": None},
    {"rms_norm_eps": GONE},
    {"hidden_act": "gelu"},
    {"pad_token_id": -128},
    {"eos_token_id": [0, 3], "bos_token_id": None},
    {"output_attentions": True, "output_hidden_states": True},
    {"torch_dtype": "auto", "dtype": GONE},
    {"dtype": "torch.bfloat16"},
    {"use_cache": False, "gradient_checkpointing": True, "attention_dropout": 0.1},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn"} | YARN, "rope_theta": 5e5},
    {"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 64} | LLAMA3},
    {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 256} | LONG},
    {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}},
    {"rope_theta": 5e5, "rope_scaling": None, "logits_scaling": 4.0},
    {"layer_types": ["full_attention"] * 3, "no_rope_layers": [1, 0, 1], "mlp_only_layers": [1]},
    {"per_layer_config": {}, "id2label": {"0": "a"}, "sliding_window": 4},
    {"auto_map": {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}},
    {"architectures": None, "transformers_version": "4.31"},
]  # fmt: skip
SAME_HYBRID = [
    {"tie_word_embeddings": True},
    {"layers_block_type": GONE, "hybrid_override_pattern": "ME*-M"},
    {"layers_block_type": GONE, "layer_types": HYBRID["layers_block_type"]},
    {"n_groups": GONE, "mamba_n_groups": 2, "conv_kernel": GONE, "mamba_d_conv": 4},
    {"n_routed_experts": GONE, "num_local_experts": 6, "num_experts_per_tok": GONE},
    {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 2, "norm_topk_prob": False},
    {"time_step_limit": [0.0, {"__float__": "Infinity"}], "time_step_min": 0.01},
    {"pad_token_id": 999, "output_attentions": True, "attention_bias": True},
    {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"},
]


def variant(source: Path, directory: Path, base: dict[str, Any], change: dict[str, Any]) -> Path:
    """The same weights and tokenizer under another config."""
    shutil.copytree(source, directory)
    config = {key: value for key, value in (base | change).items() if value != GONE}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def stock_logits(path: Path) -> Tensor:
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


def our_logits(path: Path) -> Tensor:
    model = load_model(path)
    with torch.no_grad():
        return head_of(model).logits(final_hidden(model, TOKENS))


def plan(path: Path) -> Any:
    return make_plan(path, Deployment(context=64))


def same(path: Path) -> None:
    torch.testing.assert_close(our_logits(path), stock_logits(path), atol=2e-5, rtol=1e-5)
    assert plan(path).architecture == open_checkpoint(path).architecture


@pytest.mark.parametrize("change", SAME, ids=str)
def test_what_transformers_loads_computes_the_same(
    change: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    same(variant(tiny_llama, tmp_path / "m", LLAMA, change))


@pytest.mark.parametrize("change", SAME_HYBRID, ids=str)
def test_a_hybrid_that_transformers_loads_computes_the_same(
    change: dict[str, Any], tiny_hybrid: Path, tmp_path: Path
) -> None:
    same(variant(tiny_hybrid, tmp_path / "m", HYBRID, change))


@pytest.mark.parametrize(
    "change",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "nonsense"},
        {"return_dict": False},
        {"use_cache": None},
        {"quantization_config": SILENT},
    ],
    ids=str,
)
def test_what_only_matters_elsewhere_is_ignored(
    change: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    path = variant(tiny_llama, tmp_path / "m", LLAMA, change)
    assert torch.equal(our_logits(path), our_logits(tiny_llama))
    # A student is not written with it: others could not load it.
    checkpoint = open_checkpoint(path)
    written = student_config(checkpoint.config, checkpoint.architecture)
    assert not set(change) & set(written) - {"use_cache"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pad_token_id": 128}, "pad_token_id 128 is beyond vocab_size 128"),
        ({"pad_token_id": -129}, "pad_token_id -129 is beyond"),
        ({"pad_token_id": True}, "pad_token_id is True, not a token id or null"),
        ({"eos_token_id": "0"}, "eos_token_id is '0', not a token id, a list of them or null"),
        ({"eos_token_id": ["0"]}, "eos_token_id is ['0'], not"),
        ({"bos_token_id": [0]}, "bos_token_id is [0], not"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', not a number with a decimal point"),
        ({"rms_norm_eps": 1}, "rms_norm_eps is 1, not a number with a decimal point"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"hidden_act": "nonsense"}, "hidden_act is 'nonsense', not one of gelu"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0, not a whole number from 1 to 99999999"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000, not a whole number from 1 to"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not a whole number from 1 to 9999"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None, not true or false"),
        ({"attention_bias": "false"}, "attention_bias is 'false', not true or false"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6', not a number"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not a table or null"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope type 'su' is not known"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None, not a number above 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "factor is '2', not a number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1]}},
            "short_factor has 1 numbers",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types lists 1 layers, num_hidden_layers is 3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"tie_word_embeddings": False}, "has no tensor lm_head.weight"),
    ],
    ids=str,
)
def test_what_nobody_can_run_is_one_line_of_plan(
    change: dict[str, Any], said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    refused(variant(tiny_llama, tmp_path / "m", LLAMA, change), said)


def refused(path: Path, said: str) -> None:
    for door in (plan, load_model):
        with pytest.raises(InputError) as error:
            door(path)
        assert said in str(error.value)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers_block_type": "ME*-M"}, "layers_block_type is 'ME*-M', not a list of names"),
        ({"layers_block_type": ["x"] * 5}, "unknown layer type 'x'"),
        ({"layers_block_type": GONE}, "neither layers_block_type nor hybrid_override_pattern"),
        ({"chunk_size": 16.0}, "chunk_size is 16.0, not a whole number from 1 to 99999999"),
        ({"mamba_num_heads": 7}, "mamba_num_heads 7 is not a multiple of n_groups 2"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is above n_routed_experts 6"),
        ({"n_group": 4}, "n_routed_experts 6 is not a multiple of n_group 4"),
        ({"n_group": 6}, "n_group 6 leaves n_routed_experts 6 no two of a group"),
        ({"topk_group": 2}, "topk_group 2 is above n_group 1"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"),
        ({"mamba_conv_bias": False}, "use_conv_bias=false is not supported"),
        ({"num_key_value_heads": None}, "num_key_value_heads is None"),
    ],
    ids=str,
)
def test_a_hybrid_that_nobody_can_run_is_one_line_of_plan(
    change: dict[str, Any], said: str, tiny_hybrid: Path, tmp_path: Path
) -> None:
    refused(variant(tiny_hybrid, tmp_path / "m", HYBRID, change), said)


def test_activations_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN

    # These have parameters, which no table of ours lists.
    assert set(ACTIVATIONS) == set(ACT2FN) - {"prelu", "xielu"}


def quantized(dtype: torch.dtype) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        cast = {k: v.to(dtype) if "proj" in k else v for k, v in load_file(file).items()}
        save_file(cast, file, {"format": "pt"})

    return damage


def scaled(file: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale"
    save_file(load_file(file) | {name: torch.ones(1)}, file, {"format": "pt"})


def packed(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.qweight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "config", "method"),
    [
        (quantized(torch.float8_e4m3fn), None, "F8_E4M3"),
        (quantized(torch.uint8), SILENT, "bitsandbytes"),
        (quantized(torch.int8), {}, "I8"),
        (scaled, {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        (scaled, {"quant_algo": "FP8"}, "FP8"),
        (packed, {"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
)
def test_a_quantized_teacher_is_named_with_its_method(
    damage: Callable[[Path], None], config: Any, method: str, tiny_llama: Path, tmp_path: Path
) -> None:
    change = {} if config is None else {"quantization_config": config}
    path = variant(tiny_llama, tmp_path / "m", LLAMA, change)
    damage(path / WEIGHTS)
    refused(path, f"this checkpoint is quantized ({method}); take the one in BF16")


def test_the_single_file_is_read_where_an_old_index_lies_beside_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    path = variant(tiny_llama, tmp_path / "m", LLAMA, {})
    old = {name: tensor * 2 for name, tensor in load_file(path / WEIGHTS).items()}
    save_file(old, path / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(old, "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": names}
    (path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    same(path)
    assert torch.equal(our_logits(path), our_logits(tiny_llama))
    (path / WEIGHTS).unlink()
    same(path)
    assert not torch.equal(our_logits(path), our_logits(tiny_llama))


@pytest.mark.parametrize(("factor", "tied"), [(1.0, True), (2.0, False)])
def test_tied_matrices_that_are_stored_twice(
    factor: float, tied: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    path = variant(tiny_llama, tmp_path / "m", LLAMA, {})
    tensors = load_file(path / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    same(path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture.tied == tied
    written = student_config(checkpoint.config, checkpoint.architecture)
    assert written["tie_word_embeddings"] == tied
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    if tied:
        same(path)


def test_layers_that_go_take_their_entries_of_lists_with_them(tmp_path: Path) -> None:
    lists = {"layer_types": ["full_attention"] * 3, "no_rope_layers": [1, 0, 1], "eos": [1, 2]}
    teacher = open_checkpoint(write_tiny(tmp_path / "m", LLAMA | lists))
    whole = student_config(teacher.config, teacher.architecture)
    assert whole["layer_types"] == lists["layer_types"]
    shorter = read_architecture(LLAMA | {"num_hidden_layers": 2})
    config = student_config(teacher.config, shorter)
    assert config["num_hidden_layers"] == 2
    assert not {"layer_types", "no_rope_layers"} & set(config)
    assert config["eos"] == [1, 2]
    layers = "model.layers.2."
    names = [name for name in teacher.tensors if not name.startswith(layers)]
    build_model(config, shorter, [(name, teacher[name]) for name in names])


@pytest.mark.parametrize("name", ["owner/model", "owner/bar--baz", "a..b/c"])
def test_a_folder_of_the_owners_name_does_not_hide_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name.partition("/")[0]).mkdir()
    with pytest.raises(InputError, match="is no directory and not to be had") as error:
        resolve_model(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_logits_that_are_no_numbers_are_one_line(
    part: str, tiny_llama: Path, tmp_path: Path
) -> None:
    path = variant(tiny_llama, tmp_path / "m", LLAMA, {})
    tensors = load_file(path / WEIGHTS)
    # Finite in the file, not in the model.
    tensors[part] = torch.full_like(tensors[part], 3e38)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    checkpoint = open_checkpoint(path)
    text = predicted(stack_of(checkpoint), TOKENS)
    with pytest.raises(InputError, match="logits are not finite on this text"):
        contributions(stack_of(checkpoint), TOKENS, 1, [])
    with pytest.raises(InputError, match="predicts NaN or infinite logits on this text"):
        on_text(text, text, TOKENS, np.array([12, 12]))
