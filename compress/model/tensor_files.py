"""Writing safetensors: whole or not at all, readable by whom the user lets read."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from compress.core.files import PARTIAL


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file whole or not at all, with the permissions of one that ``open`` makes here."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + PARTIAL)
    # What a killed process left may have other permissions.
    partial.unlink(missing_ok=True)
    try:
        partial.touch()
        plain = partial.stat().st_mode
        save_file(dict(tensors), partial, dict(metadata) if metadata else None)
        # safetensors 0.8 makes files that only their owner reads: a server is another user.
        partial.chmod(plain)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
