"""What every benchmark shares: arguments, text, the count of token-forwards, JSON and a table."""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.core.files import write_json
from compress.core.terminal import note, table
from compress.measure.kl import Reference, reference
from compress.model.build import load_model
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.model.find import note_of, resolve_model
from compress.student.assemble import BlockStore
from compress.sweep.stack import Stack, stack_of
from compress.text.documents import read_documents
from compress.text.packing import pack
from compress.text.splits import split_documents
from compress.text.tokenizer import load_tokenizer

# A backward pass costs about two forward ones: gradients of inputs and of the graph's other side.
BACKWARD = 2.0


@dataclass
class Cost:
    """Token-forwards: tokens times the share of the layers that they went through."""

    token_forwards: float = 0.0

    def add(self, token_forwards: float) -> None:
        """Count more of them."""
        self.token_forwards += token_forwards


@dataclass(frozen=True)
class Subject:
    """The teacher of a benchmark and its texts, as the command line names them.

    ``score``, ``select`` and ``final`` rows never overlap; ``final`` is from ``--eval-data`` where
    that is given.
    """

    settings: argparse.Namespace
    path: Path
    checkpoint: Checkpoint
    model: Any
    stack: Stack = field(repr=False)
    texts: Mapping[str, list[str]] = field(repr=False)

    @cached_property
    def store(self) -> BlockStore:
        """Blocks of the teacher's students."""
        return BlockStore(self.checkpoint, self.stack)

    def reference(self, rows: Tensor) -> Reference:
        """The teacher on rows of tokens."""
        return reference(self.checkpoint, self.stack, rows, self.store)

    def rows(self, split: str, tokens: int, length: int = 128, seed: int | None = None) -> Tensor:
        """Packed rows [rows, length] of a split."""
        chosen = self.settings.seed if seed is None else seed
        return pack(self.texts[split], load_tokenizer(self.path), length, tokens, chosen)


def arguments(document: str, model: str, **more: Mapping[str, Any]) -> argparse.Namespace:
    """The flags of a benchmark: those all share, and its own as ``name=add_argument's options``."""
    parser = argparse.ArgumentParser(description=document.partition("\n")[0])
    parser.add_argument("--model", default=model, help="teacher (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="JSONL text; default: the embedded one")
    parser.add_argument("--eval-data", type=Path, help="JSONL text of the final figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="for the JSON")
    for name, options in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser.parse_args()


def subject(settings: argparse.Namespace) -> Subject:
    """The teacher in fp32 and its texts by split."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    path = resolve_model(settings.model)
    texts: dict[str, list[str]] = dict(split_documents(read_documents(settings.data)).items())
    if settings.eval_data:
        texts["final"] = read_documents(settings.eval_data)
    checkpoint = open_checkpoint(path)
    return Subject(settings, path, checkpoint, load_model(path), stack_of(checkpoint), texts)


@contextmanager
def metered(model: Any, cost: Cost) -> Iterator[None]:
    """Count what runs through the model's layers, replays by their share, backward passes twice."""
    layers = model.model.layers
    share = 1 / len(layers)

    def hook(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        tokens = share * hidden.shape[0] * hidden.shape[1]
        cost.add(tokens)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: cost.add(BACKWARD * tokens))

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def report(
    name: str,
    settings: argparse.Namespace,
    facts: Mapping[str, Any],
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Write ``NAME.json`` with settings, facts and rows, and print the rows as a table.

    ``columns`` are keys of the rows; numbers are shown with four significant digits.
    """
    said = {key: str(value) for key, value in vars(settings).items() if value is not None}
    settings.out.mkdir(parents=True, exist_ok=True)
    file = settings.out / f"{name}.json"
    about = {"model": note_of(resolve_model(settings.model)), "threads": torch.get_num_threads()}
    write_json(file, {"settings": said, "facts": about | dict(facts), "rows": list(rows)})
    table(name, list(columns), [[shown(row.get(key)) for key in columns] for row in rows])
    for key, value in facts.items():
        note(f"{key}: {shown(value)}")
    note(f"written: {file}")


def shown(value: Any) -> str:
    """A cell: numbers short, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has been."""
        return time.monotonic() - self.begun
