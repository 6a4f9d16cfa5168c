"""The passes between matrix products, each over a row that lies in the first cache, compiled by numba.

A quantizer is a row of five float32: 1 / step, step, smallest and largest level, and 1 where it is on. A *level* is the
integer that a value is rounded to; operands of the products hold levels (`shift` makes them fit unsigned types), and
`scale` turns sums of products of levels into numbers. Where a quantizer is off its operand is float32 and holds the
values themselves. The arithmetic is that of `quant.fake_quant`, but that a product and the sum it is part of are
rounded once (`times_plus`) rather than twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vitq_ray.base.kernels import compiled, compiled_with
from vitq_ray.engines.gemm import (
    COLUMN_BLOCK,
    ROW_BLOCK,
    ROWS_AT_ONCE,
    begin_products,
    end_products,
    multiply,
    multiply_block,
    multiply_row,
    pack_columns,
    pack_rows,
)
from vitq_ray.engines.lanes import At, Lanes, Memory, Row, row_loop

INVERSE, STEP, LOW, HIGH, ON = range(5)


class Target(NamedTuple):
    """What a product takes on one side: the quantizer that makes it, and what is added to its levels."""

    quantizer: Any
    shift: Any


class Layer(NamedTuple):
    """A linear layer: packed weight, memory for sums of `COLUMN_BLOCK` columns, what `shift` left out, scale and
    bias per column."""

    weight: Any
    sums: Any
    offset: Any
    scale: Any
    quantizer: Any  # aftergemm
    bias: Any


class Product(NamedTuple):
    """A product of two activations: memory for the right side packed, for sums and for what a shift left out of them;
    minus that shift; a row of ones; the scale of the sums."""

    packed: Any
    sums: Any
    offset: Any
    low: Any
    ones: Any
    scale: Any


_ERF_TOP = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_BOTTOM = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
_ROOT_HALF = 0.5**0.5
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504, 0.693359375, -2.12194440e-4
_E = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)


class _Quantizer:
    """A quantizer in a kernel: its five numbers."""

    def __init__(self, row: Row, numbers: Memory) -> None:
        self._inverse, self._step, self._low, self._high, on = (numbers.load_one(place) for place in range(5))
        self._is_on = row.holds(on)

    def __call__(self, x: Lanes) -> Lanes:
        """Rounded to the grid, and back; x where it is off."""
        return (self._clamped(x).rounded() * self._step).where(self._is_on, x)

    def plus(self, x: Lanes, summand: Lanes) -> Lanes:
        """The same + summand."""
        return self._clamped(x).rounded().times_plus(self._step, summand).where(self._is_on, x + summand)

    def store(self, x: Lanes, shift: Lanes, out: Memory, at: At) -> None:
        """x as what its matrix product takes: levels + shift, or the values themselves where the quantizer is off."""
        if out.is_float:
            out.store(at, (self._clamped(x).rounded() + shift).where(self._is_on, x))
        else:
            out.store(at, self._clamped(x), shift)

    def _clamped(self, x: Lanes) -> Lanes:
        return (x * self._inverse).at_least(self._low).at_most(self._high)


def _exp(x: Lanes) -> Lanes:
    """e^x for x ≤ 0, within two units in the last place (Cephes' expf); below -87, e^-87, which is 2e-38."""
    x = x.at_least(-87.0)
    n = (x * _LOG2E).rounded()
    r = n.times_plus(-_LN2_LOW, n.times_plus(-_LN2_HIGH, x))
    p = r.times_plus(_E[0], _E[1])
    for coefficient in _E[2:]:
        p = p.times_plus(r, coefficient)
    return (p.times_plus(r * r, r) + 1.0) * n.power_of_two()


def _erf(x: Lanes) -> Lanes:
    """The error function within 3e-7: the rational function that Eigen and XLA use in float32."""
    x = x.at_least(-4.0).at_most(4.0)
    s = x * x
    top, bottom = s.times_plus(_ERF_TOP[0], _ERF_TOP[1]), s.times_plus(_ERF_BOTTOM[0], _ERF_BOTTOM[1])
    for coefficient in _ERF_TOP[2:]:
        top = top.times_plus(s, coefficient)
    for coefficient in _ERF_BOTTOM[2:]:
        bottom = bottom.times_plus(s, coefficient)
    return x * top * bottom.inverse()


def _gelu(x: Lanes) -> Lanes:
    return x * 0.5 * (_erf(x * _ROOT_HALF) + 1.0)


class _Sums:
    """What a linear layer gives: quantize((sums + offset) · scale) + bias, with its aftergemm quantizer."""

    def __init__(self, row: Row, sums: Memory, offset: Memory, scale: Memory, q: Memory, bias: Memory) -> None:
        self._sums, self._offset, self._scale, self._bias = sums, offset, scale, bias
        self._after = _Quantizer(row, q)

    def at(self, at: At) -> Lanes:
        y = self._sums.load(at, self._offset) * self._scale.load(at)
        return self._after.plus(y, self._bias.load(at))


@row_loop
def _finish(
    row: Row, sums: Memory, offset: Memory, scale: Memory, q: Memory, bias: Memory, out: Memory, n: Any
) -> None:
    finished = _Sums(row, sums, offset, scale, q, bias)
    row.each(n, lambda at: out.store(at, finished.at(at)))


def _to_levels_after(activation: Callable[[Lanes], Lanes]) -> Any:
    @row_loop
    def finish(
        row: Row,
        sums: Memory,
        offset: Memory,
        scale: Memory,
        q: Memory,
        bias: Memory,
        to: Memory,
        shift: Lanes,
        out: Memory,
        n: Any,
    ) -> None:
        finished, target = _Sums(row, sums, offset, scale, q, bias), _Quantizer(row, to)
        row.each(n, lambda at: target.store(activation(finished.at(at)), shift, out, at))

    return finish


_finish_to_levels, _gelu_to_levels = _to_levels_after(lambda y: y), _to_levels_after(_gelu)


@row_loop
def _finish_to_residual(
    row: Row,
    sums: Memory,
    offset: Memory,
    scale: Memory,
    q: Memory,
    bias: Memory,
    gamma: Memory,
    q_local: Memory,
    q_residual: Memory,
    x: Memory,
    n: Any,
) -> None:
    finished, local, residual = (
        _Sums(row, sums, offset, scale, q, bias),
        _Quantizer(row, q_local),
        _Quantizer(row, q_residual),
    )
    row.each(n, lambda at: x.store(at, residual.plus(x.load(at), local(finished.at(at) * gamma.load(at)))))


@row_loop
def _scaled_to_levels(
    row: Row, sums: Memory, offset: Memory, scale: Lanes, to: Memory, shift: Lanes, out: Memory, n: Any
) -> None:
    target = _Quantizer(row, to)
    row.each(n, lambda at: target.store(sums.load(at, offset) * scale, shift, out, at))


@row_loop
def _to_levels(row: Row, x: Memory, to: Memory, shift: Lanes, out: Memory, n: Any) -> None:
    target = _Quantizer(row, to)
    row.each(n, lambda at: target.store(x.load(at), shift, out, at))


@row_loop
def _quantize(row: Row, x: Memory, q: Memory, n: Any) -> None:
    quantizer = _Quantizer(row, q)
    row.each(n, lambda at: x.store(at, quantizer(x.load(at))))


@row_loop
def _softmax_to_levels(
    row: Row,
    sums: Memory,
    offset: Memory,
    scale: Lanes,
    q: Memory,
    root: Lanes,
    to: Memory,
    shift: Lanes,
    values: Memory,
    out: Memory,
    n: Any,
) -> None:
    """softmax(quantize((sums + offset) · scale) · root); root > 0; `values`: memory for the row."""
    scores, target = _Quantizer(row, q), _Quantizer(row, to)

    def keep(at: At, lanes: Lanes) -> Lanes:
        values.store(at, lanes)
        return lanes

    largest = row.largest(n, lambda at: keep(at, scores(sums.load(at, offset) * scale))) * root
    total = row.total(n, lambda at: keep(at, _exp(values.load(at) * root - largest)))
    inverse = total.inverse()
    row.each(n, lambda at: target.store(values.load(at) * inverse, shift, out, at))


@row_loop
def _normalize_to_levels(
    row: Row,
    x: Memory,
    q: Memory,
    eps: Lanes,
    gain: Memory,
    bias: Memory,
    to: Memory,
    shift: Lanes,
    values: Memory,
    out: Memory,
    n: Any,
) -> None:
    """LayerNorm of quantize(x); `values`: memory for the row."""
    before, target = _Quantizer(row, q), _Quantizer(row, to)

    def seen(at: At) -> Lanes:
        values.store(at, before(x.load(at)))
        return values.load(at)

    def squared(at: At) -> Lanes:
        away = values.load(at) - mean
        return away * away

    count = row.number(n)
    mean = row.total(n, seen) / count
    inverse = (row.total(n, squared) / count + eps).root().inverse()
    row.each(
        n,
        lambda at: target.store(
            ((values.load(at) - mean) * inverse).times_plus(gain.load(at), bias.load(at)), shift, out, at
        ),
    )


@compiled_with(inline="always")
def panels_at_once(weight: Any) -> Any:
    """How many panels of a weight all rows are multiplied with before the next: they stay in the second cache, and
    their sums in the first."""
    return max(1, COLUMN_BLOCK // weight.shape[2])


@compiled_with(inline="always")
def columns_of(layer: Any, panel: int, panels: int) -> Any:
    """(first column, how many) of some panels of a layer."""
    size = layer.weight.shape[2]
    return panel * size, min(panels * size, layer.scale.shape[0] - panel * size)


@compiled
def normalize(x: Any, q_before: Any, eps: Any, gain: Any, bias: Any, to: Any, row: Any, out: Any) -> None:
    """LayerNorm with the quantizers before and behind it: x (M, C) float32 -> out (M, ≥ C) levels."""
    width = x.shape[1]
    for i in range(x.shape[0]):
        _normalize_to_levels(x[i], q_before, eps, gain, bias, to.quantizer, to.shift, row, out[i], width)


@compiled
def quantize(x: Any, q: Any) -> None:
    """x (M, C) float32, in place."""
    for i in range(x.shape[0]):
        _quantize(x[i], q, x.shape[1])


@compiled
def to_levels(x: Any, to: Any, out: Any) -> None:
    """x (M, C) float32 -> out (M, ≥ C) levels."""
    for i in range(x.shape[0]):
        _to_levels(x[i], to.quantizer, to.shift, out[i], x.shape[1])


@compiled
def linear(a: Any, layer: Any, out: Any) -> None:
    """A linear layer: a (M, ≥ K) levels -> out (M, N) float32, with its aftergemm quantizer and bias."""
    panels = panels_at_once(layer.weight)
    begin_products()
    for panel in range(0, layer.weight.shape[0], panels):
        here, width = columns_of(layer, panel, panels)
        for first in range(0, out.shape[0], ROW_BLOCK):
            rows = min(ROW_BLOCK, out.shape[0] - first)
            before = multiply_block(a, 0, first, rows, 0, layer.weight[panel : panel + panels], layer.sums)
            for i in range(rows):
                y = out[first + i, here:]
                _finish(
                    layer.sums[before + i],
                    layer.offset[here:],
                    layer.scale[here:],
                    layer.quantizer,
                    layer.bias[here:],
                    y,
                    width,
                )
    end_products()


@compiled
def linear_to_levels(a: Any, layer: Any, gelu: bool, to: Any, out: Any) -> None:
    """As `linear`, then GELU where asked for, then the quantizer of what reads it: -> out (M, ≥ N) levels."""
    panels = panels_at_once(layer.weight)
    begin_products()
    for panel in range(0, layer.weight.shape[0], panels):
        here, width = columns_of(layer, panel, panels)
        offset, scale, bias = layer.offset[here:], layer.scale[here:], layer.bias[here:]
        for first in range(0, out.shape[0], ROW_BLOCK):
            rows = min(ROW_BLOCK, out.shape[0] - first)
            before = multiply_block(a, 0, first, rows, 0, layer.weight[panel : panel + panels], layer.sums)
            for i in range(rows):
                sums, y = layer.sums[before + i], out[first + i, here:]
                if gelu:
                    _gelu_to_levels(sums, offset, scale, layer.quantizer, bias, to.quantizer, to.shift, y, width)
                else:
                    _finish_to_levels(sums, offset, scale, layer.quantizer, bias, to.quantizer, to.shift, y, width)
    end_products()


@compiled
def linear_to_residual(a: Any, layer: Any, gamma: Any, q_local: Any, q_residual: Any, x: Any) -> None:
    """As `linear`, then LayerScale and the residual addition: x (M, N) = quantize(x) + quantize(gamma · y)."""
    panels = panels_at_once(layer.weight)
    begin_products()
    for panel in range(0, layer.weight.shape[0], panels):
        here, width = columns_of(layer, panel, panels)
        offset, scale, bias = layer.offset[here:], layer.scale[here:], layer.bias[here:]
        for first in range(0, x.shape[0], ROW_BLOCK):
            rows = min(ROW_BLOCK, x.shape[0] - first)
            before = multiply_block(a, 0, first, rows, 0, layer.weight[panel : panel + panels], layer.sums)
            for i in range(rows):
                sums, y = layer.sums[before + i], x[first + i, here:]
                _finish_to_residual(
                    sums, offset, scale, layer.quantizer, bias, gamma[here:], q_local, q_residual, y, width
                )
    end_products()


@compiled
def column_sums(ones: Any, b: Any, factor: Any, out: Any) -> None:
    """out[n] = factor · Σ_k B[n, k]: what a shift of A by `-factor` has left out of the sums; `ones`: a row of A."""
    out[:] = 0
    if factor != 0:
        multiply_row(ones, b, out)
        for j in range(out.shape[0]):
            out[j] *= factor


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
    begin_products()
    for base in range(0, q.shape[0], tokens):
        for head in range(heads):
            column = head * dim
            pack_rows(k, base, tokens, column, dim, scores.packed)
            pack_columns(v, base, tokens, column, dim, mixed.packed)
            column_sums(scores.ones, scores.packed, scores.low, scores.offset)
            column_sums(mixed.ones, mixed.packed, mixed.low, mixed.offset)
            for first in range(0, tokens, ROW_BLOCK):
                rows = min(ROW_BLOCK, tokens - first)
                before = multiply_block(q, base, first, rows, column, scores.packed, scores.sums)
                for i in range(rows):
                    _softmax_to_levels(
                        scores.sums[before + i],
                        scores.offset,
                        scores.scale,
                        q_scores,
                        root,
                        to_p.quantizer,
                        to_p.shift,
                        row,
                        p[i],
                        tokens,
                    )
                multiply(p, 0, max(rows, ROWS_AT_ONCE[p.itemsize]), 0, mixed.packed, mixed.sums)
                for i in range(rows):
                    there = out[base + first + i, column : column + dim]
                    _scaled_to_levels(mixed.sums[i], mixed.offset, mixed.scale, to.quantizer, to.shift, there, dim)
    end_products()
