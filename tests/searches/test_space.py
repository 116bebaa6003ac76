"""Spaces: a wrong file or name is one line."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import EVERY

from compress.core.errors import InputError
from compress.export.targets import restricted
from compress.memory.footprint import Deployment
from compress.model.architecture import Moe
from compress.model.build import is_plain
from compress.model.families import read_architecture
from compress.searches.problem import Globals, Problem
from compress.searches.proposals import variants
from compress.searches.space import admissible, load_space, of_teacher, resized


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("remove: none\naxes: {}\nformats: [bf16]\nkv_formats: [bf16]\nextra: 1", "extra"),
        ("remove: some\naxes: {}\nformats: [bf16]\nkv_formats: [bf16]", "remove"),
        ("remove: none\naxes: {}\nformats: [int3]\nkv_formats: [bf16]", "formats"),
        ("remove: none\naxes: {fnn: {scope: block, keep: [0.5]}}\n"
         "formats: [bf16]\nkv_formats: [bf16]", "unknown axis 'fnn'; known: .*ffn"),
        ("remove: none\naxes: {hidden: {scope: block, keep: [0.5]}}\n"
         "formats: [bf16]\nkv_formats: [bf16]", "hidden is one for all blocks"),
        ("remove: none\naxes: {ffn: {scope: block, keep: [1.5]}}\n"
         "formats: [bf16]\nkv_formats: [bf16]", "between 0 and 1"),
        ("remove: none\naxes: {}\nformats: []\nkv_formats: [bf16]", "formats"),
        ("remove: none\naxes: {}\nformats: [bf16]\nkv_formats: []", "kv_formats"),
        ("remove: [", "not YAML"),
        ("", "space.yaml"),
    ],
)  # fmt: skip
def test_a_wrong_space_is_refused_in_words(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_space(str(file))


def test_an_unknown_space_lists_those_that_exist() -> None:
    with pytest.raises(InputError, match="formats, gguf, joint, minipuzzle, minitron, puzzle"):
        load_space("jiont")


def test_a_family_without_hidden_axis_leaves_it_out_in_one_line() -> None:
    joint = load_space("joint")
    assert of_teacher(joint, read_architecture(EVERY["llama"])) == (joint, [])
    space, [line] = of_teacher(joint, read_architecture(EVERY["nemotron"]))
    assert space.axes.keys() == joint.axes.keys() - {"hidden"}
    assert line.startswith("hidden stays 64, as in every nemotron student: its LayerNorms")


def test_a_router_is_left_enough_experts_of_every_group() -> None:
    moe = Moe(layer=0, expert=12, expert_ffn=32, shared_ffn=None, top_k=2)

    def counts(block: Moe) -> list[int]:
        return [n for n in range(1, 13) if admissible(block, {"expert": n})]

    assert counts(moe) == list(range(2, 13))
    assert counts(replace(moe, routing_group=3)) == [6, 9, 12]
    assert counts(replace(moe, routing_group=2, top_group=1, top_k=4)) == [8, 10, 12]
    assert counts(replace(moe, routing_group=2, top_group=2, top_k=8)) == [8, 10, 12]


@pytest.mark.parametrize("family", ["llama", "phi3", "glm4_moe", "granitemoehybrid"])
def test_a_space_for_stock_loaders_has_students_of_one_config_only(family: str) -> None:
    teacher = read_architecture(EVERY[family])
    space = restricted(load_space("joint"), "vllm", teacher.family, tied=False)
    problem = Problem(teacher, None, space, Deployment(context=64), 10**9)
    found = set()
    for globals_ in variants(problem):
        groups = problem.groups(globals_)
        if not all(any(not option.removed for _, option in choice[:1]) for choice, *_ in groups):
            continue
        kept = [pair for choice, *_ in groups[: len(teacher.blocks)] for pair in choice]
        kept = [(number, option) for number, option in kept if number < len(teacher.blocks)]
        blocks = tuple(resized(teacher.blocks[n], replace(o, formats=())) for n, o in kept)
        student = replace(teacher, hidden=problem.hidden(globals_), blocks=blocks)
        assert is_plain(student)
        found.add(student)
    assert len(found) > 2


def test_layers_that_predict_further_tokens_keep_their_widths() -> None:
    joint, teacher = load_space("joint"), read_architecture(EVERY["nemotron_h_latent"])
    space, [line] = of_teacher(joint, teacher)
    whole = ["kv_head", "query", "expert", "expert_ffn", "shared_ffn", "latent"]
    assert joint.axes.keys() - space.axes.keys() == {*whole}
    assert line.startswith(f"{', '.join(whole)} stay whole")
    assert of_teacher(joint, replace(teacher, mtp=())) == (joint, [])


def test_a_space_for_servers_keeps_the_attention_that_the_model_begins_with() -> None:
    teacher = read_architecture(EVERY["llama"])
    space = restricted(load_space("joint"), "vllm", teacher.family, tied=True)
    groups = Problem(teacher, None, space, Deployment(context=64), 10**9).groups(Globals())
    removable = [
        any(option.removed for choice in group for _, option in choice) for group in groups
    ]
    assert removable[: len(teacher.blocks)] == [False] + [True] * (len(teacher.blocks) - 1)
    widths = {dict(option.target).get("ffn") for [(_, option)] in groups[1]}
    assert len(widths) > 2
