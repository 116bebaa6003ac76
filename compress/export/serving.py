"""How an export is served: the command, and what a device's kernels do with formats; no torch.

Kernels are those of vLLM 0.32, as its source chooses them; none was run on a GPU here.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping

from compress.export.targets import Target
from compress.formats.table import FORMATS, Format, KvFormat
from compress.memory.devices import Device
from compress.memory.footprint import Deployment, largest_batch, largest_context
from compress.model.architecture import Architecture, Mla

# From this compute capability on every attention backend reads FP8 caches.
FP8_CAPABILITY = 89
FLASHINFER = "FLASHINFER"


def serving(
    directory: str, architecture: Architecture, target: Target, deployment: Deployment,
    device: Device | None = None, *, code: bool = False,
) -> list[str]:  # fmt: skip
    """Lines of a shell: what the device does and has room for, as comments, and the command.

    ``code``: the directory has Python files that its reader needs. None for targets that are no
    server.
    """
    if target not in COMMANDS:
        return []
    facts = [] if device is None else device_facts(architecture, target, deployment, device)
    command = COMMANDS[target](directory, architecture, deployment, device, code)
    return [*(f"# {fact}" for fact in facts), command]


def device_facts(
    architecture: Architecture, target: Target, deployment: Deployment, device: Device
) -> list[str]:
    """What a device does with a student and has room for."""
    found = [room(architecture, deployment, device)]
    if target == "vllm":
        kv_formats = set(architecture.kv_formats.values())
        found += kernels(device, architecture, architecture.formats, kv_formats)
    return found


def kernels(
    device: Device, architecture: Architecture, formats: Iterable[Format],
    kv_formats: Iterable[KvFormat],
) -> Iterator[str]:  # fmt: skip
    """What vLLM's kernels of a device do with formats of a model."""
    rounding = sorted(format for format in formats if FORMATS[format].rounds_inputs)
    if rounding:
        does = "products of them" if all(map(device.runs, rounding)) else "no products of them"
        yield f"{device.name}, vLLM: {', '.join(rounding)} round activations; it has {does}"
    if told := ", ".join(sorted({*formats} - {"bf16", *rounding})):
        yield (
            f"{device.name}, vLLM: weights in {told} stay so in memory, Marlin kernels take them "
            "to BF16 inside; activations are BF16"
        )
    if "fp8" in kv_formats and device.capability < FP8_CAPABILITY:
        latent = any(isinstance(block, Mla) for block in architecture.blocks)
        backend = "by no backend where attention is latent" if latent else "by FlashInfer only"
        yield f"{device.name}, vLLM: FP8 caches {backend}; others need compute capability 8.9"


def room(architecture: Architecture, deployment: Deployment, device: Device) -> str:
    """The largest context and the largest batch."""
    limits = architecture, deployment, device.visible_bytes
    context, batch = largest_context(*limits), largest_batch(*limits)
    longest = "any context" if context is None else f"a context of {context:,}"
    most = "any size" if batch is None else f"{batch:,}"
    return (
        f"{device.name}: room for {longest} at batch {deployment.batch_size}, or for a batch of "
        f"{most} at context {deployment.context:,}"
    )


def vllm(
    directory: str, architecture: Architecture, deployment: Deployment, device: Device | None,
    code: bool,
) -> str:  # fmt: skip
    """The command of a server."""
    words = ["vllm", "serve", directory, "--max-model-len", str(deployment.context)]
    words += ["--max-num-seqs", str(deployment.batch_size)]
    if "fp8" in architecture.kv_formats.values():
        words += ["--kv-cache-dtype", "fp8"]
        if device is not None and device.capability < FP8_CAPABILITY:
            words += ["--attention-backend", FLASHINFER]
    if any(block.kind == "mamba" for block in architecture.blocks):
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[deployment.ssm_format]
        words += ["--mamba-ssm-cache-dtype", dtype]
    if code:
        words.append("--trust-remote-code")
    return shlex.join(words)


# Of targets that are servers.
COMMANDS: Mapping[Target, Callable[..., str]] = {"vllm": vllm}
