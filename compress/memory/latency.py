"""What blocks take of the time of a server, from a profile of this machine; no torch.

A profile has samples: seconds of one block in one format, by the weights of its linear layers. What
another block takes is interpolated between the two samples nearest in weights; a block with several
formats is its linear groups' shares of the block in each. A model is the sum of its blocks and of
what is outside them, so that a bound on the seconds is one more linear bound of a search.
"""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from compress.core.errors import InputError
from compress.core.settings import first_fault
from compress.formats.table import Format
from compress.model.architecture import Architecture, Block, group_format, sizes
from compress.model.families import experts_of, family_of, outside
from compress.model.layout import shape

# Of a sample: the embedding and head with all that is outside the blocks.
OUTSIDE = "outside"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Seconds of a block of a kind, of so many weights in a format: of a prompt, and of a token."""

    kind: str
    format: Format
    weights: int
    prompt_seconds: float
    token_seconds: float


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of a prompt of the profile's length, and of a token after it."""

    prompt: float
    token: float

    def plus(self, other: "Seconds", times: float = 1.0) -> "Seconds":
        """The sum with another, so many times."""
        return Seconds(
            prompt=self.prompt + times * other.prompt, token=self.token + times * other.token
        )


NOTHING = Seconds(prompt=0.0, token=0.0)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Samples of a reader on a machine, one request at a time."""

    reader: str
    machine: str
    family: str
    prompt_tokens: int
    samples: tuple[Sample, ...]

    @cached_property
    def known(self) -> Mapping[tuple[str, Format], list[Sample]]:
        """The samples of a kind in a format, by weights."""
        found: dict[tuple[str, Format], list[Sample]] = {}
        for sample in sorted(self.samples, key=lambda each: each.weights):
            found.setdefault((sample.kind, sample.format), []).append(sample)
        return found

    def at(self, kind: str, format: Format, weights: int) -> Seconds:
        """What so many weights take; InputError where nothing of the kind was measured so."""
        if not (samples := self.known.get((kind, format))):
            raise InputError(
                f"the profile of {self.reader} has no {kind} in {format}; profile it with "
                f"compress profile --formats"
            )
        if len(samples) == 1:
            [one] = samples
            share = weights / one.weights
            return Seconds(prompt=one.prompt_seconds * share, token=one.token_seconds * share)
        place = bisect.bisect([each.weights for each in samples], weights)
        place = min(max(place, 1), len(samples) - 1)
        low, high = samples[place - 1 : place + 1]
        share = (weights - low.weights) / (high.weights - low.weights)

        def between(one: float, other: float) -> float:
            return max(0.0, one + share * (other - one))

        return Seconds(
            prompt=between(low.prompt_seconds, high.prompt_seconds),
            token=between(low.token_seconds, high.token_seconds),
        )

    def block(self, block: Block, hidden: int, family: str) -> Seconds:
        """What a block takes in its formats."""
        groups = group_weights(block, hidden, family)
        total, found = sum(groups.values()), NOTHING
        for group, weights in groups.items():
            whole = self.at(block.kind, group_format(block, group), total)
            found = found.plus(whole, weights / total)
        return found

    def outside(self, architecture: Architecture) -> Seconds:
        """What embedding, head and all else that is outside the blocks take."""
        formats = dict(architecture.outside_formats)
        head = list(outside_weights(architecture))[-1]
        weights = outside_weights(architecture)[head]
        return self.at(OUTSIDE, formats.get(head, "bf16"), weights)

    def model(self, architecture: Architecture) -> Seconds:
        """What a whole model takes; InputError where it is of another family."""
        if architecture.family != self.family:
            raise InputError(f"the profile is of {self.family}, the model is {architecture.family}")
        found = self.outside(architecture)
        for block in architecture.blocks:
            found = found.plus(self.block(block, architecture.hidden, architecture.family))
        return found


def group_weights(block: Block, hidden: int, family: str) -> dict[str, int]:
    """Weights of a block's linear groups, of routed experts those that a token uses."""
    axis_sizes = {"hidden": hidden} | sizes(block)
    found: dict[str, int] = {}
    for name, slot in family_of(family).tensors(block).items():
        if slot.fused:
            copies = axis_sizes["top_k"] if "{expert}" in name else len(experts_of(name, block))
            weights = copies * prod(shape(slot.shape, axis_sizes))
            found[slot.fused] = found.get(slot.fused, 0) + weights
    return found


def outside_weights(architecture: Architecture) -> dict[str, int]:
    """Weights of the embedding, and of a head of its own after it."""
    axis_sizes = {"hidden": architecture.hidden, "vocab": architecture.vocab}
    return {
        slot.fused: prod(shape(slot.shape, axis_sizes))
        for _, slot in outside(architecture)
        if slot.fused
    }


@dataclass(frozen=True)
class SpeedBound:
    """The most seconds that a profile may say of a model: of a prompt, of a token; None: any."""

    profile: Profile
    prompt: float | None
    token: float | None

    @property
    def bounds(self) -> dict[str, float]:
        """What is bounded, by its name in ``Seconds``."""
        found = {"prompt": self.prompt, "token": self.token}
        return {name: most for name, most in found.items() if most is not None}

    def kept(self, architecture: Architecture) -> bool:
        """Whether a model keeps the bounds."""
        seconds = self.profile.model(architecture)
        return all(getattr(seconds, name) <= most for name, most in self.bounds.items())


JSON = TypeAdapter(Profile)


def read_profile(file: Path) -> Profile:
    """What ``compress profile`` wrote; InputError on a file that is missing or something else."""
    if not file.is_file():
        raise InputError(f"profile {file} does not exist; compress profile MODEL writes one")
    try:
        return JSON.validate_json(file.read_bytes())
    except ValidationError as error:
        raise InputError(f"{file} is no profile: {first_fault(error)}") from error


def write_profile(profile: Profile, file: Path) -> None:
    """Write a profile as JSON."""
    file.write_bytes(JSON.dump_json(profile, indent=1) + b"\n")


def speed_bound(file: str | None, least: float | None, prompt: float | None) -> SpeedBound | None:
    """The bound of tokens a second at least, and seconds of a prompt at most; None: neither.

    InputError where there is no profile for it.
    """
    if least is None and prompt is None:
        return None
    if file is None:
        raise InputError(
            "--min-tokens-per-second and --max-latency need --profile FILE, which compress "
            "profile MODEL writes on the machine that serves"
        )
    return SpeedBound(read_profile(Path(file)), prompt, None if least is None else 1 / least)
