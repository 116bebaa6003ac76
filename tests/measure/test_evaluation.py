import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.measure.evaluation import Subject, compare
from compress.measure.kl import mean_kl, reference
from compress.measure.lm_eval import Tasks
from compress.measure.tasks import (
    CHOICE_SIZES,
    CHOICES,
    ROLLING_TEXT,
    make_choice_rows,
    make_rolling_rows,
    write_task_rows,
)
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.sweep.stack import Stack, stack_at
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


def test_choice_rows_are_deterministic_and_have_one_true_continuation() -> None:
    texts = documents()
    rows, size = make_choice_rows(texts, 20, seed=7)
    assert size == CHOICE_SIZES[0]
    assert rows == make_choice_rows(texts, 20, seed=7)[0]
    assert rows != make_choice_rows(texts, 20, seed=8)[0]
    everything = "\n".join(texts)
    for row in rows:
        assert len(set(row["choices"])) == CHOICES
        assert len({len(choice) for choice in row["choices"]}) == 1
        true = [row["context"] + choice in everything for choice in row["choices"]]
        assert true == [number == row["answer"] for number in range(CHOICES)]
    assert len({row["answer"] for row in rows}) == CHOICES


def test_choice_rows_are_as_many_as_the_text_gives() -> None:
    assert 5 < len(make_choice_rows(documents(count=1), 1000, seed=0)[0]) < 10
    assert make_choice_rows(["short"], 5, seed=0)[0] == []


UNSPACED = {
    "chinese": "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出",
    "japanese": "ひらがなとカタカナと漢字の文章は単語の間に空白を置かない",
    "thai": "ภาษาไทยไม่เว้นวรรคระหว่างคำและผู้อ่านต้องรู้เองว่าคำหนึ่งจบลงที่ใด",
}


@pytest.mark.parametrize("script", UNSPACED)
def test_scripts_without_spaces_give_choice_rows(script: str) -> None:
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list(UNSPACED[script]), 361)) for _ in range(20)]
    rows, size = make_choice_rows(texts, 100, seed=0)
    assert (len(rows), size) == (20, CHOICE_SIZES[0])
    for row in rows:
        assert any(row["context"] + row["choices"][row["answer"]] in text for text in texts)


@pytest.mark.parametrize(("words", "size"), [(30, (120, 24)), (16, (60, 12))])
def test_short_documents_give_short_choice_rows_and_a_note(
    words: int, size: tuple[int, int], tmp_path: Path
) -> None:
    files, notes = write_task_rows(tmp_path, documents(40, words), ["choice"], seed=0)
    for row in map(json.loads, files["choice"].read_text().splitlines()):
        assert size[0] - 10 <= len(row["context"]) <= size[0] + 10
        assert size[1] <= len(row["choices"][0]) <= size[1] + 10
    assert len(notes) == 1
    assert f"asks after {size[0]} characters" in notes[0]


def test_rows_are_written_for_the_tasks_asked_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    assert write_task_rows(tmp_path / "a", ["too", "short"], ["piqa"], seed=0) == ({}, [])
    assert not (tmp_path / "a").exists()
    files, notes = write_task_rows(tmp_path, ["too", "short"], ["rolling"], seed=0)
    assert (list(files), notes) == (["rolling"], [])
    files, notes = write_task_rows(tmp_path, ["too", "short"], ["choice", "rolling"], seed=0)
    assert list(files) == ["rolling"]
    assert "task choice is left out" in notes[0]


def test_rolling_rows_are_pieces_of_the_text_up_to_the_limit() -> None:
    texts = documents(count=3, words=2000)
    rows = make_rolling_rows(texts, characters=15000, seed=0)
    assert sum(len(row["text"]) for row in rows) == 15000
    assert all(any(row["text"] in text for text in texts) for row in rows)
    whole = make_rolling_rows(texts, characters=10**9, seed=0)
    assert sum(len(row["text"]) for row in whole) == sum(map(len, texts))


def subject(stack: Stack) -> Subject:
    """A stack that is there, whose bytes do not matter."""
    return Subject(lambda: stack, 0)


def changed(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Stack:
    """The stack of a checkpoint with other weights."""
    checkpoint = open_checkpoint(path)
    tensors = {name: tensor.float() for name, tensor in checkpoint.items()}
    change(tensors)
    return Stack(checkpoint.config, checkpoint.architecture, lambda each: tensors[each.name])


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(2, 97, (6, 33), generator=torch.Generator().manual_seed(0))


def test_a_model_has_no_distance_to_itself(tiny: Path, rows: torch.Tensor) -> None:
    teacher = stack_at(tiny)
    subjects = {"teacher": subject(teacher), "again": Subject(lambda: stack_at(tiny), 7)}
    found = compare(subjects, teacher, load_tokenizer(tiny), rows)
    assert [model["bytes"] for model in found["models"].values()] == [0, 7]
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
    teacher = stack_at(tiny_llama)
    student = changed(tiny_llama, lambda own: own["model.layers.1.mlp.down_proj.weight"].zero_())
    logs = []
    for stack in (teacher, student):
        with torch.no_grad(), stack.whole() as model:
            logs.append(model(rows).logits.log_softmax(-1))
    teacher_log, student_log = logs
    kl = (teacher_log.exp() * (teacher_log - student_log)).sum(-1)
    nats = -student_log[:, :-1].gather(-1, rows[:, 1:, None]).mean()
    found = compare({"student": subject(student)}, teacher, load_tokenizer(tiny_llama), rows)
    figures = found["models"]["student"]
    assert figures["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert figures["nats_per_token"] == pytest.approx(float(nats), rel=1e-5)
    per_row = kl.mean(1)
    assert figures["stderr"]["kl"] == pytest.approx(float(per_row.std() / math.sqrt(6)), rel=1e-3)


def test_local_tasks_agree_with_the_model(tiny: Path, rows: torch.Tensor, tmp_path: Path) -> None:
    texts = documents(count=2, words=120)
    files, notes = write_task_rows(tmp_path, texts, ["choice", "rolling"], seed=0)
    teacher, tokenizer = stack_at(tiny), load_tokenizer(tiny)
    tasks = Tasks(["choice", "rolling"], files)
    found = compare({name: subject(teacher) for name in "ab"}, teacher, tokenizer, rows, tasks)
    figures = found["models"]["a"]["tasks"]
    choices = list(map(json.loads, files["choice"].read_text().splitlines()))
    right, model = 0, load_model(tiny)
    for row in choices:
        nats = [text_nats(model, tokenizer, row["context"], choice) for choice in row["choices"]]
        right += nats.index(min(nats)) == row["answer"]
    assert figures["choice"]["acc"] == pytest.approx(right / len(choices))
    assert found["samples"]["choice"] == len(choices) > 1
    pieces = [json.loads(line)["text"] for line in files["rolling"].read_text().splitlines()]
    assert figures["rolling"]["byte_perplexity"] == pytest.approx(
        2 ** figures["rolling"]["bits_per_byte"]
    )
    assert sum(map(len, pieces)) == sum(map(len, texts)) < ROLLING_TEXT
    names = {row["metric"] for row in found["paired"]}
    assert {"kl", "choice/acc", "rolling/bits_per_byte"} <= names
    assert notes == found["notes"] == []
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_perplexity_of_words_that_are_whole_texts_is_null(
    tiny_llama: Path, rows: torch.Tensor, tmp_path: Path
) -> None:
    files, _ = write_task_rows(tmp_path, ["x" * 900, "y" * 900], ["rolling"], seed=0)
    teacher, tasks = stack_at(tiny_llama), Tasks(["rolling"], files)
    found = compare({"a": subject(teacher)}, teacher, load_tokenizer(tiny_llama), rows, tasks)
    figures = found["models"]["a"]["tasks"]["rolling"]
    assert figures["word_perplexity"] is figures["stderr"] is None
    assert figures["bits_per_byte"] > 0
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
    teacher, tasks = (
        stack_at(tiny_llama),
        Tasks(["choice"], {"choice": tmp_path / "choice.jsonl"}),
    )
    with pytest.raises(InputError, match="600 tokens, but the model's window is 512"):
        compare({"a": subject(teacher)}, teacher, load_tokenizer(tiny_llama), rows, tasks)


def test_benchmarks_read_local_files(tiny_llama: Path, rows: torch.Tensor, tmp_path: Path) -> None:
    pairs = [{"sentence_good": f"the model {n}", "sentence_bad": f"model the {n}"} for n in "abcd"]
    for name in ("passive_1", "intransitive"):
        write_rows(tmp_path / "blimp" / f"{name}.jsonl", pairs)
    teacher, tasks = stack_at(tiny_llama), Tasks(["blimp"], {}, tmp_path)
    found = compare({"a": subject(teacher)}, teacher, load_tokenizer(tiny_llama), rows, tasks)
    figures = found["models"]["a"]["tasks"]
    assert set(figures) == {"blimp", "blimp_passive_1", "blimp_intransitive"}
    assert figures["blimp"]["acc"] == figures["blimp_passive_1"]["acc"]
    with pytest.raises(InputError, match="no file for task 'piqa'"):
        Tasks(["piqa"], {}, tmp_path)


def test_unknown_task_names_are_refused() -> None:
    for name in ("no_such_task", "choice"):
        with pytest.raises(InputError, match=name):
            Tasks([name], {})


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSONL of these rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


QUESTIONS = [{"question": f"model {n}?", "answer": f"keep #### secret{n}."} for n in range(20)]


@pytest.mark.parametrize(
    ("asked", "train", "shots", "said"),
    [
        (QUESTIONS[:8], QUESTIONS[8:], 5, ""),
        # Rows that are asked are no shots, wherever they are.
        (QUESTIONS[:8], QUESTIONS[5:11], 3, "3 of 5 shots: .*train.jsonl has no more rows"),
        (QUESTIONS[:8], None, 5, "5 of 5 shots, from the other rows that are asked; .*train.jsonl"),
        (QUESTIONS[:3], None, 2, "2 of 5 shots"),
        (3 * QUESTIONS[:2], None, 3, "3 of 5 shots"),
        (QUESTIONS[:1], None, 0, "0 of 5 shots"),
    ],
)
def test_no_prompt_holds_the_answer_that_it_asks_for(
    asked: list[dict[str, str]],
    train: list[dict[str, str]] | None,
    shots: int,
    said: str,
    tmp_path: Path,
) -> None:
    write_rows(tmp_path / "gsm8k" / "test.jsonl", asked)
    if train:
        write_rows(tmp_path / "gsm8k" / "train.jsonl", train)
    tasks = Tasks(["gsm8k"], {}, tmp_path)
    task = tasks.load(str(tmp_path / "cache"))[0]["gsm8k"]
    for row in task.eval_docs:
        prompt = task.fewshot_context(row, num_fewshot=task.config.num_fewshot)
        assert prompt.count("secret") == shots
        assert row["answer"] not in prompt
    assert bool(said) == ("gsm8k" in tasks.notes)
    assert re.search(said, tasks.notes.get("gsm8k", ""))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": "b"}\n{broken\n', r"test\.jsonl:2 is not JSON"),
        ("", "is empty"),
        ('{"q": "a"}\n', "rows of gsm8k do not fit: 'question' is undefined"),
    ],
)
def test_rows_that_a_task_cannot_read_are_one_line(
    content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        Tasks(["gsm8k"], {}, tmp_path).load(str(tmp_path / "cache"))


@pytest.mark.parametrize("where", ["norm", "head"])
@pytest.mark.parametrize("broken", ["teacher", "student"])
def test_predictions_that_are_not_finite_name_their_model(
    broken: str, where: str, tiny_llama: Path, rows: torch.Tensor
) -> None:
    stacks = {"teacher": stack_at(tiny_llama), "student": stack_at(tiny_llama)}
    stacks[broken] = changed(tiny_llama, lambda own: overflow(own, where))
    with pytest.raises(InputError, match=f"{broken} predicts NaN or infinite logits"):
        compare(
            {"student": subject(stacks["student"])},
            stacks["teacher"],
            load_tokenizer(tiny_llama),
            rows,
        )
    text = reference(open_checkpoint(tiny_llama), stacks["teacher"], rows)
    named = "the student" if broken == "student" else str(tiny_llama)
    with pytest.raises(InputError, match=f"{named} predicts NaN or infinite logits"):
        mean_kl(stacks["student"], text)


def overflow(tensors: dict[str, Tensor], where: str) -> None:
    """Finite weights whose products are not."""
    norm, head = tensors["model.norm.weight"], tensors["model.embed_tokens.weight"]
    # Token 100 is not in the text.
    (norm if where == "norm" else head[100]).fill_(3e38)


def test_one_row_has_figures_without_errors_and_json_holds_no_nan(tiny_llama: Path) -> None:
    teacher = stack_at(tiny_llama)
    # End of text alone is no text: bits per byte of it are not finite.
    for row in (torch.full((1, 8), 5), torch.zeros(1, 8, dtype=torch.int64)):
        found = compare(
            {name: subject(teacher) for name in "ab"}, teacher, load_tokenizer(tiny_llama), row
        )
        assert set(found["models"]["a"]["stderr"].values()) == {None}
        assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["models"]["a"]["bits_per_byte"] is None
