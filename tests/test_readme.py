import re
from pathlib import Path

from compress.run.recipe import Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SET_UP = "python -m pip install -e . && compress quickstart"
TEST = 'python -m pip install -e ".[test]" && python -m pytest'


def test_the_two_commands_of_the_readme_are_what_ci_runs() -> None:
    assert f"```bash\n{SET_UP}\n```" in README
    assert f"```bash\n{TEST}\n```" in README
    assert f"\n{TEST}\n" in (ROOT / ".ci/run").read_text()


def test_every_package_has_a_line_in_the_readme() -> None:
    tree = README.split("## The code")[1]
    for package in (ROOT / "compress").glob("*/__init__.py"):
        assert re.search(rf"^  {package.parent.name}/ ", tree, flags=re.MULTILINE), package
    for module in (ROOT / "compress").glob("*.py"):
        assert module.name == "__init__.py" or f"{module.name} " in tree, module


def test_the_notes_are_short_and_their_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "runs/README.md", ROOT / "runs/LOG.md"):
        text = page.read_text()
        assert page.name == "LOG.md" or len(text.splitlines()) <= 150, page
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).is_file(), (page, link)


def test_dependencies_name_files_that_exist() -> None:
    files = re.findall(r"\b(?:compress|benchmarks)/\S+\.py", (ROOT / "pyproject.toml").read_text())
    assert files
    for file in files:
        assert (ROOT / file).is_file(), file


def test_flags_in_the_readme_exist() -> None:
    commands = re.findall(r"^compress .*$", README, flags=re.MULTILINE)
    known = {key.replace("_", "-") for key in Recipe.model_fields}
    known |= {"run", "tasks", "task-data", "limit"}
    assert commands
    for command in commands:
        assert set(re.findall(r"--([a-z-]+)", command)) <= known
