"""The recipe of a teacher: what ``compress pretrain`` reads; and the names of optimizers."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# AdamW in fp32, with its moments in 8 bits, or with weights and moments kept on the CPU.
OptimizerName = Literal["adamw", "adamw8bit", "offload"]


class TokenizerRecipe(BaseModel):
    """A byte-level BPE to be trained on the train split."""

    model_config = ConfigDict(extra="forbid")
    vocab_size: int = Field(ge=257)


class PretrainRecipe(BaseModel):
    """What a teacher is made from; ``steps``, ``warmup`` and ``decay`` count steps, ``batch`` rows.

    ``tokenizer`` may be the path of a directory that has one; ``model`` is a Hugging Face config;
    ``data`` is a file or directory of texts, null the embedded one. Paths are relative to the
    working directory.
    """

    model_config = ConfigDict(extra="forbid")
    tokenizer: TokenizerRecipe | Path
    model: dict[str, Any]
    data: Path | None = None
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    length: int = Field(ge=2)
    learning_rate: float = Field(gt=0)
    warmup: int = Field(ge=0)
    decay: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    seed: int = 0
    checkpoint_every: int = Field(default=100, ge=1)
