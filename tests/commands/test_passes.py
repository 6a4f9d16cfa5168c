"""What passes over images do, wherever they run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_vit
from torch import nn

from vitq_ray.calibration.sensitivity import collect_sensitivity
from vitq_ray.cluster.workers import torch_threads
from vitq_ray.commands import passes
from vitq_ray.commands.passes import IN_THIS_PROCESS, Workers, engine_for, looking
from vitq_ray.data.loader import Batch
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.execute import Engine
from vitq_ray.measure.calibration import calibration_pass
from vitq_ray.quant.vit import quantize_vit, site_weights, tensor_keys


@pytest.mark.parametrize(("workers", "expected"), [(IN_THIS_PROCESS, None), (Workers(2, 3), 3), (Workers(4), 1)])
def test_an_engine_is_measured_with_the_threads_it_will_have(
    workers: Workers, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def find(name: str, *_: object) -> Engine:
        seen.append(torch.get_num_threads())
        return Engine("int8")

    monkeypatch.setattr(passes, "find_engine", find)
    assert engine_for("auto", nn.Identity(), 16, torch.device("cpu"), workers) == Engine("int8")
    assert seen == [expected or before]
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("ray_cluster")
def test_workers_look_at_a_model_as_this_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics, then gradients, by the same two workers; bit for bit, with as many threads."""
    monkeypatch.setattr(passes, "available_cpus", lambda: 2)  # with more, gradients stay in this process
    model = quantize_vit(tiny_vit()).eval()
    pixels = torch.randint(0, 256, (10, 16, 16, 3), dtype=torch.uint8)
    transform = EvalTransform(16)
    images, ids = transform.normalize(pixels), torch.arange(10)
    keys = [*list(tensor_keys(model))[:3], *list(site_weights(model))[:3]]
    grids = dict.fromkeys(keys, ((None, (-128, 127)),))
    found = []
    with torch_threads(1):
        for workers in (IN_THIS_PROCESS, Workers(2)):
            batches = [Batch(pixels[i : i + 5], ids[i : i + 5], ids[i : i + 5]) for i in (0, 5)]
            with looking(workers, transform, True) as how:
                statistics = calibration_pass(model, batches, 5, [2], transform.normalize, how.collect).statistics
                found.append((statistics, collect_sensitivity(model, images, grids, spread=how.spread)))
    (statistics, here), (others, there) = found
    assert [h.counts.tolist() for h in others.after(2)] == [h.counts.tolist() for h in statistics.after(2)]
    assert there.curves.keys() == here.curves.keys()
    assert all(np.array_equal(there.curves[key].loss, here.curves[key].loss) for key in here.curves)
    assert here.moments is not None
    assert there.moments is not None
    assert all(torch.equal(there.moments.inputs[key], moment) for key, moment in here.moments.inputs.items())
