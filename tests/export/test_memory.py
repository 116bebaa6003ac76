"""An export holds a layer at a time, however many layers there are."""

import json
import subprocess
import sys
from pathlib import Path

from tiny_models import LLAMA, ONE_THREAD, write_tiny

WIDE = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
SHALLOW, DEEP = 2, 8
# What is freed goes back at once, or the allocator keeps more than these models have.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# What a process takes for its own on top of what it had before, sampled while it exports.
MEASURED = """
import json, re, sys, threading
from pathlib import Path
from compress.export.student import export_student
from compress.model.checkpoint import open_checkpoint
from compress.sweep.placement import Placement
from quantized import with_formats

def own():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def peak(path):
    most, done = own(), threading.Event()
    before = most
    def sample():
        nonlocal most
        while not done.wait(0.001):
            most = max(most, own())
    thread = threading.Thread(target=sample)
    thread.start()
    architecture = with_formats(open_checkpoint(path).architecture, ["nvfp4", "fp8"])
    export_student(path, path / "out", architecture, "vllm", {}, placement=Placement(memory=0))
    done.set()
    thread.join()
    return most - before

folder = Path(sys.argv[1])
peak(folder / "0")  # what the first one sets up for all
print(json.dumps([peak(folder / name) for name in ("1", "2")]))
"""


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    for name, depth in enumerate((SHALLOW, SHALLOW, DEEP)):
        write_tiny(tmp_path / f"{name}", LLAMA | WIDE | {"num_hidden_layers": depth})
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    result = subprocess.run(
        command, env=ONE_THREAD | RETURNED | {"PYTHONPATH": ":".join([tests, *sys.path])},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    shallow, deep = json.loads(result.stdout)
    layer = 2 * (tmp_path / "2" / "model.safetensors").stat().st_size / DEEP  # in fp32
    # One layer more or less may be in flight where another one is just read.
    assert deep < shallow + 2 * layer < (DEEP - SHALLOW) * layer
