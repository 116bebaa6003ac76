"""Whatever a config.json says, the answer is an architecture or one line."""

import random
from typing import Any

import pytest
from published import PUBLISHED
from tiny_models import EVERY

from compress.core.errors import InputError
from compress.memory.footprint import Deployment, footprint
from compress.model.architecture import Architecture
from compress.model.families import (
    count_active,
    count_parameters,
    family_of,
    read_architecture,
    settings_of,
)
from compress.model.families.settings import EXPERTS
from compress.model.families.wrapper import text_config

VALUES: list[Any] = [
    *(0, 1, -1, 3, 7, 10**6, 10**12, -(10**12), 2**63, 1.5, -0.5, float("nan"), float("inf")),
    *("", "abc", "8", None, True, False, [], [1], ["x"], [None], {}, {"a": 1}, [[]], [0, 1] * 50),
    *(["full_attention"], ["sliding_attention"] * 4, {"rope_type": "yarn"}, {"type": "linear"}),
]
CONFIGS = [*EVERY.values(), *(config for config, _ in PUBLISHED.values())]


def mutated(draw: random.Random) -> dict[str, Any]:
    """A config with one to three keys changed, added or gone."""
    whole = draw.choice(CONFIGS)
    config = dict(text_config(whole))
    known = sorted({*family_of(config["model_type"]).reads, *config})
    for _ in range(draw.randint(1, 3)):
        key = draw.choice(known)
        if draw.random() < 0.2:
            config.pop(key, None)
        else:
            config[key] = draw.choice(VALUES)
    if "text_config" in whole:
        return whole | {"text_config": draw.choice([*VALUES, *[config] * 99])}
    return config


def answer(config: dict[str, Any]) -> Architecture | str:
    """The architecture of a config, or what is wrong with it."""
    try:
        return read_architecture(config)
    except InputError as error:
        return str(error)


def test_a_broken_config_is_one_line() -> None:
    for seed in range(200):
        holds(answer(mutated(random.Random(seed))))


def holds(found: Architecture | str) -> None:
    if isinstance(found, str):
        assert "\n" not in found
        return
    taken = footprint(found, Deployment(context=4096, batch_size=3))
    figures = (taken.weights, taken.kv_cache, taken.ssm_state, taken.conv_state)
    assert min(*figures, count_active(found)) >= 0
    assert count_parameters(found) > 0


@pytest.mark.parametrize("family", EVERY)
def test_more_experts_than_any_model_has_are_one_line(family: str) -> None:
    for key in settings_of(EVERY[family]).keys() & EXPERTS.keys():
        for count in (10_000, 10**12, 2**63):
            said = answer(EVERY[family] | {key: count})
            assert said == f"{key} is {count}, not a whole number below 10000"
