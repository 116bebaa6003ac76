"""Students whose layers differ, in layouts that servers know: read back by stock transformers.

The code that it runs is ours, from the export.
"""

import dataclasses
import importlib.util
import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import CARD
from quantized import with_formats, write_student
from tiny_models import HYBRID, LLAMA, MORE
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compress.core.errors import InputError
from compress.export.student import export_student, token_rows
from compress.export.targets import restricted
from compress.formats.table import Format
from compress.memory.footprint import weight_bytes
from compress.model.architecture import Architecture, Ffn, without_formats
from compress.model.build import load_model
from compress.model.families import read_architecture
from compress.model.find import shipped
from compress.searches.space import load_space

QWEN2 = {key: value for key, value in MORE["qwen2"].items() if key != "layer_types"}
TEACHERS: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"num_hidden_layers": 4},
    "mistral": MORE["mistral"] | {"sliding_window": None},
    "qwen2": QWEN2 | {"use_sliding_window": False},
    "nemotron_h": HYBRID
    | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "moe"]},
}


def uneven(teacher: Architecture) -> Architecture:
    """FFNs that are each narrower than the one before; of llamas, two halves of layers are gone."""
    blocks = [
        dataclasses.replace(block, ffn=96 - 16 * block.layer) if isinstance(block, Ffn) else block
        for block in teacher.blocks
    ]
    if teacher.family != "nemotron_h":
        del blocks[5], blocks[2]
    return dataclasses.replace(teacher, blocks=tuple(blocks))


@pytest.mark.parametrize(
    ("family", "format"),
    [*((family, "bf16") for family in TEACHERS), ("llama", "fp8"), ("nemotron_h", "fp8")],
)
def test_stock_transformers_computes_what_the_student_does(
    family: str, format: Format, tmp_path: Path
) -> None:
    student = with_formats(uneven(read_architecture(TEACHERS[family])), [format])
    source = write_student(tmp_path / "student", TEACHERS[family], without_formats(student))
    out, own = tmp_path / "out", tmp_path / "own"
    facts = export_student(source, out, student, "transformers", CARD)
    export_student(source, own, student, "compress", CARD)
    assert facts["bytes"] == weight_bytes(student)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    rows, meant = token_rows(student, seed=2), load_model(own)
    torch.testing.assert_close(model(rows).logits, meant(rows).logits)
    asked = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(rows[:1], **asked), meant.generate(rows[:1], **asked))
    assert torch.equal(load_model(out)(rows).logits, meant(rows).logits)
    assert "--trust-remote-code" in (out / "README.md").read_text()


def test_what_servers_cannot_express_is_refused_with_the_reason(tmp_path: Path) -> None:
    teacher = read_architecture(TEACHERS["llama"])
    first, *others = teacher.blocks
    narrow = dataclasses.replace(first, kv_head=1)
    refused = {"kv_head, which differs": (narrow, *others), "begin with attention": others}
    for reason, blocks in refused.items():
        student = dataclasses.replace(teacher, blocks=tuple(blocks))
        source = write_student(tmp_path / reason, TEACHERS["llama"], student)
        with pytest.raises(InputError, match=rf"{reason}.*--target .*compress$"):
            export_student(source, tmp_path / "out", student, "vllm", CARD)
    assert not (tmp_path / "out").exists()


def test_students_with_windows_are_even_for_servers(tmp_path: Path) -> None:
    config = TEACHERS["mistral"] | {"sliding_window": 6}
    student, joint = uneven(read_architecture(config)), load_space("joint")
    source = write_student(tmp_path / "student", config, student)
    with pytest.raises(InputError, match=r"one size of ffn.*--target compress$"):
        export_student(source, tmp_path / "out", student, "vllm", CARD)
    spaces = [restricted(joint, "vllm", "mistral", tied=False, windowed=w) for w in (True, False)]
    assert [space.axes["ffn"].scope for space in spaces] == ["global", "block"]
    assert [space.remove for space in spaces] == ["layer", "block"]


@pytest.fixture
def plugin() -> Iterator[Callable[[], None]]:
    """What the package's entry point for vLLM names."""
    root = shipped("remote_code")
    pyproject = tomllib.loads((root.parent / "pyproject.toml").read_text())["project"]
    [entry] = pyproject["entry-points"]["vllm.general_plugins"].values()
    module, _, function = entry.removeprefix("compress.").partition(":")
    file = str(root / "__init__.py")
    spec = importlib.util.spec_from_file_location(
        module, file, submodule_search_locations=[str(root)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[module] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    known = dict(CONFIG_MAPPING._extra_content)
    yield getattr(found, function)
    CONFIG_MAPPING._extra_content.clear()
    CONFIG_MAPPING._extra_content.update(known)
    del sys.modules[module]


@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
def test_with_the_plugin_no_code_of_a_directory_is_run(
    family: str, tmp_path: Path, plugin: Callable[[], None]
) -> None:
    student = uneven(read_architecture(TEACHERS[family]))
    source = write_student(tmp_path / "student", TEACHERS[family], student)
    export_student(source, tmp_path / "out", student, "vllm", CARD)
    for file in (tmp_path / "out").glob("*.py"):
        file.write_text("raise AssertionError('code of the directory was run')")
    for _ in range(2):
        plugin()
    config = AutoConfig.from_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert json.loads(config.to_json_string())["block_configs"] == written["block_configs"]
    if family == "llama":
        first = config.block_configs[0]
        assert (first.attention.no_op, first.attention.n_heads_in_group) == (False, 2)
        assert not hasattr(first.ffn, "ffn_mult")
    else:
        widths = [config.get_nemotron_h_config_for_layer(n).intermediate_size for n in (1, 3, 5)]
        assert widths == [80, 48, config.intermediate_size]
