"""Kernels that numba compiles, also where nothing can be cached: a read-only installation, a user without a home."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """A kernel that releases the GIL, cached on disk; where no folder can be written to, compiled in every process."""
    return compiled_with()(function)


def compiled_with(**options: Any) -> Callable[[F], F]:
    """As `compiled`, with options of `numba.njit`."""

    def compile_(function: F) -> F:
        try:
            return cast(F, numba.njit(nogil=True, cache=True, **options)(function))
        except RuntimeError:  # numba: "cannot cache function"
            return cast(F, numba.njit(nogil=True, **options)(function))

    return compile_
