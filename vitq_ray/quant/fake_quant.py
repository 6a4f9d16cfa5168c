"""Fake quantization: round to the integer grid and come back, in floating point.

    q = clamp(round(x · qmax / amax), -qmax - 1, qmax)        qmax = 2^(bits-1) - 1, i.e. 127 at 8 bits
    x̂ = q · amax / qmax

Symmetric, the full negative range included. The forward pass is PyTorch's own fake-quantize kernel; on CPUs, where
that kernel does not vectorize, the same four operations one after the other, in place: the same numbers, twice as
fast (but for NaN, which stays NaN here and becomes -qmax - 1 steps in the kernel; calibration refuses it).

The backward pass is ours: the gradient goes straight through where |x| <= amax and is zero outside, whereas PyTorch's
kernel lets it pass half a step further. amax gets no gradient, or where it is learned that of LSQ (Esser et al. 2020,
arXiv 1902.08153): with the step s = amax / qmax and u = x / s,

    ∂x̂/∂s = -qmax - 1    where u <= -qmax - 1
             qmax        where u >= qmax              ∂x̂/∂amax = ∂x̂/∂s / qmax
             round(u) - u    between

summed over the elements of a scale and divided by √(elements · qmax).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# A scale under which every finite activation rounds to 0: what amax == 0 means. Its inverse is a normal float32.
_SCALE_OF_ZERO_AMAX = 2.0**100
_SMALLEST_SCALE = 2.0**-126


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of the grid at `bits` bits: (-128, 127) at 8."""
    qmax = 2 ** (bits - 1) - 1
    return -qmax - 1, qmax


def step_of(amax: Tensor, largest: int) -> Tensor:
    """amax / largest level, same shape as `amax`; a zero amax yields a step that quantizes everything to 0."""
    step = (amax / largest).clamp_min(_SMALLEST_SCALE)
    return torch.where(amax > 0, step, torch.full_like(step, _SCALE_OF_ZERO_AMAX))


def finite_scale(step: Tensor) -> Tensor:
    """What a product of levels is multiplied with, of a step that may be that of a zero amax: its levels are all 0."""
    return torch.where(step >= _SCALE_OF_ZERO_AMAX, torch.zeros_like(step), step)


def fake_quantize(
    x: Tensor,
    amax: Tensor,
    bits: int = 8,
    axis: int | None = None,
    learned_over: int | None = None,
    levels: tuple[int, int] | None = None,
) -> Tensor:
    """Quantize and dequantize `x`, with a straight-through gradient inside [-amax, amax].

    Args:
        x: any shape, float32.
        amax: shape () for one scale, or one value per slice along `axis` in any shape with that many elements,
            e.g. (rows, 1) for a weight of shape (rows, columns) and axis 0.
        bits: 2 to 8.
        axis: the channel axis of `x`, or None for one scale.
        learned_over: None for an amax without gradient; else it gets LSQ's, and this is LSQ's number of elements.
        levels: smallest and largest integer less the zero point, where the grid is not the symmetric one of `bits`:
            (0, 255) for unsigned 8 bits. The step is amax / largest level.
    """
    quantized: Tensor = _FakeQuantize.apply(x, amax, levels or integer_range(bits), axis, learned_over)
    return quantized


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, amax: Tensor, levels: tuple[int, int], axis: int | None, learned_over: int | None
    ) -> Tensor:
        ctx.save_for_backward(x, amax)
        ctx.levels, ctx.axis, ctx.learned_over = levels, axis, learned_over
        return _forward(x, step_of(amax, levels[1]), levels, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (grad,) = grads
        x, amax = ctx.saved_tensors
        of_amax = None
        if ctx.learned_over is not None and ctx.needs_input_grad[1]:
            of_amax = _lsq_gradient(grad, x, amax, ctx.levels, ctx.axis) / math.sqrt(ctx.learned_over * ctx.levels[1])
        return grad * _inside(x, _along(amax, x, ctx.axis), ctx.levels), of_amax, None, None, None


def _inside(x: Tensor, amax: Tensor, levels: tuple[int, int]) -> Tensor:
    """Where the gradient goes straight through: from -amax, or from the smallest level if that is nearer, to amax."""
    low, high = levels
    if low <= -high:
        return x.abs() <= amax
    return (x <= amax) & (x >= low * step_of(amax, high))


def _lsq_gradient(grad: Tensor, x: Tensor, amax: Tensor, levels: tuple[int, int], axis: int | None) -> Tensor:
    """Σ grad · ∂x̂/∂amax over the elements of each scale, in the shape of `amax`; 0 where amax is 0."""
    low, high = levels
    level = x * _along(step_of(amax, high), x, axis).reciprocal()
    slope = torch.where(level >= high, high, torch.where(level <= low, low, level.round() - level)).mul_(grad)
    others = [d for d in range(x.ndim) if axis is None or d != axis % x.ndim]
    return (slope.sum(others) / high).reshape(amax.shape) * (amax > 0)


def _forward(x: Tensor, scale: Tensor, limits: tuple[int, int], axis: int | None) -> Tensor:
    if x.device.type == "cpu":
        scale = _along(scale, x, axis)
        return torch.mul(x, scale.reciprocal()).round_().clamp_(*limits).mul_(scale)
    return _native_forward(x, scale, limits, axis)


def _native_forward(x: Tensor, scale: Tensor, limits: tuple[int, int], axis: int | None) -> Tensor:
    """PyTorch's kernel: one launch on a GPU."""
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale.reshape(()), zeros.reshape(()), *limits)
    return torch.fake_quantize_per_channel_affine(x, scale.flatten(), zeros.flatten(), axis, *limits)


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """One value per slice of `x` along `axis`, shaped to broadcast against it."""
    if axis is None:
        return values.reshape(())
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)
