from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tests.conftest import tiny_vit
from vitq_ray.calibrate import (
    CalibrationStatistics,
    apply_setting,
    collect_statistics,
    degenerate_sites,
    setting_amax,
    tensor_amax,
)
from vitq_ray.config import InputError, QuantSetting
from vitq_ray.quant.amax import entropy_amax, mse_amax
from vitq_ray.quant.histogram import StatisticsError
from vitq_ray.quant.quantizer import State
from vitq_ray.quant.vit import observing, quantize_vit, sites_of, tensor_keys

SNAPSHOTS = (1, 2, 4)


def numbered(images: Tensor, size: int = 6) -> list[tuple[int, Tensor]]:
    return list(enumerate(images.split(size)))


@pytest.fixture
def statistics(quant_vit: VisionTransformer, images: Tensor) -> CalibrationStatistics:
    return collect_statistics(quant_vit, numbered(images), SNAPSHOTS)


def test_snapshot_equals_a_pass_over_that_many_batches(
    statistics: CalibrationStatistics, quant_vit: VisionTransformer, images: Tensor
) -> None:
    for n in SNAPSHOTS:
        alone = collect_statistics(quant_vit, numbered(images)[:n], [n])
        assert alone.after(n) == statistics.after(n)


def test_counts_are_those_of_numpy_on_the_tensors_themselves(
    statistics: CalibrationStatistics, quant_vit: VisionTransformer, images: Tensor
) -> None:
    seen: dict[str, list[np.ndarray]] = {key: [] for key in tensor_keys(quant_vit)}
    observers = {key: lambda x, key=key: seen[key].append(x.abs().flatten().numpy()) for key in seen}
    with torch.inference_mode(), observing(quant_vit, observers):
        for _, batch in numbered(images):
            quant_vit(batch)
    for key, histogram in zip(statistics.keys, statistics.after(4), strict=True):
        width = seen[key][0].max() / 2048
        assert histogram.width == width
        assert histogram.counts.sum() == sum(x.size for x in seen[key])
        assert histogram.max == max(x.max() for x in seen[key])
        total = np.zeros(len(histogram.counts), np.int64)
        for x in seen[key]:
            bins = max(2048, int(np.ceil(float(x.max()) / width)))
            edges = (np.arange(bins + 1) * float(width)).astype(np.float32)
            total[:bins] += np.histogram(x, bins=edges)[0]
        np.testing.assert_array_equal(histogram.counts, total, err_msg=key)


def test_workers_in_any_order_give_what_one_gives(
    statistics: CalibrationStatistics, quant_vit: VisionTransformer, images: Tensor
) -> None:
    widths = collect_statistics(quant_vit, numbered(images)[:1], [1]).widths()
    shares = [[0, 3], [2], [1]]
    batches = dict(numbered(images))
    parts = [collect_statistics(quant_vit, [(i, batches[i]) for i in share], SNAPSHOTS, widths) for share in shares]
    for order in itertools.permutations(parts):
        merged = order[0].merge(order[1]).merge(order[2])
        assert merged == statistics


def test_save_and_load(statistics: CalibrationStatistics) -> None:
    assert CalibrationStatistics.from_bytes(statistics.to_bytes()) == statistics


def test_collecting_restores_the_model(quant_vit: VisionTransformer, images: Tensor) -> None:
    quant_vit.train()
    seen: list[tuple[int, torch.Size]] = []
    collect_statistics(quant_vit, numbered(images)[:2], [2], on_batch=lambda i, logits: seen.append((i, logits.shape)))
    assert quant_vit.training
    assert {q.state for _, _, q in sites_of(quant_vit)} == {State.OFF}
    assert seen == [(0, torch.Size([6, 7])), (1, torch.Size([6, 7]))]


def test_calibration_ignores_dropout_and_settings(images: Tensor, statistics: CalibrationStatistics) -> None:
    model = quantize_vit(tiny_vit(proj_drop_rate=0.5))
    apply_setting(model, statistics, QuantSetting(num_batches=4, weight_bits=2, act_bits=2))
    model.train()
    assert collect_statistics(model, numbered(images), SNAPSHOTS) == statistics


def test_unknown_number_of_batches(statistics: CalibrationStatistics) -> None:
    with pytest.raises(InputError, match="3 was not collected, only 1, 2, 4"):
        statistics.after(3)


@pytest.mark.parametrize("snapshots", [(), (0,), (2, 1), (1, 1)])
def test_bad_snapshots(snapshots: tuple[int, ...], quant_vit: VisionTransformer, images: Tensor) -> None:
    with pytest.raises(InputError, match="expected ascending batch counts"):
        collect_statistics(quant_vit, numbered(images), snapshots)


def test_no_images(quant_vit: VisionTransformer) -> None:
    with pytest.raises(InputError, match="at least one batch is needed"):
        collect_statistics(quant_vit, [], [1])


def test_non_finite_activations_name_the_site(quant_vit: VisionTransformer, images: Tensor) -> None:
    quant_vit.blocks[1].mlp.fc1.bias.data[3] = float("inf")
    site = "transformer.encoder.layer.1.ffn.fc2._input_quantizer: has NaN or infinite values"
    quant_vit.train()
    with pytest.raises(StatisticsError, match=site):
        collect_statistics(quant_vit, numbered(images), SNAPSHOTS)
    assert quant_vit.training


def test_zeros_in_the_first_batch_name_the_site(quant_vit: VisionTransformer, images: Tensor) -> None:
    quant_vit.blocks[0].mlp.fc2.weight.data.zero_()
    with pytest.raises(StatisticsError, match=r"layer\.0\.ffn\.fc2\._aftergemm_quantizer: is all zeros"):
        collect_statistics(quant_vit, numbered(images), SNAPSHOTS)


def test_merging_statistics_of_other_snapshots_is_refused(
    statistics: CalibrationStatistics, quant_vit: VisionTransformer, images: Tensor
) -> None:
    other = collect_statistics(quant_vit, numbered(images)[:1], [1])
    with pytest.raises(StatisticsError, match="different tensors or snapshots"):
        statistics.merge(other)


@pytest.mark.parametrize("calibrator", ["max", "percentile", "mse", "entropy"])
def test_every_calibrator_gives_an_amax_within_the_range(calibrator: str, statistics: CalibrationStatistics) -> None:
    setting = QuantSetting("ft1", calibrator, 99.9 if calibrator == "percentile" else None, 4)
    amax = tensor_amax(statistics, setting)
    assert tuple(amax) == statistics.keys
    for key, histogram in zip(statistics.keys, statistics.after(4), strict=True):
        assert 0 < amax[key] <= histogram.max + histogram.width, key  # entropy: an upper bin edge
        if calibrator == "max":
            assert amax[key] == np.float32(histogram.max)


@pytest.mark.parametrize(("calibrator", "function"), [("mse", mse_amax), ("entropy", entropy_amax)])
def test_calibrators_work_at_the_bits_of_activations(
    calibrator: str, function: Callable[..., np.ndarray], statistics: CalibrationStatistics
) -> None:
    amax = tensor_amax(statistics, QuantSetting("ft1", calibrator, None, 4, weight_bits=8, act_bits=3))
    expected = function(statistics.after(4), 3).astype(np.float32)
    assert [float(v) for v in amax.values()] == expected.tolist()
    assert not np.array_equal(expected, function(statistics.after(4), 8).astype(np.float32))


def test_incomplete_statistics_are_refused(
    quant_vit: VisionTransformer, images: Tensor, statistics: CalibrationStatistics
) -> None:
    lost = collect_statistics(quant_vit, numbered(images)[:3], SNAPSHOTS)
    assert lost.after(2) == statistics.after(2)
    with pytest.raises(StatisticsError, match="3 of the first 4 batches were counted"):
        lost.after(4)
    with pytest.raises(StatisticsError, match="8 of the first 4 batches were counted"):
        statistics.merge(statistics).after(4)


@pytest.mark.parametrize("data", [b"", b"PK", b"not a zip at all"])
def test_unreadable_statistics(data: bytes) -> None:
    with pytest.raises(InputError, match="statistics: not a readable statistics file"):
        CalibrationStatistics.from_bytes(data)


def test_sites_of_one_tensor_share_its_amax(statistics: CalibrationStatistics, quant_vit: VisionTransformer) -> None:
    amax = setting_amax(quant_vit, statistics, QuantSetting("ft1", num_batches=4))
    prefix = "transformer.encoder.layer.1."
    names = [f"attn.{n}._input_quantizer" for n in ("query", "key", "value")]
    assert len({amax[prefix + name].item() for name in names}) == 1
    assert amax[prefix + "layernorm_input2_quantizer"] == amax[prefix + "add2_residual_input_quantizer"]


def test_degenerate_sites(statistics: CalibrationStatistics, quant_vit: VisionTransformer) -> None:
    # The 0th percentile is the lower edge of the first bin: 0 everywhere, for activations.
    amax = setting_amax(quant_vit, statistics, QuantSetting("ft2", "percentile", 0.0, 4))
    activations = [key for key, site, _ in sites_of(quant_vit) if site.family != "weight"]
    assert degenerate_sites(amax) == activations
