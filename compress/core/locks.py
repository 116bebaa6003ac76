"""Locks on files: free when every process that holds one closed it or is dead, however it died."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.core.terminal import note


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The descriptor of a file, which is made where missing; what it locks is free afterwards."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def took(descriptor: int) -> bool:
    """Take the lock of a file if nobody holds it, alone or shared; whether it was free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def share(descriptor: int) -> None:
    """Hold the lock beside others who share it; wait for one who holds it alone."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)


@contextmanager
def locked(path: Path, busy: str = "") -> Iterator[None]:
    """Hold the lock of a file alone; say ``busy`` before a wait."""
    with opened(path) as descriptor:
        if not took(descriptor):
            if busy:
                note(busy)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
