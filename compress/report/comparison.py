"""Models side by side: what each takes in the same deployment."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from compress.core.quantities import format_bytes, format_count, format_tokens
from compress.core.terminal import console, table
from compress.memory.footprint import mtp_weight_bytes
from compress.memory.plan import Plan
from compress.model.families import count_active, count_parameters
from compress.report.plan import limit_text, smallest_card


def print_comparison(plans: Mapping[str, Plan], as_json: bool = False) -> None:
    """Print plans of one deployment and budget, by what their models were called, on stdout.

    A column each: four models with names as their makers give them fit into 80 columns.
    """
    if as_json:
        print(json.dumps({name: plan.to_json() for name, plan in plans.items()}))
        return
    first = next(iter(plans.values()))
    served, names = first.deployment, short_names(list(plans))
    title = f"context {format_tokens(served.context)}, batch {served.batch_size}"
    if first.budget:
        title += f": {first.budget.description}"
    columns = [column(plan) for plan in plans.values()]
    rows = [[label, *(each[label] for each in columns)] for label in columns[0]]
    table(title, ["", *names], rows)
    for name, plan in zip(names, plans.values(), strict=True):
        for line in plan.notes:
            console().print(f"{name}: {line}", markup=False, soft_wrap=True)


def column(plan: Plan) -> dict[str, str]:
    """What is said of one model, by label."""
    model, taken = plan.architecture, plan.footprint
    further = mtp_weight_bytes(model)
    found = {
        "parameters": format_count(count_parameters(model)),
        "active": format_count(count_active(model)),
        "weights": format_bytes(taken.weights + further),
        "KV cache": format_bytes(taken.kv_cache + taken.mtp - further),
        "states": format_bytes(taken.ssm_state + taken.conv_state),
        "total": format_bytes(taken.total),
    }
    if plan.budget is None:
        return found | {"smallest card": smallest_card(taken.total)}
    return found | {
        "fits": "yes" if plan.fits else "no",
        "largest context": limit_text(plan.largest_context),
        "largest batch": limit_text(plan.largest_batch),
    }


def short_names(models: list[str]) -> list[str]:
    """The last part of every model's path or id, or all of it where several end alike."""

    def last(model: str) -> str:
        path = Path(model)
        return path.parent.name if path.name == "config.json" else path.stem or model

    counts = Counter(map(last, models))
    return [last(model) if counts[last(model)] == 1 else model for model in models]
