"""Exports: what was read back is what was meant, in bytes and in logits, or nothing is left."""

import json
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch
from exports import CARD, MIXES, QUANTIZED, SERVED, SERVED_MIXES, architecture_of, with_experts
from quantized import fake_quantized_logits, stored, uneven, with_formats, write_student
from safetensors.torch import save_file
from tiny_models import EVERY, HYBRID, LLAMA, TINY, write_tiny
from transformers import AutoModelForCausalLM

from compress import load
from compress.core.errors import InputError, VerificationFailed
from compress.export.student import export_student, token_rows
from compress.export.targets import Target, restricted
from compress.formats.fake import shared
from compress.formats.packed import stored_names
from compress.formats.table import FORMATS, Format
from compress.memory.footprint import Deployment, footprint
from compress.model.architecture import from_json
from compress.model.build import load_model
from compress.model.families import read_architecture
from compress.searches.space import load_space

# Who reads a format where that is not its own file.
READ_BY = {
    "q8_0": ("compress.model.dequantize", "product"),
    "q4_0": ("compress.formats.int4", "unpack"),
}
WIDE: dict[str, object] = dict.fromkeys(
    ("hidden_size", "intermediate_size", "moe_intermediate_size",
     "moe_shared_expert_intermediate_size"), 128,
) | {"num_attention_heads": 8}  # fmt: skip


@pytest.fixture(scope="session", params=["llama", "hybrid"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose widths every format takes."""
    return write_tiny(tmp_path_factory.mktemp("wide") / "model", TINY[request.param] | WIDE)


@pytest.mark.parametrize(
    ("formats", "target"),
    [*((mix, "compress") for mix in MIXES), *((mix, "vllm") for mix in SERVED_MIXES)],
)
def test_an_export_has_the_planned_bytes_and_the_meant_logits(
    wide: Path, tmp_path: Path, formats: Sequence[Format], target: Target
) -> None:
    architecture, out = architecture_of(wide, formats), tmp_path / "out"
    if target == "vllm":
        architecture = with_experts(architecture, formats[-1])
    facts = export_student(wide, out, architecture, target, CARD)
    found = stored(out)
    planned = footprint(architecture, Deployment(context=0)).weights
    assert sum(tensor.nbytes for tensor in found.values()) == planned == facts["bytes"]
    rows = token_rows(architecture, seed=2)
    expected = fake_quantized_logits(wide, architecture, rows)
    torch.testing.assert_close(load_model(out)(rows).logits, expected)
    assert from_json((out / "architecture.json").read_text()) == architecture
    assert (out / "tokenizer.json").read_bytes() == (wide / "tokenizer.json").read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("formats", [["bf16"], ["nvfp4", "fp8", "nvfp4"]])
@pytest.mark.parametrize("config", [LLAMA, HYBRID], ids=["llama", "hybrid"])
def test_uneven_students_export_and_stock_loaders_refuse_them(
    tmp_path: Path, config: dict[str, object], formats: Sequence[Format]
) -> None:
    architecture, out = with_formats(uneven(config), formats), tmp_path / "out"
    path = write_student(tmp_path / "student", config, architecture)
    export_student(path, out, architecture, "compress", CARD)
    rows = token_rows(architecture, seed=2)
    expected = fake_quantized_logits(path, architecture, rows)
    torch.testing.assert_close(load_model(out)(rows).logits, expected)
    with pytest.raises((ValueError, KeyError), match="compress"):
        AutoModelForCausalLM.from_pretrained(out)


def test_plain_bf16_exports_load_with_stock_transformers(tiny: Path, tmp_path: Path) -> None:
    architecture = architecture_of(tiny, ["bf16"])
    facts = export_student(tiny, tmp_path / "out", architecture, "transformers", CARD)
    rows = token_rows(architecture, seed=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(model(rows).logits, load_model(tiny)(rows).logits)
    assert "transformers" in facts["reader"]


@pytest.mark.parametrize("format", QUANTIZED)
def test_stock_transformers_refuses_quantized_exports(
    wide: Path, tmp_path: Path, format: Format
) -> None:
    export_student(wide, tmp_path / "out", architecture_of(wide, [format]), "compress", CARD)
    with pytest.raises((ValueError, OSError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("format", [name for name in QUANTIZED if name not in SERVED])
def test_vllm_takes_the_formats_that_its_loader_knows(
    wide: Path, tmp_path: Path, format: Format
) -> None:
    with pytest.raises(InputError, match=rf"nvfp4.* only.*{format}.*--target .*compress$"):
        export_student(wide, tmp_path / "out", architecture_of(wide, [format]), "vllm", CARD)
    space = load_space("joint")
    listed = space.model_copy(update={"formats": (*space.formats, format)})
    with pytest.raises(InputError, match=rf"the space lists {format}; use --target compress"):
        restricted(listed, "vllm", "llama", tied=False)
    few = {"embedding_formats": ("fp8",), "expert_formats": ("bf16", "fp8"), "first": "attention"}
    for asked in (listed, listed.model_copy(update=few)):
        for tied in (False, True):
            assert restricted(asked, "compress", "llama", tied=tied) == asked
    served = restricted(space.model_copy(update=few), "vllm", "llama", tied=False)
    assert (served.embedding_formats, served.expert_formats) == (("bf16",), ("bf16",))


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("wide", ["hybrid"], indirect=True)
def test_experts_are_packed_as_one_group(tmp_path: Path, wide: Path, format: Format) -> None:
    architecture = architecture_of(wide, [format])
    export_student(wide, tmp_path / "out", architecture, "compress", CARD)
    found, source, row = stored(tmp_path / "out"), stored(wide), FORMATS[format]
    prefix = "backbone.layers.1.mixer.experts"
    for projection in ("up_proj", "down_proj"):
        names = [f"{prefix}.{expert}.{projection}.weight" for expert in range(6)]
        common = shared([source[name] for name in names], format)
        for name in names:
            packed = row.numerics.pack(source[name], *common)
            for stored_name, tensor in zip(stored_names(name, format), packed, strict=True):
                assert torch.equal(found[stored_name].float(), tensor.float())


def test_what_is_not_quantized_is_stored_as_it_was(tiny: Path, tmp_path: Path) -> None:
    architecture = architecture_of(tiny, ["nvfp4", "fp8"])
    export_student(tiny, tmp_path / "out", architecture, "compress", CARD)
    found, source = stored(tmp_path / "out"), stored(tiny)
    same = [name for name in source if found[name].dtype == source[name].dtype]
    assert any("embed" in name for name in same)
    assert all(torch.equal(found[name], source[name]) for name in same)


def test_the_model_card_tells_command_budget_and_measurements(tiny: Path, tmp_path: Path) -> None:
    export_student(tiny, tmp_path / "out", architecture_of(tiny, ["bf16"]), "compress", CARD)
    text = (tmp_path / "out" / "README.md").read_text()
    for expected in ("compress export tiny", "1 MiB", "measured_kl | 0.25", "AutoModelForCausalLM"):
        assert expected in text


@pytest.mark.parametrize("formats", [["bf16"], ["nvfp4"]])
def test_a_failed_verification_leaves_nothing(
    tiny_llama: Path,
    tmp_path: Path,
    formats: Sequence[Format],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise VerificationFailed("logits")

    architecture = architecture_of(tiny_llama, formats)
    monkeypatch.setattr("compress.export.student.verify", fail)
    with pytest.raises(VerificationFailed):
        export_student(tiny_llama, tmp_path / "out", architecture, "compress", CARD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", QUANTIZED)
def test_a_wrong_scale_is_noticed(
    wide: Path, tmp_path: Path, format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "earlier").write_text("stays")
    module, name = READ_BY.get(format, (f"compress.formats.{format}", "unpack"))
    right, wrong = getattr(import_module(module), name), f"{module}.{name}"
    monkeypatch.setattr(wrong, lambda *stored: right(*stored) * 1.01)
    with pytest.raises(VerificationFailed, match="logits"):
        export_student(wide, tmp_path / "out", architecture_of(wide, QUANTIZED), "compress", CARD)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["out", "earlier"]


def test_wrong_bytes_are_noticed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.export.verify.tensor_bytes", lambda files: 1)
    with pytest.raises(VerificationFailed, match="planned"):
        export_student(
            tiny_llama, tmp_path / "out", architecture_of(tiny_llama, ["bf16"]), "compress", CARD
        )
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_architecture_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="architecture"):
        export_student(tiny_llama, tmp_path / "out", uneven(LLAMA), "compress", CARD)


def test_damaged_exports_are_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_student(tiny_llama, out, architecture_of(tiny_llama, ["nvfp4"]), "compress", CARD)
    tensors = stored(out)
    lost = next(name for name in tensors if name.endswith("weight_scale_2"))
    del tensors[lost]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(InputError, match=lost):
        load_model(out)
    (out / "model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(InputError, match="corrupt"):
        load_model(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no safetensors"):
        load_model(out)


@pytest.mark.parametrize("formats", [["bf16"], ["fp8", "nvfp4"]])
def test_sharded_exports_are_read_whole(
    tmp_path: Path, formats: Sequence[Format], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.model.checkpoint.SHARD_BYTES", 30_000)
    config = EVERY["nemotron_h_latent"]
    architecture = with_experts(with_formats(read_architecture(config), formats), formats[-1])
    path, out = write_student(tmp_path / "student", config, architecture), tmp_path / "out"
    export_student(path, out, architecture, "vllm", CARD)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    rows = token_rows(architecture, seed=2)
    expected = fake_quantized_logits(path, architecture, rows)
    torch.testing.assert_close(load_model(out)(rows).logits, expected)


@pytest.mark.parametrize(
    ("formats", "target"),
    [(["bf16"], "transformers"), (["nvfp4"], "vllm"), (["nvfp4", "bf16"], "compress")],
)
@pytest.mark.parametrize("told", ["layers_block_type", "hybrid_override_pattern"])
def test_a_hybrid_tells_its_layers_to_every_server_and_names_no_code(
    tmp_path: Path, told: str, formats: Sequence[Format], target: Target
) -> None:
    auto_map = {"auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}}
    config = {key: HYBRID[key] for key in HYBRID if key != "architectures"} | auto_map
    if told == "hybrid_override_pattern":
        del config["layers_block_type"]
        config[told] = "ME*-M"
    path, out = write_tiny(tmp_path / "teacher", config), tmp_path / "out"
    export_student(path, out, architecture_of(path, formats), target, CARD)
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    own = written.get("base_config", written)
    assert "auto_map" not in written | own
    assert own["layers_block_type"] == HYBRID["layers_block_type"]
    assert own["hybrid_override_pattern"] == "ME*-M"
    assert written["architectures"] == own["architectures"] == ["NemotronHForCausalLM"]


def test_what_a_server_needs_besides_weights_comes_along(tiny_llama: Path, tmp_path: Path) -> None:
    path, out = Path(shutil.copytree(tiny_llama, tmp_path / "teacher")), tmp_path / "out"
    files = {
        "chat_template.jinja": "{{ messages }}",
        "other.jinja": "{{ tools }}",
        "additional_chat_templates/rag.jinja": "{{ documents }}",
        "LICENSE": "free",
        "LICENSE.txt": "as well",
        "vocab.txt": "a",
        "generation_config.json": json.dumps({"do_sample": True, "temperature": 0.25}),
    }
    (path / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8")
    (path / "modeling_llama.py").write_text("raise SystemExit", encoding="utf-8")
    export_student(path, out, architecture_of(path, ["fp8"]), "vllm", CARD)
    assert {name: (out / name).read_text(encoding="utf-8") for name in files} == files
    assert not list(out.glob("*.py"))
    for directory in (path, out):
        assert load(directory).generation_config.temperature == 0.25
