"""What the stages of a run take, and that they are not begun where they would not fit."""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from compress.core.errors import InputError
from compress.memory.devices import find_device
from compress.memory.machine import Machine, preset_machine, this_machine
from compress.memory.work import STUDENT, Settings, Work, require_fits, work_of
from compress.model.architecture import Architecture
from compress.run.recipe import Recipe

if TYPE_CHECKING:
    from compress.sweep.placement import Placement


def machine_of(recipe: Recipe, name: str | None) -> Machine:
    """The machine of a preset's name, or this one, with the memory of a recipe where it has any."""
    if name is None:
        return this_machine(recipe.memory_bytes)
    device = find_device(name)
    if device.count > 1:
        raise InputError(
            f"--on {name}: the work is done on one card; take {name.partition('x')[2]}"
        )
    found = preset_machine(device)
    return replace(found, memory=min(found.memory, recipe.memory_bytes or found.memory))


def works_of(
    architecture: Architecture, recipe: Recipe, machine: Machine, student: float = STUDENT
) -> list[Work]:
    """What every stage of a recipe takes; ``student`` is what a trained one has of the weights."""
    own = {each.name: getattr(recipe, each.name, None) for each in fields(Settings)}
    given = {name: value for name, value in own.items() if value is not None}
    return work_of(architecture, Settings(**given | {"student": student}), machine)


def works_json(works: Sequence[Work], machine: Machine) -> dict[str, Any]:
    """What ``plan --json`` says of the work: the machine, and a row per stage."""
    stages = [
        {
            "stage": work.stage,
            "least": work.least,
            "takes": work.takes(machine),
            "host": work.host,
            "fits": work.least <= machine.memory,
            "seconds": round(work.seconds(machine), 1),
            "parts": dict(work.parts),
        }
        for work in works
    ]
    return {"machine": asdict(machine), "stages": stages}


def require_stage(
    stage: str,
    architecture: Architecture,
    recipe: Recipe,
    placement: "Placement",
    student: float = STUDENT,
) -> None:
    """InputError where a stage would not fit: what it takes, what there is and what would fit."""
    if placement.memory is None:
        return
    machine = Machine(
        name=placement.device.type, memory=placement.memory, flops=1,
        number_bytes=placement.dtype.itemsize, accelerator=placement.device.type != "cpu",
    )  # fmt: skip

    def found(name: str = stage, **settings: object) -> Work:
        works = works_of(architecture, recipe.changed(**settings), machine, student)
        return next(each for each in works if each.stage == name)

    others: dict[str, Work] = {}
    if stage in ("search", "distill"):
        others |= {
            f"--optimizer {name}": found(optimizer=name) for name in ("adamw8bit", "offload")
        }
    if stage == "search":
        others["--short-distill-tokens 0"] = found(short_distill_tokens=0)
    if stage == "distill":
        others["--local-tokens N --distill-tokens 0"] = found("local", local_tokens=1)
    require_fits(found(), machine, others)
