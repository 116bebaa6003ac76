"""DeciLM: llama whose layers have sizes of their own, or one half only (``block_configs``)."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


class Entry(dict[str, Any]):
    """A table whose entries are attributes too, which is how vLLM reads them."""

    def __getattr__(self, name: str) -> Any:
        """The entry of this name."""
        if name not in self:
            raise AttributeError(name)
        return self[name]


@strict
class DeciLMConfig(LlamaConfig):
    """Llama's settings and, per layer, KV groups and FFN width, or that a half is left out.

    Queries, keys and values have biases with ``qkv_bias``.
    """

    model_type = "nemotron-nas"

    block_configs: list[dict[str, Any]] | None = None
    qkv_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Take the entries of every layer."""
        listed = self.block_configs or []
        self.block_configs = [Entry({k: Entry(v) for k, v in each.items()}) for each in listed]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Heads need not fill the hidden size."""
