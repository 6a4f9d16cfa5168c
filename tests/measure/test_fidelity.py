"""Closeness to the float model: by hand, by PyTorch's KL divergence, and on the way through an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from tests.conftest import plan_by_hand
from vitq_ray.data.loader import Batch
from vitq_ray.data.samples import NO_LABEL
from vitq_ray.measure.evaluation import Counts, Evaluation, evaluate, evaluate_variants, sanity_problem
from vitq_ray.measure.fidelity import agrees, float_part, kl_to_float
from vitq_ray.quant.vit import apply_plan


def test_kl_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): ln 2 less the entropy of p."""
    floats, ours = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert kl_to_float(ours, floats).item() == pytest.approx(math.log(2) - entropy, abs=1e-7)
    assert kl_to_float(floats, ours).item() == pytest.approx(-math.log(0.75) / 2 - math.log(0.25) / 2 - math.log(2))
    assert kl_to_float(ours, floats).item() != pytest.approx(kl_to_float(floats, ours).item())


def test_kl_is_that_of_pytorch() -> None:
    ours, floats = torch.randn(2, 50, 9, generator=torch.Generator().manual_seed(0)).mul(4).unbind()
    wanted = F.kl_div(ours.double().log_softmax(1), floats.double().softmax(1), reduction="none").sum(1)
    assert torch.allclose(kl_to_float(ours, floats), wanted, rtol=1e-12)


def test_kl_of_equal_and_of_extreme_logits_is_a_number() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.1, 0.2, 0.3], [3e38, -3e38, 0.0]])
    assert kl_to_float(logits, logits).tolist() == [0, 0, 0]
    assert kl_to_float(logits + 1e-4, logits)[1] < 1e-12, "a shift of all logits changes nothing"
    opposite = kl_to_float(-logits, logits).numpy().astype(np.float32)
    assert np.isfinite(opposite).all()
    assert opposite[0] == pytest.approx(2e4)


def test_agreement() -> None:
    floats = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert agrees(torch.tensor([[3.0, 1.0], [9.0, 8.0]]), floats).tolist() == [False, True]


def batches(labels: torch.Tensor, known: torch.Tensor | None = None) -> Iterator[Batch]:
    pixels = torch.randint(0, 256, (len(labels), 16, 16, 3), generator=torch.Generator().manual_seed(2)).byte()
    for start in range(0, len(labels), 4):
        part = slice(start, start + 4)
        yield Batch(pixels[part], labels[part], torch.arange(len(labels))[part], None if known is None else known[part])


def to_input(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2) / 128 - 1


LABELS = torch.arange(10) % 7


@pytest.fixture
def coarse(quant_vit: VisionTransformer, images: torch.Tensor) -> VisionTransformer:
    """A model that follows a plan of 3 bits."""
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ft2", 3))
    return quant_vit


def test_the_float_model_runs_beside_or_is_known_before(
    coarse: VisionTransformer, float_vit: VisionTransformer
) -> None:
    """Its logits come with the batches, or from a model that runs with it, which is the one without quantizers."""
    logits: list[torch.Tensor] = []
    evaluate(float_vit, batches(LABELS), to_input, lambda _, y: logits.append(y))
    known = torch.cat(logits)
    ours: list[torch.Tensor] = []
    beside = evaluate(coarse, batches(LABELS), to_input, lambda _, y: ours.append(y), float_part(coarse))
    before = evaluate(coarse, batches(LABELS, known), to_input)
    both = evaluate_variants({"ours": coarse, "float": float_vit}, batches(LABELS), to_input)
    wanted = kl_to_float(torch.cat(ours), known).numpy()
    assert wanted.min() > 1e-3
    for found in (beside, before, both["ours"]):
        assert list(found.results) == ["correct", "correct5", "kl", "agree"]
        assert found.results["kl"] == pytest.approx(wanted, rel=1e-4)
        assert np.array_equal(found.results["agree"], (torch.cat(ours).argmax(1) == known.argmax(1)).numpy())
    assert list(both["float"].results) == ["correct", "correct5"]
    assert len(ours) == 3, "only the model's own logits are handed on"


def test_what_is_summed_up_with_labels_and_without(coarse: VisionTransformer) -> None:
    without = evaluate(coarse, batches(torch.full((10,), NO_LABEL)), to_input, float_model=float_part(coarse))
    assert (without.images, without.has_accuracy) == (10, False)
    summary = without.summary()
    assert list(summary) == ["images", "kl_total", "agreed", "kl", "agreement"]
    assert summary["kl"] == pytest.approx(without.results["kl"].mean())
    assert summary["agreement"] == without.results["agree"].mean()
    with_labels = evaluate(coarse, batches(LABELS), to_input, float_model=float_part(coarse))
    assert Counts.of(with_labels).means["kl"] == summary["kl"]
    assert "top1_interval95" in with_labels.summary()
    assert sanity_problem(without, 7) is None


def test_without_labels_and_float_model_there_is_nothing() -> None:
    evaluation = Evaluation.of_logits(torch.randn(3, 7), torch.full((3,), NO_LABEL), torch.arange(3))
    assert evaluation.summary() == {"images": 3}
