"""GGUF: what its package reads is what was measured, bit for bit, or a refusal says why."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import CARD, with_words
from quantized import uneven, with_formats, write_student
from tiny_models import LLAMA, tiny_config, write_tiny

from compress.core.errors import InputError
from compress.export.layouts import gguf
from compress.export.layouts.ggml import TYPES
from compress.export.layouts.gguf_tokenizer import split_of
from compress.export.student import export_student
from compress.export.targets import restricted
from compress.formats.table import FORMATS, Format
from compress.model.architecture import Ffn
from compress.model.checkpoint import open_checkpoint
from compress.searches.space import load_space
from compress.student.rounding import Inputs, round_group

package = pytest.importorskip("gguf")

WIDE = LLAMA | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
QWEN2 = tiny_config("qwen2", "Qwen2", "head_dim", hidden_size=64)
QWEN3 = tiny_config("qwen3", "Qwen3", head_dim=32)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_words(write_tiny(tmp_path_factory.mktemp("gguf") / "model", WIDE))


@pytest.mark.parametrize("formats", [*([name] for name in TYPES), list(TYPES)])
def test_an_even_llama_is_what_was_meant(
    wide: Path, tmp_path: Path, formats: Sequence[Format]
) -> None:
    architecture = with_formats(open_checkpoint(wide).architecture, formats)
    facts = export_student(wide, tmp_path / "out", architecture, "llama.cpp", CARD)
    assert facts["logit_difference"] <= 1e-5
    read = package.GGUFReader(tmp_path / "out" / gguf.FILE)
    assert read.get_field("general.architecture").contents() == "llama"
    assert read.get_field("llama.attention.head_count").contents() == 4
    assert read.get_field("tokenizer.ggml.pre").contents() == "gpt-2"
    assert read.get_field("tokenizer.ggml.tokens").contents()[-1] == "ab"
    assert read.get_field("tokenizer.ggml.merges").contents() == ["a b"]
    types = {tensor.tensor_type.name for tensor in read.tensors}
    assert types == {"F32", "BF16", *(TYPES[format].name for format in formats)}


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_other_families_have_their_own_architecture(
    tmp_path: Path, config: dict[str, object]
) -> None:
    plain = {k: v for k, v in config.items() if k not in ("layer_types", "sliding_window")}
    path = with_words(write_tiny(tmp_path / "model", plain))
    architecture = with_formats(open_checkpoint(path).architecture, ["q8_0"])
    facts = export_student(path, tmp_path / "out", architecture, "llama.cpp", CARD)
    assert facts["logit_difference"] <= 1e-5
    read = package.GGUFReader(tmp_path / "out" / gguf.FILE)
    assert read.get_field("general.architecture").contents() == config["model_type"]


def test_layers_that_differ_are_a_deci_with_their_sizes(tmp_path: Path) -> None:
    architecture = uneven(LLAMA)
    path = with_words(write_student(tmp_path / "student", LLAMA, architecture))
    facts = export_student(path, tmp_path / "out", architecture, "llama.cpp", CARD)
    assert facts["logit_difference"] <= 1e-5
    read = package.GGUFReader(tmp_path / "out" / gguf.FILE)
    # Of six halves of layers the second and third are gone: an FFN of zeros, and no heads.
    ffn = [
        sum(b.ffn for b in architecture.blocks if isinstance(b, Ffn) and b.layer == n)
        for n in range(3)
    ]
    assert ffn[0] == 0
    assert read.get_field("deci.feed_forward_length").contents() == [gguf.NONE, *ffn[1:]]
    assert read.get_field("deci.attention.head_count").contents()[1] == 0
    held = {tensor.name: tensor for tensor in read.tensors}
    assert not held["blk.0.ffn_down.weight"].data.any()
    assert "blk.1.attn_q.weight" not in held


@pytest.mark.parametrize("format", [name for name in TYPES if name != "bf16"])
def test_values_are_those_of_the_format_bit_for_bit(format: Format) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 128, generator=generator)
    [rounded] = round_group([weight], format, [Inputs(lambda: torch.eye(128), 128)])
    kind = TYPES[format]
    packed = kind.packed(*rounded.stored).numpy()
    found = package.quants.dequantize(packed, package.GGMLQuantizationType[kind.name])
    if format == "nvfp4":
        # Times the tensor scale llama.cpp multiplies products, not weights.
        found = found * rounded.stored[2].numpy()
        np.testing.assert_allclose(found, rounded.values.numpy(), rtol=2e-7)
    else:
        np.testing.assert_array_equal(found, rounded.values.numpy())


@pytest.mark.parametrize("format", ["q8_0", "q4_0"])
def test_nearest_is_the_packages_own_quantizer(format: Format) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(4))
    kind = package.GGMLQuantizationType[TYPES[format].name]
    theirs = package.quants.quantize(weight.numpy(), kind)
    ours = TYPES[format].packed(*FORMATS[format].numerics.pack(weight)).numpy()
    # It rounds codes by the scale before that is FP16.
    assert (ours != theirs).mean() < 0.01
    one, other = (package.quants.dequantize(each, kind) for each in (ours, theirs))
    assert np.abs(one - other).max() <= np.abs(weight.numpy()).max() / 7


def test_what_a_gguf_cannot_hold_is_refused_with_the_reason(wide: Path, tmp_path: Path) -> None:
    plain = open_checkpoint(wide).architecture
    for format in ("fp8", "int4"):
        with pytest.raises(InputError, match=rf"bf16, q8_0, q4_0, mxfp4.*{format}"):
            export_student(wide, tmp_path / "no", with_formats(plain, [format]), "llama.cpp", CARD)
    own = with_formats(uneven(LLAMA), ["nvfp4"])
    path = with_words(write_student(tmp_path / "student", LLAMA, own))
    with pytest.raises(InputError, match="nvfp4"):
        export_student(path, tmp_path / "no", own, "llama.cpp", CARD)
    assert not (tmp_path / "no").exists()


def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model", LLAMA)
    architecture = open_checkpoint(path).architecture
    with pytest.raises(InputError, match=r"splits text in a way that llama\.cpp has no name for"):
        export_student(path, tmp_path / "no", architecture, "llama.cpp", CARD)
    assert not (tmp_path / "no").exists()


def test_the_names_of_splits_are_told_by_their_steps(tmp_path: Path) -> None:
    words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    said = {
        "model": {"type": "BPE"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, words]},
    }
    assert split_of(tmp_path, said) == "smollm"
    with pytest.raises(InputError):
        split_of(tmp_path, said | {"normalizer": {"type": "Lowercase"}})


def test_a_search_for_llama_cpp_has_its_formats_only() -> None:
    space = restricted(load_space("gguf"), "llama.cpp", "llama", tied=True)
    assert space.formats == ("bf16", "q8_0", "q4_0")
    assert space.axes["ffn"].scope == "block"
    with pytest.raises(InputError, match="lists fp8"):
        restricted(load_space("joint"), "llama.cpp", "llama", tied=True)
    with pytest.raises(InputError, match="loads llama, mistral, qwen2, qwen3, and this is gemma3"):
        restricted(load_space("gguf"), "llama.cpp", "gemma3_text", tied=True)
