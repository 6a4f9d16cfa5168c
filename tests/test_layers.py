"""The house: imports point one way, Ray stays in `cluster/`, arguments and printing in `commands/`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vitq_ray"

# Lowest first: a file imports its own room and rooms that stand before it.
ROOMS = (
    "base",
    "data",
    "quant",
    "calibration",
    "models",
    "measure",
    "engines",
    "qat",
    "run",
    "search",
    "page",
    "cluster",
    "commands",
)
# What users import, run or name; everything may be behind it.
DOOR = ("__init__", "__main__", "search_space", "search_spaces")
MODULES = {
    ".".join(("vitq_ray", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


@cache
def imported(path: Path, at_once: bool = False) -> frozenset[str]:
    """Full names of what a file imports: wherever in the file, or `at_once`, when it is imported itself."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            module = node.module or ""
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def room_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else "__init__"


def ours(path: Path, at_once: bool = False) -> frozenset[str]:
    return imported(path, at_once) & set(MODULES)


def test_every_file_is_in_a_room() -> None:
    assert {room_of(module) for module in MODULES} <= {*ROOMS, *DOOR}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room_of(m) in ROOMS))
def test_imports_go_down(module: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room_of(module)) + 1])
    assert {room_of(name) for name in ours(MODULES[module])} - {"__init__"} <= allowed


def reached(module: str, at_once: bool = False) -> Iterator[str]:
    """The module and all of ours that importing it imports, however indirectly."""
    seen: set[str] = set()
    todo = {module}
    while todo:
        name = todo.pop()
        seen.add(name)
        yield name
        todo |= ours(MODULES[name], at_once) - seen - {"vitq_ray"}  # which loads what is asked of it, when it is


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room_of(m) in ROOMS[: ROOMS.index("cluster")]))
def test_ray_stays_in_its_room(module: str) -> None:
    """Also through what a module imports; `import vitq_ray` itself loads nothing (test_api)."""
    for name in reached(module):
        assert "ray" not in {n.split(".")[0] for n in imported(MODULES[name])}, name


def test_readers_decode_without_pytorch() -> None:
    """Its import would be most of what Ray Data's processes need to start."""
    heavy = {"torch", "torchvision", "timm"}
    names = set(reached("vitq_ray.cluster.stream", at_once=True))
    assert {"vitq_ray.data.transforms", "vitq_ray.data.loader"} <= names
    for name in names:
        assert not {n.split(".")[0] for n in imported(MODULES[name], at_once=True)} & heavy, name


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room_of(m) == "commands"))
def test_commands_leave_ray_to_the_cluster(module: str) -> None:
    assert "ray" not in {n.split(".")[0] for n in imported(MODULES[module])}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room_of(m) in ROOMS[:-1]))
def test_only_commands_parse_and_print(module: str) -> None:
    path = MODULES[module]
    assert not {n.split(".")[0] for n in imported(path)} & {"argparse", "rich"}
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    assert "print" not in {call.id for call in calls if isinstance(call, ast.Name)}


def test_only_one_file_parses_a_command_line_and_three_print() -> None:
    """Commands take options and a screen, from wherever they come."""
    room = {path.stem: path for module, path in MODULES.items() if room_of(module) == "commands"}
    assert {name for name, path in room.items() if "argparse" in imported(path)} == {"parser"}
    calls = {
        name: [n.func for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.Call)]
        for name, p in room.items()
    }
    prints = {n for n, found in calls.items() if "print" in {c.id for c in found if isinstance(c, ast.Name)}}
    assert prints == {"main", "screen", "surroundings"}


def test_no_script_imports_another() -> None:
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    names = {script.stem for script in scripts}
    assert scripts
    for script in scripts:
        assert not {n for n in imported(script) if n.split(".")[0] in names | {"scripts"}}, script.name
