"""Texts are the same in whatever files they are; rows that are none are left out, by name."""

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from compress.core.errors import InputError
from compress.run.directory import Run
from compress.run.recipe import check
from compress.run.session import Session
from compress.run.sources import checked_files
from compress.text import sources
from compress.text.documents import read_documents
from compress.text.sources import fetch_text, require_text
from compress.text.tokenizer import load_tokenizer, render_chat

TEXTS = ["one", "two\nlines", "drei \N{LATIN SMALL LETTER A WITH DIAERESIS}"]
ROWS = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}<{{ message.role }}>{{ message.content }}{% endfor %}"
)


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def in_jsonl(path: Path) -> Path:
    (path / "data.jsonl").write_bytes(jsonl(ROWS))
    return path / "data.jsonl"


def in_gzip(path: Path) -> Path:
    (path / "data.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS)))
    return path / "data.jsonl.gz"


def in_parquet(path: Path) -> Path:
    Dataset.from_list(ROWS).to_parquet(path / "data.parquet")
    return path / "data.parquet"


def in_directory(path: Path) -> Path:
    (path / "b").mkdir()
    (path / "a.txt").write_text(TEXTS[0])
    (path / "b" / "c.md.gz").write_bytes(gzip.compress(TEXTS[1].encode()))
    (path / "b" / "d.ndjson").write_bytes(jsonl(ROWS[2:]))
    (path / "b" / "picture.png").write_bytes(b"\x89PNG")
    return path


@pytest.mark.parametrize("written", [in_jsonl, in_gzip, in_parquet, in_directory])
def test_texts_are_the_same_in_any_file(
    written: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path)
    capsys.readouterr()
    assert read_documents(data) == TEXTS
    assert capsys.readouterr().err == ""


def test_rows_that_cannot_be_used_are_counted_and_the_first_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = b'{broken\n{"txt": "a"}\n\xff\xfe\n[1]\n{"text": 4}\n'
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS) + bad)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS))[:-20])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing more")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "e.parquet.gz").write_bytes(b"")
    documents = read_documents(tmp_path)
    assert documents[:3] == TEXTS
    said = capsys.readouterr().err
    assert f"9 of {len(documents) + 9} rows cannot be used and are left out: " in said
    assert f"{tmp_path}/a.jsonl:4 is not JSON" in said
    assert "a.jsonl:5 has no text" in said
    assert "a.jsonl:6 is not UTF-8 text" in said
    assert "a.jsonl:7" not in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["c.parquet", "b.jsonl.gz", "d.txt", "e.md.gz"])
def test_a_file_of_nothing_else_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match=f"holds no documents: .*{name}") as error:
        read_documents(tmp_path / name)
    assert "\n" not in str(error.value)


def test_messages_are_rendered_by_the_chat_template(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    rows = [
        {"messages": CHAT},
        {"text": None, "messages": CHAT[:1]},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": ["hi"]},
        {"messages": "hi"},
        {"text": "text comes first", "messages": CHAT},
    ]
    (tmp_path / "chat.jsonl").write_bytes(jsonl(rows))

    def render(messages: list[Any]) -> str:
        return render_chat(tokenizer, messages)

    found = read_documents(tmp_path / "chat.jsonl", render)
    assert found == ["<user>hi<assistant>ho", "<user>hi", "text comes first"]
    said = capsys.readouterr().err
    assert "3 of 6 rows cannot be used" in said
    assert "chat.jsonl:3 has messages that the chat template does not take: no tools" in said
    Dataset.from_list(rows[:1]).to_parquet(tmp_path / "chat.parquet")
    assert read_documents(tmp_path / "chat.parquet", render) == found[:1]
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template, which rows of messages need"):
        read_documents(tmp_path / "chat.jsonl", render)


def test_a_session_renders_with_its_teacher(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chat.jsonl").write_bytes(jsonl([{"messages": CHAT}] * 40))
    settings = {"model": str(tiny_llama), "data": str(tmp_path / "chat.jsonl")}
    session = Session(Run(tmp_path / "run"), checked_files(check(settings, "test")))
    with pytest.raises(InputError, match=f"the tokenizer in {tiny_llama} has no chat template"):
        list(session.splits)
    session.tokenizer.chat_template = TEMPLATE
    assert {text for texts in session.splits.values() for text in texts} == {
        "<user>hi<assistant>ho"
    }


def test_a_hub_data_set_is_read_once_and_kept_with_the_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stream(path: str, **which: Any) -> Iterator[Mapping[str, Any]]:
        asked.append((path, which))
        for number in range(10**9):
            yield {"text": f"document {number} " * 20, "id": number}

    monkeypatch.setattr(sources, "streamed", stream)
    monkeypatch.setattr(sources, "HUB_CHARACTERS", 100_000)
    data = "hf:owner/name@v1/config:validation"
    recipe = checked_files(check({"model": str(tiny_llama), "data": data}, "test"))
    assert recipe.data == data
    session = Session(Run(tmp_path / "run"), recipe)
    assert sum(map(len, session.splits["train"])) > 50_000
    [file] = (tmp_path / "run" / "text").iterdir()
    assert file.stat().st_size < 110_000
    again = Session(Run(tmp_path / "run"), recipe)
    assert again.splits == session.splits
    assert again.identity() == session.identity()
    assert asked == [("owner/name", {"name": "config", "split": "validation", "revision": "v1"})]


def test_a_hub_data_set_that_is_not_to_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, **which: Any) -> Iterator[Mapping[str, Any]]:
        yield {"text": "one"}
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(sources, "streamed", refuse)
    with pytest.raises(InputError, match=r"hf:owner/name is not to be had: no route$"):
        fetch_text("hf:owner/name", tmp_path / "text" / "x.jsonl")
    assert not list((tmp_path / "text").iterdir())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("hf:name", "names no data set; one is hf:owner/name"),
        ("hf:a/b:", "names no data set"),
        ("no/such/directory", "does not exist; data is a file"),
    ],
)
def test_a_source_that_is_none_is_refused_before_a_run(data: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        require_text(data)


def test_a_directory_without_text_says_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "picture.png").touch()
    with pytest.raises(InputError, match=r"holds no file with text; known are \.jsonl"):
        read_documents(tmp_path)
