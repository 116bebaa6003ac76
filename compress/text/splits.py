"""Which text is trained on, scored, selected on and kept for the final figures."""

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

Split = Literal["train", "score", "select", "final"]


SPLITS: tuple[Split, ...] = get_args(Split)


# Upper ends of the splits on the unit interval that a document's hash falls into.
ENDS = (0.85, 0.90, 0.95, 1.0)


def split_documents(documents: Sequence[str]) -> dict[Split, list[str]]:
    """Documents by split, each decided by the hash of its own text: 85, 5, 5 and 5 per cent."""
    splits: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        place = int.from_bytes(digest[:6], "big") / 2**48
        splits[next(s for s, end in zip(SPLITS, ENDS, strict=True) if place < end)].append(text)
    return splits
