"""What the stages of one run share: the teacher, its text and where things are."""

import re
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.core.errors import InputError
from compress.core.files import digests
from compress.export.targets import loader_of
from compress.measure.kl import Reference, reference
from compress.memory.budget import Budget, resolve_budget, teacher_bytes
from compress.memory.stored import AsStored, as_stored
from compress.model.architecture import Architecture, without_formats
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.model.config import read_config
from compress.model.families import count_active
from compress.model.families.wrapper import text_note
from compress.model.find import is_named, note_of, resolve_model
from compress.model.weights import planned_architecture
from compress.run.directory import Run
from compress.run.recipe import Recipe
from compress.student.assemble import BlockStore
from compress.sweep.placement import Placement, placement
from compress.sweep.stack import Stack, served_as, stack_of
from compress.text.documents import read_documents
from compress.text.packing import pack
from compress.text.sources import fetch_text, is_hub_text, text_files
from compress.text.splits import Split, split_documents
from compress.text.tokenizer import load_tokenizer, render_chat

# What sessions of one teacher and text, whatever their budget and deployment, load once.
SHARED = (
    *("path", "files", "checkpoint", "architecture", "placement", "stack", "store"),
    *("tokenizer", "splits"),
)
# Of a teacher's files besides its weights, those that decide what it computes of a text.
TEACHER = ("config.json", "tokenizer.json", "chat_template.jinja")
# Digests of the files that a run was made from.
DIGESTS = "digests.json"


@dataclass(frozen=True)
class Session:
    """A run and its recipe; everything heavy is loaded when first asked for."""

    run: Run
    recipe: Recipe

    @cached_property
    def path(self) -> Path:
        """Directory of the teacher."""
        return resolve_model(self.recipe.model, self.recipe.revision)

    @cached_property
    def files(self) -> dict[str, str]:
        """The sha256 of every file of the teacher that decides what it computes, by name."""
        named = {*self.path.glob("*.safetensors*"), *map(self.path.joinpath, TEACHER)}
        files = sorted(file for file in named if file.is_file())
        found = digests(files, self.run.path / DIGESTS)
        return dict(zip((file.name for file in files), found.values(), strict=True))

    @property
    def name(self) -> str:
        """What the teacher is called: its name or hub id, or the last part of its path."""
        name = self.recipe.model
        return name if is_named(name) else Path(name).name

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The teacher on disk; a quantized one comes dequantized."""
        return open_checkpoint(self.path)

    @cached_property
    def architecture(self) -> Architecture:
        """The teacher's, in BF16."""
        return without_formats(planned_architecture(self.path, read_config(self.path)))

    @cached_property
    def whole(self) -> Architecture:
        """A student that loses nothing but what predicts further tokens, where that is dropped.

        InputError where that is to be kept and there is none.
        """
        architecture, asked = self.architecture, self.recipe.mtp
        if asked == "keep" and not architecture.mtp:
            raise InputError(f"--mtp keep: {self.path} has no layers that predict further tokens")
        loader = loader_of(self.recipe.target, architecture.family)
        keep = loader.mtp if asked is None else asked == "keep"
        return architecture if keep else replace(architecture, mtp=())

    @cached_property
    def placement(self) -> Placement:
        """Where the work is done."""
        return placement(self.recipe.compute, self.recipe.memory_bytes)

    @cached_property
    def stack(self) -> Stack:
        """The teacher as its layers, on the placement; an export with its KV cache as served."""
        return stack_of(self.checkpoint, self.placement, served_as(self.path))

    @cached_property
    def store(self) -> BlockStore:
        """Blocks of the teacher's students."""
        return BlockStore(self.checkpoint, self.stack)

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's."""
        return load_tokenizer(self.path)

    @cached_property
    def budget(self) -> Budget:
        """The limit that binds."""
        asked = self.recipe.deployment, self.recipe.limit, self.recipe.preset
        limit = resolve_budget(self.whole, *asked)
        if limit is None:
            raise InputError("a search needs --budget (160MiB, 70%) or --device (a10g)")
        return limit

    def deployed(self, **settings: Any) -> "Session":
        """This session with another budget or deployment; what it has loaded they share."""
        found = Session(self.run, self.recipe.changed(**settings))
        vars(found).update({key: value for key, value in vars(self).items() if key in SHARED})
        return found

    def at_each_budget(self) -> "list[Session]":
        """This session with one budget of its sweep each."""
        budgets = self.recipe.budgets
        return [self] if len(budgets) < 2 else [self.deployed(budget=budget) for budget in budgets]

    @property
    def teacher_is_small(self) -> bool:
        """Whether the teacher is within the bound on active parameters, if there is one."""
        most = self.recipe.active
        return most is None or count_active(self.architecture) <= most

    @property
    def teacher_bytes(self) -> int:
        """The teacher in the same deployment: with BF16 weights and a 16-bit cache."""
        return teacher_bytes(self.whole, self.recipe.deployment)

    @cached_property
    def quantized(self) -> AsStored | None:
        """What a quantized teacher is on disk."""
        return as_stored(self.path, read_config(self.path))

    @property
    def served_bytes(self) -> int:
        """The teacher in the same deployment as it is: quantized, if it is."""
        if self.quantized is None or self.quantized.weights is None:
            return self.teacher_bytes
        return self.quantized.served(self.architecture, self.recipe.deployment).total

    @property
    def note(self) -> str:
        """What a reader must know about the teacher, such as how it was obtained."""
        read = f"dequantized from {self.quantized.formats}" if self.quantized else ""
        notes = note_of(self.path), text_note(read_config(self.path)), read
        return "; ".join(note for note in notes if note)

    @cached_property
    def splits(self) -> dict[Split, list[str]]:
        """Documents by split; ``eval_data`` replaces the final one."""
        recipe, render = self.recipe, self.render
        splits = split_documents(read_documents(self.source(recipe.data), render))
        if recipe.eval_data:
            splits["final"] = read_documents(self.source(recipe.eval_data), render)
        return splits

    def source(self, data: str | None) -> Path | None:
        """The file or directory of a text; of a hub data set the copy that the run keeps."""
        if data is None:
            return None
        if not is_hub_text(data):
            return Path(data)
        slug = re.sub(r"[^\w.-]+", "-", data)
        return fetch_text(data, self.run.path / "text" / f"{slug}.jsonl")

    def render(self, messages: list[Any]) -> str:
        """Messages by the teacher's chat template."""
        return render_chat(self.tokenizer, messages)

    def rows(self, split: Split, tokens: int, length: int | None = None) -> Tensor:
        """Packed rows of a split, [rows, sequence length]."""
        return self.packed(split, tokens, length or self.recipe.sequence_length)

    def packed(self, split: Split, tokens: int | None, length: int) -> Tensor:
        """Rows of so many tokens of a split, or of all of them, [rows, length]."""
        recipe, texts, vocab = self.recipe, self.splits[split], self.architecture.vocab
        file = (split == "final" and recipe.eval_data) or recipe.data or "the embedded text"
        what = f"split {split} of {file}"  # as errors call it
        return pack(texts, self.tokenizer, length, tokens, recipe.seed, what, vocab)

    def reference(self, rows: Tensor) -> Reference:
        """The teacher on rows of tokens, which students are compared with."""
        return reference(self.checkpoint, self.stack, rows, self.store)

    def training_rows(self, tokens: int, length: int) -> Tensor:
        """Rows to train on: as many as ``tokens`` asks for, or all that there are."""
        # Far more than a token per 8 characters: then there is no need to tokenize everything.
        plenty = sum(len(text) for text in self.splits["train"]) > 8 * tokens
        return self.packed("train", tokens if plenty else None, length)

    def identity(self) -> dict[str, Any]:
        """What recognizes the same teacher and text: settings, and what is in the files.

        ``eval_data`` is not in it: no stage but the evaluation reads it.
        """
        data = self.source(self.recipe.data)
        return {
            "teacher": self.files,
            "text": list(digests(text_files(data), self.run.path / DIGESTS).values())
            if data else f"embedded {sys.version_info[:2]}",
            "seed": self.recipe.seed,
            "sequence_length": self.recipe.sequence_length,
        }  # fmt: skip
