"""``compress plan``: what it says, from configs alone."""

import json
import re
from pathlib import Path

import pytest
from commands import in_fresh_process, run
from published import PUBLISHED
from published_hybrids import HYBRID_9B
from tiny_models import EVERY

from compress.core.quantities import parse_bytes
from compress.model.families import read_architecture

# Its label and its first cell.
CELLS = re.compile(r"│ (\S.*?) +│ +(\S.*?) │")


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(HYBRID_9B))
    return str(file)


def test_plan_answers_in_json_without_torch(config: str) -> None:
    output, imported, seconds = in_fresh_process(
        "plan", config, "--context", "128k", "--budget", "22GiB", "--json"
    )
    assert imported == set()
    assert seconds < 1
    assert json.loads(output) == {
        "family": "nemotron_h",
        "layers": 56,
        "parameters": {"total": 8888227328, "active": 8888227328},
        "bytes": {
            "weights": 17776454656,
            "kv_cache": 2147483648,
            "ssm_state": 141557760,
            "conv_state": 1990656,
            "mtp": 0,
            "workspace": 0,
            "total": 20067486720,
        },
        "budget": 23622320128,
        "fits": True,
        "largest_context": 348041,
        "largest_batch": 2,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_plan_counts_every_family_without_torch(name: str, tmp_path: Path) -> None:
    written, count = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(written))
    output, imported, _ = in_fresh_process("plan", str(tmp_path), "--json")
    assert imported == set()
    assert json.loads(output)["parameters"]["total"] == count


def test_plan_says_what_the_work_takes_without_torch(config: str) -> None:
    command = ("plan", config, "--work", "--on", "a10g")
    output, imported, _ = in_fresh_process(*command, "--json")
    assert imported == set()
    work = json.loads(output)["work"]
    assert work["machine"]["name"] == "a10g"
    fits = {stage["stage"]: stage["fits"] for stage in work["stages"]}
    assert fits == {"score": True, "search": False, "distill": False, "export": True}
    printed, imported, _ = in_fresh_process(*command)
    assert imported == set()
    lines = printed.splitlines()
    table = lines[next(at for at, line in enumerate(lines) if "the work on a10g" in line) :]
    assert [word for word in fits if any(word in line for line in table)] == list(fits)
    assert all(len(line.rstrip()) <= 80 for line in table if "│" in line)


def test_plan_prints_a_row_for_all_blocks_that_are_alike(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", config, "--device", "a10g", "--budget", "40GiB") == 0
    output = capsys.readouterr().out
    assert output.count("kv_head 8, query 5, head_dim 128") == 1
    assert output.count("nvfp4, bf16") == 1
    assert "a10g, vLLM: FP8 caches by FlashInfer only" in output
    assert "a10g offers 22.060 GiB (binds; budget 40.000 GiB)" in output


def test_models_side_by_side_fit_into_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["Nemotron-Nano-12B-v2", "Nemotron-Nano-9B-v2", "Qwen3-8B", "Qwen3-30B-A3B"]
    for name in names:
        (tmp_path / name.removeprefix("Nemotron-")).mkdir()
        file = tmp_path / name.removeprefix("Nemotron-") / "config.json"
        file.write_text(json.dumps(PUBLISHED[name][0]))
    paths = [str(file.parent) for file in sorted(tmp_path.glob("*/config.json"))]
    served = ("--context", "128k", "--device", "a10g")
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "plan", "--compare", *paths, *served) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if "│" in line]
    assert all(len(line.rstrip()) <= 80 for line in table)
    rows = {cells[0]: cells[1:] for line in table if (cells := line.strip("│ ").split("│"))}
    rows = {key.strip(): [cell.strip() for cell in cells] for key, cells in rows.items()}
    # In the order of their names: Nano-12B, Nano-9B, Qwen3-30B, Qwen3-8B.
    assert rows["active"] == ["12.310B", "8.888B", "3.353B", "8.191B"]
    assert rows["weights"] == ["22.929 GiB", "16.556 GiB", "56.871 GiB", "15.256 GiB"]
    assert rows["KV cache"] == ["3.000 GiB", "2.000 GiB", "12.000 GiB", "18.000 GiB"]
    assert rows["fits"] == ["no", "yes", "no", "no"]
    assert rows["largest batch"] == ["0", "2", "0", "0"]
    assert run(monkeypatch, "plan", *paths, *served, "--compare", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert [planned[path]["largest_batch"] for path in paths] == [0, 2, 0, 0]
    assert run(monkeypatch, "plan", *paths) == 2
    assert "--compare puts several side by side" in capsys.readouterr().err
    assert run(monkeypatch, "plan", paths[1], *served, "--max-batch") == 0
    assert "largest batch that fits: 2" in capsys.readouterr().out


def test_a_comparison_adds_up_with_what_predicts_further_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(EVERY["deepseek_v3"]))
    assert read_architecture(EVERY["deepseek_v3"]).mtp
    assert run(monkeypatch, "plan", "--compare", str(path), str(path), "--context", "4k") == 0
    printed = capsys.readouterr().out
    rows = dict(CELLS.findall(printed))
    parts = sum(parse_bytes(rows[label]) for label in ("weights", "KV cache", "states"))
    assert parts == pytest.approx(parse_bytes(rows["total"]), rel=1e-3)
    assert "cannot be" not in printed
    assert run(monkeypatch, "plan", "--compare", str(path), "--format", "int4") == 0
    assert "8 blocks cannot be int4 (inputs no multiple of 128)" in capsys.readouterr().out


def test_plan_asks_what_if_by_format(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--context", "128k", "--format", "fp8", "--kv-format", "fp8", "--json")
    assert run(monkeypatch, "plan", config, *asked) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["bytes"]["kv_cache"] == 2147483648 // 2
    assert planned["bytes"]["weights"] < 17776454656 * 0.6
    assert planned["budget"] is planned["fits"] is planned["largest_context"] is None


def test_plan_says_where_memory_is_not_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(HYBRID_9B | {"max_position_embeddings": 131072}))
    for budget, said in (("22GiB", True), ("17GiB", False)):
        assert run(monkeypatch, "plan", str(file), "--budget", budget) == 0
        assert ("made for 131,072 tokens" in capsys.readouterr().out) == said
