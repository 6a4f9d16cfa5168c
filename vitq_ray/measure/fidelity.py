"""How close a model is to the float model, image by image. No labels are needed.

    KL(float ‖ model) = Σ over classes of p · (ln p - ln q), in nats     p, q: softmax of the logits of float and model
    agreement                                                            the class with the largest logit is the same

Legend: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitq_ray.quant.vit import quantizers_off


def kl_to_float(logits: Tensor, float_logits: Tensor) -> Tensor:
    """(B,) float64 in nats, never negative; both (B, K).

    In float64, since rounding float32 would be as large as the KL of a good setting; what is kept fits into float32.
    """
    ours, floats = (x.double().log_softmax(dim=1) for x in (logits, float_logits))
    divergence = (floats.exp() * (floats - ours)).sum(dim=1)
    return divergence.clamp(0, torch.finfo(torch.float32).max)


def agrees(logits: Tensor, float_logits: Tensor) -> Tensor:
    """(B,) bool: the float model says the same class; both (B, K)."""
    return logits.argmax(dim=1) == float_logits.argmax(dim=1)


def float_part(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The float model in a quantized one, whatever plan that follows: (B, 3, S, S) -> (B, K)."""

    def logits_of(images: Tensor) -> Tensor:
        with quantizers_off(model):
            logits: Tensor = model(images)
            return logits

    return logits_of
