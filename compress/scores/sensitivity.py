"""What number formats cost and save, by kind of linear group."""

from collections.abc import Sequence
from dataclasses import dataclass

from compress.formats.table import FORMATS, Format
from compress.memory.footprint import group_bytes
from compress.model.architecture import Architecture, Block, block_name
from compress.model.families import linear_groups
from compress.scores.costs import Scores, kl_of, rounding_rows


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """One kind of linear group in one format, in all blocks that take it.

    ``saved`` are bytes against BF16, ``kl`` the sum of what each costs alone, predicted in nats per
    token, ``most`` the largest of them and ``where`` its block. What is ``outside`` the blocks,
    embedding and head, was measured.
    """

    kind: str
    group: str
    format: Format
    blocks: int
    saved: int
    kl: float
    most: float
    where: str


def sensitivities(architecture: Architecture, scores: Scores) -> list[Sensitivity]:
    """A row for every kind of linear group and every format that was scored."""
    alike: dict[tuple[str, str], list[Block]] = {}
    for block in architecture.blocks:
        for group in linear_groups(block, architecture.family):
            alike.setdefault((block.kind, group), []).append(block)
    endings = {tuple(key.rsplit("/", 2)[1:]) for key in scores.contributions}
    rows = [
        sensitivity(architecture, scores, group, format, blocks)
        for (_, group), blocks in alike.items()
        for format in FORMATS
        if (group, format) in endings
    ]
    shape = architecture.vocab, architecture.hidden
    for key, kl in scores.outside.items():
        group, _, format = key.partition("/")
        row = next(row for name, row in FORMATS.items() if name == format)
        saved = FORMATS["bf16"].bytes(shape) - row.bytes(shape)
        made = Sensitivity(
            kind="outside", group=group, format=row.name, blocks=1, saved=saved, kl=kl, most=kl,
            where=group,
        )  # fmt: skip
        rows.append(made)
    return rows


def sensitivity(
    architecture: Architecture,
    scores: Scores,
    group: str,
    format: Format,
    blocks: Sequence[Block],
) -> Sensitivity:
    """The row of blocks of one kind."""
    own = (architecture.hidden, architecture.family)
    costs = {b: kl_of(rounding_rows(scores, b, {}, group, format), scores.length) for b in blocks}
    taking = {block: cost for block, cost in costs.items() if cost}
    where = max(costs, key=costs.__getitem__)
    saved = (
        group_bytes(b, group, *own, "bf16") - group_bytes(b, group, *own, format) for b in taking
    )
    return Sensitivity(
        kind=blocks[0].kind, group=group, format=format, blocks=len(taking), saved=sum(saved),
        kl=sum(costs.values()), most=costs[where], where=block_name(where),
    )  # fmt: skip
