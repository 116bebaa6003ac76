"""Tiny models, small enough to print: a llama and a hybrid with all four kinds of block."""

import fcntl
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Tests run in two processes (pyproject.toml): a thread each is what two cores have.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from compress import cli
from compress.model.checkpoint import write_checkpoint
from compress.model.families import parameters, read_architecture
from compress.model.layout import Parameter
from compress.run.recipe import read_recipe, write_recipe

VOCAB = 128
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "dtype": "bfloat16",
}
HYBRID = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "chunk_size": 16,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
TINY = {"llama": LLAMA, "hybrid": HYBRID}


def drawn(parameter: Parameter, generator: torch.Generator) -> Tensor:
    """Random weights that make a model whose blocks all matter."""
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.slot.normalizes:
        return 1 + 0.1 * noise
    if parameter.name.endswith("A_log"):
        return torch.log(1 + 3 * torch.rand(parameter.shape, generator=generator))
    if len(parameter.shape) == 1:
        return 0.1 * noise
    fan_in = math.prod(parameter.shape[1:])
    return noise * (0.3 if "embed" in parameter.name else 1.5 / math.sqrt(fan_in))


def write_tiny(
    directory: Path, config: dict[str, object], seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A whole checkpoint of random weights with a character tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = (
        (p.name, drawn(p, generator).to(torch.float32 if p.slot.float32 else dtype))
        for p in parameters(read_architecture(config))
    )
    write_checkpoint(directory, tensors, config, None)
    characters = {chr(code): code - 30 for code in range(32, 127)}
    vocabulary = {"<|end|>": 0, "<unk>": 1, **characters, "\n": 97}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"eos_token": "<|end|>", "unk_token": "<unk>"}'
    )
    return directory


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
    return shared("llama", lambda path: write_tiny(path, LLAMA))


@pytest.fixture(scope="session")
def tiny_hybrid(shared: Shared) -> Path:
    return shared("hybrid", lambda path: write_tiny(path, HYBRID))


@pytest.fixture(scope="session", params=["llama", "hybrid"])
def tiny(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


def words(seed: int, count: int) -> str:
    """Text with something to learn: a few words, again and again."""
    draw = random.Random(seed)
    known = ["small", "model", "weights", "in", "a", "budget", "of", "bytes", "keep", "what", "is"]
    return " ".join(draw.choice(known) for _ in range(count)) + "."


@pytest.fixture(scope="session")
def text_file(shared: Shared) -> Path:
    """JSONL text that fills every split of a tiny run."""
    rows = (json.dumps({"text": words(n, 60)}) + "\n" for n in range(400))
    return shared("text.jsonl", lambda file: file.write_text("".join(rows)))


# A search of seconds on a tiny model.
QUICK = {
    "budget": "36%", "space": "joint", "context": "64", "sequence_length": 32,
    "score_tokens": 256, "score_length": 32, "draws": 2, "replay_tokens": 128, "repair_tokens": 256,
    "select_tokens": 160, "final_tokens": 256, "trials": 6, "finalists": 1,
    "short_distill_tokens": 256, "distill_batch_tokens": 128, "distill_length": 32,
}  # fmt: skip


def search_arguments(model: Path, run: Path, text: Path) -> list[str]:
    """What follows ``compress`` on the command line of a quick search."""
    flags = [part for key, value in (QUICK | {"data": text, "run": run}).items()
             for part in (f"--{key.replace('_', '-')}", str(value))]  # fmt: skip
    return ["search", str(model), *flags]


def search_command(model: Path, run: Path, text: Path) -> list[str]:
    """The command line of a quick search."""
    return [sys.executable, "-m", "compress.cli", *search_arguments(model, run, text)]


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def searched(tiny_hybrid: Path, text_file: Path, shared: Shared) -> Path:
    """A run after its search, made by the command; tests work on copies."""

    def search(run: Path) -> None:
        cli.app(search_arguments(tiny_hybrid, run, text_file), standalone_mode=False)

    return shared("searched", search)


@pytest.fixture
def run_copy(searched: Path, tmp_path: Path) -> Path:
    """A copy of the searched run whose distillation is short."""
    run = Path(shutil.copytree(searched, tmp_path / "run"))
    recipe = read_recipe(run / "recipe.yaml").changed(distill_tokens=512)
    write_recipe(recipe, run / "recipe.yaml")
    return run
