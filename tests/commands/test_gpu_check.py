"""benchmarks/gpu_check.py where there is no GPU: it says so; every step is a command that its script takes."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from vitq_ray.commands import options as tables
from vitq_ray.commands.main import COMMANDS
from vitq_ray.commands.parser import parse


@pytest.fixture(scope="module")
def check() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "gpu_check.py"))


def test_without_a_gpu_it_is_one_line(
    check: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check["main"](["--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: this PyTorch finds no CUDA GPU, and there is nothing to check without one\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_step_is_a_command(device: str, check: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "a folder" / device
    by_script = {command.script: command for command in COMMANDS.values()}
    for name, place in zip(check["STEPS"], check["OUTPUTS"], strict=True):
        script, *given = check["command"](name, folder, device)
        command = by_script[Path(script).name]
        parsed = parse(getattr(tables, command.options), given, script)
        assert parsed.use_gpu == (device == "gpu")
        assert str(folder / place) in given
