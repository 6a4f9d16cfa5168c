"""Kernels are compiled again when any file with kernels has changed, and only then."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from vitq_ray.base import kernels
from vitq_ray.base.kernels import sources_of_kernels
from vitq_ray.engines import passes

OWN = """
from vitq_ray.base.kernels import compiled

@compiled
def double(x):
    return 2 * x
"""


def loaded(path: Path) -> Any:
    """The kernel of a module as a new process finds it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.double(21) == 42
    return module.double


def test_a_change_of_another_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    assert sum(loaded(path).stats.cache_misses.values()) == 1
    assert sum(loaded(path).stats.cache_misses.values()) == 0
    monkeypatch.setattr(kernels, "sources_of_kernels", lambda package: "others")
    assert sum(loaded(path).stats.cache_misses.values()) == 1
    assert sum(loaded(path).stats.cache_misses.values()) == 0


def test_files_with_kernels_are_read(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    one, other = tmp_path / "room" / "one.py", tmp_path / "other.py"
    one.write_text(OWN)
    other.write_text("text")
    seen = set()
    writes_code = tmp_path / "lanes.py"  # of which kernels are made
    changes = (
        lambda: None,
        lambda: one.write_text(OWN + "#"),
        lambda: (tmp_path / "two.py").write_text(OWN),
        lambda: writes_code.write_text("from numba.extending import intrinsic"),
        lambda: writes_code.write_text("from numba.extending import intrinsic  # changed"),
    )
    for change in changes:
        change()
        sources_of_kernels.cache_clear()
        seen.add(sources_of_kernels(tmp_path))
    assert len(seen) == len(changes)
    other.write_text("other text")
    sources_of_kernels.cache_clear()
    assert sources_of_kernels(tmp_path) in seen


def test_what_kernels_are_made_of_is_read() -> None:
    package = Path(kernels.__file__).parents[1]
    for path in package.rglob("*.py"):
        text = path.read_text()
        if "import llvmlite" in text:
            assert "import intrinsic" in text, f"{path.name} would change kernels that are in the cache"
    assert b"get_host_cpu_features" in (package / "base" / "instructions.py").read_bytes()


def test_every_kernel_of_the_package_is_stamped() -> None:
    package = Path(kernels.__file__).parents[1]
    for kernel in (passes.linear, passes.attention, passes.multiply):
        assert kernel._cache._cache_file._source_stamp[1] == sources_of_kernels(package)  # type: ignore[attr-defined]
