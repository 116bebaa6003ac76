"""A large model on a small machine: memory and time of score, search and export, by depth.

``python -m benchmarks.scale --sizes 0.2,0.6,1.7 --memory 1GiB``; random BF16 hybrids (Mamba-2, MoE,
FFN, attention) of one width and so many billion parameters are written to a temporary directory,
3.4 GB for the largest, and go through the commands as a user types them: score (256 tokens, 2
draws), a joint search of 4 trials with repair, export. Memory is the peak of the process's
anonymous memory: pages of the mapped checkpoint are the file's. Flat in depth is what it must be.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Clock, arguments, report
from compress.core.files import read_json
from compress.core.terminal import note
from compress.model.architecture import Architecture
from compress.model.checkpoint import write_checkpoint
from compress.model.families import count_parameters, parameters, read_architecture
from compress.model.find import resolve_model
from compress.model.layout import Parameter

GROUP = ["linear_attention", "moe", "linear_attention", "mlp", "full_attention"]
HYBRID: dict[str, Any] = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_attention_heads": 24,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "mamba_num_heads": 48,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 64,
    "conv_kernel": 4,
    "chunk_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 768,
    "moe_shared_expert_intermediate_size": 1536,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
SEARCH = (
    *("--budget", "45%", "--space", "joint", "--trials", "4", "--baselines", "none"),
    *("--select-tokens", "128", "--sequence-length", "64", "--repair-tokens", "256"),
    *("--reselect-rounds", "0", "--finalists", "1", "--short-distill-tokens", "0"),
)
SCORE = (
    *("--score-tokens", "256", "--score-length", "64", "--draws", "2", "--replay-tokens", "64"),
    *("--space", "joint", "--sequence-length", "64"),
)
LOOK_SECONDS = 0.05


def drawn(parameter: Parameter, generator: torch.Generator, depth: int) -> Tensor:
    """Random values of a parameter that keep activations finite through the depth."""
    if parameter.slot.normalizes:
        return torch.ones(parameter.shape)
    if parameter.name.endswith("A_log"):
        return torch.rand(parameter.shape, generator=generator).mul(3).add(1).log()
    if len(parameter.shape) == 1:
        return torch.zeros(parameter.shape)
    values = torch.randn(parameter.shape, generator=generator)
    if "embed" in parameter.name:
        return values
    fan_in = parameter.count / parameter.shape[0]
    return values.mul(fan_in**-0.5 / depth**0.25)


def written(directory: Path, billions: float) -> int:
    """Write the hybrid nearest to a size; its parameters."""
    sizes = [
        count_parameters(read_architecture(HYBRID | {"layers_block_type": GROUP * groups}))
        for groups in (1, 2)
    ]
    groups = max(1, round((billions * 1e9 - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    config = HYBRID | {
        "layers_block_type": GROUP * groups, "num_hidden_layers": len(GROUP) * groups,
    }  # fmt: skip
    made = random_checkpoint(directory, config)
    return count_parameters(made)


def random_checkpoint(directory: Path, config: Mapping[str, Any]) -> Architecture:
    """Write random weights of a config, with the embedded tokenizer; what they are of."""
    made, generator = read_architecture(config), torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for each in parameters(made):
            dtype = torch.float32 if each.slot.float32 else torch.bfloat16
            yield each.name, drawn(each, generator, made.layers).to(dtype)

    write_checkpoint(directory, tensors(), config, resolve_model("embedded"))
    return made


def watched(command: list[str], cwd: Path) -> dict[str, float]:
    """Run a command to its end: seconds, CPU seconds and peak anonymous GiB of the process."""
    clock, peak = Clock(), 0
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with (cwd / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=cwd, stderr=log, stdout=log, env=environment)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, anonymous(process.pid))
            time.sleep(LOOK_SECONDS)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{(cwd / 'log').read_text()[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": clock.seconds, "cpu_seconds": cpu, "peak_gib": peak / 2**30}


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory that a process has now; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon")), 0)


def measured(billions: float, memory: str) -> list[dict[str, Any]]:
    """A row per stage of a model of so many billion parameters."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        count = written(home / "model", billions)
        compress = [sys.executable, "-m", "compress.cli"]
        bound = ("--memory", memory, "--compute", "cpu")
        stages = {
            "score": ["score", "model", "--run", "big", *SCORE, *bound],
            "search": ["search", "model", "--run", "big", *SEARCH, *SCORE, *bound],
            "export": ["export", "big", *bound],
        }
        rows = []
        for stage, words in stages.items():
            found = watched([*compress, *words], home)
            rows.append({"parameters": count / 1e9, "stage": stage, **found})
            note(
                f"{count / 1e9:.2f}B {stage}: {found['seconds']:.0f} s, {found['peak_gib']:.2f} GiB"
            )
        best = read_json(home / "runs" / "big" / "candidates.json")[0]
        rows[1]["kl"] = best["measured_kl"]
    return rows


def main() -> None:
    """Memory and time by size."""
    settings = arguments(
        __doc__ or "",
        "embedded",
        sizes={"default": "0.2,0.6,1.7", "help": "billions of parameters (default: %(default)s)"},
        memory={"default": "1GiB", "help": "what the work may take (default: %(default)s)"},
    )
    rows = []
    for size in settings.sizes.split(","):
        rows += measured(float(size), settings.memory)
    facts = {"largest anonymous GiB": max(row["peak_gib"] for row in rows)}
    report(
        "scale",
        settings,
        facts,
        ("parameters", "stage", "seconds", "cpu_seconds", "peak_gib", "kl"),
        rows,
    )


if __name__ == "__main__":
    main()
