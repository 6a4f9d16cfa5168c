"""Kernels that numba compiles, also where nothing can be cached: a read-only installation, a user without a home."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

from vitq_ray.base.instructions import HAS_AMX

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """A kernel that releases the GIL, cached on disk; where no folder can be written to, compiled in every process."""
    return compiled_with()(function)


def compiled_with(**options: Any) -> Callable[[F], F]:
    """As `compiled`, with options of `numba.njit`."""

    def compile_(function: F) -> F:
        try:
            kernel: Any = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba: "cannot cache function"
            return cast(F, numba.njit(nogil=True, **options)(function))
        # numba looks at the function's own file and at the CPU only; a kernel holds the code of other files, too, and
        # one that uses AMX is not for a process that may not.
        file = kernel._cache._cache_file
        file._source_stamp = (file._source_stamp, sources_of_kernels(Path(__file__).parents[1]), HAS_AMX)
        return cast(F, kernel)

    return compile_


@cache
def sources_of_kernels(package: Path) -> str:
    """A hash of all files of the package that have kernels, or write code for them."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        text = path.read_bytes()
        if any(marker in text for marker in (b"base.kernels import", b"import intrinsic", b"get_host_cpu_features")):
            found.update(text)
    return found.hexdigest()
