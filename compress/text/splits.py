"""Which text is trained on, scored, selected on and kept for the final figures."""

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

from compress.text.documents import pieces

Split = Literal["train", "score", "select", "final"]
SPLITS: tuple[Split, ...] = get_args(Split)
# Upper ends of the splits on the unit interval that a document's hash falls into.
ENDS = (0.85, 0.90, 0.95, 1.0)
# A split with less of the text than this is too small: it should have at least 5 per cent.
SMALLEST_SHARE = 0.01
PIECE_CHARACTERS = 1000


def split_documents(documents: Sequence[str]) -> dict[Split, list[str]]:
    """Documents by split, each decided by the hash of its own text: 85, 5, 5 and 5 per cent.

    Where that leaves a split with next to nothing (eight books are eight draws), long documents
    are cut into pieces of ``PIECE_CHARACTERS``, and each piece is a document.
    """
    whole = by_hash(documents)
    least = SMALLEST_SHARE * sum(map(len, documents))
    if all(sum(map(len, texts)) >= least for texts in whole.values()):
        return whole
    return by_hash([piece for text in documents for piece in pieces(text, PIECE_CHARACTERS)])


def by_hash(documents: Sequence[str]) -> dict[Split, list[str]]:
    """Documents by split, as their hashes say."""
    splits: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        place = int.from_bytes(digest[:6], "big") / 2**48
        splits[next(s for s, end in zip(SPLITS, ENDS, strict=True) if place < end)].append(text)
    return splits
