"""How joint compares: paired differences to every kind, and to the best of what people do."""

from collections.abc import Iterator, Mapping
from typing import Any

from compress.measure.estimates import Estimate, difference, mean_of

# What choosing both at once has to leave of the KL of what people do.
ASKED = 0.9
STAGES = ("before", "after")
JOINT = "joint"
# One lever alone, or one after the other without a search; and the two searched one after another.
SIMPLE = ("prune", "formats", "uniform then fp8", "uniform then nvfp4")
SEARCHED_SEQUENCES = ("prune then fp8", "prune then nvfp4")
Entries = Mapping[str, Mapping[str, Any]]


def estimates(entries: Entries, stage: str) -> dict[str, Estimate]:
    """KL by kind at a stage, of the kinds that fit."""
    return {kind: mean_of(entry[stage]) for kind, entry in entries.items() if entry["fits"]}


def compared(entries: Entries) -> Iterator[dict[str, Any]]:
    """A row per kind: KL with its standard error at every stage, and joint minus it, paired."""
    found = {stage: estimates(entries, stage) for stage in STAGES}
    for kind, entry in entries.items():
        row = {"kind": kind} | {key: v for key, v in entry.items() if key not in STAGES}
        row["MiB"] = entry["bytes"] / 2**20 if entry["fits"] else "does not fit"
        for stage in STAGES if entry["fits"] else ():
            own, joint = found[stage][kind], found[stage].get(JOINT)
            row |= {stage: own.value, f"{stage} se": own.stderr}
            if joint is not None and kind != JOINT:
                change, stderr = difference(own, joint)
                row |= {f"diff {stage}": change, f"diff {stage} se": stderr}
        yield row


def verdict(entries: Entries, stage: str) -> dict[str, Any]:
    """Joint against the best other kind, the best simple one and prune, then quantize.

    The best are chosen by the KL that is compared, which favours them; of the searched sequences
    the one that is better on select text stands for both, which share its trials.
    """
    found = estimates(entries, stage)
    joint = found.pop(JOINT, None)
    if joint is None:
        return {"joint": "does not fit"}
    sequences = [kind for kind in SEARCHED_SEQUENCES if kind in found]
    rivals = {
        "best other": min(found, key=lambda k: found[k].value, default=None),
        f"best single lever or blind sequence (asked: ratio {ASKED})": min(
            (kind for kind in SIMPLE if kind in found), key=lambda k: found[k].value, default=None
        ),
        "searched prune then quantize": min(
            sequences, key=lambda k: float(entries[k]["select kl"]), default=None
        ),
    }
    return {
        name: "none fits" if kind is None else against(joint, kind, found[kind])
        for name, kind in rivals.items()
    }


def against(joint: Estimate, kind: str, other: Estimate) -> dict[str, Any]:
    """Joint over one other: the ratio, and the paired difference also in standard errors."""
    change, stderr = difference(other, joint)
    return {
        "kind": kind,
        "ratio": rounded(joint.value / other.value),
        "difference": rounded(change),
        "se": None if stderr is None else rounded(stderr),
        "standard errors": rounded(change / stderr) if stderr else None,
    }


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
