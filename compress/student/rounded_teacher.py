"""A teacher rounded on text to every format that is searched, and what cuts of it are rounded by.

Taken once, in one sweep of the teacher, so that a search prices and measures what calibrated
rounding leaves, not what rounding to nearest would. What is approximated: inputs are those of the
teacher, where a student that is exported is rounded by its own (``calibration``).

Of a fused group there are X^T X of what it reads, the weights in every format as they are stored,
and the share of the squared error of its output that rounding to nearest makes which is left, on
text that was not rounded on. Embedding and head, a block of their own after the last one, have the
matrix alone, an embedding none: its rows are looked up. Of what routed experts read of the residual
stream only the diagonal is kept, a matrix each would be larger than they are: where that is cut
they have scales alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from compress.formats.fake import fused_groups, group_amax
from compress.formats.table import FORMATS, Format, GroupFormats, Rounding
from compress.model.families import outside_groups
from compress.model.layout import kept_positions, parse, shape
from compress.model.modules import weights_of
from compress.model.tensor_files import save_tensors
from compress.student.masks import numbered
from compress.student.readings import group_inputs, head_inputs
from compress.student.rounding import NOTHING, Inputs, Rounded, round_group, row_errors
from compress.student.surgery import Cut
from compress.sweep.placement import REFERENCE, Placement
from compress.sweep.stack import Stack

# Sequences that go through a layer together.
BATCH = 8


@torch.no_grad()
def round_teacher(
    stack: Stack,
    rows_RT: Tensor,
    check_RT: Tensor,
    formats: Sequence[Format],
    rounding: Rounding,
    directory: Path,
    progress: Callable[[int], None] = lambda layers: None,
) -> None:
    """Write what ``RoundedTeacher`` reads: a file for every fused group, whole or not at all.

    Those that are there stay, so that what was killed goes on. ``check_RT`` are rows that shares
    are taken on. In memory are one layer, the Gram matrices of a group, and the hidden states of
    the rows.
    """
    fitted = [stack.embed(rows) for rows in torch.split(rows_RT, BATCH)]
    checked = [stack.embed(rows) for rows in torch.split(check_RT, BATCH)]
    for number, layer in stack.visits(range(stack.layers)):
        for at, block in numbered(stack.architecture, number):
            weights = weights_of(stack.model, stack.architecture, block)
            fused = {name: slot.fused for name, (_, slot) in weights.items()}
            for names in fused_groups(weights, fused):
                file = file_of(directory, at, str(fused[names[0]]))
                if file.is_file():
                    continue
                read = partial(group_inputs, stack, layer, block, names)
                group = [weights[name][0] for name in names]
                found = rounded_group(
                    group, names, read(fitted)[0], read(checked)[0], formats, rounding
                )
                save_tensors(found, file)
        fitted = [stack.run(number, layer, states) for states in fitted]
        checked = [stack.run(number, layer, states) for states in checked]
        progress(1)
    for outside in outside_groups(stack.architecture):
        each, inputs = stack.outside(outside), NOTHING
        if outside == "head":
            inputs, _ = head_inputs(stack, fitted)
        names = [each.name.removesuffix(".weight")]
        found = rounded_group([stack.read(each)], names, [inputs], [], (), rounding)
        save_tensors(found, file_of(directory, len(stack.architecture.blocks), outside))


def file_of(directory: Path, number: int, group: str) -> Path:
    """The file of a fused group of the teacher's block of this number, or beside the blocks."""
    return directory / f"{number:04}-{group}.safetensors"


def rounded_group(
    group: Sequence[Tensor],
    names: Sequence[str],
    inputs: Sequence[Inputs],
    checks: Sequence[Inputs],
    formats: Sequence[Format],
    rounding: Rounding,
) -> dict[str, Tensor]:
    """What the file of a fused group holds; formats that its shapes refuse are left out."""
    readers = list({id(each): each for each in inputs}.values())
    found: dict[str, Tensor] = {"largest": group_amax(group)}
    known = dict[int, Inputs]()
    for number, reader in enumerate(readers):
        gram = reader.gram()
        if len(readers) > 1 and gram.shape[0] > group[0].shape[0]:
            found[f"gram/{number}"], known[id(reader)] = gram.diagonal().clone(), reader
        else:
            found[f"gram/{number}"] = gram
            known[id(reader)] = Inputs(partial(torch.Tensor.clone, gram), reader.tokens)
        found[f"tokens/{number}"] = torch.tensor(reader.tokens)
    for name, each in zip(names, inputs, strict=True):
        found[f"reader/{name}"] = torch.tensor(readers.index(each))
    for format in formats:
        if not all(FORMATS[format].takes(weight.shape) for weight in group):
            continue
        made = round_group(group, format, [known[id(each)] for each in inputs], rounding)
        near = round_group(group, format, inputs, "nearest")
        after, before = (missed(group, each, checks) for each in (made, near))
        found[f"share/{format}"] = torch.tensor(after / before if before > 0 else 1.0)
        for name, rounded in zip(names, made, strict=True):
            stored = enumerate(rounded.stored)
            found |= {f"{format}/{part}/{name}": tensor for part, tensor in stored}
    return found


def missed(group: Sequence[Tensor], made: Sequence[Rounded], inputs: Sequence[Inputs]) -> float:
    """The squared error of what a rounded group puts out."""
    return sum(
        float(row_errors(weight - each.values, reader.gram()).sum(dtype=torch.float64))
        for weight, each, reader in zip(group, made, inputs, strict=True)
    )


@dataclass(frozen=True)
class RoundedTeacher:
    """What ``round_teacher`` wrote to a directory, read a fused group at a time."""

    directory: Path
    rounding: Rounding
    placement: Placement = REFERENCE

    def share(self, number: int, group: str, format: Format) -> float:
        """The share of nearest rounding's squared output error that is left of a whole group."""
        with safe_open(file_of(self.directory, number, group), framework="pt") as reader:
            return float(reader.get_tensor(f"share/{format}"))

    def rounded(
        self,
        number: int,
        cuts: Sequence[Cut],
        weights: Mapping[str, Tensor],
        axis_sizes: Mapping[str, int],
        formats: GroupFormats,
    ) -> dict[str, Tensor]:
        """The values in their formats, fp32, of weights cut from the teacher's block ``number``.

        By their names in the layer, of linear groups that have a format; ``axis_sizes`` are the
        teacher's. A weight that reads all that its teacher's reads has rows of that one's values.
        Others are rounded by the matrices of what they read, cut along what is kept, under a scale
        that is shared with the teacher's.
        """
        found, own = dict[str, Tensor](), dict(formats)
        for names in fused_groups(weights, {each.name: each.slot.fused for each in cuts}):
            group = [each for each in cuts if each.name in names]
            if (format := own.get(str(group[0].slot.fused), "bf16")) != "bf16":
                values = self.group(number, group, weights, axis_sizes, format)
                found |= zip(names, values, strict=True)
        return found

    def group(
        self,
        number: int,
        cuts: Sequence[Cut],
        weights: Mapping[str, Tensor],
        axis_sizes: Mapping[str, int],
        format: Format,
    ) -> list[Tensor]:
        """Those of one fused group."""
        found, left = dict[int, Tensor](), dict[int, Inputs]()
        file = file_of(self.directory, number, str(cuts[0].slot.fused))
        with safe_open(file, framework="pt") as stored:
            known = set(stored.offset_keys())

            def get(name: str) -> Tensor:
                return torch.as_tensor(stored.get_tensor(name)).to(self.placement.device)

            read = cache(partial(self.cut_inputs, get))
            for at, each in enumerate(cuts):
                name = each.source.removesuffix(".weight")
                outputs, inputs = (
                    kept_positions(dimension, axis_sizes, each.keep)
                    for dimension in parse(each.slot.shape)
                )
                parts = [
                    f"{format}/{part}/{name}" for part in range(1 + len(FORMATS[format].scales))
                ]
                parts = [part for part in parts if part in known]
                if parts and len(inputs) == shape(each.slot.shape, axis_sizes)[1]:
                    values = FORMATS[format].numerics.unpack(*map(get, parts))
                    found[at] = values[outputs.to(values.device)]
                else:
                    left[at] = read(int(get(f"reader/{name}")), tuple(inputs.tolist()))
            if left:
                own = [weights[cuts[at].name] for at in left]
                made = round_group(own, format, [*left.values()], self.rounding, get("largest"))
                found |= {at: each.values for at, each in zip(left, made, strict=True)}
        return [found[at] for at in range(len(cuts))]

    def cut_inputs(
        self, get: Callable[[str], Tensor], reader: int, kept: tuple[int, ...]
    ) -> Inputs:
        """What is read along the kept inputs; a diagonal as its matrix."""
        if (tokens := int(get(f"tokens/{reader}"))) == 0:
            return NOTHING
        gram, index = get(f"gram/{reader}"), torch.tensor(kept, device=self.placement.device)
        own = gram[index].diag() if gram.dim() == 1 else gram[index[:, None], index]
        return Inputs(lambda: own, tokens)
