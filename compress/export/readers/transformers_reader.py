"""Reads a directory with transformers: ``python transformers_reader.py REQUEST``.

What comes in and goes out is said in ``table.py``. It imports nothing of this package, so that
another version of transformers reads in an environment of its own.
"""

import importlib
import json
import sys
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


if __name__ == "__main__":
    asked = Path(sys.argv[1])
    answer = read(json.loads(asked.read_text(encoding="utf-8")))
    asked.with_name("answer.json").write_text(json.dumps(answer), encoding="utf-8")
