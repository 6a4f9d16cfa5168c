"""Kernels that numba compiles, also where nothing can be cached: a read-only installation, a user without a home."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """A kernel that releases the GIL, cached on disk; where no folder can be written to, compiled in every process."""
    try:
        return _njit(function, cache=True)
    except RuntimeError:  # numba: "cannot cache function"
        return _njit(function, cache=False)


def _njit(function: F, cache: bool) -> F:
    return cast(F, numba.njit(nogil=True, cache=cache)(function))
