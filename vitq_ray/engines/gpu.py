"""Linear layers in integers on a GPU: int8 · int8 -> int32 by `torch._int_mm`, inside PyTorch's own quantized blocks.

    x (multiples of a step) ──► levels, int8 ──► · Wᵀ, int32 ──► · scale ──► aftergemm quantizer, bias

The blocks stay those of `quant.vit`; only the products of their linear layers change. Products of attention stay in
float32. It runs on a CPU, too, slowly, which is how it is tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitq_ray.measure.evaluation import NonFiniteLogitsError
from vitq_ray.quant.fake_quant import finite_scale, step_of
from vitq_ray.quant.quantizer import State, TensorQuantizer
from vitq_ray.quant.vit import GemmQuantizers, quant_blocks

_LEAST_ROWS = 32  # _int_mm takes more than 16, and is best with multiples of 8
_MULTIPLE = 8  # of the depth and the number of columns


class IntegerProduct:
    """x·Wᵀ of a linear layer whose input and weight are quantized; exact but for the last multiplication."""

    def __init__(self, weight: Tensor, of_input: TensorQuantizer, of_weight: TensorQuantizer) -> None:
        if not (torch.isfinite(weight).all() and torch.isfinite(of_input.amax).all()):
            raise NonFiniteLogitsError("a weight or an amax has NaN or infinite values")
        low, high = of_weight.rule.levels
        step = step_of(of_weight.amax.detach(), high).reshape(-1, 1)
        levels = (weight.detach() * step.reciprocal()).round_().clamp_(low, high)
        self._weight = levels.to(torch.int8).contiguous().t()  # (in, out)
        of_x = step_of(of_input.amax.detach(), of_input.rule.levels[1])
        self._inverse, self._scale = of_x.reciprocal(), (finite_scale(of_x) * finite_scale(step)).flatten()

    def __call__(self, x: Tensor) -> Tensor:  # (…, in) -> (…, out)
        levels = (x * self._inverse).round_().to(torch.int8).flatten(0, -2)
        rows = len(levels)
        short = max(_LEAST_ROWS, -(-rows // _MULTIPLE) * _MULTIPLE) - rows
        sums = torch._int_mm(nn.functional.pad(levels, (0, 0, 0, short)), self._weight)[:rows]
        return (sums.float() * self._scale).reshape(*x.shape[:-1], -1)


def _can(gemm: GemmQuantizers, weight: Tensor) -> bool:
    """Both sides are on and their levels fit int8, and the shape is one that `_int_mm` takes."""
    both = (gemm._input_quantizer, gemm._weight_quantizer)
    fits = all(q.state is State.QUANTIZE and q.rule.levels[0] >= -128 and q.rule.levels[1] <= 127 for q in both)
    return fits and not any(side % _MULTIPLE for side in weight.shape)


@contextmanager
def integer_products(model: nn.Module) -> Iterator[None]:
    """The linear layers of a quantized model compute in integers, where they can, for as long as the context lasts."""
    gemms = [pair for block in quant_blocks(model) for pair in block.gemms()]
    try:
        for gemm, weight in gemms:
            if _can(gemm, weight):
                gemm.product = IntegerProduct(weight, gemm._input_quantizer, gemm._weight_quantizer)
        yield
    finally:
        for gemm, _ in gemms:
            gemm.product = None
