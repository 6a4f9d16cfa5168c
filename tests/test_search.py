"""The search on a small Ray: the same numbers as without Ray, and the whole command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from tests.conftest import Project, load_script, tiny_vit
from vitq_ray import cli
from vitq_ray.calibrate import CalibrationStatistics, apply_setting, collect_statistics
from vitq_ray.config import InputError, QuantSetting
from vitq_ray.data.loader import Batch
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.evaluate import Evaluation, evaluate
from vitq_ray.models import geometry_of
from vitq_ray.quant.vit import quantize_vit
from vitq_ray.search import ImageSet, Resources, make_candidates, require_room, run_trials, share

tune_calib = load_script("tune_calib")
SETTINGS = [
    QuantSetting("ft1", "max", None, 2),
    QuantSetting("ft1", "percentile", 100.0, 2),  # the same scales
    QuantSetting("ft2", "percentile", 99.0, 2, 4, 4),
    QuantSetting("ft2", "percentile", 99.0, 1, 4, 4),
]


@pytest.fixture
def statistics(quant_vit: VisionTransformer, images: torch.Tensor) -> CalibrationStatistics:
    return collect_statistics(quant_vit, enumerate(images.split(12)), [1, 2])


def image_set(count: int = 33) -> ImageSet:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return ImageSet(pixels, rng.integers(0, 7, count), np.arange(count) * 2)


def test_settings_with_equal_scales_are_one_candidate(
    quant_vit: VisionTransformer, statistics: CalibrationStatistics
) -> None:
    candidates, scales = make_candidates(quant_vit, statistics, SETTINGS)
    assert [(c.name, c.same_as) for c in candidates] == [("c0", None), ("c1", "c0"), ("c2", None), ("c3", None)]
    assert set(scales) == {"c0", "c2", "c3"}


def test_sites_that_a_mode_leaves_out_do_not_make_a_candidate(
    quant_vit: VisionTransformer, statistics: CalibrationStatistics
) -> None:
    """Bits and modes do; a difference only at sites that stay in float does not."""
    same = [QuantSetting("ft1", "max", None, 2, 8, 8)] * 2
    other = [QuantSetting("ft1", "max", None, 2, 8, 6), QuantSetting("trt", "max", None, 2, 8, 8)]
    candidates, _ = make_candidates(quant_vit, statistics, same + other)
    assert [c.same_as for c in candidates] == [None, "c0", None, None]


def test_image_set_batches() -> None:
    images = image_set(7)
    parts = list(images.batches(3))
    assert [len(part.labels) for part in parts] == [3, 3, 1]
    assert np.array_equal(np.concatenate([p.images.numpy() for p in parts]), images.images)
    assert ImageSet.of(parts).sample_ids.tolist() == images.sample_ids.tolist()
    with pytest.raises(InputError, match="no readable image"):
        ImageSet.of([])


def evaluate_here(setting: QuantSetting, statistics: CalibrationStatistics, images: ImageSet) -> Evaluation:
    model = quantize_vit(tiny_vit())
    apply_setting(model, statistics, setting)
    transform = EvalTransform(16)
    batches: list[Batch] = list(images.batches(10))
    return evaluate(model, batches, transform.normalize)


def test_trials_give_what_the_driver_gives(
    ray_cluster: None, statistics: CalibrationStatistics, tmp_path: Path
) -> None:
    float_model = tiny_vit()
    geometry = geometry_of(float_model)
    model = quantize_vit(float_model)
    images, transform = image_set(), EvalTransform(16)
    candidates, scales = make_candidates(model, statistics, SETTINGS)
    shared = share(model, geometry, images, candidates, scales, transform, 10, Resources())
    results: dict[str, Evaluation] = {}
    seconds: list[float] = []

    def on_result(name: str, evaluation: Evaluation, took: float) -> None:
        assert name not in results
        results[name] = evaluation
        seconds.append(took)

    run_trials(shared, list(scales), images, Resources(), tmp_path / "tune", on_result)
    assert set(results) == {"c0", "c2", "c3"}
    for candidate in candidates:
        if candidate.same_as is None:
            here = evaluate_here(candidate.setting, statistics, images)
            there = results[candidate.name]
            for column in ("sample_ids", "labels", "correct", "correct5"):
                np.testing.assert_array_equal(getattr(there, column), getattr(here, column), err_msg=column)
    assert all(took > 0 for took in seconds)


def test_a_trial_that_fails_is_an_error(ray_cluster: None, statistics: CalibrationStatistics, tmp_path: Path) -> None:
    float_model = tiny_vit()
    geometry = geometry_of(float_model)
    model = quantize_vit(float_model)
    candidates, scales = make_candidates(model, statistics, SETTINGS[:1])
    del scales["c0"]["transformer.encoder.layer.0.ffn.fc1._input_quantizer"]
    shared = share(model, geometry, image_set(), candidates, scales, EvalTransform(16), 10, Resources())
    with pytest.raises(RuntimeError, match=r"(?s)1 of 1 trials failed; .*fc1\._input_quantizer"):
        run_trials(shared, ["c0"], image_set(), Resources(), tmp_path / "tune", lambda *_: None)


def test_no_node_can_hold_a_trial(ray_cluster: None) -> None:
    with pytest.raises(InputError, match=r"one needs 64 CPUs and 0 GPUs, no node has them; found 2 CPUs"):
        require_room(Resources(threads=64))
    with pytest.raises(InputError, match="1 GPUs, no node has them"):
        require_room(Resources(gpus=1.0))


SPACE = """
SPACE = {
    "mode": ("ft1", "ft2"),
    "calibrator": ("max", "percentile"),
    "percentile": (95.0, 100.0),
    "num_batches": (1, 3),
}
"""


def run_tune(project: Project, tmp_path: Path, *argv: object) -> int:
    space = tmp_path / "space.py"
    space.write_text(SPACE)
    small = ("--calib-batchsz", 4, "--search-space", space, "--output", tmp_path / "run")
    return cli.run(tune_calib.main, [str(a) for a in (*project.options, *small, *argv)])


def test_whole_search(ray_cluster: None, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tune(project, tmp_path) == 0
    folder = tmp_path / "run"
    files = {"run.json", "statistics.npz", "trials.jsonl", "correct.parquet", "result.json", "best"}
    assert files <= {p.name for p in folder.iterdir()}
    assert {p.name for p in (folder / "best").iterdir()} == {"setting.json", "vit_calib.pth", "vit_calib.json"}

    run = json.loads((folder / "run.json").read_text())
    splits = run["splits"]
    assert not set(splits["selection"]) & set(splits["report"])
    assert sorted(splits["selection"] + splits["report"]) == list(range(22))
    assert splits["calibration"]["split"] == "train"

    result = json.loads((folder / "result.json").read_text())
    assert result["settings"] == 12
    assert len(result["same_as"]) == 4, "percentile 100 is max: once per mode and batch count"
    assert result["images"] == len(splits["report"])
    assert result["float"]["top1"] == 1.0
    selection = result["selection"]
    best = max(v["top1_correct"] for name, v in selection.items() if name != "float")
    assert selection[result["winner"]["name"]]["top1_correct"] == best

    events = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events].count("candidate") == 12
    assert [e["event"] for e in events].count("result") == 8
    assert events[-1]["event"] == "winner"

    table = pq.read_table(folder / "correct.parquet").to_pandas()
    for name, summary in selection.items():
        rows = table[table.candidate == name]
        assert rows.correct.sum() == summary["top1_correct"]
        assert rows.sample_id.tolist() == splits["selection"]
    printed = capsys.readouterr().out
    assert "12 settings, 8 of them with scales of their own" in printed
    assert "winner" in printed

    again = CalibrationStatistics.from_bytes((folder / "statistics.npz").read_bytes())
    assert again.snapshots == (1, 3)


def test_best_evaluates_to_the_reported_counts(ray_cluster: None, project: Project, tmp_path: Path) -> None:
    assert run_tune(project, tmp_path) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    report = json.loads((tmp_path / "run" / "run.json").read_text())["splits"]["report"]
    checkpoint = ("--pretrained_dir", tmp_path / "run" / "best" / "vit_calib.pth", "--data-path", project.folder)
    logits = tmp_path / "logits.npz"
    evaluation = ("--output", tmp_path / "again", "--save-logits", logits)
    assert cli.run(load_script("evaluate").main, [str(a) for a in (*checkpoint, *evaluation)]) == 0
    saved = np.load(logits)
    correct = saved["logits"].argmax(1) == saved["labels"]
    assert correct[report].sum() == result["top1_correct"]


def test_splits_depend_on_the_split_seed_only(ray_cluster: None, project: Project, tmp_path: Path) -> None:
    def splits(name: str, *argv: object) -> dict[str, object]:
        assert run_tune(project, tmp_path, "--output", tmp_path / name, *argv) == 0
        return json.loads((tmp_path / name / "run.json").read_text())["splits"]

    first = splits("a")
    assert splits("b", "--seed", 7) == first
    assert splits("c", "--split-seed", 7) != first


def test_only_val(ray_cluster: None, project: Project, tmp_path: Path) -> None:
    (project.folder / "train.zip").unlink()
    assert run_tune(project, tmp_path, "--calib-batchsz", 2) == 0
    splits = json.loads((tmp_path / "run" / "run.json").read_text())["splits"]
    parts = [set(splits["calibration"]["sample_ids"]), set(splits["selection"]), set(splits["report"])]
    assert splits["calibration"]["split"] == "val"
    assert sum(map(len, parts)) == len(set.union(*parts)) == 22


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--select-images", 20), "--select-images: 20 asked for, the selection half has 11"),
        (("--calib-batchsz", 20), "needs 60 images (batches x batch size), the split has 40"),
        (("--search-space", "nowhere.py"), "nowhere.py: no such file"),
        (("--min-float-top1", 1.5), "expected a number from 0 to 1, got '1.5'"),
        (("--threads-per-trial", 64), "one needs 64 CPUs"),
    ],
)
def test_bad_options(
    argv: tuple[object, ...],
    message: str,
    ray_cluster: None,
    project: Project,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_tune(project, tmp_path, *argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_float_model_at_chance_stops_the_search(
    ray_cluster: None, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line.split("\t") for line in (project.folder / "val_map.txt").read_text().splitlines()]
    wrong = "".join(f"{name}\t{(int(label) + 1) % 7}\n" for name, label in lines)
    (project.folder / "val_map.txt").write_text(wrong)
    assert run_tune(project, tmp_path) == 2
    assert "not above chance level" in capsys.readouterr().err
    events = (tmp_path / "run" / "trials.jsonl").exists()
    assert not events, "nothing was searched"


def test_output_that_holds_a_run(
    ray_cluster: None, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert run_tune(project, tmp_path) == 2
    assert "already holds a run" in capsys.readouterr().err
