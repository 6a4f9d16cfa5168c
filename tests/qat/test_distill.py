"""The loss, against NumPy by hand and against PyTorch's own losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitq_ray.base.config import InputError
from vitq_ray.qat.loss import image_losses
from vitq_ray.qat.recipe import Distillation

B, K = 5, 7


def logits(seed: int) -> torch.Tensor:
    return torch.randn(B, K, generator=torch.Generator().manual_seed(seed)) * 3


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


LABELS = torch.tensor([0, 3, 6, 2, 2])


@pytest.mark.parametrize(("temperature", "scale"), [(3.0, None), (1.0, 10_000.0), (7.5, 0.3)])
def test_by_hand(temperature: float, scale: float | None) -> None:
    student, teacher = logits(0), logits(1)
    s, t = student.double().numpy(), teacher.double().numpy()
    cross_entropy = -np.log(softmax(s))[np.arange(B), LABELS.numpy()]
    p, q = softmax(t / temperature), softmax(s / temperature)
    divergence = (p * (np.log(p) - np.log(q))).sum() / (B * K)  # element mean
    expected = cross_entropy.mean() + (10 * K if scale is None else scale) * divergence
    losses = image_losses(student, LABELS, teacher, Distillation(temperature, scale))
    assert losses.shape == (B,)
    assert losses.mean().item() == pytest.approx(expected, rel=1e-5)


def test_equals_the_published_formula_at_1000_classes() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(4, 1000, generator=generator) for _ in range(2))
    labels = torch.tensor([1, 999, 5, 0])
    divergence = torch.nn.KLDivLoss()  # its mean is over elements
    with pytest.warns(UserWarning, match="batchmean"):
        soft = divergence(F.log_softmax(student / 3, dim=-1), F.softmax(teacher / 3, dim=-1))
    expected = F.cross_entropy(student, labels) + 10_000 * soft
    torch.testing.assert_close(image_losses(student, labels, teacher).mean(), expected)


def test_without_teacher_it_is_cross_entropy() -> None:
    expected = F.cross_entropy(logits(0), LABELS, reduction="none")
    torch.testing.assert_close(image_losses(logits(0), LABELS), expected)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    image_losses(student, LABELS, teacher).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_bfloat16_logits_give_a_float32_loss() -> None:
    assert image_losses(logits(0).bfloat16(), LABELS, logits(1).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("values", [(0.0, None), (-1.0, None), (float("nan"), None), (3.0, -1.0), (3.0, float("inf"))])
def test_impossible_values(values: tuple[float, float | None]) -> None:
    with pytest.raises(InputError, match="expected a number"):
        Distillation(*values)
