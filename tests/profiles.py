"""A profile that is invented: a machine that reads every weight at a pace of its format."""

from collections.abc import Mapping

from compress.formats.table import Format
from compress.memory.latency import OUTSIDE, Profile, Sample, outside_weights
from compress.model.architecture import Architecture

# Seconds of a weight, and what a block takes besides; a prompt takes ten times as long.
PACE: Mapping[Format, float] = {"bf16": 4e-9, "fp8": 3e-9, "q8_0": 2e-9, "nvfp4": 1e-9}
BLOCK, PROMPT = 1e-6, 10


def invented_profile(teacher: Architecture) -> Profile:
    """The profile of a family's attention and FFN blocks."""
    sizes = {kind: (100, 20_000) for kind in ("attention", "ffn")}
    sizes[OUTSIDE] = tuple(list(outside_weights(teacher).values())[-1:])
    return Profile(
        reader="llama.cpp", machine="here", family=teacher.family, prompt_tokens=128,
        samples=tuple(
            Sample(
                kind=kind, format=format, weights=weights,
                prompt_seconds=PROMPT * (BLOCK + pace * weights),
                token_seconds=BLOCK + pace * weights,
            )
            for kind, several in sizes.items()
            for weights in several
            for format, pace in PACE.items()
        ),
    )  # fmt: skip
