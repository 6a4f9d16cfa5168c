"""What passes over images do, wherever they run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitq_ray.commands import passes
from vitq_ray.commands.passes import IN_THIS_PROCESS, Workers, engine_for
from vitq_ray.engines.execute import Engine


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
