"""Settings that people write: YAML files and JSON, read strictly into pydantic models."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from compress.core.errors import InputError

# How pydantic calls a key that is not known, of a model and of a dataclass.
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
Model = TypeVar("Model", bound=BaseModel)


def read_settings(path: Path, model: type[Model], what: str) -> Model:
    """The YAML file of a model, called ``what``; keys that are not there have their defaults.

    Raises:
        InputError: no such file, no YAML, no keys, or as ``checked`` says.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    keys = [name for name, field in model.model_fields.items() if field.is_required()]
    if settings is None and not keys:
        settings = {}
    if not isinstance(settings, dict):
        known = ", ".join(keys or list(model.model_fields)[:4])
        raise InputError(f"{path} holds no keys; a {what} has {known}, ...")
    return checked(settings, model, str(path))


def checked(settings: dict[str, Any], model: type[Model], source: str) -> Model:
    """The model of these settings.

    Raises:
        InputError: a key that is not known, with the one that may be meant, or a wrong value.
    """
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise InputError(f"{source}: {first_fault(error, list(keys_of(model)))}") from error


def first_fault(error: ValidationError, known: Sequence[str] = ()) -> str:
    """What is wrong first, in words; ``known`` keys are offered where one is not."""
    # A key that is not known explains another that is missing, not the other way round.
    first = min(error.errors(), key=lambda found: found["type"] not in UNKNOWN)
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in UNKNOWN:
        close = get_close_matches(str(first["loc"][-1]), known, n=1)
        listed = f"; known: {', '.join(known)}" if known else ""
        return f"unknown key {where!r}" + (f"; did you mean {close[0]}?" if close else listed)
    if first["type"].startswith("missing"):
        return f"{where} is missing"
    reason = str(first["msg"]).removeprefix("Value error, ")
    return f"{where} is {first['input']!r:.80}: {reason}" if where else reason


def keys_of(model: type[BaseModel]) -> Iterator[str]:
    """The keys of a model and of the models in it."""
    for name, field in model.model_fields.items():
        yield name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys_of(kind)
