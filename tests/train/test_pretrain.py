"""Pretraining ends in a checkpoint that stock code loads, and a kill changes nothing."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import TINY
from torch import nn
from transformers import AutoModelForCausalLM

from compress.core.errors import InputError
from compress.core.settings import read_settings
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.model.families import count_parameters, read_architecture
from compress.model.find import resolve_model
from compress.text.splits import split_documents
from compress.text.tokenizer import load_tokenizer
from compress.train.loop import Progress
from compress.train.pretrain import HeldOut, Reader, balance, count_loads, pretrain
from compress.train.recipes import PretrainRecipe

BROKEN = TINY["hybrid"] | {"vocab_size": 300, "conv_kernel": "four"}


class Interrupted(Exception):
    """Stands for a kill: nothing after it runs."""


def stop_at(step: int) -> Progress:
    def progress(done: int, steps: int, figures: dict[str, float]) -> None:
        if done == step:
            raise Interrupted

    return progress


def quiet(done: int, steps: int, figures: dict[str, float]) -> None:
    pass


def recipe(directory: Path, family: str = "hybrid", **changes: object) -> Path:
    text = "the quick brown fox jumps over the lazy dog again and again "
    rows = [json.dumps({"text": f"{number} {text * 3}"}) for number in range(120)]
    (directory / "data.jsonl").write_text("\n".join(rows))
    keys = {
        "tokenizer": {"vocab_size": 300},
        "model": TINY[family] | {"vocab_size": 300},
        "data": str(directory / "data.jsonl"),
        "steps": 6, "batch": 2, "length": 16, "learning_rate": 0.01, "warmup": 1, "decay": 2,
        "weight_decay": 0.1, "seed": 0, "checkpoint_every": 3,
    }  # fmt: skip
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys | changes))
    return path


@pytest.mark.parametrize("family", TINY)
def test_a_pretrained_teacher_is_a_stock_checkpoint_in_bf16(tmp_path: Path, family: str) -> None:
    out = tmp_path / "teacher"
    metrics = pretrain(recipe(tmp_path, family), out, progress=quiet)
    assert metrics["tokens"] == 6 * 2 * 16
    # Bytes per token and bits per nat relate the two figures.
    assert 0 < metrics["bits_per_byte"] < metrics["nats_per_token"] / 0.69
    checkpoint = open_checkpoint(out)
    for name, tensor in load_file(out / "model.safetensors").items():
        wanted = torch.float32 if name.endswith("correction_bias") else torch.bfloat16
        assert tensor.dtype == wanted, name
    assert checkpoint.config["dtype"] == "bfloat16"
    tokenizer = load_tokenizer(out)
    assert checkpoint.config["eos_token_id"] == tokenizer.eos_token_id
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("the quick brown")])
    torch.testing.assert_close(stock(ids).logits, load_model(out)(ids).logits)
    assert not list((tmp_path / "teacher.training").glob("training-*"))
    # Finished: the same recipe does nothing, so it cannot be interrupted.
    assert pretrain(tmp_path / "recipe.yaml", out, progress=stop_at(1)) == metrics


def test_pretraining_resumes_bit_for_bit(tmp_path: Path) -> None:
    path, whole, broken = recipe(tmp_path), tmp_path / "whole", tmp_path / "broken"
    pretrain(path, whole, progress=quiet)
    with pytest.raises(Interrupted):
        pretrain(path, broken, progress=stop_at(5))
    assert not broken.exists()
    pretrain(path, broken, progress=quiet)
    for name in ("model.safetensors", "metrics.json", "tokenizer.json", "config.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


def test_the_tokenizer_of_another_model_can_be_used(tmp_path: Path, tiny_llama: Path) -> None:
    out = tmp_path / "teacher"
    pretrain(recipe(tmp_path, tokenizer=str(tiny_llama), steps=1), out, progress=quiet)
    given, kept = load_tokenizer(tiny_llama), load_tokenizer(out)
    assert given.encode("a quick fox") == kept.encode("a quick fox")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": 1}, "'learning_rates'; did you mean learning_rate"),
        ({"steps": 0}, "steps is 0: .* greater than or equal to 1"),
        ({"tokenizer": {"vocab_size": 500}}, "vocab_size 300 is below"),
        ({"model": {"model_type": "bert"}}, "'bert' is not supported"),
        ({"model": BROKEN}, "recipe's model: .*conv_kernel"),
        ({"length": 100_000}, "are needed"),
        ({"learning_rate": 1e30, "warmup": 0}, "loss is (nan|inf) at step"),
    ],
)
def test_recipes_that_cannot_work_are_one_line(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pretrain(recipe(tmp_path, **changes), tmp_path / "out", progress=quiet)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="no teacher of ours"):
        pretrain(recipe(tmp_path), tmp_path / "out")


def test_balancing_raises_the_bias_of_idle_experts() -> None:
    router = nn.Module()
    router.register_buffer("e_score_correction_bias", torch.zeros(4))
    router.forward = lambda chosen: (None, None, chosen)
    count_loads(router)
    router(torch.tensor([[0, 1], [0, 1], [0, 2]]))
    balance(router)
    signs = router.e_score_correction_bias.sign().tolist()
    assert signs == [-1, -1, 1, 1]


def test_the_embedded_teacher_is_what_its_recipe_makes(embedded_text: list[str]) -> None:
    teacher = resolve_model("embedded")
    assert (teacher / "model.safetensors").stat().st_size <= 4_000_000
    checkpoint = open_checkpoint(teacher)
    architecture = checkpoint.architecture
    assert architecture == read_architecture(
        read_settings(teacher / "recipe.yaml", PretrainRecipe, "recipe").model
    )
    assert {block.kind for block in architecture.blocks} == {"attention", "ffn", "moe", "mamba"}
    stay = 2 * architecture.vocab * architecture.hidden
    assert stay <= 0.2 * count_parameters(architecture)
    # Its text may differ a little between Python versions, its quality not by much.
    metrics = json.loads((teacher / "metrics.json").read_text())
    documents = split_documents(embedded_text)["select"]
    held_out = HeldOut(documents, load_tokenizer(teacher), 256)
    measured = held_out.measure(Reader(load_model(teacher)))
    assert measured["nats_per_token"] == pytest.approx(metrics["nats_per_token"], abs=0.2)
