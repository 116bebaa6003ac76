"""Whatever a config.json says, the answer is figures or one line (5,000: benchmarks.mutations)."""

import random
from pathlib import Path

import pytest
from published import PUBLISHED
from tiny_models import EVERY

from benchmarks.mutations import answer, fault, mutated
from compress.model.families import settings_of
from compress.model.families.settings import EXPERTS

CONFIGS = [*EVERY.values(), *(config for config, _ in PUBLISHED.values())]


def test_a_broken_config_is_one_line(tmp_path: Path) -> None:
    for seed in range(200):
        draw = random.Random(seed)
        config = mutated(draw, draw.choice(CONFIGS))
        assert fault(answer(config, tmp_path / "config.json")) is None, config


@pytest.mark.parametrize("family", EVERY)
def test_more_experts_than_any_model_has_are_one_line(family: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for key in settings_of(EVERY[family]).keys() & EXPERTS.keys():
        for count in (10_000, 10**12, 2**63):
            said = answer(EVERY[family] | {key: count}, file)
            assert said == f"{file}: {key} is {count}, not a whole number below 10000"
