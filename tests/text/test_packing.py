"""Text is deterministic, its splits never mix, and every token of a row was in a document."""

import json
from pathlib import Path

import pytest
import torch

from compress.core.errors import InputError
from compress.text.documents import pieces, read_documents
from compress.text.embedded import SHORTEST, docstrings
from compress.text.packing import pack
from compress.text.splits import SPLITS, split_documents
from compress.text.tokenizer import load_tokenizer


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_of_a_file_are_its_texts(tmp_path: Path) -> None:
    texts = ["one", 'two\n"quoted"', "drei ä"]
    lines = [json.dumps({"text": text, "id": 1}) for text in texts]
    assert read_documents(written(tmp_path / "data.jsonl", *lines, "")) == texts


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], "holds no documents"),
        (["{broken"], r"jsonl:1 is not JSON"),
        (['{"txt": "a"}'], "jsonl:1 has no text"),
        (['{"text": 3}'], "jsonl:1 has no text"),
        (['{"text": null}', "3"], "jsonl:1 has no text.*; .*jsonl:2 is no row"),
        (['{"text": ["a", "list"]}'], "jsonl:1 has no text"),
        (['"text"'], "jsonl:1 is no row"),
        (['{"text": ""}', '{"text": " \\t\\n"}'], "holds no documents"),
        (["[" * 100_000], "jsonl:1 is not JSON"),
        (["\0"], "jsonl:1 is not JSON"),
    ],
)
def test_text_that_cannot_be_used_is_named_by_line(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_documents(written(tmp_path / "data.jsonl", *lines))


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_documents(tmp_path / "nothing.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="jsonl:1 is not UTF-8"):
        read_documents(tmp_path / "binary.jsonl")


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n', ["one", "two"]),
        (b'{"text": "one"}\n\xef\xbb\xbf{"text": "two"}\n\xef\xbb\xbf', ["one", "two"]),
        (b'{"text": "a \\ud800 b"}', ["a \N{REPLACEMENT CHARACTER} b"]),
        (b'{"text": "\\ude00\\ud83d"}', [2 * "\N{REPLACEMENT CHARACTER}"]),
        (b'{"text": "\\ud83d\\ude00"}', ["\N{GRINNING FACE}"]),
        (b'{"text": "a\\u0000b"}', ["a\0b"]),
        (b'{"text": ""}\n{"text": " \\n"}\n{"text": "one"}', ["one"]),
        ('{"text": "einer\u2028zwei\x85"}'.encode(), ["einer\u2028zwei\x85"]),
    ],
)
def test_text_as_people_have_it_is_read_and_can_be_used(
    tmp_path: Path, tiny_llama: Path, content: bytes, texts: list[str]
) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    documents = read_documents(tmp_path / "data.jsonl")
    assert documents == texts
    assert sum(map(len, split_documents(documents).values())) == len(texts)
    assert len(pack(documents, load_tokenizer(tiny_llama), length=1)) > len(texts)


def test_docstrings_come_from_the_top_and_code_is_not_run() -> None:
    source = (
        b'"""Module."""\nraise SystemExit\nclass A:\n  """Class."""\n  def f(self):\n    "Def."\n'
    )
    assert list(docstrings(source)) == ["Module.", "Class.", "Def."]
    assert list(docstrings(b"def broken(:")) == []


def test_the_embedded_text_is_english_of_some_size_and_always_the_same(
    embedded_text: list[str],
) -> None:
    documents = read_documents(None)
    assert documents == embedded_text
    assert 1_500_000 < sum(map(len, documents)) < 4_000_000
    assert min(map(len, documents)) >= SHORTEST
    assert any("lambda" in text for text in documents)
    splits = split_documents(documents)
    assert all(len(splits[split]) > 5 for split in splits)


def test_a_document_is_in_one_split_whatever_the_others_are() -> None:
    documents = [f"document number {number}" for number in range(4000)]
    splits = split_documents(documents)
    assert sorted(text for split in splits.values() for text in split) == sorted(documents)
    for split, share in {"train": 0.85, "score": 0.05, "select": 0.05, "final": 0.05}.items():
        assert len(splits[split]) / 4000 == pytest.approx(share, abs=0.015)
        assert split_documents(splits[split][:7])[split] == splits[split][:7]


@pytest.mark.parametrize(("count", "characters"), [(1, 400_000), (8, 90_000), (30, 20_000)])
def test_a_few_long_documents_fill_every_split_with_their_pieces(
    count: int, characters: int
) -> None:
    documents = [
        " ".join(f"{number}.{place}" for place in range(characters // 7)) for number in range(count)
    ]
    splits = split_documents(documents)
    total = sum(map(len, documents))
    assert sum(len(text) for split in SPLITS for text in splits[split]) == total
    assert all(sum(map(len, splits[split])) > total / 100 for split in SPLITS)


def test_long_documents_stay_whole_where_every_split_has_some() -> None:
    documents = [f"{number} word " * 1000 for number in range(400)]
    splits = split_documents(documents)
    assert sorted(text for split in SPLITS for text in splits[split]) == sorted(documents)


def test_packing_keeps_every_token_and_separates_documents(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    documents = [f"text {number}: " + "word " * number for number in range(40)]
    rows = pack(documents, tokenizer, length=16)
    assert rows.dtype == torch.int64
    assert rows.shape[1] == 16
    stream = rows.flatten().tolist()
    texts = tokenizer.decode(stream).split(tokenizer.eos_token)
    assert set(texts[:-1]) <= set(documents)
    assert len(texts) > 30
    assert texts[:-1] != documents[: len(texts) - 1]


def test_packing_is_a_function_of_the_seed_and_more_tokens_begin_alike(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    documents = [f"document {number}" * 3 for number in range(40)]
    some, more = (pack(documents, tokenizer, 8, tokens=count, seed=3) for count in (61, 200))
    assert some.shape == (8, 8)
    assert torch.equal(some, more[:8])
    assert torch.equal(some, pack(documents, tokenizer, 8, tokens=61, seed=3))
    assert not torch.equal(some, pack(documents, tokenizer, 8, tokens=61, seed=4))


def test_few_rows_come_from_many_documents(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    books = [chr(97 + number) * 4000 for number in range(20)]
    rows = pack(books, tokenizer, 32, tokens=32 * 32)
    decoded = {tokenizer.decode(row)[-1] for row in rows.tolist()}
    assert len(decoded) >= 5


def test_pieces_are_the_text_cut_after_white_space() -> None:
    text = "one two three " * 30 + "x" * 100
    found = list(pieces(text, 40))
    assert "".join(found) == text
    assert max(map(len, found)) <= 40
    assert all(piece[-1] == " " for piece in found[:10])


def test_too_little_text_says_how_much_there_is(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    with pytest.raises(InputError, match=r"gives 10 tokens in 2 documents, 64 are needed"):
        pack(["abcd", "efgh"], tokenizer, 32, tokens=50)
    with pytest.raises(InputError, match="gives 0 tokens"):
        pack([], tokenizer, 32)


def test_a_missing_or_broken_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    with pytest.raises(InputError, match="is corrupt"):
        load_tokenizer(tmp_path)
