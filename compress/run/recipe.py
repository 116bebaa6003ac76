"""The recipe of a run: every setting, its default and what it means. Flags equal its keys."""

import os
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from compress.core.errors import InputError
from compress.core.files import write_text
from compress.core.quantities import parse_budget, parse_bytes, parse_count, parse_tokens
from compress.core.settings import checked, read_settings
from compress.export.targets import Target
from compress.formats.table import Rounding
from compress.memory.devices import Compute, Device, find_device
from compress.memory.footprint import Deployment, SsmFormat
from compress.memory.latency import SpeedBound, speed_bound
from compress.model.find import is_named, pinned_revision
from compress.run.directory import Run
from compress.searches.space import asked_kinds, shipped_spaces
from compress.student.candidate import Ranking
from compress.text.sources import is_hub_text
from compress.train.recipes import OptimizerName, PrecisionName, terms_of


def absolute(path: str) -> str:
    """A path that means the same in every directory; ``~`` is the home."""
    return os.path.abspath(os.path.expanduser(path))


def located(model: str) -> str:
    """A model's name as recipes hold it: one of ours or a hub id as it is, a path absolute."""
    return model if is_named(model) else absolute(model)


def drawn(space: str | None) -> str | None:
    """A space's name as recipes hold it: the path of a file that is there is absolute."""
    if space is None or space in shipped_spaces() or not os.path.isfile(absolute(space)):
        return space
    return absolute(space)


def kept(text: str | None) -> str | None:
    """A source of text as recipes hold it: one of the hub as it is, a path absolute."""
    return text if text is None or is_hub_text(text) else absolute(text)


# Fields as they are kept: paths mean the same in every directory.
Model = Annotated[str, AfterValidator(located)]
Space = Annotated[str | None, AfterValidator(drawn)]
Text = Annotated[str | None, AfterValidator(kept)]


class Recipe(BaseModel):
    """Everything that decides what a run computes.

    The same recipe gives the same candidates. Several processes begin with the same ones; what they
    propose later depends on who finishes when. Paths are absolute, so that a run can be continued
    from every directory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    model: Model = Field(
        "embedded",
        description="Teacher: a directory, a short name or a hub id (owner/name@revision).",
    )
    revision: str | None = Field(
        None, description="Commit, branch or tag of a hub model; a run keeps its commit."
    )
    budget: str | None = Field(
        None,
        description="Bytes the student may take (160MiB), or a share of the teacher's (70%); "
        "several, separated by commas, are a sweep.",
    )
    active_parameters: str | None = Field(
        None, description="Parameters that one token may use at most (1.2B)."
    )
    profile: str | None = Field(
        None, description="What compress profile wrote: seconds of blocks on the serving machine."
    )
    min_tokens_per_second: float | None = Field(
        None, gt=0, description="Tokens a second that a student generates at least, by the profile."
    )
    max_latency: float | None = Field(
        None, gt=0, description="Seconds that the profile's prompt takes a student at most."
    )
    context: str = Field("2k", description="Context the student is served with (2k, 128k, 1M).")
    batch_size: int = Field(1, ge=1, description="Sequences served at once.")
    ssm_format: SsmFormat = Field(
        "fp32", description="Format of recurrent states (Mamba, delta nets)."
    )
    workspace: str = Field("0", description="Bytes a server needs besides model and caches (1GiB).")
    device: str | None = Field(None, description="Device preset, such as a10g or 8xh100.")
    space: Space = Field(
        None,
        description="Search space: a shipped one or a YAML file; default: formats where they "
        "suffice, else joint.",
    )
    baselines: str | None = Field(
        None,
        description="What is compared with at the same bytes: all, none, or kinds separated by "
        "commas; default: all, of a space that is named those that are a part of it.",
    )
    target: Target = Field(
        "vllm",
        description="What the student is served with: only what it loads is searched. compress "
        "takes everything and is read by compress.load alone.",
    )
    reader_python: Text = Field(
        None, description="A Python that has the target's server, to read exports back with."
    )
    mtp: Literal["keep", "drop"] | None = Field(
        None,
        description="What becomes of layers that predict further tokens (MTP): kept in BF16, their "
        "bytes and caches counted, cut along the hidden size, other widths that they have left "
        "whole, and not trained; or dropped. vllm drafts with them, transformers and compress "
        "ignore them. Default: kept for a target that uses them.",
    )
    data: Text = Field(
        None,
        description="Texts to score, select and train on: JSONL with a text or messages in each "
        "row, Parquet, plain text, gzip of these, a directory of them, or hf:owner/name[:split]; "
        "default: embedded.",
    )
    eval_data: Text = Field(None, description="Texts for the final table instead.")
    seed: int = Field(0, ge=0, description="Seed of every random draw.")
    compute: Compute = Field("auto", description="Where the work is done; auto is a GPU if any.")
    memory: str | None = Field(
        None,
        description="What the work may take there (20GiB); models that need more are read "
        "layer by layer. Default: all that is free.",
    )
    sequence_length: int = Field(128, ge=2, description="Tokens of a sequence to select on.")
    score_tokens: int = Field(2048, ge=1, description="Tokens for the contribution matrix.")
    score_length: int = Field(64, ge=2, description="Tokens of a sequence to score on.")
    draws: int = Field(8, ge=1, description="Label draws per scored sequence.")
    replay_tokens: int = Field(
        1024, ge=1, description="Most tokens to replay removals and layers on."
    )
    repair_tokens: int = Field(
        4096, ge=2, description="Tokens that output projections are refitted on, if the space may."
    )
    rounding: Rounding = Field(
        "second-order",
        description="How weights are rounded to their formats: to nearest, with scales of least "
        "error on what they read (scales), or by that column by column (second-order).",
    )
    calibration_tokens: int = Field(
        8192, ge=1, description="Training tokens that weights are rounded on."
    )
    select_tokens: int = Field(2048, ge=1, description="Tokens that a trial is measured on.")
    final_tokens: int = Field(16384, ge=1, description="Tokens of the final table.")
    ranking: Ranking = Field(
        "contribution",
        description="What decides which units stay: ours; activation (Minitron and Minitron-SSM); "
        "or router (experts by router-weighted saliency, the rest as ours).",
    )
    reselect_rounds: int = Field(
        2,
        ge=0,
        description="Rounds in which a finalist's units are chosen again, given what else it lost; "
        "0 keeps those of the ranking, as other rankings than ours always do.",
    )
    trials: int = Field(100, ge=1, description="Candidates to measure.")
    workers: int = Field(
        1,
        ge=1,
        description="Processes that measure candidates; each holds its own models. The same "
        "command on a run that is being searched adds one.",
    )
    finalists: int = Field(3, ge=1, description="Candidates to distil shortly before choosing one.")
    short_distill_tokens: int = Field(16384, ge=0, description="Training tokens of a finalist.")
    local_tokens: int = Field(
        0,
        ge=0,
        description="Tokens on which every cut block of the chosen student is trained towards its "
        "teacher's block, alone, before distillation.",
    )
    distill_tokens: int = Field(
        262144,
        ge=0,
        description="Training tokens of the chosen student; meanwhile its teacher's states take "
        "2 bytes x hidden size for each on disk.",
    )
    distill_length: int = Field(256, ge=2, description="Tokens of a training sequence.")
    distill_batch_tokens: int = Field(1024, ge=1, description="Tokens of an optimizer step.")
    learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate of distillation.")
    optimizer: OptimizerName = Field(
        "adamw",
        description="What trains students: AdamW in fp32, with moments in 8 bits (needs torchao), "
        "or with fp32 weights and moments on the CPU beside a GPU (offload).",
    )
    loss: str = Field(
        "kl",
        description="What distillation brings down: a sum of kl (teacher to student), reverse-kl, "
        "ce (the text itself), cosine and mse (final hidden states), with weights: kl + 0.1*ce.",
    )
    validate_every: int = Field(
        0,
        ge=0,
        description="Training tokens between two measurements of KL and nats on training text "
        "that is held out; 0: none.",
    )
    patience: int = Field(
        0,
        ge=0,
        description="Measurements in a row that may be worse than the best before distillation "
        "ends, with what was best; 0: all.",
    )
    precision: PrecisionName | None = Field(
        None,
        description="What the products of a distillation compute in; default: fp32 on a CPU, bf16 "
        "on a GPU.",
    )
    emulate: bool = Field(
        False, description="Compute a precision that this machine has no units for, slowly."
    )

    @model_validator(mode="before")
    @classmethod
    def pinned(cls, settings: Any) -> Any:
        """Settings with the revision that a model's name has behind its @ as the revision."""
        if not isinstance(settings, dict) or not isinstance(settings.get("model"), str):
            return settings
        model, revision = pinned_revision(settings["model"])
        if revision is None:
            return settings
        if settings.get("revision") not in (None, revision):
            raise ValueError(f"{settings['model']} and revision {settings['revision']} differ")
        return {**settings, "model": model, "revision": revision}

    @property
    def budgets(self) -> tuple[str, ...]:
        """The budgets of a sweep as written; one, or none, without commas."""
        return tuple(part.strip() for part in (self.budget or "").split(",") if part.strip())

    @cached_property
    def limits(self) -> tuple[int | Fraction, ...]:
        """The budgets as bytes or shares of the teacher's."""
        return tuple(parse_budget(text) for text in self.budgets)

    @cached_property
    def limit(self) -> int | Fraction | None:
        """The budget of what takes one, if any."""
        if len(self.limits) > 1:
            raise InputError(f"budget {self.budget!r} is a sweep; only a search takes one")
        return self.limits[0] if self.limits else None

    @cached_property
    def speed(self) -> SpeedBound | None:
        """The bound on seconds, if there is one; InputError where there is no profile for it."""
        return speed_bound(self.profile, self.min_tokens_per_second, self.max_latency)

    @cached_property
    def memory_bytes(self) -> int | None:
        """What the work may take, if it is bounded."""
        return None if self.memory is None else parse_bytes(self.memory, "memory")

    @cached_property
    def preset(self) -> Device | None:
        """The device, if one is named."""
        return None if self.device is None else find_device(self.device)

    @cached_property
    def active(self) -> int | None:
        """The most parameters that one token may use; None where they are not bounded."""
        asked = self.active_parameters
        return None if asked is None else parse_count(asked, "active_parameters")

    @cached_property
    def deployment(self) -> Deployment:
        """How the student is served."""
        return Deployment(
            context=parse_tokens(self.context),
            batch_size=self.batch_size,
            ssm_format=self.ssm_format,
            workspace_bytes=parse_bytes(self.workspace, "workspace"),
        )

    def changed(self, **settings: Any) -> "Recipe":
        """A checked copy with other settings."""
        return check(self.model_dump() | settings, "settings")


def near(model: str) -> str:
    """A recipe's model as it can be typed here: a path below this directory without what is above.

    It names the same model.
    """
    short = os.path.relpath(model)
    return short if located(short) == model and not short.startswith("..") else model


def check(settings: dict[str, Any], source: str) -> Recipe:
    """The recipe of these settings; InputError names the first wrong key or value."""
    return complete(checked(settings, Recipe, source), source)


def complete(recipe: Recipe, source: str) -> Recipe:
    """The recipe itself; InputError where one of its quantities is wrong."""
    # Quantities are kept as written, but a wrong one is refused here, not in a later stage.
    _ = recipe.deployment, recipe.active, recipe.speed, recipe.preset, recipe.memory_bytes
    if recipe.budget is not None and not recipe.limits:
        parse_budget(recipe.budget)
    for budget, limit in zip(recipe.budgets, recipe.limits, strict=True):
        if recipe.limits.count(limit) > 1:
            raise InputError(f"{source}: budget {recipe.budget!r} names {budget} twice")
    terms_of(recipe.loss)
    if not (recipe.local_tokens or recipe.distill_tokens):
        raise InputError(f"{source}: local_tokens and distill_tokens are both 0: nothing to train")
    if recipe.baselines not in (None, "all", "none"):
        asked_kinds(recipe.baselines)
    return recipe


def read_recipe(path: Path) -> Recipe:
    """The recipe of a YAML file; keys that are not there have their defaults."""
    return complete(read_settings(path, Recipe, "recipe"), str(path))


def to_yaml(recipe: Recipe) -> str:
    """Every key with its value, in the order of the class; ``read_recipe`` gives it back."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False)


def keep_recipe(recipe: Recipe, run: Run) -> None:
    """Make the recipe that of a run from now on; InputError if the run is of another model."""
    require_model(recipe.model, run)
    write_recipe(recipe, run.path / "recipe.yaml")


def require_model(model: str, run: Run) -> None:
    """InputError if the run exists and is of another model."""
    file = run.path / "recipe.yaml"
    if file.is_file() and (before := read_recipe(file).model) != model:
        raise InputError(f"{run.path} is a run of {before}; take another --run for {model}")


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the whole recipe atomically."""
    write_text(path, to_yaml(recipe))
