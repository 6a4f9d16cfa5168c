"""Python: the commands as functions, silent and lazily loaded; the README's lines; the console command; the wheel."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import vitq_ray
from tests.conftest import Project, make_project, scalars
from vitq_ray.commands.main import COMMANDS, main
from vitq_ray.commands.options import TrainOptions
from vitq_ray.models.checkpoint import load_calibrated
from vitq_ray.run.image_table import read_images
from vitq_ray.run.site_table import read_scales, read_sites

ROOT = Path(__file__).resolve().parents[2]


def test_importing_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, vitq_ray; dir(vitq_ray); print([m for m in ('torch', 'ray', 'numpy', 'rich') if m in sys.modules])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert process.stdout.strip() == "[]", process.stderr


def test_warnings_go_to_the_log_and_nothing_is_printed() -> None:
    """In a process of its own: pytest listens to logs, and Python prints warnings that nobody listens to."""
    code = """if True:
        import logging, vitq_ray
        from vitq_ray.commands.screen import SILENT, Terminal, log_shown
        SILENT.warn("unheard")
        logging.getLogger("vitq_ray.models.geometry").warning("unheard")
        with log_shown(Terminal("x")):
            logging.getLogger("vitq_ray.models.geometry").warning("seen on a terminal")
        logging.basicConfig(format="heard: %(message)s")
        SILENT.warn("by a script that listens")"""
    process = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert process.stdout == ""
    assert process.stderr == "warning: seen on a terminal\nheard: by a script that listens\n"


def test_every_name_is_there() -> None:
    for name in vitq_ray.__all__:
        assert getattr(vitq_ray, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'calibrat'"):
        vitq_ray.calibrat  # noqa: B018


def test_functions_show_their_options() -> None:
    parameters = inspect.signature(vitq_ray.train).parameters
    assert list(parameters) == list(TrainOptions.declared())
    assert parameters["qat_lr"].default == 1e-4


def test_calibrate_and_evaluate(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    common = {"pretrained_dir": project.checkpoint, "data_path": project.folder}
    small = {"num_calib_batch": 2, "calib_batchsz": 4, "calib_split": "val"}
    with caplog.at_level(logging.WARNING, "vitq_ray"):
        calibrated = vitq_ray.calibrate(**common, **small, calib_output_path=tmp_path / "calib", log_to="tensorboard")
    assert "calibration images are in val" in caplog.text
    written = json.loads((tmp_path / "calib" / "result.json").read_text())
    assert len(written.pop("checksum")) == 64
    assert calibrated.result == written
    assert calibrated.evaluation.images == 22
    assert calibrated.float_on_calibration.top1 == 1.0
    common["pretrained_dir"] = calibrated.checkpoint
    evaluated = vitq_ray.evaluate(**common, output=tmp_path / "again", log_to=["tensorboard"])
    assert scalars(tmp_path / "again" / "tensorboard")["top1"] == {22: pytest.approx(evaluated.evaluation.top1)}
    assert evaluated.what == calibrated.setting.label
    assert (evaluated.evaluation.correct == calibrated.evaluation.correct).all()
    assert scalars(tmp_path / "calib" / "tensorboard")["top1"] == {22: pytest.approx(calibrated.evaluation.top1)}
    assert tuple(capsys.readouterr()) == ("", "")
    with pytest.raises(vitq_ray.InputError, match=r"^quant_mode: ft1 given, but"):
        vitq_ray.evaluate(**common, quant_mode="ft1")


@pytest.mark.draws
def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = make_project(tmp_path, train=40, val=30)
    small = {"num_calib_batch": 2, "calib_batchsz": 4, "batch_size": 8, "num_epochs": 1, "dashboard": False}
    common = {"pretrained_dir": project.checkpoint, "data_path": project.folder}
    small |= {"learn_amax": True, "qat_lr": 0.1}
    trained = vitq_ray.train(**common, **small, output=tmp_path / "run", log_to="tensorboard")
    found = scalars(tmp_path / "run" / "tensorboard")
    assert list(found["loss"]) == [1, 2, 3, 4, 5]
    assert list(found["selection_top1"]) == [0, 5]
    assert found["report_qat_top1"] == {5: pytest.approx(trained.counts["qat"]["report"].top1)}
    assert trained.counts["qat"]["val"].images == 30
    assert trained.checkpoint == tmp_path / "run" / "vit_qat.pth"
    again = vitq_ray.train(resume=tmp_path / "run")
    assert scalars(tmp_path / "run" / "tensorboard") == found
    assert (again.counts, again.best_epoch, again.checkpoint) == (
        trained.counts,
        trained.best_epoch,
        trained.checkpoint,
    )
    assert tuple(capsys.readouterr()) == ("", "")
    scales = read_scales(tmp_path / "run")
    before, after = (
        {key: float(site.amax.max()) for key, site in load_calibrated(str(path)).plan.sites.items() if site.rule.on}
        for path in (tmp_path / "run" / "start" / "vit_calib.pth", trained.checkpoint)
    )
    assert scales == {key: (value, after[key]) for key, value in before.items()}
    page = vitq_ray.report(run=tmp_path / "run").page.read_text()
    assert ("The scales were learned, too." in page) == (before != after)


@pytest.mark.draws
def test_tune(ray_cluster: None, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "space.py").write_text("SPACE = {'calibrator': ('max', 'mse'), 'num_batches': (1,)}")
    common = {"pretrained_dir": project.checkpoint, "data_path": project.folder}
    found = vitq_ray.tune(
        **common, search_space=tmp_path / "space.py", calib_batchsz=4, output=tmp_path / "run", dashboard=False
    )
    assert found.winner.label in ("ft2 max n=1 w8a8", "ft2 mse n=1 w8a8")
    assert found.checkpoint.exists()
    assert found.result["images"] == 11
    page = vitq_ray.report(run=tmp_path / "run", table=True).page.read_text()
    assert f"Of 2 settings, {found.winner.label} is the best" in page
    table, images = read_sites(tmp_path / "run"), read_images(tmp_path / "run")
    assert table is not None
    assert images is not None
    assert table.candidates == ("c000", "c001")
    assert list(images["label"] == images["quantized_class"]).count(True) == found.result["top1_correct"]
    assert images.flipped.sum() == len(images.pictures) == 11 - found.result["agreed"]
    rows = pq.read_table(tmp_path / "run" / "candidates.parquet").to_pylist()
    assert {row["name"]: row["kl"] for row in rows} == {n: found.result["selection"][n]["kl"] for n in table.candidates}
    again = vitq_ray.tune(resume=tmp_path / "run")
    assert (again.winner, again.checkpoint) == (found.winner, found.checkpoint)
    assert tuple(capsys.readouterr()) == ("", "")


def readme_lines() -> str:
    section = (ROOT / "README.md").read_text().split("## From Python")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    return code


def test_the_lines_of_the_readme_run(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", readme_lines()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    first, sites, error = process.stdout.splitlines()
    assert re.fullmatch(r"float 9\d\.\d\d%, ft1 mse n=2 w8a8 9\d\.\d\d%", first)
    assert sites.endswith("sites")
    assert error == "percentile: expected a number from 0 to 100, got 101"


def test_console_command(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *project.options, "--output", str(tmp_path / "out")]) == 0
    assert "float: top-1 100.00 %" in capsys.readouterr().out
    assert main([]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vitq_ray {vitq_ray.__version__}\n"
    assert main(["calibrate"]) == 2
    known = "calib, evaluate, tune, qat, export, sensitivity, report"
    assert capsys.readouterr().err == f"error: calibrate: no such command; the commands are {known}\n"
    assert main(["tune", "--help"]) == 0
    assert "vitq-ray tune --resume runs/search" in capsys.readouterr().out


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "vitq_ray", folder / "source" / "vitq_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*map(str, build), str(folder / "source")], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def test_a_command_runs_from_the_wheel_alone(unpacked: Path, tmp_path: Path) -> None:
    """Outside the checkout, with the bundled sample; search spaces and the console command are in it."""
    names = {path.name for path in (unpacked / "vitq_ray" / "search_spaces").iterdir()}
    assert {"calib.py", "calib_qat.py", "qat.py", "quick.py", "wide.py"} <= names
    (info,) = unpacked.glob("vitq_ray-*.dist-info")
    assert info.name == f"vitq_ray-{vitq_ray.__version__}.dist-info"
    assert "vitq-ray = vitq_ray.commands.main:main" in (info / "entry_points.txt").read_text()
    process = subprocess.run(
        [sys.executable, "-m", "vitq_ray", "evaluate", "--limit", "64"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert f"using the bundled sample in {unpacked}" in process.stdout
    result = json.loads((tmp_path / "runs" / "evaluate" / "result.json").read_text())
    assert (result["images"], result["versions"]["vitq_ray"]) == (64, vitq_ray.__version__)
