"""What tests share. It imports no torch: the process that only hands out tests reads it too."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Tests run in two processes (pyproject.toml): a thread each is what two cores have.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from compress import cli
from compress.core.files import read_json, write_json
from compress.run.recipe import read_recipe, write_recipe

# Makes what all processes of a test run share, and says where it is; made once, by whom needs it
# first, while the others wait. It must not be changed: tests work on copies.
Shared = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    (base / "shared").mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        path, done = base / "shared" / name, base / "shared" / f"{name}.done"
        with (base / "shared" / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(path)
                done.touch()
        return path

    return made


@pytest.fixture(scope="session")
def tiny_llama(shared: Shared) -> Path:
    from tiny_models import LLAMA, write_tiny

    return shared("llama", lambda path: write_tiny(path, LLAMA))


@pytest.fixture(scope="session")
def tiny_hybrid(shared: Shared) -> Path:
    from tiny_models import HYBRID, write_tiny

    return shared("hybrid", lambda path: write_tiny(path, HYBRID))


@pytest.fixture(scope="session", params=["llama", "hybrid"])
def tiny(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


@pytest.fixture(scope="session")
def text_file(shared: Shared) -> Path:
    """JSONL text that fills every split of a tiny run."""
    from tiny_models import write_words

    return shared("text.jsonl", write_words)


@pytest.fixture(scope="session")
def embedded_text(shared: Shared) -> list[str]:
    """The embedded text as one process read it, which takes seconds."""
    from compress.text.documents import read_documents

    file = shared("embedded.json", lambda file: write_json(file, read_documents(None)))
    return cast(list[str], read_json(file))


def search_with(shared: Shared, name: str, model: Path, text: Path, *more: str) -> Path:
    """A run after its search, made by the command; tests work on copies."""
    from tiny_models import search_arguments

    def search(run: Path) -> None:
        cli.app([*search_arguments(model, run, text), *more], standalone_mode=False)

    return shared(name, search)


@pytest.fixture(scope="session")
def searched(tiny_hybrid: Path, text_file: Path, shared: Shared) -> Path:
    """A run after its search, with candidates of every kind."""
    return search_with(shared, "searched", tiny_hybrid, text_file)


@pytest.fixture(scope="session")
def alone(tiny_hybrid: Path, text_file: Path, shared: Shared) -> Path:
    """The searched run without baselines: resuming and changed settings are the same for them."""
    return search_with(shared, "alone", tiny_hybrid, text_file, "--baselines", "none")


def copy_of(run: Path, to: Path) -> Path:
    """A copy of a run whose distillation is short."""
    shutil.copytree(run, to)
    write_recipe(read_recipe(to / "recipe.yaml").changed(distill_tokens=512), to / "recipe.yaml")
    return to


@pytest.fixture
def run_copy(searched: Path, tmp_path: Path) -> Path:
    return copy_of(searched, tmp_path / "run")


@pytest.fixture
def alone_copy(alone: Path, tmp_path: Path) -> Path:
    return copy_of(alone, tmp_path / "run")
