"""The loss of quantization-aware training: cross entropy, and the distance to a float teacher.

    loss = CE(student, labels) + scale · mean over B and K of  p_t · (log p_t - log p_s)
    p_t = softmax(teacher / T),  log p_s = log_softmax(student / T)

The mean runs over images and classes (`KLDivLoss` of log-probabilities with its element mean), so the default scale
is 10 · K: the plain KL divergence of an image weighs 10. There is no factor T².
Legend: B images, K classes, T temperature.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vitq_ray.qat.recipe import Distillation


def image_losses(
    student: Tensor, labels: Tensor, teacher: Tensor | None = None, distillation: Distillation | None = None
) -> Tensor:
    """Loss of every image, (B,); the loss of a batch is their mean.

    Args:
        student: logits (B, K), of any float type; the loss is computed in float32.
        labels: (B,) int64.
        teacher: logits (B, K), without gradient; None for cross entropy alone.
        distillation: its defaults where None.
    """
    student = student.float()
    losses = F.cross_entropy(student, labels, reduction="none")
    if teacher is None:
        return losses
    distillation = distillation or Distillation()
    return losses + distillation.scale_for(student.shape[1]) * _divergences(student, teacher, distillation.temperature)


def _divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KLDiv of every image, (B,): the mean over classes, as the element mean has it."""
    log_student = F.log_softmax(student / temperature, dim=1)
    of_teacher = F.softmax(teacher.detach().float() / temperature, dim=1)
    return F.kl_div(log_student, of_teacher, reduction="none").mean(dim=1)
