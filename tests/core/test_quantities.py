from collections.abc import Callable
from fractions import Fraction

import pytest

from compress.core.errors import InputError
from compress.core.quantities import (
    format_bytes,
    format_count,
    format_tokens,
    parse_budget,
    parse_bytes,
    parse_count,
    parse_share,
    parse_tokens,
)


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("22GiB", 22 * 2**30),
        ("24GB", 24 * 10**9),
        ("160MiB", 160 * 2**20),
        ("160 mib", 160 * 2**20),
        ("22.06GiB", 23686744637),
        ("0.3GB", 300_000_000),
        ("4096", 4096),
        ("4096B", 4096),
    ],
)
def test_bytes(text: str, bytes: int) -> None:
    assert parse_bytes(text) == bytes


def test_a_context_counts_in_powers_of_two_and_parameters_in_powers_of_ten() -> None:
    assert parse_tokens("128k") == 131072
    assert parse_tokens("1M") == 2**20
    assert parse_tokens("4000") == 4000
    assert parse_count("128k") == 128_000
    assert parse_count("1.6B") == 1_600_000_000


def test_a_share_is_exact() -> None:
    assert parse_share("70%") == Fraction(7, 10)
    assert parse_share("12.5 %") == Fraction(1, 8)
    assert parse_share("22GiB") is None


@pytest.mark.parametrize("text", ["", "GiB", "22 GiBB", "-3GiB", "1e9", "22,5GB", "1.5", "70%"])
def test_a_wrong_size_says_what_is_accepted(text: str) -> None:
    with pytest.raises(InputError, match="22GiB, 24GB, 160MiB"):
        parse_bytes(text, "budget")


@pytest.mark.parametrize("text", ["%", "x%", "-5%"])
def test_a_wrong_share_says_what_is_accepted(text: str) -> None:
    with pytest.raises(InputError, match="70%"):
        parse_share(text)


@pytest.mark.parametrize("text", ["0", "0B", "0GiB", "0.0 MB", "0%", "0.00%"])
def test_a_budget_of_nothing_is_none(text: str) -> None:
    with pytest.raises(InputError, match="has to be above 0"):
        parse_budget(text)


def test_a_budget_is_bytes_or_a_share() -> None:
    assert parse_budget("1KiB") == 1024
    assert parse_budget("70%") == Fraction(7, 10)


@pytest.mark.parametrize("parsed", [parse_tokens, parse_count])
def test_a_count_of_nothing_is_none(parsed: Callable[[str], int]) -> None:
    with pytest.raises(InputError, match="has to be above 0"):
        parsed("0k")


def test_numbers_are_written_as_they_are_read() -> None:
    assert format_bytes(17776454656) == "16.556 GiB"
    assert format_bytes(12) == "12 B"
    assert format_count(8888227328) == "8.888B"
    assert format_tokens(131072) == "128k"
    assert format_tokens(348041) == "348,041"
    assert parse_tokens(format_tokens(2**20)) == 2**20
