"""What is wrong with an export is found and named, whatever it is."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from conftest import Shared
from exports import CARD, architecture_of
from quantized import stored
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA, write_tiny
from torch import Tensor

from compress.core.errors import VerificationFailed
from compress.core.files import read_json
from compress.export.predictions import GREEDY, ROWS, compare, predictions
from compress.export.readers import Reader
from compress.export.readers.table import has_own_code
from compress.export.record import RECORD, write_record
from compress.export.student import export_student
from compress.export.verify import verify
from compress.model.find import shipped
from compress.model.headers import INDEX

Tensors = dict[str, Tensor]
# As many query as key heads, so that q and k have one shape, and all are square.
SQUARE = LLAMA | {"num_key_value_heads": 4}
LAYER = "model.layers.{}.self_attn.{}_proj.weight"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def exported(shared: Shared) -> Path:
    """An FP8 and BF16 student in three files."""

    def make(out: Path) -> None:
        source = write_tiny(out.with_name("square"), SQUARE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("compress.model.checkpoint.SHARD_BYTES", 70_000)
            export_student(source, out, architecture_of(source, ["fp8", "bf16"]), "vllm", CARD)
        assert (out / SHARD).is_file()

    return shared("exported", make)


def changed(directory: Path, change: Callable[[Tensors], object]) -> None:
    """Change tensors in the files where they are, and the index with them."""
    tensors = stored(directory)
    files = {file: list(stored_in(file)) for file in directory.glob("*.safetensors")}
    before = set(tensors)
    change(tensors)
    for file, names in files.items():
        save_file({n: tensors[n].contiguous() for n in names if n in tensors}, file)
    new = {name: tensors[name] for name in tensors.keys() - before}
    if new:
        save_file(new, directory / "more.safetensors")
    where = {name: file.name for file in files for name in stored_in(file)}
    where |= dict.fromkeys(new, "more.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def stored_in(file: Path) -> Tensors:
    found: Tensors = load_file(file)
    return found


def swap(tensors: Tensors, one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


def swap_layers(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers.0." in name]:
        swap(tensors, name, name.replace(".layers.0.", ".layers.2."))


def scale_of(tensors: Tensors) -> str:
    return min(name for name in tensors if name.endswith("weight_scale"))


def truncate(directory: Path) -> None:
    file = directory / SHARD
    file.write_bytes(file.read_bytes()[:-100])


def stale_index(directory: Path) -> None:
    index = read_json(directory / INDEX)
    said = index["weight_map"]
    said["model.norm.weight"] = next(
        file for file in said.values() if file != said["model.norm.weight"]
    )
    (directory / INDEX).write_text(json.dumps(index))


def setting(key: str, value: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = read_json(directory / "config.json")
        (directory / "config.json").write_text(json.dumps(config | {key: value}))

    return change


def of_tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    return lambda directory: changed(directory, change)


def another_shard(directory: Path) -> None:
    changed(directory, lambda tensors: None)
    names = stored_in(directory / SHARD)
    save_file({n: t.clone().view(torch.uint8).flip(0).view(t.dtype).view(t.shape)
               for n, t in names.items()}, directory / SHARD)  # fmt: skip


FAULTS: dict[str, Callable[[Path], None]] = {
    r"changed scale: \S+weight_scale has other numbers": of_tensors(
        lambda t: t.update({scale_of(t): 2 * t[scale_of(t)]})
    ),
    rf"another student's: all \d+ tensors of {SHARD}": another_shard,
    r"transposed tensor: model.layers.1.self_attn.o_proj.weight": of_tensors(
        lambda t: t.update({LAYER.format(1, "o"): t[LAYER.format(1, "o")].t()})
    ),
    r"transposed tensor: model.layers.0.mlp.up_proj.weight is \[64, 96\]": of_tensors(
        lambda t: t.update(
            {"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].t()}
        )
    ),
    r"missing scale: \S+weight_scale": of_tensors(lambda t: t.pop(scale_of(t))),
    r"wrong layer order: model.layers.0.\S+ holds model.layers.2": of_tensors(swap_layers),
    r"swapped tensors: \S+k_proj.weight holds \S+q_proj.weight": of_tensors(
        lambda t: swap(t, LAYER.format(0, "q"), LAYER.format(0, "k"))
    ),
    rf"truncated file: {SHARD} has": truncate,
    r"wrong dtype: model.norm.weight is F32, exported as BF16": of_tensors(
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()})
    ),
    r"other settings: rope_theta in config.json is 2": setting("rope_theta", 2),
    r"other settings: intermediate_size in config.json is 80": setting("intermediate_size", 80),
    r"extra tensor: model.layers.3.bias": of_tensors(
        lambda t: t.update({"model.layers.3.bias": torch.ones(4)})
    ),
    r"missing tensor: model.norm.weight": of_tensors(lambda t: t.pop("model.norm.weight")),
    r"stale index: model.norm.weight is in \S+, the index says": stale_index,
}


@pytest.mark.parametrize("named", FAULTS)
def test_a_fault_is_named(exported: Path, tmp_path: Path, named: str) -> None:
    directory = Path(shutil.copytree(exported, tmp_path / "out"))
    FAULTS[named](directory)
    with pytest.raises(VerificationFailed, match=named):
        verify(directory, {"compress": None})


def signed_anew(directory: Path) -> None:
    """Let the record agree with what is there, as if it had been written so."""
    write_record(directory, read_json(directory / RECORD)["predictions"])


@pytest.mark.parametrize("reader", ["compress", "transformers"])
def test_readers_find_what_was_written_wrong(
    exported: Path, tmp_path: Path, reader: Reader
) -> None:
    directory = Path(shutil.copytree(exported, tmp_path / "out"))
    (whole,) = verify(directory, {reader: None})
    assert whole.greedy == (GREEDY * ROWS, GREEDY * ROWS)
    changed(directory, lambda t: t.update({scale_of(t): 2 * t[scale_of(t)]}))
    signed_anew(directory)
    with pytest.raises(VerificationFailed, match=r"logits|greedy tokens"):
        verify(directory, {reader: None})


def test_only_code_that_we_wrote_is_run(exported: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(exported, tmp_path / "out"))
    assert not has_own_code(directory)
    own = "configuration_decilm.py"
    shutil.copy(shipped("remote_code", own), directory)
    assert has_own_code(directory)
    setting("auto_map", {"AutoConfig": f"somebody/code--{own[:-3]}.Config"})(directory)
    with pytest.raises(VerificationFailed, match="other code: auto_map names somebody/code--"):
        has_own_code(directory)
    with (directory / own).open("a", encoding="utf-8") as file:
        file.write("# changed")
    with pytest.raises(VerificationFailed, match=f"other code: {own} is no file that"):
        has_own_code(directory)


def test_a_tie_ends_a_row_and_another_token_is_an_error() -> None:
    logits = torch.zeros(1, 4, 8)
    logits[0, :, 3], logits[0, 2, 5] = 5.0, 4.9995
    rows = torch.full((1, 4), 3)
    meant = predictions("meant", logits, rows, 1)
    assert meant.greedy.tolist() == [[3, 3, 3]]
    other = replace(meant, text=meant.text + 3e-4, greedy=torch.tensor([[3, 3, 5]]))
    found = compare(meant, other)
    assert (found.greedy, found.ties) == ((2, 3), 1)
    with pytest.raises(VerificationFailed, match="greedy tokens: meant says 5 where the student"):
        compare(meant, replace(other, text=meant.text))
    with pytest.raises(VerificationFailed, match="logits"):
        compare(meant, replace(meant, text=meant.text * torch.nan))


def test_the_command_says_what_differs_and_ends_with_4(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = Path(shutil.copytree(exported, tmp_path / "out"))
    assert run(monkeypatch, "verify", str(directory)) == 0
    truncate(directory)
    assert run(monkeypatch, "verify", str(directory)) == 4
    assert "error: truncated file" in capsys.readouterr().err
    nowhere = "--reader-python", str(tmp_path / "python")
    assert run(monkeypatch, "verify", str(exported), "--reader", "vllm", *nowhere) == 2
    assert run(monkeypatch, "verify", str(tmp_path)) == 2
