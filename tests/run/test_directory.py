import shlex
from pathlib import Path

import pytest

from compress.core.errors import InputError
from compress.core.files import atomic_directory, fingerprint, read_json, write_json, write_text
from compress.core.terminal import command
from compress.run.directory import Run, find_run, is_run, require_free, run_at, shown
from compress.run.recipe import Recipe, check, read_recipe, to_yaml, write_recipe


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def pipeline(run: Run, settings: dict[str, int]) -> list[str]:
    """Three stages in a row, each with a setting of its own; which ones were redone."""
    redone = []
    before = None
    for stage in ("score", "search", "distill"):
        inputs = {"setting": settings[stage], "before": before}
        if not run.stage_done(stage, inputs):
            redone.append(stage)
            run.sign(stage, inputs)
        before = run.fingerprint(stage)
    return redone


def test_a_finished_stage_is_not_redone(run: Run) -> None:
    settings = {"score": 1, "search": 1, "distill": 1}
    assert pipeline(run, settings) == ["score", "search", "distill"]
    assert pipeline(run, settings) == []


def test_a_changed_setting_redoes_its_stage_and_what_follows(run: Run) -> None:
    settings = {"score": 1, "search": 1, "distill": 1}
    pipeline(run, settings)
    assert pipeline(run, settings | {"search": 2}) == ["search", "distill"]
    assert pipeline(run, settings | {"search": 2, "distill": 5}) == ["distill"]


def test_a_stage_that_did_not_sign_is_redone(run: Run) -> None:
    inputs = {"seed": 0}
    assert not run.stage_done("score", inputs)
    write_json(run.path / "candidates.json", [])
    assert not run.stage_done("score", inputs)


def test_a_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_broken_state_is_one_clear_error(run: Run) -> None:
    run.sign("score", {})
    (run.path / "state.json").write_text('{"score": ')
    with pytest.raises(InputError, match=r"state\.json is not JSON"):
        run.stage_done("score", {})


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "student"

    def fail_halfway() -> None:
        with atomic_directory(target) as partial:
            (partial / "half").write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with atomic_directory(target) as partial:
            (partial / "file").write_text(text)
            assert not target.exists() or (target / "file").read_text() == "first"
        assert (target / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_what_a_killed_process_left_does_not_count(tmp_path: Path) -> None:
    left = tmp_path / "student.partial"
    left.mkdir()
    (left / "old").write_text("")
    with atomic_directory(tmp_path / "student"):
        pass
    assert list((tmp_path / "student").iterdir()) == []


def test_a_file_that_cannot_be_written_whole_is_left_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "value.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_is_found_by_name_and_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(Recipe(), Path("runs/smol/recipe.yaml"))
    assert find_run("smol") == (Run(Path("runs/smol")), None)
    assert find_run("smol:c3") == (Run(Path("runs/smol")), "c3")
    assert find_run("runs/smol:c3") == (Run(Path("runs/smol")), "c3")
    with pytest.raises(InputError, match="known: smol"):
        find_run("small")


@pytest.mark.parametrize(
    "name",
    [
        *("plain", "with blank", "ünïcode", "a.b", "runs/deep/er", "./here", "up/../over", "x/"),
        *("~", "~/home", "$HOME", "'quoted'", "*", "a;b", "c:d/e"),
    ],
)
@pytest.mark.parametrize("candidate", [None, "c3", "50-joint-001"])
def test_whatever_a_run_is_called_it_is_found_again(
    name: str, candidate: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home of mine"))
    (tmp_path / "up").mkdir()
    made = run_at(name)
    require_free(made)
    write_recipe(Recipe(), made.path / "recipe.yaml")
    require_free(made)
    for known in (name, shown(made)):
        found, asked = find_run(known if candidate is None else f"{known}:{candidate}")
        assert (found.path.resolve(), asked) == (made.path.resolve(), candidate)
        assert is_run(known)
        assert shlex.split(command("prune", known)) == ["compress", "prune", known]


def test_a_run_that_was_killed_before_it_had_its_recipe_is_begun_again(run: Run) -> None:
    for name in (
        "study/search.lock",
        "digests.json.partial",
        "digests.json",
        "recipe.yaml.partial",
    ):
        write_text(run.path / name, "")
        require_free(run)


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a:b", "x/a:b", "-a", "x/..", "~/..", "a\n"])
def test_a_name_that_could_not_be_given_again_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not a name that commands can be given"):
        run_at(name)
    assert not is_run(name)


def test_a_run_takes_no_place_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("empty").mkdir()
    Path("letters/export").mkdir(parents=True)
    # A teacher of ours has a recipe too: the one it was trained with.
    for name in ("recipe.yaml", "config.json"):
        write_text(Path("teacher") / name, "{}")
    for name in ("./file", "./letters", "./teacher"):
        with pytest.raises(InputError, match="exists and is no run; take another --run"):
            require_free(run_at(name))
        assert not is_run(name)
    require_free(run_at("./empty"))


def test_a_recipe_comes_back_from_yaml(tmp_path: Path) -> None:
    recipe = check({"budget": "70%", "learning_rate": 1e-5, "trials": 7, "device": "8xh100"}, "x")
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    assert set(Recipe.model_fields) == {line.split(":")[0] for line in to_yaml(recipe).splitlines()}


def test_a_recipe_takes_numbers_where_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("budget: 160000000\ncontext: 4096\nlearning_rate: 3e-4\n")
    recipe = read_recipe(tmp_path / "r.yaml")
    assert (recipe.budget, recipe.context, recipe.learning_rate) == ("160000000", "4096", 3e-4)
    assert recipe.deployment.context == 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budgett: 70%", "unknown key 'budgett'; did you mean budget?"),
        ("zzz: 1", "unknown key 'zzz'; known: model, revision, budget"),
        ("trials: 0", "trials is 0"),
        ("trials: many", "trials is 'many'"),
        ("target: tensorrt", "target is 'tensorrt'"),
        ("budget: 70 percent", "budget '70 percent' is not understood"),
        ("context: long", "context 'long' is not understood"),
        ("device: h101", "device 'h101' is not known"),
        ("- a list", "holds no keys"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_recipe_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        read_recipe(tmp_path / "r.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
