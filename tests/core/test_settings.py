"""One strict reader for run recipes, search spaces and recipes of teachers."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from compress.core.errors import InputError
from compress.core.settings import read_settings
from compress.run.recipe import Recipe
from compress.searches.space import Space, shipped_spaces
from compress.train.recipes import PretrainRecipe

KINDS = {
    "recipe": (Recipe, "trials: 3"),
    "space": (Space, "remove: block\naxes: {ffn: {scope: block, keep: [0.5]}}\n"
              "formats: [bf16]\nkv_formats: [bf16]"),
    "teacher": (PretrainRecipe, "tokenizer: {vocab_size: 300}\nmodel: {}\nsteps: 1\nbatch: 1\n"
                "length: 8\nlearning_rate: 0.1\nwarmup: 0\ndecay: 0\nweight_decay: 0"),
}  # fmt: skip
WRONG = {
    "recipe": [("trails: 3", "unknown key 'trails'; did you mean trials?"),
               ("trials: many", "trials is 'many'"), ("seed: -1", "seed is -1: Input should be")],
    "space": [("repairs: true", "unknown key 'repairs'; did you mean repair?"),
              ("remove: all", "remove is 'all': Input should be 'none', 'layer' or 'block'"),
              ("axes: {ffn: {scope: block, kep: [0.5]}}", "'axes.ffn.kep'; did you mean keep?")],
    "teacher": [("step: 3", "unknown key 'step'; did you mean steps?"),
                ("steps: 0", "steps is 0"), ("batch: null", "batch is None")],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "f.yaml cannot be read: No such file"),
        (b"a: [", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- a list", "f.yaml holds no keys; a"),
        (b"words", "f.yaml holds no keys; a"),
        (b"1: 2", "f.yaml"),
    ],
)
def test_what_is_no_file_of_settings_is_one_line(
    kind: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "f.yaml").write_bytes(content)
    refused(tmp_path / "f.yaml", kind, said)


@pytest.mark.parametrize(
    ("kind", "line", "said"), [(kind, *case) for kind in WRONG for case in WRONG[kind]]
)
def test_a_wrong_key_or_value_is_named_with_what_would_work(
    kind: str, line: str, said: str, tmp_path: Path
) -> None:
    _, right = KINDS[kind]
    key = line.partition(":")[0]
    rest = [one for one in right.splitlines() if one.partition(":")[0] != key]
    (tmp_path / "f.yaml").write_text("\n".join([*rest, line]))
    refused(tmp_path / "f.yaml", kind, said)


def refused(file: Path, kind: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        read_settings(file, KINDS[kind][0], kind)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_right_files_are_read_whatever_their_beginning(
    kind: str, encoding: str, tmp_path: Path
) -> None:
    model, text = KINDS[kind]
    (tmp_path / "f.yaml").write_text(f"# größer\n{text}", encoding=encoding)
    assert isinstance(read_settings(tmp_path / "f.yaml", model, kind), BaseModel)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    text = shipped_spaces()["joint"].read_text(encoding="utf-8")
    kept = [line for line in text.splitlines() if not line.startswith("remove:")]
    (tmp_path / "f.yaml").write_text("\n".join(kept))
    refused(tmp_path / "f.yaml", "space", "f.yaml: remove is missing")
