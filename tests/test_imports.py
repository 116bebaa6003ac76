"""Packages are a list: a module imports what stands before its own package, and nothing after."""

import ast
from collections.abc import Iterator
from pathlib import Path

import compress

ROOT = Path(compress.__file__).parent
# Bottom up. flags, api, serving and cli are single files above all packages.
ORDER = (
    "core", "formats", "model", "memory", "text", "sweep", "student", "measure", "scores", "train",
    "searches", "export", "report", "run", "flags", "api", "serving", "cli",
)  # fmt: skip
LONGEST_FILE = 350


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name below ``compress`` and file of every module."""
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), file


def imported(file: Path) -> Iterator[str]:
    """Names below ``compress`` that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (n.removeprefix("compress.") for n in names if n.startswith("compress."))


def arrows() -> dict[str, set[str]]:
    """Modules that every module imports, itself left out."""
    known = dict(modules())
    found: dict[str, set[str]] = {}
    for module, file in known.items():
        # ``from compress.run import stages`` names a module, ``import note`` something inside one.
        targets = {n if n in known else n.rpartition(".")[0] for n in imported(file)}
        found[module] = targets - {module}
    return found


def test_every_package_has_its_place_in_the_list() -> None:
    assert {module.partition(".")[0] for module, _ in modules() if module} <= set(ORDER)


def test_imports_point_down_the_list() -> None:
    place = {package: number for number, package in enumerate(ORDER)}
    upward = [
        f"{module} -> {target}"
        for module, targets in arrows().items()
        if module
        for target in targets
        if place[target.partition(".")[0]] > place[module.partition(".")[0]]
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = arrows()
    while free := [module for module, targets in left.items() if not targets & set(left)]:
        for module in free:
            del left[module]
    assert left == {}


def test_no_file_is_too_long_to_read() -> None:
    long = [name for name, file in modules()
            if len(file.read_text(encoding="utf-8").splitlines()) > LONGEST_FILE]  # fmt: skip
    assert long == []
