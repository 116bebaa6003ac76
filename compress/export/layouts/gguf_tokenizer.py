"""The tokenizer of a directory as a GGUF file has it: byte-level BPE, and a name for how it splits.

How text is split into words is llama.cpp's own code, by name (``llama-vocab.cpp``); a tokenizer
that splits otherwise would give other tokens there, and is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.errors import InputError
from compress.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
# By the steps that split: regular expressions, single digits, the words of GPT-2.
SPLITS: Mapping[tuple[str, ...], str] = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{REST}",): "qwen2",
    (rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{REST}",): "llama-bpe",
}
# Where a whole word that is a token is taken without merging.
WHOLE_WORDS = ("llama-bpe",)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def add_tokenizer(writer: "GGUFWriter", source: Path, vocab: int) -> None:
    """Give a GGUF file the tokenizer of a directory, for a model of ``vocab`` tokens.

    Raises:
        InputError: there is none, or one that llama.cpp would split text otherwise with.
    """
    tokenizer: Any = load_tokenizer(source)
    said = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_of(source, said))
    added = {each["id"]: each for each in said["added_tokens"]}
    names = {number: token for token, number in said["model"]["vocab"].items()}
    names |= {number: each["content"] for number, each in added.items()}
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(vocab)])

    def kind(number: int) -> int:
        if number in added:
            return CONTROL if added[number]["special"] else USER_DEFINED
        return NORMAL if number in names else UNUSED

    writer.add_token_types([kind(number) for number in range(vocab)])
    merges = said["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    begun = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begun and tokenizer.bos_token_id is not None)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def split_of(source: Path, said: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer splits; InputError where it has none."""
    kind, normalizer = said["model"]["type"], said.get("normalizer")
    found = SPLITS.get(steps_of(said.get("pre_tokenizer") or {}))
    plain = normalizer is None or normalizer["type"] == "NFC"
    whole = bool(said["model"].get("ignore_merges"))
    if kind != "BPE" or found is None or not plain or whole != (found in WHOLE_WORDS):
        raise InputError(
            f"the tokenizer in {source} splits text in a way that llama.cpp has no name for here; "
            f"known: {', '.join(SPLITS.values())}, of byte-level BPE"
        )
    return found


def steps_of(splitter: Mapping[str, Any]) -> tuple[str, ...]:
    """The steps of a pre-tokenizer that split; what ``SPLITS`` does not have is by its type."""
    kind = splitter.get("type", "")
    if kind == "Sequence":
        return tuple(step for each in splitter["pretokenizers"] for step in steps_of(each))
    if kind == "ByteLevel" and not splitter["add_prefix_space"]:
        return ("words",) if splitter.get("use_regex", True) else ()
    if kind == "Digits" and splitter["individual_digits"]:
        return ("digits",)
    if kind == "Split" and splitter["behavior"] == "Isolated" and not splitter["invert"]:
        return (splitter["pattern"].get("Regex", kind),)
    return (kind,)
