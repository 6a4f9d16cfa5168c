"""Instruction sets of this CPU that kernels may be written for."""

from __future__ import annotations

import ctypes
import sys

from numba.core import config
from numba.core.codegen import get_host_cpu_features


def _features() -> set[str]:
    """What numba compiles for: this CPU's instruction sets, or those that NUMBA_CPU_NAME, NUMBA_CPU_FEATURES allow."""
    text = config.CPU_FEATURES
    if text is None:
        text = "" if config.CPU_NAME == "generic" else get_host_cpu_features()
    return {feature[1:] for feature in text.split(",") if feature.startswith("+")}


def _may_use_tiles() -> bool:
    """Ask Linux for AMX's registers, for this process; without a yes their first use would end it."""
    if not sys.platform.startswith("linux"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


FEATURES = _features()
HAS_AVX2 = "avx2" in FEATURES
HAS_AVX512 = {"avx512f", "avx512bw"} <= FEATURES
HAS_AVX512_VNNI = HAS_AVX512 and "avx512vnni" in FEATURES
HAS_AVX_VNNI = "avxvnni" in FEATURES
HAS_VNNI = HAS_AVX512_VNNI or HAS_AVX_VNNI
HAS_AMX = HAS_AVX512_VNNI and {"amx-tile", "amx-int8"} <= FEATURES and _may_use_tiles()
