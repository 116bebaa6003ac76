"""Kernels for a GPU that can be imported change nothing on a CPU."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Shared
from safetensors.torch import load_file
from tiny_models import EVERY, ONE_THREAD, write_tiny

from compress.model.build import load_model
from compress.model.families import FAMILIES, family_of
from compress.model.kernels import modeling

# As the packages say what they offer; where transformers looks for it.
PACKAGES = {
    "causal_conv1d/__init__.py": ("causal_conv1d_fn", "causal_conv1d_update"),
    "mamba_ssm/__init__.py": (),
    "mamba_ssm/ops/__init__.py": (),
    "mamba_ssm/ops/triton/__init__.py": (),
    "mamba_ssm/ops/triton/ssd_combined.py": (
        *("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    ),
    "mamba_ssm/ops/triton/selective_state_update.py": ("selective_state_update",),
    "fla/__init__.py": (),
    "fla/ops/__init__.py": (),
    "fla/ops/gated_delta_rule.py": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
}
KERNEL = "def {name}(x, *rest, **named):\n    raise RuntimeError('Expected x.is_cuda()')\n"
# Of every model that is named: whether each kernel was found where it is asked for, then logits in
# eval mode, in training mode and with a cache.
FORWARDS = """
import sys, torch
from pathlib import Path
from compress.model.build import load_model
from compress.model.families import family_of
from compress.model.kernels import modeling
from safetensors.torch import save_file

class Elsewhere:
    is_cpu = False

def forwards(path):
    model = load_model(path)
    rows = torch.arange(1, 41).view(2, 20)
    kind = model.config.model_type
    module = modeling(kind)
    for name in family_of(kind).kernels:
        try:
            getattr(module, name)(Elsewhere())
        except RuntimeError as error:
            assert "is_cuda" in str(error)
        else:
            raise SystemExit(f"{name} is not replaced: this would show nothing")
    with torch.no_grad():
        found = {"eval": model(rows).logits, "train": model.train()(rows).logits}
        model.eval()
        found["made"] = model.generate(rows, max_new_tokens=4, do_sample=False)
    save_file({key: value.contiguous() for key, value in found.items()}, path / "logits")

for path in Path(sys.argv[1]).iterdir():
    forwards(path)
"""
NAMES = [name for name in EVERY if family_of(EVERY[name]["model_type"]).kernels]


@pytest.fixture(scope="session")
def beside_packages(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of every family that has kernels, run where the packages can be imported."""

    def run(home: Path) -> None:
        for name in NAMES:
            write_tiny(home / name, EVERY[name])
        packages = tmp_path_factory.mktemp("packages")
        for file, names in PACKAGES.items():
            path = packages / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(KERNEL.format(name=name) for name in names))
        command = [sys.executable, "-c", FORWARDS, str(home)]
        paths = ":".join([str(packages), *sys.path])
        subprocess.run(command, env=ONE_THREAD | {"PYTHONPATH": paths}, check=True)

    return shared("beside_packages", run)


@pytest.mark.parametrize("name", NAMES)
def test_packages_for_a_gpu_change_nothing_on_a_cpu(name: str, beside_packages: Path) -> None:
    path = beside_packages / name
    found, model = load_file(path / "logits"), load_model(path)
    rows = torch.arange(1, 41).view(2, 20)
    with torch.no_grad():
        assert torch.equal(found["eval"], model(rows).logits)
        assert torch.equal(found["train"], model.train()(rows).logits)
    made = model.eval().generate(rows, max_new_tokens=4, do_sample=False)
    assert torch.equal(found["made"], made)


def layers_of(function: Any) -> Iterator[Any]:
    """A function and what it wraps, from the outside in."""
    while inspect.isfunction(function):
        yield function
        function = getattr(function, "__wrapped__", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_function_that_packages_replace_is_listed(family: str) -> None:
    module = modeling(family)
    replaced = set()
    for name, function in vars(module).items():
        layers = list(layers_of(function))
        made_in = [layer.__globals__["__name__"] for layer in layers]
        if made_in[-1:] == [module.__name__] and any("hub_kernels" in each for each in made_in):
            replaced.add(name)
    assert replaced == set(FAMILIES[family].kernels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_compute_what_the_torch_scan_does(tiny_hybrid: Path) -> None:
    pytest.importorskip("mamba_ssm")
    rows = torch.arange(1, 41).view(2, 20)
    model = load_model(tiny_hybrid)
    with torch.no_grad():
        plain, fused = model(rows).logits, model.cuda()(rows.cuda()).logits.cpu()
    assert (plain - fused).norm() <= 1e-4 * plain.norm()
