"""The tokenizer of a model directory."""

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compress.core.errors import InputError


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model directory; InputError if it has none or no end-of-text token."""
    if not (path / "tokenizer.json").is_file():
        raise InputError(f"{path} has no tokenizer.json; copy the tokenizer of the model into it")
    try:
        Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{path / 'tokenizer.json'} is corrupt: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer in {path} cannot be read: {error}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer in {path} has no eos_token; documents are joined with it")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer
