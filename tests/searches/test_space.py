"""Spaces: a wrong file or name is one line."""

from pathlib import Path

import pytest

from compress.core.errors import InputError
from compress.searches.space import load_space


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("remove: none\naxes: {}\nformats: [bf16]\nkv_formats: [bf16]\nextra: 1", "extra"),
        ("remove: some\naxes: {}\nformats: [bf16]\nkv_formats: [bf16]", "remove"),
        ("remove: none\naxes: {}\nformats: [int3]\nkv_formats: [bf16]", "formats"),
        ("remove: none\naxes: {fnn: {scope: block, keep: [0.5]}}\n"
         "formats: [bf16]\nkv_formats: [bf16]", "unknown axis 'fnn'; known: .*ffn"),
        ("remove: none\naxes: {hidden: {scope: block, keep: [0.5]}}\n"
         "formats: [bf16]\nkv_formats: [bf16]", "hidden is one for all blocks"),
        ("remove: none\naxes: {ffn: {scope: block, keep: [1.5]}}\n"
         "formats: [bf16]\nkv_formats: [bf16]", "between 0 and 1"),
        ("remove: none\naxes: {}\nformats: []\nkv_formats: [bf16]", "formats"),
        ("remove: none\naxes: {}\nformats: [bf16]\nkv_formats: []", "kv_formats"),
        ("remove: [", "not YAML"),
        ("", "space.yaml"),
    ],
)  # fmt: skip
def test_a_wrong_space_is_refused_in_words(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_space(str(file))


def test_an_unknown_space_lists_those_that_exist() -> None:
    with pytest.raises(InputError, match="formats, joint, minipuzzle, minitron, puzzle"):
        load_space("jiont")
