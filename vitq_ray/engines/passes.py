"""The passes between matrix products, each over a row that lies in the first cache, compiled by numba.

A quantizer is a row of five float32: 1 / step, step, smallest and largest level, and 1 where it is on. A *level* is the
integer that a value is rounded to; operands of the products hold levels (`shift` makes them fit unsigned types), and
`scale` turns sums of products of levels into numbers. Where a quantizer is off its operand is float32 and holds the
values themselves. The arithmetic is that of `quant.fake_quant`, operation for operation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import llvmlite.ir as ir
import numpy as np
from numba import float32, types
from numba.extending import intrinsic

from vitq_ray.base.kernels import compiled, compiled_with
from vitq_ray.engines.gemm import ROW_BLOCK, multiply, pack_columns, pack_rows

INVERSE, STEP, LOW, HIGH, ON = range(5)


class Target(NamedTuple):
    """What a product takes on one side: the quantizer that makes it, and what is added to its levels."""

    quantizer: Any
    shift: Any


class Layer(NamedTuple):
    """A linear layer: packed weight, memory for sums, what `shift` left out of them, scale and bias per column."""

    weight: Any
    sums: Any
    offset: Any
    scale: Any
    quantizer: Any  # aftergemm
    bias: Any


class Product(NamedTuple):
    """A product of two activations: memory for the right side packed, for sums and for what a shift left out of them;
    minus that shift; the scale of the sums."""

    packed: Any
    sums: Any
    offset: Any
    low: Any
    scale: Any


# A product may be fused into a sum; where a row is summed up, in any order.
_EACH, _SUMS = {"contract"}, {"contract", "reassoc", "nsz"}
_ERF_TOP = tuple(
    np.float32(c)
    for c in (
        -2.72614225801306e-10,
        2.77068142495902e-08,
        -2.10102402082508e-06,
        -5.69250639462346e-05,
        -7.34990630326855e-04,
        -2.95459980854025e-03,
        -1.60960333262415e-02,
    )
)
_ERF_BOTTOM = tuple(
    np.float32(c)
    for c in (
        -1.45660718464996e-05,
        -2.13374055278905e-04,
        -1.68282697438203e-03,
        -7.37332916720468e-03,
        -1.42647390514189e-02,
    )
)
_T0, _T1, _T2, _T3, _T4, _T5, _T6 = _ERF_TOP
_B0, _B1, _B2, _B3, _B4 = _ERF_BOTTOM
_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1), np.float32(2)
_LEAST, _MOST = np.float32(-4), np.float32(4)
_ROOT_HALF = np.float32(0.5**0.5)
_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_SMALLEST_EXPONENT = np.float32(-87)
_E5, _E4, _E3, _E2, _E1, _E0 = (
    np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
)


@intrinsic
def _power_of_two(typing: Any, exponent: Any) -> Any:
    """2^n as float32, of an int32 n in [-126, 127]: its bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.IntType(32)
        biased = builder.add(arguments[0], ir.Constant(kind, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(kind, 23)), ir.FloatType())

    return float32(types.int32), generate


@compiled_with(inline="always")
def _exp(x: Any) -> Any:
    """e^x for x ≤ 0, within two units in the last place (Cephes' expf); below -87, e^-87, which is 2e-38."""
    x = max(x, _SMALLEST_EXPONENT)
    n = np.rint(x * _LOG2E)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = ((((_E5 * r + _E4) * r + _E3) * r + _E2) * r + _E1) * r + _E0
    return (p * (r * r) + r + _ONE) * _power_of_two(np.int32(n))


@compiled_with(inline="always")
def _erf(x: Any) -> Any:
    """The error function within 3e-7: the rational function that Eigen and XLA use in float32."""
    x = min(max(x, _LEAST), _MOST)
    s = x * x
    top = (((((_T0 * s + _T1) * s + _T2) * s + _T3) * s + _T4) * s + _T5) * s + _T6
    bottom = (((_B0 * s + _B1) * s + _B2) * s + _B3) * s + _B4
    return x * top / bottom


@compiled_with(fastmath=_EACH, error_model="numpy")
def _quantize(row: Any, q: Any) -> None:
    """Round a row to its grid and come back, in place."""
    if q[ON] == 0:
        return
    inverse, step, low, high = q[INVERSE], q[STEP], q[LOW], q[HIGH]
    for j in range(row.shape[0]):
        row[j] = min(max(np.rint(row[j] * inverse), low), high) * step


@compiled_with(fastmath=_EACH, error_model="numpy")
def _to_levels(row: Any, q: Any, shift: Any, out: Any) -> None:
    """A row as what its matrix product takes: levels + shift, or the values themselves where the quantizer is off."""
    if q[ON] == 0:
        for j in range(row.shape[0]):
            out[j] = row[j]
        return
    inverse, low, high = q[INVERSE], q[LOW], q[HIGH]
    for j in range(row.shape[0]):
        out[j] = min(max(np.rint(row[j] * inverse), low), high) + shift


@compiled_with(fastmath=_EACH, error_model="numpy")
def _finish(sums: Any, offset: Any, scale: Any, q: Any, bias: Any, row: Any) -> None:
    """row = quantize((sums + offset) · scale) + bias: what a linear layer gives, with its aftergemm quantizer."""
    if q[ON] == 0:
        for j in range(row.shape[0]):
            row[j] = float32(sums.dtype.type(sums[j] + offset[j])) * scale[j] + bias[j]
        return
    inverse, step, low, high = q[INVERSE], q[STEP], q[LOW], q[HIGH]
    for j in range(row.shape[0]):
        y = float32(sums.dtype.type(sums[j] + offset[j])) * scale[j]
        row[j] = min(max(np.rint(y * inverse), low), high) * step + bias[j]


@compiled_with(fastmath=_EACH, error_model="numpy")
def _gelu(row: Any) -> None:
    for j in range(row.shape[0]):
        x = row[j]
        row[j] = _HALF * x * (_ONE + _erf(x * _ROOT_HALF))


@compiled_with(fastmath=_EACH, error_model="numpy")
def _scaled(sums: Any, offset: Any, scale: Any, row: Any) -> None:
    for j in range(row.shape[0]):
        row[j] = float32(sums.dtype.type(sums[j] + offset[j])) * scale


@compiled_with(fastmath=_EACH, error_model="numpy")
def _exponentials(row: Any, factor: Any, largest: Any) -> None:
    for j in range(row.shape[0]):
        row[j] = _exp(row[j] * factor - largest)


@compiled_with(fastmath={*_SUMS, "nnan"})
def _largest(row: Any) -> Any:
    largest = row[0]
    for j in range(row.shape[0]):
        largest = max(largest, row[j])
    return largest


@compiled_with(fastmath=_SUMS, error_model="numpy")
def _softmax(row: Any, factor: Any) -> None:
    """softmax(row · factor) in place; factor > 0."""
    _exponentials(row, factor, _largest(row) * factor)
    total = float32(0)
    for j in range(row.shape[0]):
        total += row[j]
    inverse = _ONE / total
    for j in range(row.shape[0]):
        row[j] *= inverse


@compiled_with(fastmath=_SUMS, error_model="numpy")
def _normalize(row: Any, eps: Any, gain: Any, bias: Any) -> None:
    """LayerNorm of a row, in place."""
    width = row.shape[0]
    total = float32(0)
    for j in range(width):
        total += row[j]
    mean = total / float32(width)
    total = float32(0)
    for j in range(width):
        total += (row[j] - mean) * (row[j] - mean)
    inverse = _ONE / np.sqrt(total / float32(width) + eps)
    for j in range(width):
        row[j] = (row[j] - mean) * inverse * gain[j] + bias[j]


@compiled
def normalize(x: Any, q_before: Any, eps: Any, gain: Any, bias: Any, to: Any, row: Any, out: Any) -> None:
    """LayerNorm with the quantizers before and behind it: x (M, C) float32 -> out (M, ≥ C) levels."""
    width = x.shape[1]
    for i in range(x.shape[0]):
        row[:width] = x[i]
        _quantize(row[:width], q_before)
        _normalize(row[:width], eps, gain, bias)
        _to_levels(row[:width], to.quantizer, to.shift, out[i, :width])


@compiled
def quantize(x: Any, q: Any) -> None:
    """x (M, C) float32, in place."""
    for i in range(x.shape[0]):
        _quantize(x[i], q)


@compiled
def to_levels(x: Any, to: Any, out: Any) -> None:
    """x (M, C) float32 -> out (M, ≥ C) levels."""
    for i in range(x.shape[0]):
        _to_levels(x[i], to.quantizer, to.shift, out[i, : x.shape[1]])


@compiled
def linear(a: Any, layer: Any, out: Any) -> None:
    """A linear layer: a (M, ≥ K) levels -> out (M, N) float32, with its aftergemm quantizer and bias."""
    for first in range(0, out.shape[0], ROW_BLOCK):
        rows = min(ROW_BLOCK, out.shape[0] - first)
        multiply(a, first, rows, 0, layer.weight, layer.sums)
        for i in range(rows):
            _finish(layer.sums[i], layer.offset, layer.scale, layer.quantizer, layer.bias, out[first + i])


@compiled
def linear_to_levels(a: Any, layer: Any, gelu: bool, to: Any, row: Any, out: Any) -> None:
    """As `linear`, then GELU where asked for, then the quantizer of what reads it: -> out (M, ≥ N) levels."""
    width = layer.scale.shape[0]
    for first in range(0, out.shape[0], ROW_BLOCK):
        rows = min(ROW_BLOCK, out.shape[0] - first)
        multiply(a, first, rows, 0, layer.weight, layer.sums)
        for i in range(rows):
            _finish(layer.sums[i], layer.offset, layer.scale, layer.quantizer, layer.bias, row[:width])
            if gelu:
                _gelu(row[:width])
            _to_levels(row[:width], to.quantizer, to.shift, out[first + i, :width])


@compiled
def linear_to_residual(a: Any, layer: Any, gamma: Any, q_local: Any, q_residual: Any, row: Any, x: Any) -> None:
    """As `linear`, then LayerScale and the residual addition: x (M, N) = quantize(x) + quantize(gamma · y)."""
    width = layer.scale.shape[0]
    for first in range(0, x.shape[0], ROW_BLOCK):
        rows = min(ROW_BLOCK, x.shape[0] - first)
        multiply(a, first, rows, 0, layer.weight, layer.sums)
        for i in range(rows):
            _finish(layer.sums[i], layer.offset, layer.scale, layer.quantizer, layer.bias, row[:width])
            for j in range(width):
                row[j] *= gamma[j]
            _quantize(row[:width], q_local)
            _quantize(x[first + i], q_residual)
            for j in range(width):
                x[first + i, j] += row[j]


@compiled
def column_sums(b: Any, factor: Any, out: Any) -> None:
    """out[n] = factor · Σ_k B[n, k]: what a shift of A by `-factor` has left out of the sums."""
    panels, steps, width, group = b.shape
    out[:] = 0
    if factor == 0:
        return
    for panel in range(panels):
        for step in range(steps):
            for place in range(width):
                for k in range(group):
                    out[panel * width + place] += out.dtype.type(b[panel, step, place, k]) * factor


@compiled
def attention(
    q: Any,
    k: Any,
    v: Any,
    tokens: int,
    heads: int,
    dim: int,
    scores: Any,
    q_scores: Any,
    root: Any,
    p: Any,
    to_p: Any,
    mixed: Any,
    to: Any,
    row: Any,
    out: Any,
) -> None:
    """softmax(q·kᵀ · root)·v of every image and head, with the quantizers around it.

    Args:
        q, k, v: (images · tokens, heads · dim) levels.
        scores, mixed: the two `Product`s, of q and kᵀ, and of probabilities and v.
        p: memory for the levels of probabilities, (ROW_BLOCK, ≥ tokens); `to_p` makes them.
        out: (images · tokens, ≥ heads · dim) levels, made by `to`.
    """
    for base in range(0, q.shape[0], tokens):
        for head in range(heads):
            column = head * dim
            pack_rows(k, base, tokens, column, dim, scores.packed)
            pack_columns(v, base, tokens, column, dim, mixed.packed)
            column_sums(scores.packed, scores.low, scores.offset)
            column_sums(mixed.packed, mixed.low, mixed.offset)
            for first in range(0, tokens, ROW_BLOCK):
                rows = min(ROW_BLOCK, tokens - first)
                multiply(q, base + first, rows, column, scores.packed, scores.sums)
                for i in range(rows):
                    _scaled(scores.sums[i], scores.offset, scores.scale, row[:tokens])
                    _quantize(row[:tokens], q_scores)
                    _softmax(row[:tokens], root)
                    _to_levels(row[:tokens], to_p.quantizer, to_p.shift, p[i, :tokens])
                multiply(p, 0, rows, 0, mixed.packed, mixed.sums)
                for i in range(rows):
                    _scaled(mixed.sums[i], mixed.offset, mixed.scale, row[:dim])
                    there = out[base + first + i, column : column + dim]
                    _to_levels(row[:dim], to.quantizer, to.shift, there)
