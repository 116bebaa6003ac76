"""Loops that distil a step of 2 x 2,048 tokens, each in a process of its own (``distil``).

python -m benchmarks.distil_loops TEACHER STUDENT full|ours|again
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from benchmarks.common import report
from benchmarks.scale import watched
from compress.core.terminal import note
from compress.model.build import load_model
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.model.modules import final_hidden, head_of
from compress.sweep.placement import REFERENCE, Placement
from compress.sweep.stack import stack_of
from compress.sweep.states import stored_states
from compress.train.distill import DistillSettings, Lesson, Teacher, distill
from compress.train.optimizers import BETAS
from compress.train.precision import numerics_of

LENGTH = 2048
# So little that every layer is computed again in the backward pass.
TIGHT_BYTES = 2 * 2**30
LOOPS = {"full": "full logits", "ours": "ours", "again": "ours, layers computed again"}


def loops(settings: Any, teacher: Checkpoint, student: Path, home: Path) -> None:
    """Every loop in its process, and the gradients of both on the same rows."""
    rows = []
    base = [sys.executable, "-m", "benchmarks.distil_loops", str(teacher.path)]
    for loop, name in LOOPS.items():
        used = watched([*base, str(student), loop], home)
        said = json.loads((home / "log").read_text().splitlines()[-1])
        rows.append({"loop": name, **said, "GiB": used["peak_gib"]})
        rows[-1]["memory"] = rows[-1]["GiB"] / rows[0]["GiB"]
        rows[-1]["speed"] = rows[0]["CPU s a step"] / rows[-1]["CPU s a step"]
        note(json.dumps(rows[-1]))
    facts = differences(teacher, student, home)
    columns = ("loop", "CPU s a step", "tokens a CPU s", "GiB", "memory", "speed", "CPU s stored")
    report("distil_loops", settings, facts, columns, rows)


def measured_loop(loop: str, path: Path, student: Path) -> dict[str, float]:
    """CPU seconds of a step of a loop; of ours also those of storing its states."""
    torch.set_num_threads(1)
    checkpoint, stored, marks = open_checkpoint(path), 0.0, list[float]()
    vocab, shape = checkpoint.architecture.vocab, (2, LENGTH)
    rows = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0))

    def mark(*_: Any) -> None:
        marks.append(time.process_time())

    if loop == "full":
        models = load_model(path), load_model(student)
        mark()
        full_logits(*models, rows, mark)
    else:
        place = Placement(memory=TIGHT_BYTES if loop == "again" else None)
        stack = stack_of(checkpoint, place)
        with tempfile.TemporaryDirectory() as folder:
            begun = time.process_time()
            states = stored_states(stack, rows, Path(folder) / "states.safetensors")
            stored = time.process_time() - begun
            stack.release()
            asked = DistillSettings(
                tokens=rows.numel(), batch_tokens=2 * LENGTH, learning_rate=1e-4
            )
            model = load_model(student)
            with stack.head() as head:
                mark()
                distill(Teacher(states, head), model, rows, asked, place, progress=mark)
    seconds = marks[-1] - marks[-2]
    return {"CPU s a step": seconds, "tokens a CPU s": 2 * LENGTH / seconds, "CPU s stored": stored}


def full_logits(teacher: Any, student: Any, rows: Tensor, mark: Callable[[], None]) -> None:
    """The loop of a trainer that takes the logits of both models."""
    student.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, betas=BETAS)
    for ids in torch.split(rows, 2):
        torch.autograd.backward(full_kl(teacher, student, ids))
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mark()


def full_kl(teacher: Any, student: Any, ids: Tensor) -> Tensor:
    """Mean forward KL over tokens, of full logits."""
    with torch.no_grad():
        expected = teacher(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    found = student(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    return kl_div(found, expected, reduction="sum", log_target=True) / ids.numel()


def differences(teacher: Checkpoint, student: Path, home: Path) -> dict[str, float]:
    """How far our loss and gradient are from those of full logits: live states, and stored ones."""
    shape, whole = (2, 128), load_model(teacher.path)
    rows = torch.randint(
        teacher.architecture.vocab, shape, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        live = final_hidden(whole, rows)
    stored = stored_states(stack_of(teacher), rows, home / "stored.safetensors")
    model = load_model(student).requires_grad_(True)
    weights, head, index = list(model.parameters()), head_of(whole), torch.arange(2)
    expected = full_kl(whole, model, rows)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, weights)])
    facts: dict[str, float] = {}
    for name, states in (("live", live), ("stored in BF16", stored)):
        found = Lesson(model, head, REFERENCE, numerics_of(None, False, REFERENCE))(
            rows, states[index]
        )
        own = torch.cat([g.flatten() for g in torch.autograd.grad(found, weights)])
        facts[f"KL, {name}, relative difference"] = abs(found.item() / expected.item() - 1)
        facts[f"gradient, {name}, relative difference"] = float(
            (own - gradient).norm() / gradient.norm()
        )
    return facts


if __name__ == "__main__":
    print(json.dumps(measured_loop(sys.argv[3], Path(sys.argv[1]), Path(sys.argv[2]))))
