import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.core.errors import InputError
from compress.measure.estimates import difference, exponential, mean_of, pooled, ratio_of
from compress.measure.evaluation import evaluate
from compress.measure.tasks import CHOICES, make_choice_rows, make_rolling_rows, write_task_rows
from compress.model.build import load_model
from compress.text.tokenizer import load_tokenizer

WORDS = (
    "the",
    "small",
    "model",
    "keeps",
    "what",
    "matters",
    "and",
    "forgets",
    "much",
    "that",
    "not",
)


def documents(count: int = 12, words: int = 400) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, words)) for _ in range(count)]


def test_paired_standard_error_is_that_of_the_differences() -> None:
    a, b = mean_of([1.0, 2.0, 3.0, 4.0]), mean_of([1.5, 2.5, 3.0, 5.0])
    change, stderr = difference(a, b)
    # Differences .5 .5 0 1: mean .5, standard deviation sqrt(1/6), over sqrt(4).
    assert change == pytest.approx(0.5)
    assert stderr == pytest.approx(math.sqrt(1 / 6) / 2)
    assert a.stderr == pytest.approx(math.sqrt(5 / 3) / 2)


def test_a_constant_offset_has_no_paired_error() -> None:
    values = np.random.default_rng(1).normal(size=50)
    _, stderr = difference(mean_of(values), mean_of(values + 0.25))
    assert stderr == pytest.approx(0, abs=1e-12)


def test_one_sample_has_no_standard_error() -> None:
    assert mean_of([1.0]).stderr is None


def test_influence_values_average_to_the_value() -> None:
    draw = np.random.default_rng(2)
    ratio = ratio_of(draw.random(40), 1 + draw.random(40))
    for estimate in (ratio, exponential(ratio), pooled([ratio, exponential(ratio)])):
        assert estimate.influence.mean() == pytest.approx(estimate.value)


def test_ratio_error_agrees_with_resampling() -> None:
    draw = np.random.default_rng(3)
    below = 1 + draw.random(400)
    above = 0.5 * below + 0.1 * draw.random(400)
    picks = draw.integers(0, 400, (4000, 400))
    resampled = above[picks].sum(1) / below[picks].sum(1)
    assert ratio_of(above, below).stderr == pytest.approx(resampled.std(), rel=0.1)


def test_choice_rows_are_deterministic_and_have_one_true_continuation() -> None:
    texts = documents()
    rows = make_choice_rows(texts, 20, seed=7)
    assert rows == make_choice_rows(texts, 20, seed=7)
    assert rows != make_choice_rows(texts, 20, seed=8)
    everything = "\n".join(texts)
    for row in rows:
        assert len(set(row["choices"])) == CHOICES
        assert len({len(choice) for choice in row["choices"]}) == 1
        true = [row["context"] + choice in everything for choice in row["choices"]]
        assert true == [number == row["answer"] for number in range(CHOICES)]
    assert len({row["answer"] for row in rows}) == CHOICES


def test_choice_rows_are_as_many_as_the_text_gives() -> None:
    assert 5 < len(make_choice_rows(documents(count=1), 1000, seed=0)) < 10
    with pytest.raises(InputError, match="too short"):
        make_choice_rows(["short"], 5, seed=0)


def test_rolling_rows_are_pieces_of_the_text_up_to_the_limit() -> None:
    texts = documents(count=3, words=2000)
    rows = make_rolling_rows(texts, characters=15000, seed=0)
    assert sum(len(row["text"]) for row in rows) == 15000
    assert all(any(row["text"] in text for text in texts) for row in rows)
    whole = make_rolling_rows(texts, characters=10**9, seed=0)
    assert sum(len(row["text"]) for row in whole) == sum(map(len, texts))


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(2, 97, (6, 33), generator=torch.Generator().manual_seed(0))


def test_a_model_has_no_distance_to_itself(tiny: Path, rows: torch.Tensor) -> None:
    teacher = load_model(tiny)
    found = evaluate({"teacher": teacher, "again": tiny}, teacher, load_tokenizer(tiny), rows)
    for model in found["models"].values():
        assert model["kl"] == pytest.approx(0, abs=1e-6)
    for row in found["paired"]:
        assert row["difference"] == pytest.approx(0, abs=1e-6)
    # Characters are tokens here: as many bytes as predicted tokens.
    assert found["text"] == {"sequences": 6, "tokens": 198, "bytes": 192}
    teacher_figures = found["models"]["teacher"]
    assert teacher_figures["bits_per_byte"] == pytest.approx(
        teacher_figures["nats_per_token"] / math.log(2)
    )


def test_figures_equal_those_of_the_logits(tiny_llama: Path, rows: torch.Tensor) -> None:
    teacher, student = load_model(tiny_llama), load_model(tiny_llama)
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight.zero_()
        teacher_log, student_log = (
            model(rows).logits.log_softmax(-1) for model in (teacher, student)
        )
    kl = (teacher_log.exp() * (teacher_log - student_log)).sum(-1)
    nats = -student_log[:, :-1].gather(-1, rows[:, 1:, None]).mean()
    found = evaluate({"student": student}, teacher, load_tokenizer(tiny_llama), rows)
    figures = found["models"]["student"]
    assert figures["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert figures["nats_per_token"] == pytest.approx(float(nats), rel=1e-5)
    per_row = kl.mean(1)
    assert figures["stderr"]["kl"] == pytest.approx(float(per_row.std() / math.sqrt(6)), rel=1e-3)


def test_bytes_are_those_of_the_tensors(tiny_llama: Path, rows: torch.Tensor) -> None:
    teacher = load_model(tiny_llama)
    found = evaluate(
        {"disk": tiny_llama, "memory": teacher, "told": teacher},
        teacher,
        load_tokenizer(tiny_llama),
        rows,
        sizes={"told": 7},
    )
    disk, memory, told = (found["models"][name]["bytes"] for name in ("disk", "memory", "told"))
    assert 2 * disk == memory
    assert told == 7


def test_local_tasks_agree_with_the_model(tiny: Path, rows: torch.Tensor, tmp_path: Path) -> None:
    texts = documents(count=4, words=200)
    files = write_task_rows(tmp_path, texts, count=4, characters=1500, seed=0)
    teacher, tokenizer = load_model(tiny), load_tokenizer(tiny)
    found = evaluate(
        {"a": teacher, "b": teacher},
        teacher,
        tokenizer,
        rows,
        tasks=["choice", "rolling"],
        task_rows=files,
    )
    tasks = found["models"]["a"]["tasks"]
    right = 0
    for row in map(json.loads, files["choice"].read_text().splitlines()):
        nats = [text_nats(teacher, tokenizer, row["context"], choice) for choice in row["choices"]]
        right += nats.index(min(nats)) == row["answer"]
    assert tasks["choice"]["acc"] == pytest.approx(right / 4)
    assert found["samples"]["choice"] == 4
    pieces = [json.loads(line)["text"] for line in files["rolling"].read_text().splitlines()]
    assert tasks["rolling"]["byte_perplexity"] == pytest.approx(
        2 ** tasks["rolling"]["bits_per_byte"]
    )
    assert sum(map(len, pieces)) == 1500
    names = {row["metric"] for row in found["paired"]}
    assert {"kl", "choice/acc", "rolling/bits_per_byte"} <= names
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def text_nats(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    tokens = torch.tensor([tokenizer.encode(context + continuation)])
    start = len(tokenizer.encode(context))
    with torch.no_grad():
        log = model(tokens).logits[0, start - 1 : -1].log_softmax(-1)
    return -float(log.gather(-1, tokens[0, start:, None]).sum())


def test_an_answer_longer_than_the_window_is_refused(
    tiny_llama: Path, rows: torch.Tensor, tmp_path: Path
) -> None:
    row = {"context": "the", "choices": [" model" * 100, " small"], "answer": 0}
    (tmp_path / "choice.jsonl").write_text(json.dumps(row) + "\n")
    teacher = load_model(tiny_llama)
    with pytest.raises(InputError, match="600 tokens, but the model's window is 512"):
        evaluate(
            {"a": teacher},
            teacher,
            load_tokenizer(tiny_llama),
            rows,
            tasks=["choice"],
            task_rows={"choice": tmp_path / "choice.jsonl"},
        )


def test_benchmarks_read_local_files(tiny_llama: Path, rows: torch.Tensor, tmp_path: Path) -> None:
    pairs = [{"sentence_good": f"the model {n}", "sentence_bad": f"model the {n}"} for n in "abcd"]
    for name in ("passive_1", "intransitive"):
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (tmp_path / "blimp").mkdir(exist_ok=True)
        (tmp_path / "blimp" / f"{name}.jsonl").write_text(lines)
    teacher = load_model(tiny_llama)
    found = evaluate(
        {"a": teacher},
        teacher,
        load_tokenizer(tiny_llama),
        rows,
        tasks=["blimp"],
        task_data=tmp_path,
    )
    tasks = found["models"]["a"]["tasks"]
    assert set(tasks) == {"blimp", "blimp_passive_1", "blimp_intransitive"}
    assert tasks["blimp"]["acc"] == tasks["blimp_passive_1"]["acc"]
    with pytest.raises(InputError, match="no file for task 'piqa'"):
        evaluate(
            {"a": teacher},
            teacher,
            load_tokenizer(tiny_llama),
            rows,
            tasks=["piqa"],
            task_data=tmp_path,
        )


def test_unknown_task_names_are_refused_before_anything_runs(
    tiny_llama: Path, rows: torch.Tensor
) -> None:
    teacher = load_model(tiny_llama)
    with pytest.raises(InputError, match="task 'no_such_task' is not known to lm-eval"):
        evaluate(
            {"a": teacher},
            teacher,
            load_tokenizer(tiny_llama),
            rows,
            tasks=["no_such_task"],
        )
