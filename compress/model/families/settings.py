"""What values of config.json may be: those that transformers takes, told without importing it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.core.errors import InputError


@dataclass(frozen=True)
class Kind:
    """A kind of value: in words, and whether a value is of it."""

    said: str
    takes: Callable[[Any], bool]

    @property
    def or_null(self) -> "Kind":
        """The same, or null."""
        return Kind(f"{self.said} or null", lambda value: value is None or self.takes(value))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return type(value) in (int, float) and math.isfinite(value)


def is_list(value: Any, of: type) -> bool:
    """Whether a value is a list of this very type."""
    return isinstance(value, list) and all(type(each) is of for each in value)


# torch's functions without parameters that transformers has under these names.
ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python"),
    *("gelu_pytorch_tanh", "gelu_python_tanh", "hardswish", "laplace", "leaky_relu", "linear"),
    *("mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus"),
    *("swish", "tanh"),
)
ACTIVATION = Kind(f"one of {', '.join(ACTIVATIONS)}", lambda value: value in ACTIVATIONS)
# Beyond any model, and small enough to allocate positions of.
SIZE = Kind("a whole number from 1 to 99999999", lambda v: type(v) is int and 0 < v < 10**8)
# Beyond any model, and few enough to make a list of.
LAYERS = Kind("a whole number from 1 to 9999", lambda v: type(v) is int and 0 < v < 10_000)
# Of experts, whatever a family calls their number.
FEW = Kind("a whole number below 10000", lambda v: type(v) is int and v < 10_000)
EXPERTS = dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), FEW)
COUNT = Kind("a whole number of at least 0", lambda value: type(value) is int and value >= 0)
NUMBER = Kind("a number", is_number)
# transformers takes no whole number here, nor a number as text.
REAL = Kind("a number with a decimal point", lambda v: type(v) is float and math.isfinite(v))
TEXT = Kind("a text", lambda value: type(value) is str)
SWITCH = Kind("true or false", lambda value: type(value) is bool)
TOKEN = Kind("a token id", lambda value: type(value) is int).or_null
TOKENS = Kind("a token id, a list of them or null", lambda v: TOKEN.takes(v) or is_list(v, of=int))
FLAGS = Kind("a list of 0 and 1", lambda v: is_list(v, of=int) and set(v) <= {0, 1})
NUMBERS = Kind("a list of whole numbers", lambda value: is_list(value, of=int))
NAMES = Kind("a list of names", lambda value: is_list(value, of=str))
WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
# What every family reads.
COMMON: dict[str, Kind] = {
    **dict.fromkeys((*WIDTHS, "max_position_embeddings"), SIZE),
    **dict.fromkeys(("tie_word_embeddings", "mlp_bias"), SWITCH),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), TOKEN),
    "eos_token_id": TOKENS,
}
TABLE = Kind("a table", lambda value: isinstance(value, dict))


def require(settings: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """InputError on the first setting that is present and not of its kind."""
    for key, kind in kinds.items():
        if key in settings and not kind.takes(settings[key]):
            raise InputError(f"{key} is {settings[key]!r}, not {kind.said}")


def require_divides(settings: Mapping[str, Any], *pairs: tuple[str, str]) -> None:
    """InputError unless the second of each pair, where both are set, divides the first."""
    for whole, part in pairs:
        if settings.get(whole) and settings.get(part) and settings[whole] % settings[part]:
            said = f"is not a multiple of {part} {settings[part]}"
            raise InputError(f"{whole} {settings[whole]} {said}")


def head_width(config: Mapping[str, Any]) -> int:
    """Width of a head: a key of its own, of which hidden size over heads is only the default."""
    if config.get("head_dim") is None:
        require_least(config, ("hidden_size", "num_attention_heads"))
    width: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return width


def require_least(settings: Mapping[str, Any], *pairs: tuple[str, str]) -> None:
    """InputError unless the first of each pair is at least the second."""
    for whole, part in pairs:
        if settings[part] > settings[whole]:
            raise InputError(f"{part} {settings[part]} is above {whole} {settings[whole]}")


def require_routing(settings: Mapping[str, Any]) -> None:
    """InputError where a router would have to choose more than there is."""
    experts, groups = settings["n_routed_experts"], settings["n_group"]
    require_least(settings, ("n_routed_experts", "num_experts_per_tok"))
    require_least({"topk_group": 1, **settings}, ("n_group", "topk_group"))
    if experts < 2 * groups:
        raise InputError(f"n_group {groups} leaves n_routed_experts {experts} no two of a group")


FACTORS = Kind("a list of numbers", lambda v: isinstance(v, list) and all(map(is_number, v)))
POSITIVE = Kind("a number above 0", lambda value: is_number(value) and value > 0)
# What each rope type needs, and what may be there besides (transformers 5.23).
ROPES: Mapping[str, Mapping[str, Kind]] = {
    "default": {},
    "linear": {"factor": POSITIVE},
    "dynamic": {"factor": POSITIVE},
    "yarn": {"factor": POSITIVE.or_null},
    "longrope": {"short_factor": FACTORS, "long_factor": FACTORS},
    "llama3": {"factor": POSITIVE, "low_freq_factor": POSITIVE, "high_freq_factor": POSITIVE},
    "proportional": {},
}
BESIDES: dict[str, Kind] = dict.fromkeys(
    ("factor", "original_max_position_embeddings", "partial_rotary_factor", "attention_factor",
     "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), NUMBER.or_null,
)  # fmt: skip


def require_rope(config: Mapping[str, Any], head_dim: int, partial: Sequence[str]) -> None:
    """InputError unless transformers can turn positions as ``rope_scaling`` and others say.

    ``partial`` are the rope types that may turn a part of the channels only.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPES:
        raise InputError(f"rope type {kind!r} is not known to transformers: {', '.join(ROPES)}")
    require({"rope_theta": 1e4} | dict(config) | rope, {"rope_theta": POSITIVE} | BESIDES)
    require({key: rope.get(key) for key in ROPES[kind]}, ROPES[kind])
    if missing := [key for key in ROPES[kind] if key not in rope]:
        raise InputError(f"rope type {kind!r} needs {missing[0]}")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if not 0 <= (1 if share is None else share) <= 1:
        raise InputError(f"partial_rotary_factor {share} is not between 0 and 1")
    if share not in (None, 1) and kind not in partial:
        raise InputError(f"rope type {kind!r} with partial_rotary_factor {share} is not supported")
    for key in ("short_factor", "long_factor") if kind == "longrope" else ():
        if len(rope[key]) != (needed := int(head_dim * (share or 1)) // 2):
            raise InputError(
                f"{key} has {len(rope[key])} numbers; head_dim {head_dim} needs {needed}"
            )
    if head_dim > 4 and head_dim % 2:
        raise InputError(f"head_dim {head_dim} is odd: positions turn pairs of channels")
