"""Blockwise local distillation of a candidate, resumable layer by layer."""

import json
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from compress.core.files import fingerprint, write_json
from compress.core.terminal import note, progress
from compress.model.architecture import block_name, to_json
from compress.model.checkpoint import in_bf16, open_checkpoint, write_checkpoint
from compress.model.layout import Parameter
from compress.model.tensor_files import save_tensors
from compress.run.session import Session
from compress.student.candidate import Candidate, block_keep
from compress.sweep.placement import Placement
from compress.sweep.stack import Stack
from compress.train.distill import DistillSettings
from compress.train.local import Learned, Pair, local_distill

STUDENT = "student"
# Normalized errors of every trained block, before and after.
ERRORS = "blocks.json"


def localized(
    session: Session, candidate: Candidate, cut: Path, home: Path, tokens: int,
    inputs: Mapping[str, Any],
) -> Path:  # fmt: skip
    """The BF16 student of ``cut`` after so many tokens of local distillation, made if not yet.

    It is in ``home``, with what its blocks gained; layers that are done are not done again.
    ``inputs`` are what decides it.
    """
    directory, recipe = home / STUDENT, session.recipe
    stage = f"local:{candidate.id}"
    if session.run.stage_done(stage, inputs, directory):
        return directory
    parts = home / f"parts-{fingerprint(inputs)[:12]}"
    settings = DistillSettings(
        tokens=tokens, batch_tokens=recipe.distill_batch_tokens,
        learning_rate=recipe.learning_rate, seed=recipe.seed,
    )  # fmt: skip
    known = trained_layers(session, candidate, cut, parts, settings)
    checkpoint = open_checkpoint(cut)
    better = {name: tensor for one in known.values() for name, tensor in one.tensors.items()}
    tensors = ((name, better.get(name, tensor)) for name, tensor in checkpoint.items())
    write_checkpoint(
        directory,
        in_bf16(chain(tensors, checkpoint.mtp()), candidate.architecture),
        checkpoint.config,
        session.path,
        to_json(candidate.architecture),
    )
    say(session, candidate, known, home)
    session.run.sign(stage, inputs)
    for left in home.glob("parts-*"):
        shutil.rmtree(left)
    return directory


def trained_layers(
    session: Session, candidate: Candidate, cut: Path, parts: Path, settings: DistillSettings
) -> dict[int, Learned]:
    """What the blocks of every layer have learned; each layer's is in ``parts`` once it is done."""
    checkpoint, pairs = open_checkpoint(cut), changed(session, candidate)
    teacher, place = session.stack, session.placement

    def read(parameter: Parameter) -> Tensor:
        # What is in fp32 already would be trained in the mapped file's own pages.
        return checkpoint[parameter.name].clone()

    # fp32 weights, one layer at a time.
    student = Stack(
        checkpoint.config, candidate.architecture, read, Placement(place.device, memory=0)
    )
    rows = session.training_rows(settings.tokens, session.recipe.distill_length)
    known = {int(file.stem): read_learned(file) for file in sorted(parts.glob("*.safetensors"))}
    with progress("distill: blocks", len(pairs)) as advance:
        advance(sum(len(one.errors) for one in known.values()), "")
        learning = local_distill(
            teacher, student, pairs, rows, settings, parts, candidate.keep.get("hidden"), known
        )
        for layer, found in learning:
            save_learned(found, parts / f"{layer:05}.safetensors")
            known[layer] = found
            advance(len(found.errors), f"layer {layer}")
    return known


def changed(session: Session, candidate: Candidate) -> list[Pair]:
    """The blocks that are not their teacher's: cut, repaired, or reading fewer channels."""
    blocks, numbers = session.architecture.blocks, candidate.keep["blocks"].tolist()
    return [
        Pair(number, own)
        for own, number in enumerate(numbers)
        if block_keep(candidate.keep, blocks[number]) or number in candidate.repaired
    ]


def save_learned(found: Learned, file: Path) -> None:
    """Write what a layer has learned, whole or not at all."""
    save_tensors(found.tensors, file, {"errors": json.dumps(list(found.errors.items()))})


def read_learned(file: Path) -> Learned:
    """What ``save_learned`` wrote."""
    opened: Any = safe_open
    errors = json.loads(opened(file, framework="pt").metadata()["errors"])
    return Learned({number: (before, after) for number, (before, after) in errors}, load_file(file))


def say(session: Session, candidate: Candidate, known: Mapping[int, Learned], home: Path) -> None:
    """Write what every block gained, and say it in one line."""
    errors = dict(one for found in known.values() for one in found.errors.items())
    blocks = session.architecture.blocks
    rows = [{"block": block_name(blocks[number]), "before": errors[number][0],
             "after": errors[number][1]} for number in sorted(errors)]  # fmt: skip
    write_json(home / ERRORS, rows)
    if errors:
        closer = sum(after < before for before, after in errors.values())
        begun = sum(before for before, _ in errors.values()) / len(errors)
        reached = sum(min(one) for one in errors.values()) / len(errors)
        note(
            f"{candidate.id}: {closer} of {len(rows)} blocks are closer to their teacher's; mean "
            f"normalized error {begun:.4f} before, {reached:.4f} after"
        )
