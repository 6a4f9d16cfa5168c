"""Milliseconds of what a search came to: in its engine, and as a file in the runtime whose mode it has."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import plan_by_hand
from vitq_ray.commands.screen import Screen
from vitq_ray.commands.tune_latency import latencies
from vitq_ray.engines.execute import Engine


class Heard(Screen):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)


def job_of(model: nn.Module) -> Any:
    geometry = SimpleNamespace(num_tokens=5, width=32, heads=2, depth=2)
    return SimpleNamespace(
        model=model,
        engine=Engine("fake"),
        options=SimpleNamespace(latency=(1, 2)),
        transform=SimpleNamespace(size=16),
        device=torch.device("cpu"),
        loaded=SimpleNamespace(geometry=geometry),
    )


@pytest.mark.parametrize("mode", ["ft2", "ort", "openvino"])
def test_in_the_engine_and_in_the_runtime(mode: str, quant_vit: nn.Module, images: Tensor) -> None:
    if mode == "openvino":
        pytest.importorskip("openvino", reason="no OpenVINO")
    heard = Heard()
    rows = latencies(job_of(quant_vit), {"c1": plan_by_hand(quant_vit.eval(), images, mode)}, heard)
    runtimes = [("float", None), ("c1", None), *([("c1", mode)] if mode != "ft2" else [])]
    assert sorted((row["batch"], row["candidate"], str(row["runtime"])) for row in rows) == sorted(
        (batch, name, str(runtime)) for batch in (1, 2) for name, runtime in runtimes
    )
    assert all(row["ms_per_image"] > 0 and row["threads"] >= 1 for row in rows)
    assert heard.warned == []


def test_a_runtime_that_is_not_there(quant_vit: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    heard = Heard()
    rows = latencies(job_of(quant_vit), {"c1": plan_by_hand(quant_vit.eval(), images, "ort")}, heard)
    assert {row["runtime"] for row in rows} == {None}
    (line,) = heard.warned
    assert line.startswith("latency: c1 in ort is not measured: onnxruntime: is not installed; pip install")
