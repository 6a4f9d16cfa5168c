"""Against a scalar computation by hand, and against PyTorch's own autograd where the two should agree."""

from __future__ import annotations

import pytest
import torch

from vitq_ray.quant.fake_quant import _native_forward, fake_quantize, integer_range, step_of

BITS = range(2, 9)


def by_hand(value: float, amax: float, bits: int) -> float:
    qmax = 2 ** (bits - 1) - 1
    level = round(value * qmax / amax)  # Python rounds half to even, as the kernel does
    return max(-qmax - 1, min(qmax, level)) * amax / qmax


@pytest.mark.parametrize("bits", BITS)
def test_per_tensor(bits: int) -> None:
    x = torch.linspace(-3, 3, 997)
    expected = torch.tensor([by_hand(v, 1.7, bits) for v in x.tolist()])
    assert torch.allclose(fake_quantize(x, torch.tensor(1.7), bits), expected, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_per_row_equals_per_tensor_on_each_row(bits: int) -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    amax = weight.abs().amax(dim=1, keepdim=True) * 0.8
    rows = torch.stack([fake_quantize(row, a.squeeze(), bits) for row, a in zip(weight, amax, strict=True)])
    assert torch.equal(fake_quantize(weight, amax, bits, axis=0), rows)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_equals_pytorchs_kernel_bit_for_bit(bits: int, axis: int | None) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(300, 200, generator=generator)
    amax = torch.rand(() if axis is None else (x.shape[axis],), generator=generator) * 3 + 0.01
    native = _native_forward(x, step_of(amax, integer_range(bits)[1]), integer_range(bits), axis)
    assert torch.equal(fake_quantize(x, amax, bits, axis), native)


def test_range_at_8_bits_includes_minus_128() -> None:
    assert integer_range(8) == (-128, 127)
    x = torch.tensor([-10.0, 10.0])
    assert fake_quantize(x, torch.tensor(127.0 / 127)).tolist() == pytest.approx([-128 / 127, 1.0])


@pytest.mark.parametrize("axis", [None, 0])
def test_amax_zero_gives_zeros(axis: int | None) -> None:
    x = torch.tensor([[1e6, -3.0], [0.5, 0.0]])
    amax = torch.zeros(()) if axis is None else torch.zeros(2, 1)
    assert torch.equal(fake_quantize(x, amax, 8, axis), torch.zeros(2, 2))


def test_only_the_degenerate_channel_becomes_zero() -> None:
    x = torch.tensor([[0.5, -1.0], [0.5, -1.0]])
    y = fake_quantize(x, torch.tensor([[0.0], [1.0]]), 8, axis=0)
    assert torch.equal(y[0], torch.zeros(2))
    assert y[1].tolist() == pytest.approx([round(63.5) / 127, -1.0])


def test_tiny_amax_stays_finite() -> None:
    assert torch.isfinite(fake_quantize(torch.tensor([0.0, 1.0]), torch.tensor(1e-42))).all()


@pytest.mark.parametrize("axis", [None, 0])
def test_gradient_mask_is_amax_and_not_half_a_step_further(axis: int | None) -> None:
    # 1.003 lies within half a step (1/254) of amax: PyTorch's own op would let its gradient through.
    x = torch.tensor([[-1.003, -1.0, 0.2], [1.0, 1.003, 5.0]], requires_grad=True)
    amax = torch.ones(()) if axis is None else torch.ones(2, 1)
    grad = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    fake_quantize(x, amax, 8, axis).backward(grad)
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 2.0, 3.0], [4.0, 0.0, 0.0]]

    native = x.detach().clone().requires_grad_()
    torch.fake_quantize_per_tensor_affine(native, 1 / 127, 0, -128, 127).backward(grad)
    assert native.grad is not None
    assert native.grad[1, 1] == 5.0, "PyTorch's mask has changed; ours may no longer be needed"


def test_amax_gets_no_gradient() -> None:
    amax = torch.tensor(1.0, requires_grad=True)
    x = torch.ones(3, requires_grad=True)
    fake_quantize(x, amax).sum().backward()
    assert amax.grad is None


def lsq_by_hand(x: float, grad: float, amax: float, bits: int) -> float:
    """LSQ's gradient of one element for amax, before the division by √(elements · qmax)."""
    qmax = 2 ** (bits - 1) - 1
    u = x * qmax / amax
    slope = qmax if u >= qmax else -qmax - 1 if u <= -qmax - 1 else round(u) - u
    return grad * slope / qmax


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_learned_amax_has_lsqs_gradient(bits: int) -> None:
    x = torch.linspace(-2, 2, 101, dtype=torch.float32)
    grad = torch.randn(101, generator=torch.Generator().manual_seed(0))
    amax = torch.tensor(1.3, requires_grad=True)
    fake_quantize(x, amax, bits, learned_over=25).backward(grad)
    expected = sum(lsq_by_hand(v, g, 1.3, bits) for v, g in zip(x.tolist(), grad.tolist(), strict=True))
    assert amax.grad is not None
    assert amax.grad.item() == pytest.approx(expected / (25 * (2 ** (bits - 1) - 1)) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_learned_amax_agrees_with_pytorchs_learnable_op(bits: int) -> None:
    """PyTorch decides by the rounded value what lies outside, LSQ by the value itself: leave that half step out."""
    low, high = integer_range(bits)
    x = torch.randn(2000, generator=torch.Generator().manual_seed(bits)) * 2
    level = x / (1.1 / high)
    x = x[~(((level > high) & (level < high + 0.5)) | ((level < low) & (level > low - 0.5)))]
    grad = torch.randn(len(x), generator=torch.Generator().manual_seed(9))
    amax = torch.tensor(1.1, requires_grad=True)
    ours = fake_quantize(x, amax, bits, learned_over=len(x))
    ours.backward(grad)
    scale = torch.tensor([1.1 / high], requires_grad=True)
    factor = (len(x) * high) ** -0.5
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x, scale, torch.zeros(1), low, high, factor)
    theirs.backward(grad)
    torch.testing.assert_close(ours, theirs)
    assert amax.grad is not None
    assert scale.grad is not None
    assert amax.grad.item() == pytest.approx(scale.grad.item() / high, rel=1e-3)  # amax = scale · qmax


def test_learned_amax_of_rows_is_that_of_each_row() -> None:
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(4))
    grad = torch.randn(3, 20, generator=torch.Generator().manual_seed(5))
    amax = torch.tensor([[0.5], [1.0], [0.0]], requires_grad=True)
    fake_quantize(weight, amax, 4, 0, learned_over=20).backward(grad)
    assert amax.grad is not None
    assert amax.grad.shape == (3, 1)
    for row in range(2):
        alone = amax.detach()[row, 0].clone().requires_grad_()
        fake_quantize(weight[row], alone, 4, learned_over=20).backward(grad[row])
        torch.testing.assert_close(amax.grad[row, 0], alone.grad)
    assert amax.grad[2].item() == 0
