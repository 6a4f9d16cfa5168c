"""Keys inside URIs are used, and reach no file, no output and no error line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pyarrow import fs

from tests.conftest import Project, load_script
from vitq_ray.base import files
from vitq_ray.base.config import InputError
from vitq_ray.commands import tune_job
from vitq_ray.commands.options import TuneOptions
from vitq_ray.commands.screen import SILENT
from vitq_ray.data import folders, samples

SECRET = "hu%2Fsh+hush"
PLACE = f"s3://AKIAKEY:{SECRET}@bucket"


@pytest.fixture
def bucket(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The project as if it lay on S3; a line too many in the map, and a broken image."""
    resolve = files.resolve

    def local(path: str) -> tuple[fs.FileSystem, str]:
        return resolve(path.replace(PLACE, str(project.folder)))

    for module in (files, folders, samples):
        monkeypatch.setattr(module, "resolve", local)
    archive = project.folder / "val.zip"
    data = archive.read_bytes()
    place = data.index(b"IDAT") + 20
    archive.write_bytes(data[:place] + bytes(4) + data[place + 4 :])
    with open(project.folder / "val_map.txt", "a") as lines:
        lines.write((project.folder / "val_map.txt").read_text().splitlines()[0] + "\n")
    return project


def test_no_file_and_no_output_has_them(bucket: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pretrained_dir", f"{PLACE}/vit.npz", "--data-path", PLACE]
    few = ["--num-calib-batch", "1", "--calib-output-path", str(tmp_path / "calib")]
    calib, evaluate = load_script("calib"), load_script("evaluate")
    assert calib.main([*options, *few]) == 2  # the broken image
    assert evaluate.main([*options, "--output", str(tmp_path), "--img_size", "9"]) == 2
    assert evaluate.main([*options, "--output", str(tmp_path), "--on-bad-image", "skip"]) == 0
    assert calib.main([*options, *few, "--on-bad-image", "skip"]) == 0
    out, err = capsys.readouterr()
    assert "s3://bucket/val.zip!" in err
    assert "were listed before" in err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["options"]["data_path"] == "s3://bucket"
    assert result["checkpoint"] == "s3://bucket/vit.npz"
    assert result["bad_images"][0]["image"].startswith("s3://bucket/val.zip!")
    texts = [out, err, *(path.read_text(errors="replace") for path in tmp_path.glob("**/*.json"))]
    assert len(texts) == 5
    for text in texts:
        assert "hush" not in text
        assert "AKIAKEY" not in text


def test_a_search_stores_none(bucket: Project) -> None:
    values = {"pretrained_dir": f"{PLACE}/vit.npz", "data_path": PLACE}
    job = tune_job.prepare(TuneOptions.of({**values, "search_space": "quick", "calib_batchsz": 1}), SILENT)
    assert job.options.data_path == PLACE  # what is read
    text = json.dumps(tune_job.describe(job))
    assert '"data_path": "s3://bucket"' in text
    assert "hush" not in text


@pytest.mark.parametrize("uri", ["s3://AKIAKEY:hu/sh+hush@bucket", "s3:///AKIAKEY:hush@bucket", "nosuch://u:hush@x"])
def test_a_uri_that_cannot_be_read(uri: str) -> None:
    with pytest.raises(InputError, match="not a readable URI") as caught:
        files.resolve(uri)
    assert "hush" not in str(caught.value)
