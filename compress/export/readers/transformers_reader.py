"""Reads a directory with transformers: ``python transformers_reader.py REQUEST``.

What comes in and goes out is said in ``table.py``. It imports nothing of this package, so that
another version of transformers reads in an environment of its own.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

# What transformers 5.23 and compressed-tensors 0.20 dequantize to BF16, whatever the dtype: in fp32
# the products of such a layer raise.
BF16_ONLY = "nvfp4-pack-quantized"


def read(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    transformers: Any = importlib.import_module("transformers")
    rows = torch.tensor(request["rows"], device=request["device"])
    prompt = request["prompt"]
    config = Path(request["directory"], "config.json").read_text(encoding="utf-8")
    dtype = "bfloat16" if BF16_ONLY in config else "float32"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["directory"],
        dtype=getattr(torch, dtype),
        trust_remote_code=request["own_code"],
        local_files_only=True,
    )
    if dtype == "float32":
        # Experts that a quantized checkpoint has in BF16 stay so, and scales of INT4.
        for parameter in model.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
    model = model.eval().to(request["device"])
    with torch.inference_mode():
        scores = model(input_ids=rows, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        best = scores.topk(min(request["top"], scores.shape[-1]))
        # No stop, no sampling: what a directory says of generation is not compared here.
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        greedy = model.generate(
            rows[:, :prompt],
            attention_mask=torch.ones_like(rows[:, :prompt]),
            max_new_tokens=rows.shape[1] - prompt,
            do_sample=False,
        )[:, prompt:]
    return {
        "reader": f"transformers {transformers.__version__}",
        "dtype": dtype,
        "text": scores.gather(-1, rows[:, 1:, None]).squeeze(-1).tolist(),
        "ids": best.indices.tolist(), "values": best.values.tolist(),
        "greedy": greedy.tolist(),
    }  # fmt: skip


def peak_bytes() -> int:
    """The most memory that this process had (Linux; getrusage counts who started it, too)."""
    said = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(said.partition("VmHWM:")[2].split()[0]) * 1024


def bench(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of prompts and of tokens generated after them, in the dtype of the directory."""
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["directory"],
        dtype="auto",
        trust_remote_code=request["own_code"],
        local_files_only=True,
    )
    model = model.eval().to(request["device"])
    whole = torch.tensor([request["tokens"]], device=request["device"])
    prompts: list[float] = []
    tokens: list[float] = []

    def timed(ids: torch.Tensor, cache: Any, into: list[float]) -> Any:
        start = time.perf_counter()
        found = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        int(found.logits.argmax())  # waits for a device
        into.append(time.perf_counter() - start)
        return found.past_key_values

    with torch.inference_mode():
        for _ in range(request["repeats"]):
            cache = timed(whole, None, prompts)
            for n in range(request["generate"]):
                cache = timed(whole[:, n : n + 1], cache, tokens)
    return {
        "reader": f"transformers {transformers.__version__}",
        "prompt_seconds": prompts, "token_seconds": tokens,
        "peak_bytes": peak_bytes(),
    }  # fmt: skip


if __name__ == "__main__":
    asked = Path(sys.argv[1])
    request = json.loads(asked.read_text(encoding="utf-8"))
    answer = read(request) if "rows" in request else bench(request)
    asked.with_name("answer.json").write_text(json.dumps(answer), encoding="utf-8")
