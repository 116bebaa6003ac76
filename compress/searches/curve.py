"""What number formats alone reach: predicted KL against bits, from no choice to the least."""

from dataclasses import dataclass, replace

from compress.formats.table import FORMATS, Format
from compress.memory.footprint import Deployment, outside_bytes, weight_bytes
from compress.model.architecture import Architecture
from compress.model.families import parameters
from compress.scores.costs import Scores
from compress.searches.knapsack import smallest
from compress.searches.problem import Globals, Problem
from compress.searches.proposals import candidate_of, decode
from compress.searches.space import load_space

POINTS = 12


@dataclass(frozen=True, kw_only=True)
class Point:
    """A student of the ``formats`` space that keeps embedding, head and caches in BF16.

    Its bits a weight inside the blocks, scales counted, its bytes of weights and its predicted KL
    in nats per token. ``format`` is the one of all blocks that take it; None where the knapsack
    chose for every linear group.
    """

    bits: float
    bytes: int
    kl: float
    format: Format | None = None


def format_curve(teacher: Architecture, scores: Scores, formats: set[Format]) -> list[Point]:
    """The best choice of formats by the scores at bytes from all in BF16 to the least there is.

    Then one point for each of ``formats`` alone.
    """
    offered: tuple[Format, ...] = ("bf16", *(f for f in FORMATS if f in formats - {"bf16"}))
    space = load_space("formats").model_copy(
        update={"kv_formats": ("bf16",), "head_formats": ("bf16",), "format_scope": "group"}
    )
    plain = replace(teacher, mtp=())

    def chosen(*own: Format, bytes: int) -> Point | None:
        problem = Problem(
            plain,
            scores,
            space.model_copy(update={"formats": own}),
            Deployment(context=0, batch_size=0),
            bytes,
        )
        if (found := decode(problem, Globals())) is None:
            return None
        made = candidate_of(problem, "formats", 0, found).architecture
        alone = own[0] if len(own) == 1 else None
        size = weight_bytes(made)
        return Point(bits=bits(made), bytes=size, kl=found.predicted, format=alone)

    most = weight_bytes(plain)
    whole = Problem(
        plain,
        None,
        space.model_copy(update={"formats": offered}),
        Deployment(context=0, batch_size=0),
        most,
    )
    knapsack = whole.knapsack(whole.groups(Globals()), Globals(), priced=False)
    least = smallest(knapsack) + most - knapsack.room
    # Closer where the KL is higher.
    sizes = (least + (most - least) * (n / (POINTS - 1)) ** 2 for n in range(POINTS)[::-1])
    points = [chosen(*offered, bytes=round(size)) for size in sizes]
    points += [chosen(format, bytes=most) for format in offered[1:]]
    return [point for point in points if point is not None]


def bits(architecture: Architecture) -> float:
    """Bits a weight inside the blocks, scales counted."""
    inside = sum(each.count for each in parameters(architecture) if each.block is not None)
    return 8 * (weight_bytes(architecture) - outside_bytes(architecture)) / inside
