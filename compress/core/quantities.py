"""Quantities as people write them: "22GiB", "128k", "1.6B", "50%" in and out; pure text."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import TypeVar

from compress.core.errors import InputError

Quantity = TypeVar("Quantity", int, Fraction, int | Fraction)
BYTES: Mapping[str, int] = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
# A context of "128k" is 131072 tokens: its makers mean powers of two, unlike for parameters.
TOKENS: Mapping[str, int] = {"": 1, "k": 2**10, "m": 2**20}
COUNTS: Mapping[str, int] = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse(text: str, units: Mapping[str, int], what: str, examples: str) -> int:
    """A number with one of ``units``, rounded down; InputError says what is accepted."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in units or ("." in found[1] and units[found[2]] == 1):
        raise InputError(f"{what} {text!r} is not understood; write it like {examples}")
    # Fractions, because "0.3GB" must not depend on how a float rounds.
    return int(Fraction(found[1]) * units[found[2]])


def parse_bytes(text: str, what: str = "size") -> int:
    """Bytes of "22GiB", "24GB", "160MiB" or "1000000"."""
    return parse(text, BYTES, what, "22GiB, 24GB, 160MiB or a number of bytes")


def parse_tokens(text: str) -> int:
    """Tokens of context that "128k" (131072), "1M" (1048576) or "4000" are."""
    return positive(parse(text, TOKENS, "context", "128k (131072), 1M or 4000"), text, "context")


def parse_count(text: str, what: str = "count") -> int:
    """A count in powers of ten, as parameters and training tokens are given: "1.6B", "300k"."""
    return positive(parse(text, COUNTS, what, "1.6B, 135M or 300k"), text, what)


def parse_share(text: str) -> Fraction | None:
    """The fraction that "70%" is; None if the text is not a percentage."""
    if not text.strip().endswith("%"):
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if not found:
        raise InputError(f"budget {text!r} is not understood; a share is written like 70%")
    return Fraction(found[1]) / 100


def parse_budget(text: str) -> int | Fraction:
    """A budget: bytes, or the share of a teacher's that "70%" is; InputError if it is none."""
    share = parse_share(text)
    return positive(parse_bytes(text, "budget") if share is None else share, text, "budget")


def positive(value: Quantity, text: str, what: str) -> Quantity:
    """The value itself; InputError if it is 0."""
    if not value:
        raise InputError(f"{what} {text!r} has to be above 0")
    return value


def format_bytes(count: int) -> str:
    """Bytes in the largest binary unit that leaves a number of at least 1: "16.556 GiB"."""
    for unit in ("GiB", "MiB", "KiB"):
        if count >= BYTES[unit.lower()]:
            return f"{count / BYTES[unit.lower()]:,.3f} {unit}"
    return f"{count} B"


def format_count(count: int) -> str:
    """A count in powers of ten: "8.888B", "134.515M"."""
    for unit in ("B", "M", "k"):
        if count >= COUNTS[unit.lower()]:
            return f"{count / COUNTS[unit.lower()]:,.3f}{unit}"
    return str(count)


def format_tokens(count: int) -> str:
    """Tokens with k = 1024 where that is exact, else with separators: "128k", "348,041"."""
    for unit in ("m", "k"):
        if count and count % TOKENS[unit] == 0:
            return f"{count // TOKENS[unit]}{unit.upper() if unit == 'm' else unit}"
    return f"{count:,}"
