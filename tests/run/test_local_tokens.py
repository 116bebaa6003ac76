"""``--local-tokens``: blocks first, alone or before the whole; a kill costs a layer."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.core.errors import InputError
from compress.core.files import read_json
from compress.model.checkpoint import open_checkpoint
from compress.run import local
from runs import command, rows_of

LOCAL = ("--local-tokens", 512, "--distill-tokens")


class Interrupted(Exception):
    """Stands for a kill."""


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(run / "distill" / name / "student").items())


def cut_one(run: Path) -> str:
    """The candidate of the run that lost units of most blocks."""
    names: list[str] = [row["id"] for row in rows_of(run)]
    keeps = {name: load_file(run / "candidates" / name / "keep.safetensors") for name in names}
    return max(names, key=lambda name: len({key.partition("/")[0] for key in keeps[name]}))


def test_blocks_alone_then_the_whole(alone_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = cut_one(alone_copy)
    run = f"{alone_copy}:{name}"
    command("distill", run, *LOCAL, 0)
    assert "blocks are closer to their teacher's" in capsys.readouterr().err
    blocks = read_json(alone_copy / "distill" / name / "local" / "blocks.json")
    assert any(row["after"] < row["before"] for row in blocks)
    alone = weights(alone_copy, name)
    blocks_alone = load_file(alone_copy / "distill" / name / "local/student/model.safetensors")
    cut = load_file(alone_copy / "candidates" / name / "model.safetensors")
    changed = {key for key in cut if not torch.equal(cut[key], blocks_alone[key])}
    assert changed
    assert not any("embed" in key or "lm_head" in key for key in changed)
    made = (alone_copy / "distill" / name / "local" / "student" / "config.json").stat().st_mtime_ns
    command("distill", run, *LOCAL, 256)
    # The whole begins with the blocks that are there.
    again = (alone_copy / "distill" / name / "local" / "student" / "config.json").stat().st_mtime_ns
    assert again == made
    assert not all(torch.equal(alone[key], t) for key, t in weights(alone_copy, name).items())
    assert not (alone_copy / "states").exists()
    command("distill", run, "--local-tokens", 1024, "--distill-tokens", 0)
    assert not all(torch.equal(alone[key], t) for key, t in weights(alone_copy, name).items())
    more = weights(alone_copy, name)
    command("distill", run, "--local-tokens", 0, "--distill-tokens", 256)
    assert not all(torch.equal(more[key], t) for key, t in weights(alone_copy, name).items())


def test_interrupted_between_layers_it_ends_the_same(
    alone_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = cut_one(alone_copy)
    whole = Path(shutil.copytree(alone_copy, tmp_path / "whole"))
    command("distill", f"{whole}:{name}", *LOCAL, 0)
    save, saved = local.save_learned, []

    def interrupted(found: Any, file: Path) -> None:
        save(found, file)
        saved.append(file)
        if len(saved) == 1:
            raise Interrupted

    monkeypatch.setattr(local, "save_learned", interrupted)
    with pytest.raises(Interrupted):
        command("distill", f"{alone_copy}:{name}", *LOCAL, 0)
    command("distill", f"{alone_copy}:{name}", *LOCAL, 0)
    assert len(saved) == len(set(saved)) > 1
    found = weights(alone_copy, name)
    assert all(torch.equal(found[key], tensor) for key, tensor in weights(whole, name).items())
    assert not list(alone_copy.glob("distill/*/local/parts-*"))


def test_no_training_at_all_is_refused(alone_copy: Path) -> None:
    with pytest.raises(InputError, match="nothing to train"):
        command("distill", alone_copy, "--distill-tokens", 0)
