"""Precision recipes against BF16: a small teacher pretrained in each, from the same seeds.

    OMP_NUM_THREADS=1 python -m benchmarks.recipes --steps 150 --seeds 3

The architecture of ``--model`` from random weights, on the same rows of text in the same order, in
BF16, in every recipe, and in nvfp4 without each of its parts; the reference numerics. Nats are of
held-out text after training: *plain* of the weights in an fp32 forward pass, as a teacher is used,
*own* of the recipe's own forward pass. Gaps are relative to BF16 of the same seed, mean and
standard deviation over seeds; every finished row is kept, so that an interrupted run is a shorter
one.
"""

from collections.abc import Iterator
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

from torch import Tensor, nn

from benchmarks.common import Clock, arguments, report
from compress.core.settings import read_settings
from compress.core.terminal import note
from compress.model.families import read_architecture
from compress.model.find import resolve_model
from compress.text.documents import read_documents
from compress.text.packing import pack
from compress.text.splits import split_documents
from compress.text.tokenizer import load_tokenizer
from compress.train.loop import TrainSettings, batch_at, train
from compress.train.precision import Numerics, quantized
from compress.train.pretrain import RECIPE, HeldOut, Reader, balance, count_loads, new_model
from compress.train.recipes import PRECISIONS, Operand, Precision, PretrainRecipe

NVFP4 = PRECISIONS["nvfp4"]
ONE_BY_16 = Operand(numbers="e2m1", block=(1, 16))
VARIANTS: dict[str, Precision] = {
    "bf16": PRECISIONS["bf16"],
    "fp8-hybrid": PRECISIONS["fp8-hybrid"],
    "fp8-block": PRECISIONS["fp8-block"],
    "nvfp4": NVFP4,
    "nvfp4 without Hadamard": replace(NVFP4, hadamard=False),
    "nvfp4 without stochastic rounding": replace(NVFP4, gradient=ONE_BY_16),
    "nvfp4 without square scales": replace(NVFP4, weight=ONE_BY_16),
    "nvfp4 without BF16 layers": replace(NVFP4, plain_share=0.0),
    "nvfp4 without BF16 at the end": replace(NVFP4, plain_forward=0.0),
}


def main() -> None:
    """Train every variant from every seed and print the gaps."""
    settings = arguments(
        __doc__ or "",
        "embedded",
        steps={"type": int, "default": 150},
        batch={"type": int, "default": 4},
        length={"type": int, "default": 64},
        seeds={"type": int, "default": 3},
    )
    path = resolve_model(settings.model)
    asked = read_settings(path / RECIPE, PretrainRecipe, "pretraining recipe")
    splits, tokenizer = split_documents(read_documents(settings.data)), load_tokenizer(path)
    tokens = settings.steps * settings.batch * settings.length
    rows = pack(splits["train"], tokenizer, settings.length, tokens)
    held_out = HeldOut(splits["select"], tokenizer, settings.length)
    held_out.rows = held_out.rows[: 4096 // settings.length]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in range(settings.seeds):
        chosen = asked.model_copy(update={"seed": seed})
        for name, precision in VARIANTS.items():
            clock, model = Clock(), new_model(chosen, tokenizer)
            numerics = Numerics(precision)
            with quantized(model, read_architecture(chosen.model), numerics):
                fit(model, rows, settings, chosen, numerics)
                numerics.plain = False
                own = held_out.measure(Reader(model, numerics))["nats_per_token"]
            plain = held_out.measure(Reader(model))["nats_per_token"]
            found[name].append({"plain": plain, "own": own, "seconds": clock.seconds})
            note(f"seed {seed}, {name}: {plain:.4f} plain, {own:.4f} own, {clock.seconds:.0f} s")
        facts = {"tokens": tokens, "seeds": seed + 1}
        columns = ["recipe", "plain", "gap %", "±", "own", "own gap %", "own ±", "seconds"]
        report("recipes", settings, facts, columns, list(table_of(found)))


def fit(
    model: Any, rows: Tensor, settings: Any, chosen: PretrainRecipe, numerics: Numerics
) -> None:
    """Train a model on the rows, once each, at the rates of its recipe in so many steps."""
    count_loads(model)

    def loss_of(reader: nn.Module, step: int) -> Tensor:
        numerics.at((step + 0.5) / settings.steps)
        loss: Tensor = reader(batch_at(rows, step, settings.batch, chosen.seed)).mean()
        return loss

    how = TrainSettings(
        steps=settings.steps,
        batch_tokens=settings.batch * settings.length,
        learning_rate=chosen.learning_rate,
        warmup=settings.steps // 10,
        decay=settings.steps // 3,
        weight_decay=chosen.weight_decay,
        seed=chosen.seed,
    )
    train(
        Reader(model, numerics), loss_of, how, progress=lambda *_: None,
        after_step=lambda reader, step: balance(reader),
    )  # fmt: skip


def table_of(found: dict[str, list[dict[str, float]]]) -> Iterator[dict[str, Any]]:
    """A row for every variant with its relative gaps to BF16 of the same seeds."""
    for name, runs in found.items():
        row: dict[str, Any] = {"recipe": name, "seconds": mean(run["seconds"] for run in runs)}
        for key, gap, spread in (("plain", "gap %", "±"), ("own", "own gap %", "own ±")):
            pairs = zip(runs, found["bf16"], strict=True)
            gaps = [100 * (run[key] / base[key] - 1) for run, base in pairs]
            row |= {key: mean(run[key] for run in runs), gap: mean(gaps)}
            row[spread] = stdev(gaps) if len(gaps) > 1 else None
        yield row


if __name__ == "__main__":
    main()
