"""What a model predicts on token rows, small enough to lie in an export, and two of them compared.

A row is a prompt and the student's own greedy tokens after it. So one pass over the rows compares
log-probabilities at every place, and generating from the prompts compares what a server gives out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from compress.core.errors import VerificationFailed
from compress.sweep.stack import Stack, final_states

# Says nothing of how to generate.
NOTHING: Any = GenerationConfig
# R rows, T tokens of each, of which the last are greedy, K tokens that are likeliest.
ROWS, PROMPT, GREEDY, TOP = 4, 40, 12, 8
# Greedy tokens where each costs a sweep of all weights.
SWEPT = 3
# In fp32 a written and a read model run the same arithmetic: as a share of the largest magnitude.
EXACT = 1e-3
# In another arithmetic, in nats: a model in BF16 alone is 1e-3 to 4e-3 from itself in fp32.
NOISE = 2e-2


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Log-probabilities of rows [R, T], and greedy tokens.

    Attributes:
        reader: who read what.
        dtype: in which arithmetic.
        text: of each token after the first [R, T - 1].
        ids: the likeliest tokens at each place but the last [R, T - 1, K], the likeliest first.
        values: theirs [R, T - 1, K].
        greedy: what it generates after the prompts [R, T - PROMPT].
    """

    reader: str
    dtype: str
    text: Tensor
    ids: Tensor
    values: Tensor
    greedy: Tensor

    def to_json(self) -> dict[str, Any]:
        """As JSON says it."""
        keys = ("text", "values", "ids", "greedy")
        tensors = {key: getattr(self, key).tolist() for key in keys}
        return {"reader": self.reader, "dtype": self.dtype} | tensors


def from_json(found: Mapping[str, Any]) -> Predictions:
    """What ``to_json`` or a reader wrote."""
    numbers = {key: torch.tensor(found[key], dtype=torch.float32) for key in ("text", "values")}
    tokens = {key: torch.tensor(found[key]) for key in ("ids", "greedy")}
    return Predictions(reader=found["reader"], dtype=found["dtype"], **numbers, **tokens)


def predictions(reader: str, logits_RTV: Tensor, rows_RT: Tensor, prompt: int) -> Predictions:
    """Those of fp32 logits; the greedy tokens are what follows if all before are the row's."""
    scores = logits_RTV[:, :-1].double().log_softmax(-1).float().cpu()
    best = scores.topk(min(TOP, scores.shape[-1]))
    return Predictions(
        reader=reader, dtype="float32", ids=best.indices, values=best.values,
        text=scores.gather(-1, rows_RT[:, 1:, None]).squeeze(-1),
        greedy=best.indices[:, prompt - 1 :, 0],
    )  # fmt: skip


@torch.no_grad()
def logits(stack: Stack, rows_RT: Tensor) -> Tensor:
    """Logits [R, T, V] of token rows, fp32, where the stack is."""
    [hidden_BTD] = final_states(stack, [rows_RT])
    with stack.head() as head:
        return head.logits(hidden_BTD.flatten(0, 1)).view(*rows_RT.shape, -1)


@torch.no_grad()
def continued(stack: Stack, prompts_RP: Tensor) -> Tensor:
    """Prompts with the student's greedy tokens after them [R, T].

    ``GREEDY`` with a cache where all of it stays in place, else ``SWEPT``, a sweep for each.
    """
    rows = prompts_RP.to(stack.placement.device)
    if len(stack.stays) == len(stack.parts):
        with stack.whole() as model:
            # As its directory says it may sample, and stop; what is left out here it fills in.
            told, model.generation_config = model.generation_config, NOTHING()
            plain = {"max_new_tokens": GREEDY, "do_sample": False, "pad_token_id": 0}
            found: Tensor = model.generate(rows, attention_mask=torch.ones_like(rows), **plain)
            model.generation_config = told
            return found.cpu()
    for _ in range(SWEPT):
        [hidden_BTD] = final_states(stack, [rows])
        with stack.head() as head:
            rows = torch.cat((rows, head.logits(hidden_BTD[:, -1]).argmax(-1, keepdim=True)), 1)
    return rows.cpu()


@dataclass(frozen=True)
class Comparison:
    """How far a reader is from the student that was measured.

    Attributes:
        reader: who read.
        difference: the largest one of log-probabilities, as a share of the largest magnitude.
        kl: of the likeliest tokens and the rest, nats per token.
        greedy: tokens that are equal before each row's first that is not, of so many.
        ties: rows whose first other token was as likely as its own, within what they differ by.
    """

    reader: str
    difference: float
    kl: float
    greedy: tuple[int, int]
    ties: int

    @property
    def text(self) -> str:
        """In one line."""
        equal, of = self.greedy
        ties = f" ({self.ties} rows end at a tie)" if self.ties else ""
        return (
            f"{self.reader}: log-probabilities differ by {self.difference:.1e} of their range, "
            f"KL {self.kl:.1e}, {equal} of {of} greedy tokens equal{ties}"
        )


def compare(meant: Predictions, read: Predictions) -> Comparison:
    """Compare what a reader predicts with what was meant.

    Raises:
        VerificationFailed: more than what its arithmetic explains, or not a number.
    """
    same = (meant.ids[..., :, None] == read.ids[..., None, :]).float()
    there = same.sum(-1) > 0
    values = torch.einsum("rtkl,rtl->rtk", same, read.values)
    apart = torch.cat(
        ((read.text - meant.text).abs().flatten(), (values - meant.values).abs()[there])
    )
    largest = float(apart.max()) if apart.isfinite().all() else math.inf
    difference = largest / float(meant.text.abs().max())
    kl = divergence(meant.values, torch.where(there, values, -math.inf))
    equal, ties = 0, 0
    for row, mine in enumerate(meant.greedy):
        others = (read.greedy[row] != mine).nonzero()
        first = int(others[0]) if len(others) else len(mine)
        equal += first
        if first < len(mine):
            at = meant.values.shape[1] - len(mine) + first
            margin = float(meant.values[row, at, 0] - meant.values[row, at, 1])
            if not margin <= 2 * largest:
                raise VerificationFailed(
                    f"greedy tokens: {read.reader} says {int(read.greedy[row, first])} where the "
                    f"student says {int(mine[first])}, {margin:.3f} nats likelier than any other"
                )
            ties += 1
    found = Comparison(read.reader, difference, kl, (equal, meant.greedy.numel()), ties)
    # Written so that NaN fails.
    right = difference <= EXACT if read.dtype == "float32" else kl <= NOISE
    if not right:
        bound = f"{EXACT:.0e} of their range" if read.dtype == "float32" else f"KL {NOISE:.0e}"
        raise VerificationFailed(f"logits: {found.text}; more than {bound}")
    return found


def divergence(meant: Tensor, read: Tensor) -> float:
    """KL of log-probabilities [R, T, K] of the same tokens, what is not among them as one token.

    Tokens that the reader does not list (minus infinity) count among the rest.
    """
    listed = read.isfinite()
    one, other = (each.where(listed, -math.inf).exp() for each in (meant, read))
    logs = torch.where(listed, meant - read.where(listed, 0.0), 0.0)
    rest = [(1 - each.sum(-1)).clamp(min=1e-12) for each in (one, other)]
    return float(((one * logs).sum(-1) + rest[0] * (rest[0] / rest[1]).log()).mean())
