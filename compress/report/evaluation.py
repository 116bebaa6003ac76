"""The tables of an evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.core.quantities import format_bytes
from compress.core.terminal import note, table
from compress.memory.budget import Budget
from compress.report.figures import plus_minus, words


def print_results(found: Mapping[str, Any]) -> None:
    """The evaluation as tables: models, then paired differences with standard errors."""
    tasks = sorted({task for row in found["models"].values() for task in row["tasks"]})
    text = found["text"]
    table(
        f"Held-out text: {text['tokens']} tokens in {text['sequences']} sequences",
        ["model", "bytes", "KL", "nats/token", "bits/byte", *tasks],
        [[name, *cells(row, tasks)] for name, row in found["models"].items()],
    )
    pairs = [
        [f"{pair['b']} - {pair['a']}", pair["metric"], plus_minus(pair["difference"], None, 4, "+"),
         plus_minus(pair["stderr"])]
        for pair in found["paired"] if pair["metric"] in ("kl", "nats_per_token")
        or pair["metric"].endswith(("acc", "acc_norm"))
    ]  # fmt: skip
    if pairs:
        table("Paired differences", ["models", "metric", "difference", "stderr"], pairs, left=2)
    for line in found["notes"]:
        note(line)


def cells(row: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """A model's figures."""
    errors = row["stderr"]
    found = [format_bytes(row["bytes"])]
    found += [plus_minus(row[k], errors[k]) for k in ("kl", "nats_per_token", "bits_per_byte")]
    for metrics in (row["tasks"].get(task, {}) for task in tasks):
        first = next((key for key in metrics if "stderr" not in key), None)
        found.append(plus_minus(metrics[first], metrics["stderr"], 3) if first else "")
    return found


def print_table(
    rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any], budget: Budget, whole: int
) -> None:
    """The last table on the terminal, and whether anything beats the joint student."""
    # Where the text gives no rows for the task choice there are no columns for it.
    choice = any(row.get("choice_accuracy") is not None for row in rows)
    columns = [
        *("student", "bytes", "", "KL", "KL distilled", "nats", "nats dist."),
        *(("choice", "choice dist.") if choice else ()),
    ]
    lines = []
    for row in rows:
        kind = words(row["kind"])
        if row["kind"] != "teacher" and not row["fits"]:
            lines.append([kind, "does not fit", *[""] * (len(columns) - 2)])
            continue
        cells = [kind, format_bytes(row["bytes"]), f"{row['bytes'] / whole:.0%}"]
        for key, error, digits in (
            ("kl", "kl_se", 4), ("nats_per_token", "", 4), ("choice_accuracy", "choice_se", 3)
        ):  # fmt: skip
            for when in ("", "distilled_"):
                cells.append(plus_minus(row.get(when + key), row.get(when + error), digits))
        lines.append(cells[: len(columns)])
    tokens = found["text"]["tokens"]
    table(f"Within {budget.description}, on {tokens} tokens of final text", columns, lines)
    for pair in found["paired"]:
        if pair["metric"] == "kl" and pair["b"].startswith("joint") and pair["a"] != "teacher":
            same = pair["a"].endswith("distilled") == pair["b"].endswith("distilled")
            if same:
                shift = plus_minus(pair["difference"], pair["stderr"], sign="+")
                note(f"{pair['b']} minus {pair['a']}: KL {shift}")
