"""A number format per block against one per linear group: KL at the same bits a block weight.

``python -m benchmarks.groups --bits 5.4,4.9``: the ``formats`` space from the same scores, to
nearest, without measured trials, on text that scores have not seen.
"""

import torch

from benchmarks.common import Clock, arguments, report, subject
from compress.core.terminal import note
from compress.measure.estimates import mean_of
from compress.measure.kl import sequence_kl
from compress.memory.footprint import Deployment, outside_bytes
from compress.model.families import parameters
from compress.scores.contributions import contributions
from compress.scores.costs import Scores
from compress.searches.curve import bits
from compress.searches.problem import Globals, Problem
from compress.searches.proposals import candidate_of, decode
from compress.searches.space import load_space
from compress.student.assemble import stack_in_formats
from compress.sweep.placement import REFERENCE


def main() -> None:
    """Score once, choose by both scopes at every size, measure."""
    settings = arguments(
        __doc__ or "",
        "smollm2-135m",
        bits={"default": "5.4,4.9"},
        formats={"default": "bf16,fp8,nvfp4"},
        score_tokens={"type": int, "default": 2048},
        score_length={"type": int, "default": 64},
        draws={"type": int, "default": 8},
        final_tokens={"type": int, "default": 8192},
    )
    found = subject(settings)
    teacher, formats = found.checkpoint.architecture, settings.formats.split(",")
    rows, clock = found.rows("score", settings.score_tokens, settings.score_length), Clock()
    asked = [format for format in formats if format != "bf16"]
    made = contributions(found.stack, rows, settings.draws, asked, settings.seed)
    facts = {"scoring, seconds": clock.seconds, "rows": len(made["hidden"])}
    scores = Scores(made, {}, {}, rows.shape[1])
    final = found.reference(found.rows("final", settings.final_tokens))
    inside = sum(each.count for each in parameters(teacher) if each.block is not None)
    shown = []
    for asked_bits in map(float, settings.bits.split(",")):
        budget = outside_bytes(teacher) + int(asked_bits * inside / 8)
        for scope in ("block", "group"):
            update = {"format_scope": scope, "formats": tuple(formats), "kv_formats": ("bf16",)}
            space, clock = load_space("formats").model_copy(update=update), Clock()
            problem = Problem(teacher, scores, space, Deployment(context=0, batch_size=0), budget)
            proposal = decode(problem, Globals())
            assert proposal is not None
            seconds = clock.seconds
            student = candidate_of(problem, "formats", 0, proposal).architecture
            stack = stack_in_formats(found.checkpoint, student, REFERENCE)
            kl = mean_of(torch.cat(list(sequence_kl(stack, final))).numpy())
            shown.append(
                {
                    "scope": scope,
                    "bits": bits(student),
                    "options": sum(map(len, problem.groups(Globals()))),
                    "seconds": seconds,
                    "predicted": proposal.predicted,
                    "kl": kl.value,
                    "se": kl.stderr,
                }
            )
            note(f"{scope}, {asked_bits} bits: {kl.value:.4f}")
    report("groups", settings, facts, list(shown[0]), shown)


if __name__ == "__main__":
    main()
