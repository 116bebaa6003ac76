from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import LLAMA

from compress.core.errors import InputError
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.model.families import parameters, read_architecture
from compress.model.gguf import convert

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}


def in_gguf(name: str) -> str:
    """GGUF's name of a llama tensor."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Query and key rows in the order of llama.cpp: rotary pairs side by side."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def write_gguf(file: Path, checkpoint: Path) -> None:
    """The tiny llama as llama.cpp would store it, its weights in Q8_0 where they can be."""
    source = open_checkpoint(checkpoint)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LLAMA["num_hidden_layers"])
    writer.add_context_length(LLAMA["max_position_embeddings"])
    writer.add_embedding_length(LLAMA["hidden_size"])
    writer.add_feed_forward_length(LLAMA["intermediate_size"])
    writer.add_head_count(LLAMA["num_attention_heads"])
    writer.add_head_count_kv(LLAMA["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(LLAMA["rms_norm_eps"])
    writer.add_rope_dimension_count(LLAMA["head_dim"])
    writer.add_vocab_size(LLAMA["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", *(f"t{n}" for n in range(3, LLAMA["vocab_size"]))])
    writer.add_token_types([gguf.TokenType.NORMAL] * LLAMA["vocab_size"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for parameter in parameters(source.architecture):
        weight = source[parameter.name].float().numpy()
        if "q_proj" in parameter.name:
            weight = interleaved(weight, LLAMA["num_attention_heads"])
        if "k_proj" in parameter.name:
            weight = interleaved(weight, LLAMA["num_key_value_heads"])
        if weight.ndim == 2 and weight.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(in_gguf(parameter.name), gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(in_gguf(parameter.name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_becomes_a_plain_bf16_checkpoint(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    capsys.readouterr()
    convert(tmp_path / "tiny.gguf", tmp_path / "model")
    # No bars of transformers' own.
    assert capsys.readouterr() == ("", "")
    made, source = open_checkpoint(tmp_path / "model"), open_checkpoint(tiny_llama)
    assert made.architecture == source.architecture == read_architecture(made.config)
    assert made.config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in made.config
    for parameter in parameters(source.architecture):
        tensor = made[parameter.name]
        assert tensor.dtype == torch.bfloat16
        # Q8_0 rounds to 1/254 of the largest of 32, BF16 to 1/256 of itself.
        scale = source[parameter.name].float().abs().max()
        assert (tensor.float() - source[parameter.name].float()).abs().max() < scale / 64
    assert (tmp_path / "model/tokenizer.json").is_file()
    assert (tmp_path / "model/generation_config.json").is_file()
    tokens = torch.arange(16)[None]
    logits, expected = (
        load_model(path)(tokens).logits for path in (tmp_path / "model", tiny_llama)
    )
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert divergence / tokens.numel() < 0.01


def test_reading_gguf_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.model.gguf.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"install -e \"\.\[gguf\]\""):
        convert(tmp_path / "x.gguf", tmp_path / "model")
