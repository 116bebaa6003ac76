"""What the work on a model takes: bytes and time of score, search, distill and export; no torch.

Bytes are those on the placement beside the process itself. What has to be there at once, with w the
weights of the largest part (a layer; or embedding and head)::

    score    w, a rounding error of w per format, of one batch the inputs of all layers and a
             gradient per draw, activations of a layer, logits, the contribution matrix in fp32;
             or rounding, where that takes more
    search   2 w (read and made), the matrix, the teacher's states of the text, logits; or a
             finalist's training or rounding, where that takes more
    local    w, and weights and moments of a layer
    distill  weights and moments of the student, the head, inputs of all layers, logits
    export   2 w, logits, all in fp32; or rounding, where that takes more
    rounding on text: 2 w, states of the text, a Gram matrix and two of its size that factor it,
             the weights that are rounded together in all ways that are tried

Besides, a stage takes what is free: layers that stay (a third of the memory), inputs of more
batches (a quarter), cut blocks (an eighth). Time is that of the products, at a rate, and of reading
what does not stay. Times are rough: text decides when replays and trials stop.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from compress.core.errors import InputError
from compress.core.quantities import format_bytes
from compress.memory.machine import Machine
from compress.memory.sizes import Sizes, sizes_of
from compress.model.architecture import (
    Architecture,
)

FP32 = 4
# Sequences of a batch that is scored, and that a sweep replays or measures.
SCORE_BATCH, SWEEP_BATCH = 8, 4
# Tokens of a batch while training, and whose logits are there at a time.
MICRO_TOKENS, HEAD_TOKENS = 1024, 512
# Arrays over tokens and vocabulary in flight: logits, probabilities, and what becomes of them.
HEAD_ARRAYS = 4
# Linear groups that a unit is a part of: what reads the residual stream, and what writes it.
GROUPS = 2
EXPORT_TOKENS = 512
# What a student that is planned before it is searched has of its teacher's weights.
STUDENT = 0.7
# Bytes of a trained weight with gradient and moments, by optimizer and by bytes of a number.
TRAINED = {
    ("adamw", 4): 16, ("adamw", 2): 16, ("adamw8bit", 4): 10, ("adamw8bit", 2): 6,
    ("offload", 4): 16, ("offload", 2): 4,
}  # fmt: skip
# fp32 weights, gradients and moments on the host, of an optimizer that keeps them there.
MASTERS = 16
# Bytes read in a second.
READ_RATE = 1e9
# Candidates measured for each trial, baselines with them; tangents for each; passes of one.
MEASURED, TANGENTS, TANGENT_PASSES = 1.5, 0.3, 3
# A Gram matrix and what factors it; a weight in fp32 and what becomes of it in what is tried.
GRAMS, TRIED = 3, 8
# Forward passes of a text that is rounded on: as far as each group, and through the layer.
ROUNDING_PASSES = 3.5
BACKWARD = 2  # forward passes that a backward pass through trained weights is worth


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a recipe that decide how much work there is, under their names there.

    ``formats`` are scored; ``student`` is what a trained one has of the weights of the model.
    """

    score_tokens: int
    score_length: int
    draws: int
    replay_tokens: int
    select_tokens: int
    sequence_length: int
    trials: int
    reselect_rounds: int
    finalists: int
    short_distill_tokens: int
    local_tokens: int
    distill_tokens: int
    distill_length: int
    optimizer: str
    rounding: str = "nearest"
    calibration_tokens: int = 0
    formats: int = 2
    student: float = STUDENT


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one stage takes: bytes at once by what they are, bytes that it would like besides.

    ``host`` are the bytes at once in a host's memory that is not the machine's. ``operations`` are
    multiplications and additions, ``sweeps`` how often all ``weights`` (bytes) are read.
    """

    stage: str
    parts: Mapping[str, int]
    more: int
    host: int = 0
    operations: float
    sweeps: float
    weights: int

    @property
    def least(self) -> int:
        """Bytes without which it cannot run."""
        return sum(self.parts.values())

    def takes(self, machine: Machine) -> int:
        """Bytes that it takes on a machine that has enough."""
        return min(self.least + self.more, max(self.least, machine.memory))

    def seconds(self, machine: Machine) -> float:
        """About how long it takes; layers that do not stay are read in every sweep."""
        streamed = max(0, self.weights - machine.resident_bytes)
        return self.operations / machine.flops + self.sweeps * streamed / READ_RATE


def work_of(architecture: Architecture, asked: Settings, machine: Machine) -> list[Work]:
    """What every stage takes, in their order."""
    own = sizes_of(architecture)
    found = [
        score_work(own, asked, machine),
        search_work(own, asked, machine),
        distill_work(own, asked, machine),
        export_work(own, asked),
    ]
    if asked.local_tokens:
        found.insert(2, local_work(own, asked, machine))
    return found


def score_work(own: Sizes, asked: Settings, machine: Machine) -> Work:
    """Contributions and replays, whichever takes more."""
    number, layers = machine.number_bytes, len(own.layers)
    batch = min(SCORE_BATCH * asked.score_length, asked.score_tokens)
    state = own.hidden * number
    inputs = (layers + 1 + asked.draws) * batch * state
    scan = 1 + asked.formats
    parts = {
        "weights of a layer": own.largest * number,
        "rounding errors": asked.formats * max(own.layers) * number,
        "layer inputs": inputs,
        "activations": 2 * max(own.activations) * batch * number,
        "logits": HEAD_ARRAYS * asked.score_length * own.vocab * FP32,
    }
    matrix = matrix_bytes(own, asked)
    if not machine.accelerator:
        parts["contribution matrix"] = matrix
    batches = max(1, asked.score_tokens // batch)
    passes = asked.score_tokens * (2 + asked.draws + scan)
    after = layers / 2 * asked.replay_tokens  # every layer is removed in turn, halves follow it
    heads = (asked.score_tokens + layers * asked.replay_tokens) * own.vocab * own.hidden
    found = Work(
        stage="score", parts=parts, more=staying(own, machine) + (batches - 1) * inputs,
        operations=2 * (own.active * (passes + after) + heads),
        sweeps=2 + asked.replay_tokens / (SWEEP_BATCH * asked.score_length),
        weights=own.weights * number, host=matrix if machine.accelerator else 0,
    )  # fmt: skip
    return with_rounding(found, own, asked, number, asked.formats)


def with_rounding(work: Work, own: Sizes, asked: Settings, number: int, times: int) -> Work:
    """A stage that also rounds the model on text, ``times`` over: the more of bytes, both times."""
    if asked.rounding == "nearest" or not times:
        return work
    tokens = asked.calibration_tokens
    parts = {
        "weights of a layer": made_bytes(own, number),
        "states of the text": tokens * own.hidden * number,
        "Gram matrices": GRAMS * own.widest**2 * FP32,
        "rounded weights": TRIED * own.together * FP32,
    }
    operations = 2 * (ROUNDING_PASSES * tokens * own.active + times * own.columns)
    return replace(
        work,
        parts=max(work.parts, parts, key=lambda each: sum(each.values())),
        operations=work.operations + operations,
        sweeps=work.sweeps + 1,
    )


def matrix_bytes(own: Sizes, asked: Settings) -> int:
    """The contribution matrix in fp32, and once more while its parts are joined."""
    rows = max(1, asked.score_tokens // asked.score_length) * asked.draws
    return 2 * rows * own.units * (1 + GROUPS * asked.formats) * FP32


def search_work(own: Sizes, asked: Settings, machine: Machine) -> Work:
    """Trials and the short distillation of finalists, whichever takes more."""
    number = machine.number_bytes
    batch = SWEEP_BATCH * asked.sequence_length
    parts = {
        "weights of a layer": made_bytes(own, number),
        "teacher's states": asked.select_tokens * own.hidden * number,
        "activations": max(own.activations) * batch * number,
        "logits": HEAD_ARRAYS * min(batch, HEAD_TOKENS) * own.vocab * FP32,
    }
    matrix = matrix_bytes(own, asked) // 2
    if not machine.accelerator:
        parts["contribution matrix"] = matrix
    body = own.active + own.vocab * own.hidden
    measured = asked.trials * (MEASURED + TANGENTS * TANGENT_PASSES) * asked.select_tokens
    again = asked.reselect_rounds * asked.finalists * asked.score_tokens * (2 + asked.draws)
    trained = asked.finalists * asked.short_distill_tokens * (1 + asked.student * (1 + BACKWARD))
    trials = Work(
        stage="search", parts=parts, more=staying(own, machine) + 2 * own.weights * number,
        operations=2 * body * (measured + again + trained),
        sweeps=asked.trials * MEASURED * asked.select_tokens / batch, weights=own.weights * number,
        host=matrix if machine.accelerator else 0,
    )  # fmt: skip
    trials = with_rounding(trials, own, asked, FP32, asked.finalists)
    training = distill_work(own, asked, machine)
    if not asked.short_distill_tokens or not asked.finalists or trials.least > training.least:
        return trials
    return Work(
        stage="search", parts=training.parts, more=training.more,
        operations=trials.operations, sweeps=trials.sweeps, weights=trials.weights,
        host=max(trials.host, training.host),
    )  # fmt: skip


def local_work(own: Sizes, asked: Settings, machine: Machine) -> Work:
    """Blocks trained alone; their teacher's states are in a file."""
    number = machine.number_bytes
    batch = max(MICRO_TOKENS, asked.distill_length)
    parts = {
        "weights of a layer": own.largest * number,
        "weights and moments": TRAINED["adamw", 4] * max(own.layers),
        "activations": 2 * max(own.activations) * batch * number,
    }
    passes = 1 + asked.student * (1 + BACKWARD)
    return Work(
        stage="local", parts=parts, more=0,
        operations=2 * own.active * asked.local_tokens * passes, sweeps=1,
        weights=own.weights * number,
    )  # fmt: skip


def distill_work(own: Sizes, asked: Settings, machine: Machine) -> Work:
    """A student trained whole, in formats: as it is stored beside what is trained."""
    number, layers, share = machine.number_bytes, len(own.layers), asked.student
    stored = FP32 if asked.optimizer == "adamw" else number
    batch = max(MICRO_TOKENS, asked.distill_length)
    again = layers * own.hidden + max(own.activations)
    parts = {
        "weights and moments": round(TRAINED[asked.optimizer, number] * share * own.weights),
        "rounded weights": round(stored * share * own.weights),
        "teacher's head": own.vocab * own.hidden * number,
        "activations": again * batch * number,
        "logits": HEAD_ARRAYS * HEAD_TOKENS * own.vocab * FP32,
    }
    kept = max(0, sum(own.activations) * batch * number - parts["activations"])
    passes = 1 + share * (1 + BACKWARD)
    operations = 2 * (own.active + own.vocab * own.hidden) * asked.distill_tokens * passes
    offloaded = asked.optimizer == "offload" and machine.accelerator
    return Work(
        stage="distill", parts=parts, more=kept, operations=operations, sweeps=1,
        host=round(MASTERS * share * own.weights) if offloaded else 0,
        weights=own.weights * number,
    )  # fmt: skip


def export_work(own: Sizes, asked: Settings) -> Work:
    """Packing, and reading back; in fp32 everywhere."""
    parts = {
        "weights of a layer": made_bytes(own, FP32),
        "logits": 3 * EXPORT_TOKENS * own.vocab * FP32,
    }
    operations = 2 * 3 * EXPORT_TOKENS * (own.active + own.vocab * own.hidden)
    found = Work(
        stage="export", parts=parts, more=0, operations=operations, sweeps=4,
        weights=own.weights * FP32,
    )  # fmt: skip
    return with_rounding(found, own, asked, FP32, 1)


def made_bytes(own: Sizes, number: int) -> int:
    """The largest part of a student: a layer, while the next one is made, or what is outside."""
    return max(2 * max(own.layers), own.outside) * number


def staying(own: Sizes, machine: Machine) -> int:
    """Bytes of layers that would stay, all of them where there is room."""
    return min((own.weights - own.largest) * machine.number_bytes, machine.resident_bytes)


def require_fits(work: Work, machine: Machine, others: Mapping[str, Work]) -> None:
    """InputError where a stage cannot run: what it needs, what there is, what would fit.

    ``others`` are the stage by what would have to be asked for it.
    """
    if work.least <= machine.memory:
        return
    largest = max(work.parts, key=lambda part: work.parts[part])
    fitting = [name for name, each in others.items() if each.least <= machine.memory]
    remedy = f"; {' or '.join(fitting)} would fit" if fitting else ""
    raise InputError(
        f"{work.stage} of this model takes at least {format_bytes(work.least)} "
        f"({format_bytes(work.parts[largest])} of {largest}), {machine.name} has "
        f"{format_bytes(machine.memory)} for it{remedy}"
    )
