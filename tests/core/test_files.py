"""Files are UTF-8 whatever the locale, and so is what a terminal is told."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import compress


def without_encoding(source: str) -> list[int]:
    """Lines that read or write text in the encoding of the locale."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "os":
            continue
        binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args)
        method = isinstance(node.func, ast.Attribute) and name in ("read_text", "write_text")
        if (method or (name == "open" and not binary)) and not any(
            keyword.arg == "encoding" for keyword in node.keywords
        ):
            found.append(node.lineno)
    return found


def test_no_file_is_opened_in_the_encoding_of_the_locale() -> None:
    assert without_encoding("path.read_text()\nopen(path)\npath.open('r')") == [1, 2, 3]
    sources = Path(compress.__file__).parent.rglob("*.py")
    found = {str(file): without_encoding(file.read_text("utf-8")) for file in sources}
    assert {file: lines for file, lines in found.items() if lines} == {}


SCRIPT = """
import sys
from pathlib import Path
from compress.cli import main
from compress.core.files import read_json, write_json, write_text
from compress.core.terminal import table
from compress.run.recipe import Recipe, read_recipe, write_recipe

model = sys.argv[2]
write_recipe(Recipe(model=model), Path("recipe.yaml"))
assert read_recipe(Path("recipe.yaml")).model == str(Path(model).absolute())
write_json(Path("facts.json"), {"model": model})
assert read_json(Path("facts.json"))["model"] == model
write_text(Path("card.md"), f"{model} \\u00b1 1")
main()
"""


def test_names_and_output_are_utf_8_in_the_c_locale(tmp_path: Path, tiny_llama: Path) -> None:
    model = tmp_path / "mödel-模型 ±"
    model.mkdir()
    shutil.copyfile(tiny_llama / "config.json", model / "config.json")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", SCRIPT, "plan", model.name]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert model.name in done.stderr.decode("utf-8")
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == f"{model.name} ± 1"
    assert "weights" in done.stdout.decode("utf-8")
