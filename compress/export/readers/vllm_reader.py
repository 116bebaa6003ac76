"""Reads a directory with vLLM: ``python vllm_reader.py REQUEST``, in a Python that has vLLM.

What comes in and goes out is said in ``table.py``. It imports nothing of this package, so that
vLLM's environment needs nothing of ours.

vLLM has kernels of weight-only FP8 and NVFP4 for GPUs alone (Marlin, which dequantizes on the way).
On a CPU two kernels here take their places: configuration, loading and fusing of shards are vLLM's
own, then each weight is dequantized once, in the model's dtype. Marlin computes the same from FP8
scales that are BF16 numbers; see ``layouts`` for the others. A GPU runs vLLM's own kernels.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Both have to be there before vLLM is imported: a cache that a small test needs, and no second
# process, in which nothing here would be registered.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Dequantized:
    """What both kernels share: the layer's weight is a matrix of numbers once it is loaded."""

    def __init__(self, config: Any, layer_param_names: Any = ()) -> None:
        self.config, self.names = config, layer_param_names

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Everywhere."""
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        """Every layer."""
        return True, None

    def input_quant_key(self) -> None:
        """Activations are not rounded."""

    def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
        """The layer's output."""
        return importlib.import_module("torch").nn.functional.linear(x, layer.weight, bias)


class DequantizedFp8(Dequantized):
    """FP8 codes [in, out] with a scale a tensor or an output channel."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the codes by what they stand for, [out, in]."""
        codes, scale = (getattr(layer, name).data.float() for name in self.names[:2])
        settle(layer, (codes * scale.reshape(1, -1)).t(), self.config.out_dtype)


class DequantizedNvFp4(Dequantized):
    """NVFP4 codes [out, in/2] with an E4M3 scale a block of 16 and one of the tensor."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the codes by what they stand for, [out, in]."""
        torch: Any = importlib.import_module("torch")
        pairs, grid = layer.weight.data, torch.tensor(E2M1 + tuple(-value for value in E2M1))
        codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
        steps = layer.weight_scale.data.float() * layer.weight_global_scale.float()
        values = grid[codes.int()] * steps.repeat_interleave(16, dim=1)
        settle(layer, values, layer.params_dtype)


def settle(layer: Any, values: Any, dtype: Any) -> None:
    """Give a layer its dequantized weight."""
    parameter = importlib.import_module("torch").nn.Parameter
    layer.weight = parameter(values.to(dtype).contiguous(), requires_grad=False)


def register() -> None:
    """Put the two kernels where vLLM looks for those of a CPU, and allow fp32 beside them."""
    kernels: Any = importlib.import_module("vllm.model_executor.kernels.linear")
    cpu = importlib.import_module("vllm.platforms").PlatformEnum.CPU
    kernels._POSSIBLE_WFP8A16_KERNELS[cpu] = [DequantizedFp8]
    # Weight-only NVFP4 asks for this one by its name; with activations vLLM has its own emulation.
    kernels.MarlinNvFp4LinearKernel = DequantizedNvFp4
    kernels._POSSIBLE_NVFP4_KERNELS[cpu] = [kernels.EmulationNvFp4LinearKernel]
    torch: Any = importlib.import_module("torch")
    layout: Any = importlib.import_module("vllm.model_executor.layers.quantization.modelopt")
    for name in ("ModelOptFp8Config", "ModelOptNvFp4Config", "ModelOptMixedPrecisionConfig"):
        getattr(layout, name).get_supported_act_dtypes = lambda _: [torch.float32, torch.bfloat16]


def read(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    vllm: Any = importlib.import_module("vllm")
    on_cpu = importlib.import_module("vllm.platforms").current_platform.is_cpu()
    if on_cpu:
        register()
    rows, prompt, top = request["rows"], request["prompt"], request["top"]
    model = vllm.LLM(
        model=request["directory"],
        skip_tokenizer_init=True,
        dtype="float32" if on_cpu else "bfloat16",
        max_model_len=len(rows[0]) + 1,
        max_num_seqs=len(rows),
        enforce_eager=True,
        enable_prefix_caching=False,
        trust_remote_code=request["own_code"],
    )
    settings = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    scored = vllm.SamplingParams(max_tokens=1, prompt_logprobs=top, **settings)
    greedy = vllm.SamplingParams(max_tokens=len(rows[0]) - prompt, **settings)

    def run(texts: list[list[int]], how: Any) -> Any:
        return model.generate([{"prompt_token_ids": text} for text in texts], how, use_tqdm=False)

    text, ids, values = [], [], []
    for row, output in zip(rows, run(rows, scored), strict=True):
        # The first token follows nothing.
        found = [{i: one.logprob for i, one in at.items()} for at in output.prompt_logprobs[1:]]
        best = [sorted(at, key=at.__getitem__, reverse=True)[:top] for at in found]
        text.append([at[token] for token, at in zip(row[1:], found, strict=True)])
        ids.append(best)
        values.append([[at[i] for i in some] for at, some in zip(found, best, strict=True)])
    generated = run([row[:prompt] for row in rows], greedy)
    where = "a CPU with dequantizing kernels" if on_cpu else "a GPU"
    return {
        "reader": f"vLLM {vllm.__version__} on {where}",
        "dtype": "float32" if on_cpu else "bfloat16",
        "text": text, "ids": ids, "values": values,
        "greedy": [list(output.outputs[0].token_ids) for output in generated],
    }  # fmt: skip


def peak_bytes() -> int:
    """The most memory that this process had (Linux; getrusage counts who started it, too)."""
    said = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(said.partition("VmHWM:")[2].split()[0]) * 1024


def bench(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of prompts and of tokens generated after them, one request at a time."""
    vllm: Any = importlib.import_module("vllm")
    if importlib.import_module("vllm.platforms").current_platform.is_cpu():
        register()
    more, ids = request["generate"], request["tokens"]
    model = vllm.LLM(
        model=request["directory"],
        skip_tokenizer_init=True,
        max_model_len=len(ids) + more + 1,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        trust_remote_code=request["own_code"],
    )

    def timed(tokens: int) -> float:
        how = vllm.SamplingParams(
            max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        model.generate([{"prompt_token_ids": ids}], how, use_tqdm=False)
        return time.perf_counter() - start

    timed(1)
    prompts = [timed(1) for _ in range(request["repeats"])]
    tokens = [(timed(1 + more) - min(prompts)) / more for _ in range(request["repeats"])]
    return {
        "reader": f"vLLM {vllm.__version__}", "prompt_seconds": prompts, "token_seconds": tokens,
        "peak_bytes": peak_bytes(),
    }  # fmt: skip


if __name__ == "__main__":
    asked = Path(sys.argv[1])
    request = json.loads(asked.read_text(encoding="utf-8"))
    answer = read(request) if "rows" in request else bench(request)
    asked.with_name("answer.json").write_text(json.dumps(answer), encoding="utf-8")
