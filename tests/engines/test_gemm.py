"""Matrix products of integers: exact at the values where common kernels are not."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT
from vitq_ray.base import instructions
from vitq_ray.base.kernels import compiled
from vitq_ray.engines import gemm

SHAPES = (*gemm.SHAPES, (1, 1, 1), (5, 3, 2), (6, 4, 16), (7, 77, 33), (49, 1536, 40))
RANGES = {"uint8": (0, 255), "int16": (-255, 255), "float32": (-63, 63)}  # float32: no sum passes 2²⁴


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_int64(kind: str, shape: tuple[int, int, int]) -> None:
    rows, depth, columns = shape
    low, high = RANGES[kind]
    random = np.random.default_rng(0)
    a, b = random.integers(low, high + 1, (rows, depth)), random.integers(-128, 128, (columns, depth))
    a[0], b[0] = high, 127
    a[-1], b[-1] = low or high, -128
    np.testing.assert_array_equal(gemm.product(a, b, kind), a @ b.T)


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize(
    ("origin", "first", "rows"), [(0, 0, 3), (0, 4, 3), (5, 0, 2), (5, 4, 2), (5, 20, 1), (3, 2, 20)]
)
def test_a_few_rows_are_multiplied_with_those_before_them(kind: str, origin: int, first: int, rows: int) -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 60, (60, 33)), random.integers(-60, 60, (20, 33))
    left, right = gemm.aligned((60, 48), kind), gemm.packed(20, 33, kind, gemm.FLOAT if kind == gemm.FLOAT else "int8")
    left[:, :33] = a
    gemm.pack_rows(b.astype(right.dtype), 0, 20, 0, 33, right)
    sums = gemm.sums(gemm.ROW_BLOCK, 20, kind)
    before = multiply_block_alone(left, origin, first, rows, right, sums)
    assert before == min(first, max(0, gemm.ROWS_AT_ONCE[left.itemsize] - rows))
    expected = a[origin + first - before : origin + first + rows] @ b.T
    np.testing.assert_array_equal(sums[: before + rows, :20], expected)


@compiled
def multiply_block_alone(a: Any, origin: int, first: int, rows: int, b: Any, c: Any) -> Any:
    gemm.begin_products()
    before = gemm.multiply_block(a, origin, first, rows, 0, b, c)
    gemm.end_products()
    return before


def test_wide_right_sides_are_exact() -> None:
    """Levels with a zero point may have nine bits: those of k and v, which are packed while a model runs."""
    random = np.random.default_rng(0)
    a, b = random.integers(-255, 256, (17, 66)), random.integers(-255, 256, (33, 66))
    a[0], b[0] = 255, -255
    left = gemm.aligned((17, 80), "int16")
    left[:, :66] = a
    by_rows, by_columns = gemm.packed(33, 66, "int16", "int16"), gemm.packed(33, 66, "int16", "int16")
    gemm.pack_rows(b.astype(np.int16), 0, 33, 0, 66, by_rows)
    gemm.pack_columns(np.ascontiguousarray(b.T).astype(np.int16), 0, 66, 0, 33, by_columns)
    np.testing.assert_array_equal(by_rows, by_columns)
    sums = gemm.sums(17, 33, "int16")
    gemm.multiply_alone(left, 0, 17, 0, by_rows, sums)
    np.testing.assert_array_equal(sums[:17, :33], a @ b.T)


@pytest.mark.parametrize("kind", ["uint8", "int16"])
def test_kernels_are_exact_here(kind: str) -> None:
    assert gemm.is_exact(kind)


def test_saturating_products_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vpmaddubsw does: sums of two products saturate at 16 bits."""

    def saturating(a: Any, b: Any, kind: str) -> Any:
        pairs = a[:, None, :] * b[None, :, :]
        pairs = np.pad(pairs, ((0, 0), (0, 0), (0, pairs.shape[2] % 2))).reshape(*pairs.shape[:2], -1, 2).sum(3)
        return pairs.clip(-(2**15), 2**15 - 1).sum(2)

    assert gemm.is_exact("uint8", ((6, 8, 16),))
    monkeypatch.setattr(gemm, "product", saturating)
    assert not gemm.is_exact("uint8", ((6, 8, 16),))


LESS = {  # what a CPU may have: (instruction sets that it lacks, the integers that are left)
    "AVX-512 VNNI, no AMX": (("amx",), "uint8"),
    "AVX-512, no VNNI": (("amx", "avx512vnni", "avxvnni"), "int16"),
    "AVX-VNNI, no AVX-512": (("amx", "avx512", "avx10"), "uint8"),
}


@pytest.mark.parametrize("cpu", LESS)
def test_lesser_cpus_are_exact_too(cpu: str, tmp_path: Any) -> None:
    lacks, expected = LESS[cpu]
    has = {"AVX-512 VNNI, no AMX": instructions.HAS_AVX512_VNNI, "AVX-512, no VNNI": instructions.HAS_AVX512}
    if not has.get(cpu, instructions.HAS_AVX_VNNI):
        pytest.skip(f"this CPU lacks what '{cpu}' has")
    features = ",".join(f"+{name}" for name in sorted(instructions.FEATURES) if not name.startswith(lacks))
    assert_exact({"NUMBA_CPU_FEATURES": features}, expected, tmp_path)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NUMBA_CPU_FEATURES": "+sse2,+sse4.1,+avx,+avx2,+fma"}, "int16"),  # also where the CPU has VNNI
        ({"NUMBA_CPU_NAME": "generic"}, "None"),
    ],
)
def test_cpus_of_long_ago_are_exact_too(environment: dict[str, str], expected: str, tmp_path: Any) -> None:
    assert_exact(environment, expected, tmp_path)


@pytest.mark.skipif(not instructions.HAS_AMX, reason="this CPU has no AMX")
def test_an_operating_system_that_refuses_tiles(tmp_path: Any) -> None:
    """Their first use would end the process: kernels in the cache that use them are compiled again without them, also
    where kernels of other modules were made ready first."""
    assert_exact({}, "uint8", tmp_path)
    assert any("multiply" in path.name for path in tmp_path.rglob("*.nbc"))
    refuse = (
        "import ctypes; C, no = ctypes.CDLL, type('No', (), {'syscall': lambda *_: -1})();"
        "ctypes.CDLL = lambda name, *more, **most: no if name is None else C(name, *more, **most);"
        "import vitq_ray.calibration.histogram;"
        "from vitq_ray.engines import gemm; assert not gemm.HAS_AMX;"
    )
    assert_exact({}, "uint8", tmp_path, refuse)


def assert_exact(environment: dict[str, str], expected: str, tmp_path: Any, before: str = "") -> None:
    code = (
        f"{before}from vitq_ray.engines.gemm import *; kinds = ('int16', 'uint8');"
        f"print(integers(), all(is_exact(kind) for kind in kinds))"
    )
    mine = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_CPU")}
    environment = {**mine, **environment, "NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()) == (0, [expected, "True"]), run.stderr
