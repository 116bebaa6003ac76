"""How trainings compute, as tables and names; and the recipe of a teacher for ``pretrain``.

Nothing here imports torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from compress.core.errors import InputError

# AdamW in fp32, with its moments in 8 bits, or with weights and moments kept on the CPU.
OptimizerName = Literal["adamw", "adamw8bit", "offload"]

# Terms of a student's loss, ``train/losses.py``.
TermName = Literal["kl", "reverse-kl", "ce", "cosine", "mse"]
PrecisionName = Literal["fp32", "bf16", "fp8-hybrid", "fp8-block", "nvfp4"]


@dataclass(frozen=True, kw_only=True)
class Operand:
    """How an operand of a product is rounded before it is multiplied.

    ``block`` is what shares a scale: so many rows by so many numbers along the axis that the
    product sums over; None is the whole tensor. Rounding is to nearest unless ``stochastic``.
    """

    numbers: Literal["e4m3", "e5m2", "e2m1"]
    block: tuple[int, int] | None = None
    stochastic: bool = False


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What the products of a training compute in; weights and their moments are fp32.

    Attributes:
        name: of the recipe.
        products: what everything that is not quantized computes in.
        weight: operands of quantized linear layers; None where none is quantized.
        activation: in the forward product, and in that of the weight's gradient.
        gradient: of the output, in both products of the backward pass.
        hadamard: the random Hadamard transform of both inputs of the weight's gradient.
        plain_first: layers at the beginning whose linear layers are not quantized, ``plain_last``
            at the end.
        plain_share: share of all linear layers, the last ones, that are not quantized.
        plain_forward: last share of the tokens for which forward products are not quantized.
        capability: the first compute capability of CUDA devices with units for it.
    """

    name: PrecisionName
    products: Literal["fp32", "bf16"] = "bf16"
    weight: Operand | None = None
    activation: Operand | None = None
    gradient: Operand | None = None
    hadamard: bool = False
    plain_first: int = 0
    plain_last: int = 0
    plain_share: float = 0.0
    plain_forward: float = 0.0
    capability: tuple[int, int] | None = None


PRECISIONS: dict[PrecisionName, Precision] = {each.name: each for each in (
    Precision(name="fp32", products="fp32"),
    Precision(name="bf16"),
    # Nemotron-H (arXiv 2504.03624): per-tensor current scaling.
    Precision(
        name="fp8-hybrid",
        weight=Operand(numbers="e4m3"),
        activation=Operand(numbers="e4m3"),
        gradient=Operand(numbers="e5m2"),
        plain_first=4, plain_last=4, capability=(8, 9),
    ),
    # Nemotron Nano 2 (arXiv 2508.14444), after DeepSeek-V3.
    Precision(
        name="fp8-block",
        weight=Operand(numbers="e4m3", block=(128, 128)),
        activation=Operand(numbers="e4m3", block=(1, 128)),
        gradient=Operand(numbers="e4m3", block=(1, 128)),
        capability=(9, 0),
    ),
    # Pretraining in NVFP4 (arXiv 2509.25149).
    Precision(
        name="nvfp4",
        weight=Operand(numbers="e2m1", block=(16, 16)),
        activation=Operand(numbers="e2m1", block=(1, 16)),
        gradient=Operand(numbers="e2m1", block=(1, 16), stochastic=True),
        hadamard=True, plain_share=0.15, plain_forward=0.18, capability=(10, 0),
    ),
)}  # fmt: skip


@dataclass(frozen=True)
class Term:
    """One loss with its weight."""

    name: TermName
    weight: float = 1.0


def terms_of(text: str) -> tuple[Term, ...]:
    """The terms of a text; InputError where it is no sum of known ones."""
    known = get_args(TermName)
    found = list[Term]()
    for part in text.split("+"):
        weight, times, name = part.rpartition("*")
        try:
            value = float(weight) if times else 1.0
        except ValueError:
            value = 0.0
        if name.strip() not in known or not 0 < value < float("inf"):
            raise InputError(
                f"loss {text!r}: {part.strip()!r} is no term; one is {', '.join(known)}, or a "
                "positive weight times one, such as kl + 0.1*ce"
            )
        found.append(Term(next(each for each in known if each == name.strip()), value))
    if len({term.name for term in found}) < len(found):
        raise InputError(f"loss {text!r} has a term twice")
    return tuple(found)


class TokenizerRecipe(BaseModel):
    """A byte-level BPE to be trained on the train split."""

    model_config = ConfigDict(extra="forbid")
    vocab_size: int = Field(ge=257)


class PretrainRecipe(BaseModel):
    """What a teacher is made from; ``steps``, ``warmup`` and ``decay`` count steps, ``batch`` rows.

    ``tokenizer`` may be the path of a directory that has one; ``model`` is a Hugging Face config;
    ``data`` is a file or directory of texts, null the embedded one. Paths are relative to the
    working directory. Held-out text is measured at every checkpoint; training ends after
    ``patience`` of them in a row that were worse than the best, 0: never. ``precision`` null is
    fp32 on a CPU and bf16 on a GPU; ``emulate`` computes
    in the reference where the machine has no units for it.
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
    patience: int = Field(default=0, ge=0)
    precision: PrecisionName | None = None
    emulate: bool = False
