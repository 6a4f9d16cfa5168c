"""The calibration pass: exactly n full batches, and what the float model makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.conftest import tiny_vit
from vitq_ray.base.config import InputError
from vitq_ray.calibration.statistics import CalibrationStatistics, collect_statistics
from vitq_ray.data.loader import Batch
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.measure.calibration import Numbered, OnLogits, ToInput, calibration_pass, collect_here

NORMALIZE = EvalTransform(16).normalize
PIXELS = torch.randint(0, 256, (14, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batches(sizes: Sequence[int]) -> list[Batch]:
    """Images in order, from 0 on; sample ids are 100 more."""
    parts = torch.arange(sum(sizes)).split(list(sizes))
    return [Batch(PIXELS[part], part % 7, part + 100) for part in parts]


@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 4, 4, 2], [4, 4, 3, 3], [4, 2, 4, 4]])
def test_exactly_the_full_batches(sizes: list[int], quant_vit: VisionTransformer) -> None:
    full = [batch for batch in batches(sizes) if len(batch.labels) == 4]
    if len(full) < 3:
        with pytest.raises(InputError, match=r"3 batches of 4 asked for, the readable images make 2$"):
            calibration_pass(quant_vit, batches(sizes), 4, [1, 3], NORMALIZE)
        return
    seen = calibration_pass(quant_vit, batches(sizes), 4, [1, 3], NORMALIZE)
    inputs = [(i, NORMALIZE(batch.images)) for i, batch in enumerate(full)]
    alone = collect_statistics(quant_vit, inputs, [1, 3])
    assert seen.statistics.to_bytes() == alone.to_bytes()
    assert seen.sample_ids.tolist() == torch.cat([batch.sample_ids for batch in full]).tolist()
    with torch.no_grad():
        logits = tiny_vit()(torch.cat([x for _, x in inputs]))
    hits = logits.argmax(1) == torch.cat([batch.labels for batch in full])
    assert seen.evaluation.correct.tolist() == hits.tolist()


def test_no_more_is_read_than_needed(quant_vit: VisionTransformer) -> None:
    waiting = iter(batches([4, 4, 4]))
    calls: list[None] = []
    calibration_pass(quant_vit, waiting, 4, [2], NORMALIZE, on_batch=lambda: calls.append(None))
    assert len(calls) == 2
    assert next(waiting).sample_ids[0] == 108


@pytest.mark.parametrize("sizes", [[], [3], [4]])
def test_too_few_images(sizes: list[int], quant_vit: VisionTransformer) -> None:
    whole = sizes.count(4)
    message = rf"^calibration: 2 batches of 4 asked for, the readable images make {whole}; 1 broken ones were skipped$"
    with pytest.raises(InputError, match=message):
        calibration_pass(
            quant_vit, batches(sizes), 4, [2], NORMALIZE, bad_images=[("a.jpg", "broken"), ("a.jpg", "broken")]
        )


def test_statistics_collected_elsewhere(quant_vit: VisionTransformer) -> None:
    """In two parts, as batch 0 and workers do; logits are judged by the labels of their batch."""

    def elsewhere(
        model: nn.Module,
        numbered: Numbered,
        snapshots: Sequence[int],
        to_input: ToInput,
        on_logits: OnLogits,
        kinds: Iterable[str],
    ) -> CalibrationStatistics:
        first = collect_here(model, iter([next(numbered)]), snapshots, to_input, on_logits, kinds)
        rest = ((i, to_input(batch.images)) for i, batch in numbered)
        return first.merge(collect_statistics(model, rest, snapshots, first.widths(), on_logits, kinds))

    here = calibration_pass(quant_vit, batches([4, 4, 4]), 4, [1, 3], NORMALIZE)
    there = calibration_pass(quant_vit, batches([4, 4, 4]), 4, [1, 3], NORMALIZE, elsewhere)
    assert there.statistics.to_bytes() == here.statistics.to_bytes()
    assert there.evaluation.correct.tolist() == here.evaluation.correct.tolist()
    assert there.sample_ids.tolist() == here.sample_ids.tolist()
