"""Imports point one way, and Ray stays at the edge."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vitq_ray"

# Lowest first: a module may import modules of this package that stand before it.
ORDER = (
    "config",
    "files",
    "quant.fake_quant",
    "quant.histogram",
    "quant.amax",
    "quant.modes",
    "quant.quantizer",
    "quant.vit",
    "models",
    "ft_names",
    "checkpoint",
    "data.tables",
    "data.samples",
    "data.transforms",
    "data.loader",
    "data.source",
    "calibrate",
    "evaluate",
    "search_space",
    "proposals",
    "racing",
    "distill",
    "qat_loop",
    "run_folder",
    "contest",
    "live",
    "progress",
    "cli",
    "cluster",
    "metrics",
    "workers",
    "trials",
    "qat_search",
    "search",
    "qat",
)
MAY_IMPORT_RAY = frozenset({"data.source", "cluster", "metrics", "workers", "trials", "qat_search", "qat"})
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imported(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            module = node.module or ""
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_its_place() -> None:
    assert set(MODULES) == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_down(module: str) -> None:
    ours = {n.removeprefix("vitq_ray.") for n in imported(MODULES[module])} & set(ORDER)
    assert ours <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", sorted(set(ORDER) - MAY_IMPORT_RAY))
def test_ray_stays_at_the_edge(module: str) -> None:
    assert not {n for n in imported(MODULES[module]) if n.split(".")[0] == "ray"}


def test_no_script_imports_another() -> None:
    scripts = sorted((PACKAGE.parent / "scripts").glob("*.py"))
    names = {script.stem for script in scripts}
    assert scripts
    for script in scripts:
        assert not {n for n in imported(script) if n.split(".")[0] in names | {"scripts"}}, script.name
