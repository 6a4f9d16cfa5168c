"""Two models' logits for the same images, compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """How far logits are from others.

    Attributes:
        agreement: share of images with the same class.
        kl: mean KL divergence of the softmax from the others', nats.
        largest: the largest difference of a logit.
    """

    agreement: float
    kl: float
    largest: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def compare(logits: Tensor, others: Tensor) -> Comparison:
    """Both (N, classes); KL(others ‖ logits)."""
    kl = F.kl_div(
        logits.double().log_softmax(1), others.double().log_softmax(1), reduction="batchmean", log_target=True
    )
    same = (logits.argmax(1) == others.argmax(1)).float().mean()
    return Comparison(same.item(), kl.item(), (logits - others).abs().max().item())
