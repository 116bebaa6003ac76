"""Models of the hub, by a function that does what the hub's does: snapshots of links to blobs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from packers import CASES, write_quantized
from safetensors.torch import load_file, save_file

from compress.api import plan
from compress.core.errors import InputError
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.model.config import read_config
from compress.model.find import resolve_model
from compress.run.directory import Run
from compress.run.recipe import check
from compress.run.session import Session
from compress.run.sources import checked_files

COMMITS = {"main": "a" * 40, "v1": "b" * 40, None: "a" * 40}
TOKENS = torch.arange(24).view(2, 12)


class Hub:
    """Repositories, and what was fetched of them; ``cache`` is as the hub's library keeps it."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.repositories, self.asked = cache, dict[str, Path](), list[str]()

    def download(
        self,
        name: str,
        revision: str | None = None,
        allow_patterns: Any = None,
        ignore_patterns: Any = None,
    ) -> str:
        commit = revision if revision in COMMITS.values() else COMMITS[revision]
        folder = self.cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / str(commit)
        files = [f for f in self.repositories[name].rglob("*") if f.is_file()]
        names = [f.relative_to(self.repositories[name]).as_posix() for f in files]
        chosen = filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for file in chosen:
            self.asked.append(file)
            blob, link = folder / "blobs" / file.replace("/", "-"), snapshot / file
            for each in (blob, link):
                each.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repositories[name] / file, blob)
            if not link.is_symlink():
                link.symlink_to(blob)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    return hub


def sharded(source: Path, to: Path) -> Path:
    """The same checkpoint in two files with an index, beside what else repositories hold."""
    shutil.copytree(source, to)
    tensors = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, to / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    (to / "original").mkdir()
    for twin in ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"):
        (to / twin).write_bytes(b"nothing that is read")
    (to / "chat_template.jinja").write_text("{{ messages }}")
    return to


def test_a_plan_fetches_config_and_index_alone(hub: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    hub.repositories["owner/name"] = sharded(tiny_llama, tmp_path / "repo")
    made = plan("owner/name@v1", context="64")
    assert made == plan(str(tiny_llama), context="64")
    assert sorted(set(hub.asked)) == ["config.json", "model.safetensors.index.json"]
    assert resolve_model("owner/name@v1", config_only=True).name == COMMITS["v1"]


def test_a_search_fetches_the_rest_of_the_revision(
    hub: Hub, tiny_llama: Path, tmp_path: Path
) -> None:
    hub.repositories["owner/name"] = sharded(tiny_llama, tmp_path / "repo")
    recipe = checked_files(check({"model": "owner/name@v1"}, "test"))
    assert (recipe.model, recipe.revision) == ("owner/name", COMMITS["v1"])
    assert not [file for file in hub.asked if file.endswith(".safetensors")]
    session = Session(Run(tmp_path / "run"), recipe)
    assert session.path.name == COMMITS["v1"]
    assert (session.path / "model-00001-of-00002.safetensors").is_symlink()
    assert not {"consolidated.safetensors", "original/model.safetensors"} & set(hub.asked)
    assert "pytorch_model.bin" not in hub.asked
    assert "chat_template.jinja" in hub.asked
    assert set(session.files) > {"config.json", "tokenizer.json"}
    assert torch.equal(
        load_model(session.path)(TOKENS).logits, load_model(tiny_llama)(TOKENS).logits
    )


def test_a_quantized_model_has_the_bytes_of_its_index(hub: Hub, tmp_path: Path) -> None:
    write_quantized(tmp_path / "q", *CASES["FP8 by fp8"])
    hub.repositories["owner/q"] = sharded(tmp_path / "q", tmp_path / "repo")
    stored = plan("owner/q", context="64")["stored"]
    index = json.loads((tmp_path / "repo" / "model.safetensors.index.json").read_text())
    assert stored["formats"] == "fp8"
    assert stored["weights"] == index["metadata"]["total_size"]
    assert "model-00001-of-00002.safetensors" not in hub.asked


@pytest.mark.parametrize(
    ("own", "refused"),
    [
        (lambda name: name, False),
        (lambda name: name.replace("proj.weight", "proj.qweight"), True),
        (lambda name: name.replace("proj.weight", "proj.weight.absmax"), True),
    ],
)
def test_what_a_search_would_not_read_is_refused_by_its_index(
    own: Callable[[str], str], refused: bool, hub: Hub, tiny_llama: Path, tmp_path: Path
) -> None:
    repository = hub.repositories["owner/name"] = sharded(tiny_llama, tmp_path / "repo")
    config = read_config(repository) | {"quantization_config": {"quant_method": "gptq"}}
    (repository / "config.json").write_text(json.dumps(config))
    file = repository / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    both = {**index["weight_map"]} if "absmax" in own("proj.weight") else {}
    index["weight_map"] = both | {own(name): f for name, f in index["weight_map"].items()}
    file.write_text(json.dumps(index))
    if not refused:
        plan("owner/name", context="64")
        return
    with pytest.raises(InputError, match=r"quantized \(gptq\); take the one in BF16: known here"):
        plan("owner/name", context="64")


def test_shards_without_an_index_are_all_read(tiny_llama: Path, tmp_path: Path) -> None:
    path = sharded(tiny_llama, tmp_path / "m")
    (path / "model.safetensors.index.json").unlink()
    (path / "consolidated.safetensors").unlink()
    assert torch.equal(load_model(path)(TOKENS).logits, load_model(tiny_llama)(TOKENS).logits)


def lost_blob(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(path / "blobs" / "gone")


def only(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / "model.safetensors").rename(path / name)

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lost_blob, "model.safetensors does not exist; get it, or the whole model anew"),
        (only("pytorch_model.bin"), "pytorch_model.bin is pickled code, which is never run here"),
        (only("consolidated.00.pth"), "consolidated.00.pth is pickled code"),
        (only("model.gguf"), "take the model that its GGUF file was made of"),
        (only("weights"), "holds no safetensors file"),
    ],
)
def test_weights_that_are_not_there_are_one_line_before_a_run(
    damage: Callable[[Path], None], said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    shutil.copytree(tiny_llama, path)
    damage(path)
    for door in (open_checkpoint, lambda path: checked_files(check({"model": str(path)}, "test"))):
        with pytest.raises(InputError) as error:
            door(path)
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def test_the_cache_folder_of_a_model_says_where_its_snapshot_is(hub: Hub, tiny_llama: Path) -> None:
    hub.repositories["owner/name"] = tiny_llama
    snapshot = resolve_model("owner/name")
    with pytest.raises(InputError, match=f"take {snapshot}"):
        read_config(snapshot.parents[1])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.GatedRepoError, "is gated: accept its terms at https://huggingface.co/owner/name"),
        (errors.RevisionNotFoundError, "has no revision 'v9' on the hub"),
        (errors.RepositoryNotFoundError, "not on the hub; log in with: hf auth login"),
        (errors.OfflineModeIsEnabled, "not to be had: what the library says"),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(
    error: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        refused = error.__new__(error)
        refused.args = ("what the library says\nand more",)
        raise refused

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(InputError) as found:
        resolve_model("owner/name@v9")
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_two_revisions_of_one_model_are_refused() -> None:
    assert check({"model": "a/b@v1", "revision": "v1"}, "test").revision == "v1"
    with pytest.raises(InputError, match="a/b@v1 and revision v2 differ"):
        check({"model": "a/b@v1", "revision": "v2"}, "test")
