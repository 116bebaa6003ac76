"""Reads a GGUF file with llama.cpp: ``python llama_cpp_reader.py REQUEST``.

That Python has the package ``llama-cpp-python``. What comes in and goes out is said in
``table.py``. It imports nothing of this package, so that the environment needs nothing of ours.

The cache is in fp32. Products with weights in BF16 round what they are multiplied with to BF16, and
those with quantized weights to 8 bits in blocks of 32: that is llama.cpp's arithmetic on a CPU.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

F32 = 0


def read(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    package: Any = importlib.import_module("llama_cpp")
    numpy: Any = importlib.import_module("numpy")
    rows, prompt = request["rows"], request["prompt"]
    [file] = Path(request["directory"]).glob("*.gguf")
    length = len(rows[0])
    model = package.Llama(
        model_path=str(file), n_ctx=length, n_batch=length, n_ubatch=length, n_gpu_layers=0,
        type_k=F32, type_v=F32, logits_all=True, verbose=False,
    )  # fmt: skip

    def scores(tokens: list[int]) -> Any:
        model.reset()
        model.eval(tokens)
        logits = numpy.array(model.scores[: len(tokens)], dtype=numpy.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - numpy.log(numpy.exp(logits).sum(-1, keepdims=True))

    text, ids, values, greedy = [], [], [], []
    for row in rows:
        found = scores(row)[:-1]
        best = numpy.argsort(-found, axis=-1, kind="stable")[:, : request["top"]]
        text.append(found[numpy.arange(length - 1), row[1:]].tolist())
        ids.append(best.tolist())
        values.append(numpy.take_along_axis(found, best, axis=-1).tolist())
        # A token at a time, as a server generates.
        made = [int(scores(row[:prompt])[-1].argmax())]
        while len(made) < length - prompt:
            model.eval(made[-1:])
            made.append(int(model.scores[model.n_tokens - 1].argmax()))
        greedy.append(made)
    return {
        "reader": f"llama.cpp (llama-cpp-python {package.__version__}) on a CPU",
        "dtype": "int8", "text": text, "ids": ids, "values": values, "greedy": greedy,
    }  # fmt: skip


def peak_bytes() -> int:
    """The most memory that this process had (Linux; getrusage counts who started it, too)."""
    said = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(said.partition("VmHWM:")[2].split()[0]) * 1024


def bench(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of prompts and of tokens generated after them."""
    package: Any = importlib.import_module("llama_cpp")
    prompt, cores = request["prompt"], len(os.sched_getaffinity(0))
    [file] = Path(request["directory"]).glob("*.gguf")
    model = package.Llama(
        model_path=str(file), n_ctx=prompt + request["generate"], n_batch=prompt, n_ubatch=prompt,
        n_threads=cores, n_threads_batch=cores, verbose=False,
    )  # fmt: skip
    prompts, tokens = [], []
    for _ in range(request["repeats"]):
        model.reset()
        start = time.perf_counter()
        model.eval(request["tokens"])
        prompts.append(time.perf_counter() - start)
        for token in request["tokens"][: request["generate"]]:
            start = time.perf_counter()
            model.eval([token])
            tokens.append(time.perf_counter() - start)
    return {
        "reader": f"llama.cpp (llama-cpp-python {package.__version__})",
        "prompt_seconds": prompts, "token_seconds": tokens,
        "peak_bytes": peak_bytes(),
    }  # fmt: skip


if __name__ == "__main__":
    asked = Path(sys.argv[1])
    request = json.loads(asked.read_text(encoding="utf-8"))
    answer = read(request) if "rows" in request else bench(request)
    asked.with_name("answer.json").write_text(json.dumps(answer), encoding="utf-8")
