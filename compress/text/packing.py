"""Text to packed rows of tokens. Without a file, the text is the one that every Python carries."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from compress.core.errors import InputError
from compress.text.documents import pieces

# Characters of a piece per token of a row: English has 4 to 5 a token, so a piece is about a row.
PIECE_CHARACTERS = 6


def pack(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    tokens: int | None = None,
    seed: int = 0,
    what: str = "the text",
    vocab: int | None = None,
) -> Tensor:
    """Rows of ``length`` tokens, int64: documents shuffled, each followed by EOS, cut into rows.

    With ``tokens``, the first rows that hold at least so many, of pieces of documents that are
    little longer than a row: a few thousand tokens then come from as many documents as they can,
    not from one book. Otherwise every whole row. ``what`` names the text in the error.

    Raises:
        InputError: there are fewer tokens than that, or tokens from ``vocab`` on.
    """
    rows = None if tokens is None else -(-tokens // length)
    texts = list(documents)
    if rows is not None:
        texts = [p for text in documents for p in pieces(text, PIECE_CHARACTERS * length)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    needed = length if rows is None else rows * length
    stream: list[int] = []
    for index in order.tolist():
        if rows is not None and len(stream) >= needed:
            break
        stream += tokenizer.encode(texts[index], add_special_tokens=False, verbose=False)
        stream.append(tokenizer.eos_token_id)
    if len(stream) < needed:
        raise InputError(
            f"{what} gives {len(stream)} tokens in {len(documents)} documents, "
            f"{needed} are needed; give more text, in more rows, or ask for fewer tokens"
        )
    rows = len(stream) // length if rows is None else rows
    if vocab is not None:
        require_tokens(stream, vocab)
    return torch.tensor(stream[: rows * length]).view(rows, length)


def require_tokens(ids: Sequence[int], vocab: int) -> None:
    """InputError where a token id of a text has no embedding."""
    if beyond := [id for id in ids if id >= vocab]:
        raise InputError(
            f"token id {min(beyond)} of the tokenizer is beyond vocab_size {vocab}, and the text "
            "has it; take it out of the text or of tokenizer.json"
        )
