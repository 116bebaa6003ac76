"""Where the work is done: device, number type, and the bytes of weights that may stay there."""

import ctypes
from dataclasses import dataclass

import torch

from compress.core.errors import InputError
from compress.core.quantities import format_bytes
from compress.memory.devices import Compute
from compress.memory.machine import RESIDENT_SHARE, free_memory

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """Where a model is worked on, and in what.

    ``memory`` is what the work may take there, in bytes; None: as much as it wants. The default is
    the reference that defines what is right; everything else agrees with it within stated bounds.
    """

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    memory: int | None = None

    @property
    def resident_bytes(self) -> int | None:
        """Bytes of weights that may stay; the rest is for what is made of them."""
        return None if self.memory is None else int(RESIDENT_SHARE * self.memory)


REFERENCE = Placement()


def return_free_memory() -> None:
    """Give the system back what is free on the host.

    What is kept of a layer is small and lies between large weights that are gone: glibc keeps all
    of it otherwise, and memory grows with the depth of a model (measured: runs/LOG.md).
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def placement(compute: Compute, memory: int | None) -> Placement:
    """The placement that a recipe asks for.

    ``auto`` is a CUDA device where there is one. ``memory`` None is what the machine has free now.
    A CPU works in fp32, a GPU in BF16. InputError on a device that is not there, and on more
    memory than there is.
    """
    cuda = torch.cuda.is_available()
    if compute == "cuda" and not cuda:
        raise InputError("compute cuda: this torch sees no CUDA device; cpu or auto would work")
    if compute == "cpu" or not cuda:
        device, dtype, free = torch.device("cpu"), torch.float32, free_memory()
    else:
        device, dtype = torch.device("cuda"), torch.bfloat16
        free = torch.cuda.mem_get_info(device)[0]
    if memory is not None and memory > free:
        raise InputError(
            f"memory {format_bytes(memory)} is more than the {format_bytes(free)} that "
            f"{device.type} has free"
        )
    return Placement(device, dtype, free if memory is None else memory)
