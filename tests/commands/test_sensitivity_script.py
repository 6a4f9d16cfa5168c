"""What each part of a plan costs, from a checkpoint, a run, or calibrated first; interrupted and gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import vitq_ray
from tests.conftest import Project, make_project
from vitq_ray.base.config import InputError
from vitq_ray.run.folder import RunFolder
from vitq_ray.run.log import Log
from vitq_ray.run.results import read_result

FEW = {"num_calib_batch": 2, "calib_batchsz": 4, "calibrator": "max", "engine": "fake"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, dict[str, str], str]:
    """A project, its options, and a calibrated checkpoint."""
    folder = tmp_path_factory.mktemp("sensitivity")
    (folder / "project").mkdir()
    project = make_project(folder / "project")
    data = {"pretrained_dir": project.checkpoint, "data_path": str(project.folder)}
    found = vitq_ray.calibrate(calib_output_path=str(folder / "calib"), wprec=4, aprec=4, **data, **FEW)
    return project, data, str(found.checkpoint)


def test_every_part_is_measured_and_predicted(made: tuple[Project, dict[str, str], str], tmp_path: Path) -> None:
    _, data, checkpoint = made
    found = vitq_ray.sensitivity(
        pretrained_dir=checkpoint, data_path=data["data_path"], images=6, engine="fake", output=str(tmp_path / "s")
    )
    content = json.loads((tmp_path / "s" / "sensitivity.json").read_text())
    parts = {(part["kind"], part["name"]): part for part in content["parts"]}
    assert content["images"] == 6
    assert content["integer_share"] == 1
    whole = parts["whole", "*"]
    assert whole["sites"] == sum(part["sites"] for (kind, _), part in parts.items() if kind == "block")
    assert whole["kl"] > max(part["kl"] for (kind, _), part in parts.items() if kind == "site")
    assert whole["predicted_kl"] == pytest.approx(
        sum(part["predicted_kl"] for (kind, _), part in parts.items() if kind == "family")
    )
    low, high = whole["kl_interval95"]
    assert low < whole["kl"] < high
    assert read_result(tmp_path / "s")["kl"] == pytest.approx(whole["kl"])
    assert [effect.part.kind for effect in found.effects] == sorted(
        (effect.part.kind for effect in found.effects), key=["whole", "site", "family", "block"].index
    )
    with pytest.raises(InputError, match=r"already holds a run; resume it, or choose another"):
        vitq_ray.sensitivity(pretrained_dir=checkpoint, data_path=data["data_path"], output=str(tmp_path / "s"))


def test_it_goes_on_where_it_was_interrupted(
    made: tuple[Project, dict[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float checkpoint, calibrated first; the rest is not measured twice, and comes to the same."""
    _, data, _ = made
    options = {**data, **FEW, "images": 4, "parts": "family,block"}
    whole = vitq_ray.sensitivity(output=str(tmp_path / "whole"), **options)
    append, measured = Log.append, []

    def interrupted(self: Log, event: str, **values: object) -> None:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(values)
        append(self, event, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vitq_ray.sensitivity(output=str(tmp_path / "cut"), **options)
    assert len(measured) == 5
    again = vitq_ray.sensitivity(resume=str(tmp_path / "cut"))
    assert again.result["parts"] == whole.result["parts"]
    events = RunFolder.find(tmp_path / "cut", "sensitivity").events()
    assert len({(event["kind"], event["name"]) for event in events}) == len(events) == len(whole.effects)
    with pytest.raises(InputError, match=r"images: 5 given, but .* was started with 4"):
        vitq_ray.sensitivity(resume=str(tmp_path / "cut"), images=5)


def test_the_checkpoint_of_a_run_is_looked_at_and_gone_on_with(
    made: tuple[Project, dict[str, str], str], tmp_path: Path
) -> None:
    """Of a calibration here, named by a relative path; it has what was found, too."""
    _, _, checkpoint = made
    run = tmp_path / "calib"
    shutil.copytree(Path(checkpoint).parent, run)
    options = {"images": 2, "parts": "block", "engine": "fake", "output": str(tmp_path / "s")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        whole = vitq_ray.sensitivity(run="calib", **options)
    assert json.loads((run / "sensitivity.json").read_text()) == json.loads(
        (tmp_path / "s" / "sensitivity.json").read_text()
    )
    (tmp_path / "s" / "result.json").unlink()
    (run / "sensitivity.json").unlink()
    assert vitq_ray.sensitivity(resume=str(tmp_path / "s")).result["parts"] == whole.result["parts"]
    assert (run / "sensitivity.json").exists()


def test_weights_with_corrections_are_refused(made: tuple[Project, dict[str, str], str], tmp_path: Path) -> None:
    _, data, _ = made
    few = {**FEW, "calibrator": "fisher", "corrections": "round"}
    with pytest.raises(
        InputError, match=r"its weights have corrections \(round\), which no part alone can be told from"
    ):
        vitq_ray.sensitivity(**data, **few, images=2, output=str(tmp_path / "s"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": "site,layer"}, "parts: 'layer' is not one of site, family, block"),
        ({"images": 1}, "images: expected an integer >= 2, got 1"),
        ({"run": "/nowhere", "pretrained_dir": "x"}, "run: /nowhere given, and a checkpoint, too"),
        ({"run": "/nowhere"}, "result.json"),
        ({"use_gpu": True}, "use_gpu: True given, but parts are measured on the CPU"),
        ({"resume": "/nowhere"}, "/nowhere: has no run.json"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vitq_ray.sensitivity(**options)


def test_images_that_were_calibrated_on_are_measured_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without train: from a float checkpoint, and from one that was calibrated; a resumed run keeps its images."""
    project = make_project(tmp_path, val=30)
    for path in project.folder.glob("train*"):
        path.unlink()
    data = {"data_path": str(project.folder), "seed": 0}
    monkeypatch.setattr("vitq_ray.commands.sensitivity.images_to_look_at", lambda model: 10)
    drawn = np.random.default_rng(0).permutation(30).tolist()
    folder = tmp_path / "apart"
    found = vitq_ray.sensitivity(
        pretrained_dir=project.checkpoint, **data, **FEW, images=20, parts="block", output=str(folder)
    )
    assert RunFolder(folder).read_run()["images"] == drawn[10:]  # eight for scales, ten for gradients
    assert found.result["images_also_calibrated_on"] == 0
    many = {**FEW, "num_calib_batch": 6, "calib_output_path": str(tmp_path / "c")}
    made = vitq_ray.calibrate(pretrained_dir=project.checkpoint, **data, **many)
    after = {"pretrained_dir": str(made.checkpoint), **data, "images": 20, "parts": "block", "engine": "fake"}
    found = vitq_ray.sensitivity(**after, output=str(tmp_path / "more"))
    assert RunFolder(tmp_path / "more").read_run()["images"] == drawn[24:] + drawn[:14]
    assert found.result["images_also_calibrated_on"] == 14
    assert "14 of the 20 images that parts are measured on were calibrated on" in caplog.text
    (folder / "result.json").unlink()
    monkeypatch.setattr("vitq_ray.commands.sensitivity.images_to_look_at", lambda model: 12)
    vitq_ray.sensitivity(resume=str(folder))
