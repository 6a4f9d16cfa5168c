"""Loops over rows: what they compute, whatever is left of a row behind the last whole vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.special

from vitq_ray.base.kernels import compiled
from vitq_ray.engines import gemm, passes
from vitq_ray.engines.lanes import WIDTHS, Row, row_loop
from vitq_ray.engines.passes import Target

LENGTHS = (1, 2, 3, 4, 7, 15, 16, 17, 37, 197)
OFF = np.array([1, 1, 0, 0, 0], np.float32)


def quantizer(step: float, low: int = -128, high: int = 127) -> Any:
    return np.array([1 / np.float32(step), step, low, high, 1], np.float32)


def values(n: int, spread: float = 1.0) -> Any:
    return (spread * np.random.default_rng(n).standard_normal(n)).astype(np.float32)


@row_loop
def _reduce(row: Row, x: Any, out: Any, n: Any) -> None:
    row.each(n, lambda at: out.store(at, x.load(at) * 0.0 + row.total(n, x.load) + row.largest(n, x.load)))


@compiled
def reduce(x: Any, out: Any) -> None:
    _reduce(x, out, x.shape[0])


@pytest.mark.parametrize("n", LENGTHS)
def test_sums_and_maxima_see_every_element_once(n: int) -> None:
    for place in range(n):
        x, out = np.full(n, -3, np.float32), np.zeros(n, np.float32)
        x[place] = 7
        reduce(x, out)
        assert (out == 7 - 3 * (n - 1) + 7).all()
    x = np.full(n, -5, np.float32)
    reduce(x, out)
    assert (out == -5 * n - 5).all(), "the largest of negative numbers is negative"


@pytest.mark.parametrize("n", LENGTHS)
def test_nothing_is_written_behind_a_row(n: int) -> None:
    out = np.full(n + max(WIDTHS), 99, np.uint8)
    passes.to_levels(values(n)[None], Target(quantizer(0.1), np.float32(128)), out[None])
    assert (out[n:] == 99).all()
    assert (out[:n] != 99).any()


@pytest.mark.parametrize(("kind", "shift"), [("uint8", 128), ("uint8", 37), ("int16", 0), ("int8", 0), ("float32", 0)])
def test_levels_are_rounded_to_even_and_clamped(kind: str, shift: int) -> None:
    low, high = (-shift, 255 - shift) if shift else (-128, 127)
    below = np.nextafter(np.float32(1.5), np.float32(0))  # + 128 would be rounded to 129.5, and that to 130
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, below, -below, 126.5, 127.5, 1e30, -128.5, -1e30, 0] * 3, np.float32)
    out = np.zeros((1, len(x)), kind)
    passes.to_levels(x[None], Target(quantizer(1, low, high), np.float32(shift)), out)
    np.testing.assert_array_equal(out[0].astype(np.int64) - shift, np.rint(x).clip(low, high))


def test_a_quantizer_that_is_off_passes_values_on() -> None:
    x, out = values(37)[None], np.zeros((1, 37), np.float32)
    passes.to_levels(x, Target(OFF, np.float32(0)), out)
    np.testing.assert_array_equal(out, x)
    passes.quantize(out, OFF)
    np.testing.assert_array_equal(out, x)
    passes.quantize(out, quantizer(0.25, -2, 1))
    np.testing.assert_array_equal(out, np.rint(x * 4).clip(-2, 1) / 4)


def test_nan_stays_nan() -> None:
    x = values(20)[None]
    x[0, [3, 18]] = np.nan
    passes.quantize(x, quantizer(0.1))
    assert np.flatnonzero(np.isnan(x)).tolist() == [3, 18]


@pytest.mark.parametrize("n", LENGTHS)
def test_layer_norm(n: int) -> None:
    x, gain, bias, out = values(n)[None] + 3, values(n + 1)[:n], values(n + 2)[:n], np.zeros((1, n), np.float32)
    q, row = quantizer(0.1), np.zeros(n, np.float32)
    passes.normalize(x, q, np.float32(1e-6), gain, bias, Target(OFF, np.float32(0)), row, out)
    seen = (np.rint(x[0] * q[0]).clip(-128, 127) * q[1]).astype(np.float64)
    expected = (seen - seen.mean()) / np.sqrt(seen.var() + 1e-6) * gain + bias
    np.testing.assert_allclose(out[0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("n", LENGTHS)
def test_a_linear_layer_with_gelu(n: int) -> None:
    """One row with the numbers themselves for levels: sums · scale + bias, then GELU."""
    x, weight, bias = np.array([[2.0, -3.0]], np.float32), values(2 * n, 0.7).reshape(n, 2), values(n)
    b = gemm.packed(n, 2, gemm.FLOAT, gemm.FLOAT)
    gemm.pack_rows(weight, 0, n, 0, 2, b)
    a = gemm.aligned((1, 16), gemm.FLOAT)
    a[:, :2] = x
    zeros, ones = np.zeros(b.shape[0] * b.shape[2], np.float32), np.ones(n, np.float32)
    layer = passes.Layer(b, gemm.sums(gemm.ROW_BLOCK, n, gemm.FLOAT), zeros, ones, OFF, bias)
    out = np.zeros((1, n), np.float32)
    passes.linear_to_levels(a, layer, True, Target(OFF, np.float32(0)), out)
    y = (x.astype(np.float64) @ weight.T)[0] + bias
    np.testing.assert_allclose(out[0], y * scipy.special.ndtr(y), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("dim", [8, 32, 50])
def test_attention_of_values_in_float(tokens: int, dim: int) -> None:
    heads, images = 2, 2
    q, k, v = (gemm.aligned((images * tokens, heads * dim), gemm.FLOAT) for _ in range(3))
    for i, part in enumerate((q, k, v)):
        part[:] = np.random.default_rng(i).standard_normal(part.shape)
    out = gemm.aligned((images * tokens, heads * dim), gemm.FLOAT)

    def product(columns: int, depth: int) -> passes.Product:
        b = gemm.packed(columns, depth, gemm.FLOAT, gemm.FLOAT)
        offset, ones = np.zeros(b.shape[0] * b.shape[2], np.float32), np.ones(b.shape[1] * b.shape[3], np.float32)
        sums = gemm.sums(gemm.ROW_BLOCK, columns, gemm.FLOAT)
        return passes.Product(b, sums, offset, np.float32(0), ones, np.float32(1))

    off, row = Target(OFF, np.float32(0)), np.zeros(tokens, np.float32)
    p = gemm.aligned((gemm.ROW_BLOCK, -(-tokens // 16) * 16), gemm.FLOAT)
    passes.attention(
        *(q, k, v, tokens, heads, dim, product(tokens, dim), OFF, np.float32(0.3)),
        *(p, off, product(dim, tokens), off, row, out),
    )
    q, k, v = (x.astype(np.float64).reshape(images, tokens, heads, dim).swapaxes(1, 2) for x in (q, k, v))
    expected = scipy.special.softmax(q @ k.swapaxes(2, 3) * 0.3, axis=3) @ v
    np.testing.assert_allclose(out, expected.swapaxes(1, 2).reshape(out.shape), rtol=0, atol=1e-5)


def test_a_layer_wider_than_what_is_computed_at_once() -> None:
    n, depth, rows = gemm.COLUMN_BLOCK + 70, 40, gemm.ROW_BLOCK + 5
    random = np.random.default_rng(0)
    levels, weight = random.integers(-9, 10, (rows, depth)), random.integers(-9, 10, (n, depth))
    b = gemm.packed(n, depth, "int16", "int8")
    gemm.pack_rows(weight.astype(np.int8), 0, n, 0, depth, b)
    a = gemm.aligned((rows, 48), "int16")
    a[:, :depth] = levels
    scale, bias, gamma = (np.abs(values(n + i)[:n]) for i in range(3))
    offset, sums = np.zeros(b.shape[0] * b.shape[2], np.int32), gemm.sums(gemm.ROW_BLOCK, gemm.COLUMN_BLOCK, "int16")
    layer = passes.Layer(b, sums, offset, scale, OFF, bias)
    expected = (levels @ weight.T) * scale + bias
    out, x = np.zeros((rows, n), np.float32), np.ones((rows, n), np.float32)
    passes.linear(a, layer, out)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)
    passes.linear_to_residual(a, layer, gamma, OFF, OFF, x)
    np.testing.assert_allclose(x, 1 + expected * gamma, rtol=1e-5, atol=1e-3)
    passes.linear_to_levels(a, layer, False, Target(OFF, np.float32(0)), x)
    np.testing.assert_array_equal(x, out)
