"""Latency: a profile of a whole model adds up, and says what it lacks."""

from dataclasses import replace
from pathlib import Path

import pytest
from profiles import BLOCK, PACE, invented_profile
from quantized import with_formats
from tiny_models import LLAMA

from compress.core.errors import InputError
from compress.memory.latency import (
    Profile,
    SpeedBound,
    group_weights,
    outside_weights,
    read_profile,
    write_profile,
)
from compress.model.families import read_architecture
from compress.run.recipe import check

TEACHER = read_architecture(LLAMA)


def made() -> Profile:
    return invented_profile(TEACHER)


def test_a_model_is_the_sum_of_its_blocks_by_their_groups_and_formats() -> None:
    mixed, profile = with_formats(TEACHER, ["bf16", "q8_0"]), made()
    [outside] = outside_weights(TEACHER).values()
    expected = BLOCK + PACE["bf16"] * outside
    for block in mixed.blocks:
        weights = group_weights(block, mixed.hidden, "llama")
        expected += BLOCK + sum(PACE[dict(block.formats)[g]] * n for g, n in weights.items())
    found = profile.model(mixed)
    assert found.token == pytest.approx(expected)
    assert found.prompt == pytest.approx(10 * expected)


def test_fewer_weights_and_blocks_take_less() -> None:
    profile = made()
    whole = profile.model(TEACHER)
    shorter = replace(TEACHER, blocks=TEACHER.blocks[:-1])
    thin = replace(TEACHER, blocks=(*TEACHER.blocks[:-1], replace(TEACHER.blocks[-1], ffn=32)))
    assert profile.model(shorter).token < profile.model(thin).token < whole.token
    bound = SpeedBound(profile, prompt=None, token=profile.model(thin).token)
    assert bound.kept(thin)
    assert not bound.kept(TEACHER)


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    write_profile(made(), tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == made()
    (tmp_path / "other.json").write_text('{"reader": 1}')
    with pytest.raises(InputError, match="is no profile"):
        read_profile(tmp_path / "other.json")


def test_what_was_not_measured_is_said() -> None:
    with pytest.raises(InputError, match=r"no attention in q4_0.*--formats"):
        made().model(with_formats(TEACHER, ["q4_0"]))
    with pytest.raises(InputError, match="profile is of llama, the model is qwen2"):
        made().model(replace(TEACHER, family="qwen2"))


def test_a_bound_on_speed_needs_a_profile(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="need --profile FILE, which compress profile MODEL"):
        check({"model": "m", "min_tokens_per_second": 20.0}, "here")
    with pytest.raises(InputError, match=r"none.json does not exist; compress profile MODEL"):
        check({"model": "m", "max_latency": 1.0, "profile": str(tmp_path / "none.json")}, "here")
    write_profile(made(), tmp_path / "profile.json")
    asked = {"model": "m", "profile": str(tmp_path / "profile.json"), "min_tokens_per_second": 20.0}
    speed = check(asked, "here").speed
    assert speed is not None
    assert speed.bounds == {"token": 0.05}
