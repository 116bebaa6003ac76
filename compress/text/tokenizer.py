"""The tokenizer of a model directory."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from compress.core.errors import InputError
from compress.core.files import read_json
from compress.model.families.wrapper import text_config

# What tokenizers were kept in before there was a tokenizer.json.
OLDER = ("tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model directory; InputError if it has none or no end-of-text token.

    ``tokenizer.json`` says all of it. The class that tokenizer_config.json names is not asked: it
    may be code of the checkpoint, or build another tokenizer (LlamaTokenizerFast loses the spaces
    of a ByteLevel one before transformers 5.22).
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{path} has no tokenizer.json; {what_to_do(path)}")
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{file} is corrupt: {error}") from error
    fast: Any = PreTrainedTokenizerFast
    try:
        tokenizer = fast.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the tokenizer in {path} cannot be read: {reason}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = end_of_text(path, tokenizer)
    return tokenizer


def render_chat(tokenizer: PreTrainedTokenizerFast, messages: list[Any]) -> str:
    """Messages as the chat template writes them.

    ValueError on messages that it does not take, InputError where the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer in {tokenizer.name_or_path} has no chat template, which rows of "
            "messages need; give rows of text, or a chat_template.jinja beside the tokenizer"
        )
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("a message has a role and a content")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def what_to_do(path: Path) -> str:
    """Where a tokenizer.json may come from."""
    others = [name for name in OLDER if (path / name).is_file()]
    if not others:
        return "copy the tokenizer of the model into it"
    return (
        f"AutoTokenizer.from_pretrained reads its {others[0]} (with the package sentencepiece) and "
        "save_pretrained writes one"
    )


def end_of_text(path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """The token that config.json ends texts with, where tokenizer_config.json names none."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    named = text_config(config).get("eos_token_id")
    token = named[0] if isinstance(named, list) and named else named
    if type(token) is not int or not 0 <= token < len(tokenizer):
        raise InputError(f"the tokenizer in {path} has no eos_token; documents are joined with it")
    return str(tokenizer.convert_ids_to_tokens(token))
