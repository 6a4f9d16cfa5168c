"""A search whose settings change weights: interrupted and gone on with, its checkpoints, what its parts cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import vitq_ray
from tests.conftest import make_project
from vitq_ray.base.config import InputError
from vitq_ray.models.checkpoint import load_calibrated
from vitq_ray.run.log import Log

SPACE = """
SPACE = {"mode": ("ft2",), "calibrator": ("fisher",), "weights": ("fisher",), "num_batches": (8,),
         "transforms": (("rotate", "shift", "heads", "balance"),),
         "corrections": (("fit", "round", "bias", "learn"), ())}
"""


@pytest.fixture(scope="module")
def options(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("corrected")
    project = make_project(folder, val=60)
    (folder / "space.py").write_text(SPACE)
    few = {"search_space": str(folder / "space.py"), "calib_batchsz": 4, "wprec": 3, "aprec": 3, "batch_size": 10}
    data = {"pretrained_dir": project.checkpoint, "data_path": str(project.folder)}
    return {**data, **few, "chunk_images": 10, "engine": "fake", "max_trials_in_flight": 1}


@pytest.fixture(scope="module")
def searched(options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> vitq_ray.TuneResult:
    return vitq_ray.tune(**options, output=str(tmp_path_factory.mktemp("searched") / "run"))


def test_its_winner_can_be_loaded_and_comes_to_the_same(
    searched: vitq_ray.TuneResult, options: dict[str, object]
) -> None:
    """Corrections win at 3 bits; the checkpoint has FasterTransformer's names and gives the counts that were said."""
    assert searched.winner.corrections
    found = load_calibrated(str(searched.checkpoint))
    state = torch.load(searched.checkpoint, weights_only=True)
    assert "transformer.encoder.layer.0.attn.query.weight" in state
    assert set(found.plan.weights) >= {"blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias"}
    again = vitq_ray.evaluate(
        pretrained_dir=str(searched.checkpoint),
        data_path=options["data_path"],
        reference=options["pretrained_dir"],
        engine="fake",
    )
    rows = (searched.result, searched.result["selection"][searched.result["winner"]["name"]])
    assert again.evaluation.images == sum(row["images"] for row in rows) == 60
    assert int(again.evaluation.results["correct"].sum()) == sum(row["top1_correct"] for row in rows)
    assert float(again.evaluation.results["kl"].sum()) == pytest.approx(sum(row["kl_total"] for row in rows), rel=1e-3)


@pytest.mark.slow
def test_it_goes_on_with_the_same_weights(
    searched: vitq_ray.TuneResult, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corrected weights, which race first, are computed again; other ones than were raced are refused."""
    append, folder = Log.append, tmp_path / "cut"

    def full(self: Log, event: str, **values: object) -> None:
        append(self, event, **values)
        if event == "chunk":
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", full)
        with pytest.raises(OSError, match="No space left"):
            vitq_ray.tune(**options, output=str(folder))
    with monkeypatch.context() as patch:
        patch.setattr("vitq_ray.calibration.planner.rounded", lambda *args: {})
        with pytest.raises(InputError, match=r"candidate c00\d: its corrected weights are not those that were raced"):
            vitq_ray.tune(resume=str(folder))
    resumed = vitq_ray.tune(resume=str(folder))
    assert resumed.winner == searched.winner
    ours, theirs = (torch.load(found.checkpoint, weights_only=True) for found in (resumed, searched))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_its_parts_are_looked_at_without_corrections(searched: vitq_ray.TuneResult, tmp_path: Path) -> None:
    found = vitq_ray.sensitivity(
        run=str(searched.folder), images=4, parts="block", engine="fake", output=str(tmp_path / "s")
    )
    assert not found.result["setting"]["corrections"]
    assert json.loads((searched.folder / "sensitivity.json").read_text())["parts"] == found.result["parts"]
    data = {"data_path": found.result["options"]["data_path"], "output": str(tmp_path / "t")}
    with pytest.raises(
        InputError, match="expected a setting without corrections, or with --run the folder of a search"
    ):
        vitq_ray.sensitivity(pretrained_dir=str(searched.checkpoint), **data)


class _Reached(Exception):
    pass


@pytest.mark.parametrize(("command", "correction", "step"), [
    ("tune", "fit", "fitted"), ("tune", "learn", "learned"), ("calibrate", "fit", "fitted"),
    ("calibrate", "learn", "learned"),
])  # fmt: skip
def test_the_seed_is_that_of_corrections_too(
    options: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    correction: str,
    step: str,
) -> None:
    def stop(*args: object) -> None:
        raise _Reached(args[-1])

    monkeypatch.setattr(f"vitq_ray.calibration.planner.{step}", stop)
    own: dict[str, object] = {"output": str(tmp_path / "run")}
    if command == "calibrate":
        own = {"calib_output_path": str(tmp_path), "calibrator": "fisher", "corrections": correction}
        own |= {"quant_mode": "ft2", "num_calib_batch": 8}
    taken = ("pretrained_dir", "data_path", "calib_batchsz", *(options if command == "tune" else ()))
    with pytest.raises(_Reached, match="7"):
        getattr(vitq_ray, command)(**{name: options[name] for name in taken}, **own, seed=7)
