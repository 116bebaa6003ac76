"""The recipe of a run: every setting, its default and what it means. Flags equal its keys."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.core.errors import InputError
from compress.core.files import write_text
from compress.core.quantities import parse_bytes, parse_count, parse_share, parse_tokens
from compress.export.targets import Target
from compress.memory.devices import find_device
from compress.memory.footprint import Deployment, SsmFormat
from compress.student.candidate import Ranking


class Recipe(BaseModel):
    """Everything that decides what a run computes.

    The same recipe gives the same candidates. Several workers begin with the same ones; what they
    propose later depends on who finishes when.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    model: str = Field("embedded", description="Teacher: a directory, a short name or a hub id.")
    budget: str | None = Field(
        None,
        description="Bytes the student may take (160MiB), or a share of the teacher's (70%); "
        "several, separated by commas, are a sweep.",
    )
    active_parameters: str | None = Field(
        None, description="Parameters that one token may use at most (1.2B)."
    )
    context: str = Field("2k", description="Context the student is served with (2k, 128k, 1M).")
    batch_size: int = Field(1, ge=1, description="Sequences served at once.")
    ssm_format: SsmFormat = Field("fp32", description="Format of the Mamba states.")
    workspace: str = Field("0", description="Bytes a server needs besides model and caches (1GiB).")
    device: str | None = Field(None, description="Device preset, such as a10g or 8xh100.")
    space: str | None = Field(
        None,
        description="Search space: a shipped one or a YAML file; default: formats where they "
        "suffice, else joint.",
    )
    target: Target = Field("compress", description="Loader the student has to work with.")
    data: str | None = Field(
        None,
        description="JSONL file of texts to score, select and train on; default: embedded.",
    )
    eval_data: str | None = Field(None, description="JSONL file for the final table instead.")
    seed: int = Field(0, ge=0, description="Seed of every random draw.")
    sequence_length: int = Field(128, ge=2, description="Tokens of a sequence to select on.")
    score_tokens: int = Field(2048, ge=1, description="Tokens for the contribution matrix.")
    score_length: int = Field(64, ge=2, description="Tokens of a sequence to score on.")
    draws: int = Field(8, ge=1, description="Label draws per scored sequence.")
    replay_tokens: int = Field(
        1024,
        ge=1,
        description="Most tokens to replay removals, deep cuts and layers on.",
    )
    replay_share: float = Field(
        0.25, gt=0, lt=1,
        description="Besides removals, cuts of an axis to this share are replayed.",
    )  # fmt: skip
    repair_tokens: int = Field(
        4096, ge=2, description="Tokens that output projections are refitted on, if the space may."
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
        1, ge=1, description="Processes that measure candidates; each holds its own models."
    )
    finalists: int = Field(3, ge=1, description="Candidates to distil shortly before choosing one.")
    short_distill_tokens: int = Field(16384, ge=0, description="Training tokens of a finalist.")
    distill_tokens: int = Field(262144, ge=1, description="Training tokens of the chosen student.")
    distill_length: int = Field(256, ge=2, description="Tokens of a training sequence.")
    distill_batch_tokens: int = Field(1024, ge=1, description="Tokens of an optimizer step.")
    learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate of distillation.")

    @property
    def budgets(self) -> tuple[str, ...]:
        """The budgets of a sweep as written; one, or none, without commas."""
        return tuple(part.strip() for part in (self.budget or "").split(",") if part.strip())

    @property
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


def check(settings: dict[str, Any], source: str) -> Recipe:
    """The recipe of these settings; InputError names the first wrong key or value."""
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            close = get_close_matches(key, Recipe.model_fields, n=1)
            hint = (
                f"did you mean {close[0]}?" if close else f"known: {', '.join(Recipe.model_fields)}"
            )
            raise InputError(f"{source}: unknown key {key!r}; {hint}") from error
        raise InputError(f"{source}: {key} is {first['input']!r}: {first['msg']}") from error
    # Quantities are kept as written, but a wrong one is refused here, not in a later stage.
    _ = recipe.deployment
    if recipe.budget is not None and not recipe.budgets:
        parse_bytes(recipe.budget, "budget")
    for budget in recipe.budgets:
        if parse_share(budget) is None:
            parse_bytes(budget, "budget")
        if recipe.budgets.count(budget) > 1:
            raise InputError(f"{source}: budget {recipe.budget!r} names {budget} twice")
    if recipe.active_parameters is not None:
        parse_count(recipe.active_parameters, "active_parameters")
    if recipe.device is not None:
        find_device(recipe.device)
    return recipe


def read_recipe(path: Path) -> Recipe:
    """The recipe of a YAML file; keys that are not there have their defaults."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if settings is not None and not isinstance(settings, dict):
        raise InputError(f"{path} holds no keys; a recipe looks like: budget: 70%")
    return check(settings or {}, str(path))


def to_yaml(recipe: Recipe) -> str:
    """Every key with its value, in the order of the class; ``read_recipe`` gives it back."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the whole recipe atomically."""
    write_text(path, to_yaml(recipe))
