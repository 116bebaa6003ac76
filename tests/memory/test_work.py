"""What the work takes: flat in depth where it is streamed, and refused where it does not fit."""

from dataclasses import replace
from typing import Any

import pytest
from published_hybrids import HYBRID_12B, HYBRID_30B
from tiny_models import HYBRID, LLAMA

from compress.core.errors import InputError
from compress.memory.devices import DEVICES
from compress.memory.machine import Machine, preset_machine, this_machine
from compress.memory.work import Work, require_fits
from compress.model.families import read_architecture
from compress.run.recipe import check
from compress.run.work import works_of

A10G = preset_machine(DEVICES["a10g"])
LAPTOP = Machine(name="laptop", memory=2**34, flops=1e11, number_bytes=4)


def works(config: dict[str, Any], machine: Machine = LAPTOP, **settings: Any) -> dict[str, Work]:
    found = works_of(read_architecture(config), check(settings, "test"), machine)
    return {work.stage: work for work in found}


@pytest.mark.parametrize("config", [LLAMA, HYBRID], ids=["llama", "hybrid"])
def test_streamed_stages_take_no_more_for_a_deeper_model(config: dict[str, Any]) -> None:
    if config is LLAMA:
        deep = config | {"num_hidden_layers": 300}
    else:
        deep = config | {"layers_block_type": 60 * config["layers_block_type"]}
    shallow, deep_works = (works(each, local_tokens=1) for each in (config, deep))
    for stage in ("local", "export"):
        assert deep_works[stage].parts == shallow[stage].parts
    for part in ("weights of a layer", "rounding errors", "activations", "logits"):
        assert deep_works["score"].parts[part] == shallow["score"].parts[part]
    assert deep_works["distill"].least > 20 * shallow["distill"].parts["weights and moments"]


def test_a_stage_takes_what_is_free_and_no_more_than_it_can_use() -> None:
    for work in works(HYBRID_12B, A10G).values():
        for memory in (2**30, 2**35, 2**40):
            machine = replace(A10G, memory=memory)
            assert work.least <= work.takes(machine) <= max(memory, work.least)
            assert work.takes(machine) <= work.least + work.more


def test_a_large_hybrid_goes_through_a_small_card_layer_by_layer() -> None:
    asked = {"short_distill_tokens": 0, "local_tokens": 100_000}
    for config in (HYBRID_12B, HYBRID_30B):
        found = works(config, A10G, **asked)
        fits = {stage for stage, work in found.items() if work.least <= A10G.memory}
        assert {"score", "search", "export"} <= fits
        assert "distill" not in fits
    assert works(HYBRID_12B, A10G, **asked)["local"].least < A10G.memory


def test_a_stage_that_does_not_fit_says_what_would() -> None:
    found, eight_bits = (
        works(HYBRID_12B, replace(A10G, memory=70 * 2**30), optimizer=name)["distill"]
        for name in ("adamw", "adamw8bit")
    )
    with pytest.raises(InputError, match=r"^distill .* at least 1.*GiB.*a10g has 70.*8-bit would"):
        require_fits(found, replace(A10G, memory=70 * 2**30), {"8-bit": eight_bits, "no": found})
    require_fits(found, replace(A10G, memory=found.least), {})


def test_less_memory_takes_more_time() -> None:
    score = works(HYBRID_12B, A10G)["score"]
    assert score.seconds(A10G) > score.seconds(replace(A10G, memory=2**37))


def test_this_machine_is_timed() -> None:
    machine = this_machine(2**30)
    assert machine.memory == 2**30
    assert machine.flops > 1e8


def test_rounding_on_text_is_counted() -> None:
    near, second = (works(HYBRID_12B, rounding=name) for name in ("nearest", "second-order"))
    for stage in ("score", "search", "export"):
        assert second[stage].operations > near[stage].operations
        assert second[stage].least >= near[stage].least
    assert second["export"].parts["Gram matrices"] > 0
