"""Stock readers, each a single file that another Python runs without this package."""

from typing import Literal

Reader = Literal["transformers", "vllm", "llama.cpp", "compress"]
