"""A tokenizer is its tokenizer.json: no class of a checkpoint, no other reading of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedTokenizerFast

from compress.core.errors import InputError
from compress.run.directory import Run
from compress.run.evaluate import require_same_tokens
from compress.run.recipe import Recipe
from compress.run.session import Session
from compress.text.packing import pack
from compress.text.tokenizer import load_tokenizer

TEXT = "keep  what is,\nin a budget <|extra|>"


def with_config(directory: Path, source: Path, **settings: Any) -> Path:
    """A copy of a model directory with another tokenizer_config.json."""
    shutil.copytree(source, directory)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "X"])
def test_ids_are_those_of_the_file_whatever_class_is_named(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    path = with_config(tmp_path / "m", tiny_llama, tokenizer_class=name, eos_token="<|end|>")
    plain = Tokenizer(models.BPE(vocab={"<|end|>": 0, **alphabet()}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(["<|end|>"])
    plain.save(str(path / "tokenizer.json"))
    loaded = load_tokenizer(path)
    assert loaded.encode(TEXT, add_special_tokens=False) == plain.encode(TEXT).ids
    assert loaded.decode(loaded.encode(TEXT)) == TEXT


def alphabet() -> dict[str, int]:
    return {letter: 1 + n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def test_code_of_a_checkpoint_is_neither_asked_for_nor_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"AutoTokenizer": ["tok_x.X", "tok_x.X"], "AutoConfig": "tok_x.X"}
    settings: dict[str, Any] = dict(tokenizer_class="X", auto_map=code, eos_token="<|end|>")
    path = with_config(tmp_path / "m", tiny_llama, **settings)
    (path / "tok_x.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\nclass X: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert load_tokenizer(path).encode("is") == load_tokenizer(tiny_llama).encode("is")
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    ("eos", "found"), [(0, "<|end|>"), ([3, 0], "!"), (None, None), (98, None)]
)
def test_config_names_the_end_where_the_tokenizer_does_not(
    eos: Any, found: str | None, tiny_llama: Path, tmp_path: Path
) -> None:
    path = with_config(tmp_path / "m", tiny_llama)
    config = json.loads((path / "config.json").read_text()) | {"eos_token_id": eos}
    (path / "config.json").write_text(json.dumps(config))
    if found:
        assert load_tokenizer(path).eos_token == found
    else:
        with pytest.raises(InputError, match="has no eos_token"):
            load_tokenizer(path)


def test_a_token_without_an_embedding_is_named(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.add_tokens(["<|extra|>"])
    text = [TEXT] * 20
    beyond = len(tokenizer) - 1
    with pytest.raises(InputError, match=f"token id {beyond} of the tokenizer is beyond vocab_si"):
        pack(text, tokenizer, 32, 64, vocab=beyond)
    assert pack(text, tokenizer, 32, 64, vocab=beyond + 1).max() == beyond


def test_models_of_another_tokenizer_are_not_compared(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe(model=str(tiny_llama), data=str(text_file), final_tokens=64, sequence_length=32)
    teacher = Session(Run(tmp_path), recipe)
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    session = Session(Run(tmp_path), recipe.changed(model=str(other)))
    require_same_tokens(teacher, session)
    file = other / "tokenizer.json"
    # The same to the text, though not the same file.
    file.write_text(json.dumps(json.loads(file.read_text())))
    require_same_tokens(teacher, session)
    changed = Tokenizer.from_file(str(file))
    vocabulary = changed.get_vocab()
    swapped = vocabulary | {"a": vocabulary["e"], "e": vocabulary["a"]}
    assert len(swapped) == len(vocabulary)
    changed.model = models.BPE(vocab=swapped, merges=[], unk_token="<unk>")
    changed.save(str(file))
    fresh = Session(Run(tmp_path), recipe.changed(model=str(other)))
    with pytest.raises(InputError, match="reads the text otherwise"):
        require_same_tokens(teacher, fresh)


def test_what_is_loaded_is_a_fast_tokenizer_with_its_own_normalizer(
    tiny_llama: Path, tmp_path: Path
) -> None:
    path = with_config(tmp_path / "m", tiny_llama, eos_token="<|end|>", do_lower_case=False)
    changed = Tokenizer.from_file(str(path / "tokenizer.json"))
    changed.normalizer = Lowercase()
    changed.save(str(path / "tokenizer.json"))
    loaded = load_tokenizer(path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.encode("IS") == loaded.encode("is")
