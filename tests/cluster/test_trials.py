"""The search on a small Ray: the same numbers as without Ray, and the whole command line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray import tune
from timm.models.vision_transformer import VisionTransformer

from tests.conftest import Project, descendants, load_script, make_project, make_setting, scrape, tiny_vit
from vitq_ray.base.config import InputError
from vitq_ray.calibration.scales import Scales, apply_setting
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import CalibrationStatistics, collect_statistics
from vitq_ray.cluster import trials
from vitq_ray.cluster.images import ImageSet, ImageStore, StoredImages
from vitq_ray.cluster.trials import Resources, require_room, run_trials, share
from vitq_ray.commands.options import TuneOptions
from vitq_ray.commands.parser import parse
from vitq_ray.commands.screen import SILENT
from vitq_ray.commands.tune_job import TuneJob, prepare
from vitq_ray.data.loader import Batch
from vitq_ray.data.splits import Splits
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.execute import Engine, executed
from vitq_ray.measure.evaluation import Evaluation, evaluate
from vitq_ray.measure.metrics import METRICS, Results, pack
from vitq_ray.measure.racing import RaceRules
from vitq_ray.models.checkpoint import load_calibrated
from vitq_ray.quant.vit import quantize_vit

tune_calib = load_script("tune_calib")
INT8 = Engine("int8")
SETTINGS = {
    "a": make_setting("ft1", "max", 2),
    "b": make_setting("ft2", "percentile 99", 2, 4),
    "c": make_setting("ft2", "percentile 99", 1, 4),
}


@pytest.fixture
def statistics(quant_vit: VisionTransformer, images: torch.Tensor) -> CalibrationStatistics:
    return collect_statistics(quant_vit, enumerate(images.split(12)), [1, 2])


def image_set(count: int = 33) -> ImageSet:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    logits = rng.normal(size=(count, 7)).astype(np.float32)
    return ImageSet([pixels], rng.integers(0, 7, count), np.arange(count) * 2, [logits])


def test_image_set_batches() -> None:
    images = image_set(7)
    parts = list(images.batches(3))
    assert [len(part.labels) for part in parts] == [3, 3, 1]
    assert np.array_equal(np.concatenate([p.images.numpy() for p in parts]), images.parts[0])
    assert [p.sample_ids.tolist() for p in images.batches(2, 3, 6)] == [[6, 8], [10]]


def stored(images: ImageSet, part_images: int = 1000) -> StoredImages:
    """The images in the object store, `part_images` or more to a part."""
    store = ImageStore(part_images * 16 * 16 * 3)
    for batch in images.batches(5):
        store.add(batch, batch.float_logits)
    return store.stored()


def test_images_come_back_from_the_object_store_in_parts(ray_cluster: None) -> None:
    images = image_set(33)
    back = stored(images, part_images=7)
    assert [len(ray.get(part)) for part in back.parts] == [10, 10, 10, 3]
    for size, start, end in ((33, 0, 33), (4, 0, 33), (9, 8, 22), (1, 10, 11)):
        wanted = list(images.batches(size, start, end))
        for here, there in zip(wanted, back.fetch().batches(size, start, end), strict=True):
            for name in ("images", "labels", "sample_ids", "float_logits"):
                assert torch.equal(getattr(here, name), getattr(there, name))
    with pytest.raises(InputError, match="no readable image"):
        ImageStore().stored()


def test_no_process_keeps_a_copy_of_the_stored_images(ray_cluster: None) -> None:
    """The store holds the pixels, the driver only what is on its way to it."""
    pixels = weakref.WeakSet()  # type: ignore[var-annotated]

    def batches() -> Iterator[Batch]:
        for batch in image_set(60).batches(5):
            pixels.add(batch.images)
            yield batch
            del batch
            assert len(pixels) <= 3, "batches that wait to be put, and the one that is passed on"

    store = ImageStore(10 * 16 * 16 * 3)
    for batch in batches():
        store.add(batch, torch.zeros(len(batch.labels), 7))
    del batch
    images = store.stored()
    assert len(pixels) == 0
    held = images.fetch().parts[0]
    assert not held.flags.owndata, "mapped from the object store"


class Recorder:
    """A referee that takes everything, and stops candidate `stop` after its first chunk."""

    def __init__(self, names: list[str], images: int, stop: str | None = None) -> None:
        self.waiting = list(names)
        self.stop = stop
        self.correct = {name: np.zeros(images, bool) for name in names}
        self.done = dict.fromkeys(names, 0)
        self.on_take: Callable[[str], None] = lambda name: None

    def next(self) -> str | None:
        return self.waiting.pop(0) if self.waiting else None

    @property
    def over(self) -> bool:
        return not self.waiting

    def seen(self, name: str) -> int:
        return self.done[name]

    def take(self, name: str, start: int, results: Results, seconds: float) -> bool:
        assert seconds > 0
        assert list(results) == list(METRICS)
        correct = results["correct"]
        assert not (correct & ~results["correct5"]).any()
        assert start <= self.done[name]
        self.correct[name][start : start + len(correct)] = correct
        self.done[name] = max(self.done[name], start + len(correct))
        self.on_take(name)
        return name == self.stop


def evaluate_here(setting: Setting, statistics: CalibrationStatistics, images: ImageSet) -> Evaluation:
    model = quantize_vit(tiny_vit())
    apply_setting(model, statistics, setting)
    with executed(model, INT8) as run:
        return evaluate(run, list(images.batches(10)), EvalTransform(16).normalize)


def test_trials_give_what_the_driver_gives_also_where_a_worker_is_killed(
    ray_cluster: None, statistics: CalibrationStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once; one worker dies in the middle, no trial is lost; one candidate is stopped."""
    images, pending = image_set(303), "TUNE_MAX_PENDING_TRIALS_PG"
    monkeypatch.setenv(pending, "7")
    referee = Recorder(list(SETTINGS), len(images), stop="c")
    seen, killed = set(), []

    def kill_once(name: str) -> None:
        seen.add(os.environ[pending])
        if referee.done["b"] >= 20 and not killed:
            killed.extend(descendants(os.getpid(), ("ray::CandidateTrial", "ray::ResourceTrainable"))[:1])
            os.kill(killed[0], signal.SIGKILL)

    referee.on_take = kill_once
    model = quantize_vit(tiny_vit())
    scales = Scales(model, statistics)
    with share(model, stored(images), RaceRules(303, 10), EvalTransform(16), 10, INT8, Resources()) as shared:
        for name, setting in SETTINGS.items():
            shared.add(name, scales.plan(setting))
        run_trials(shared, referee, Resources(), tmp_path / "tune")
    assert killed
    assert (seen, os.environ[pending]) == ({"2"}, "7"), "set for the trials, and as before afterwards"
    assert referee.done == {"a": 303, "b": 303, "c": 10}
    for name, setting in SETTINGS.items():
        here = evaluate_here(setting, statistics, images).correct[: referee.done[name]]
        np.testing.assert_array_equal(referee.correct[name][: len(here)], here, err_msg=name)
    assert not (tmp_path / "tune").exists(), "Tune's own bookkeeping is removed"


def test_images_that_no_object_store_can_hold_are_refused(
    ray_cluster: None, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(TuneJob, "selection_bytes", 250_000_000)  # of the 300 MB that the cluster has
    assert run_tune(project, tmp_path, "--output", tmp_path / "run") == 2
    assert "object store: 0.30 GB of a node cannot hold" in capsys.readouterr().err


@pytest.mark.parametrize("full_at", [10, 33])
def test_what_the_referee_raises_is_not_buried(
    full_at: int, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a trial, and at its end; of trials that need no PyTorch, and so start at once."""
    chunks = {n: pack({name: np.zeros(n, metric.dtype) for name, metric in METRICS.items()}) for n in (10, 3)}

    class Counting(tune.Trainable):  # by value: workers do not have the tests
        def setup(self, config: dict[str, Any], shared: object) -> None:  # type: ignore[override]
            self.begin = self.end = 0

        def step(self) -> dict[str, Any]:
            self.begin, self.end = self.end, min(self.end + 10, 33)
            images = self.end - self.begin
            said = {"candidate": "a", "start": self.begin, "images": images, "seconds": 1.0, "done": self.end == 33}
            return said | chunks[images]

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

    referee = Recorder(["a", "b"], 33)

    def disk_full(name: str) -> None:
        if referee.done[name] == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    referee.on_take = disk_full
    monkeypatch.setattr(trials, "CandidateTrial", Counting)
    with pytest.raises(OSError, match="No space left") as caught:
        run_trials(None, referee, Resources(in_flight=1), tmp_path / "tune")
    assert caught.value.errno == errno.ENOSPC
    assert referee.done == {"a": full_at, "b": 0}
    assert not (tmp_path / "tune").exists()


def test_a_trial_that_fails_is_an_error(ray_cluster: None, statistics: CalibrationStatistics, tmp_path: Path) -> None:
    model, images = quantize_vit(tiny_vit()), image_set()
    plan = Scales(model, statistics).plan(SETTINGS["a"])
    sites = {key: site for key, site in plan.sites.items() if not key.endswith("0.ffn.fc1._input_quantizer")}
    message = r"(?s)1 of 1 trials failed; .*has 57 sites, which are not those of"
    with share(model, stored(images), RaceRules(33, 10), EvalTransform(16), 10, INT8, Resources()) as shared:
        shared.add("a", dataclasses.replace(plan, sites=sites))
        with pytest.raises(RuntimeError, match=message):
            run_trials(shared, Recorder(["a"], 33), Resources(in_flight=1), tmp_path / "tune", max_failures=0)


def test_no_process_of_a_race_stays(ray_cluster: None, statistics: CalibrationStatistics) -> None:
    """The desk is an actor: without its end, every search of one session would leave a process behind."""
    model = quantize_vit(tiny_vit())
    with share(model, stored(image_set()), RaceRules(33, 10), EvalTransform(16), 10, INT8, Resources()) as shared:
        plan = Scales(model, statistics).plan(SETTINGS["a"])
        shared.add("a", plan)
        assert ray.get(shared.desk.get.remote("a"))[0].key == plan.key
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(shared.desk.get.remote("a"))


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
    small = ("--calib-batchsz", 4, "--search-space", space, "--output", tmp_path / "run", "--max-trials-in-flight", 1)
    return tune_calib.main([str(a) for a in (*project.options, *small, *argv)])


@pytest.fixture(scope="module")
def finished(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `project`, `space.py` and the finished run `run`; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "project").mkdir()
    assert run_tune(make_project(folder / "project"), folder) == 0
    return folder


@pytest.fixture
def copied(finished: Path) -> Iterator[Path]:
    """The finished run at its own place, put back as it was afterwards: paths are part of a run."""
    backup = finished.with_name("backup")
    shutil.copytree(finished, backup)
    yield finished
    shutil.rmtree(finished)
    backup.rename(finished)


def test_whole_search(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished / "run"
    files = {"run.json", "statistics.npz", "trials.jsonl", "correct.parquet", "result.json", "best"}
    assert files <= {p.name for p in folder.iterdir()}
    assert {p.name for p in (folder / "best").iterdir()} == {"setting.json", "vit_calib.pth", "vit_calib.json"}

    run = json.loads((folder / "run.json").read_text())
    splits = run["splits"]
    assert not set(splits["selection"]) & set(splits["report"])
    assert sorted(splits["selection"] + splits["report"]) == list(range(22))
    assert splits["calibration"]["split"] == "train"

    result = json.loads((folder / "result.json").read_text())
    candidates = result["candidates"]
    assert len(candidates) == 12
    same = [c["same_as"] for c in candidates.values() if c["same_as"]]
    assert len(same) == 4, "percentile 100 is max: once per mode and batch count"
    assert result["images"] == len(splits["report"])
    assert result["float"]["top1"] == 1.0
    selection = result["selection"]
    finished = {n: s for n, s in selection.items() if n != "float" and s["images"] == 11}
    best = max(s["top1_correct"] for s in finished.values())
    assert selection[result["winner"]["name"]]["top1_correct"] == best
    assert [c["outcome"] for c in candidates.values()].count("best") == 1 + same.count(result["winner"]["name"])

    events = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    kinds = [e["event"] for e in events]
    assert kinds.count("candidate") == 12
    assert kinds.count("decision") == 8
    assert kinds[-1] == "winner"
    (engine,) = (e for e in events if e["event"] == "engine")
    assert result["engine"].items() <= engine.items()

    table = pq.read_table(folder / "correct.parquet").to_pandas()
    assert result["race"]["images_evaluated"] >= len(table) - 11
    for name, summary in selection.items():
        rows = table[table.candidate == name]
        assert rows.correct.sum() == summary["top1_correct"]
        assert rows.sample_id.tolist() == splits["selection"][: summary["images"]]
    again = CalibrationStatistics.from_bytes((folder / "statistics.npz").read_bytes())
    assert again.snapshots == (1, 3)


@pytest.mark.slow
def test_two_workers_and_another_seed(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Statistics do not depend on the workers, splits not on the seed."""
    project = Project(finished / "project")
    assert run_tune(project, tmp_path, "--num-workers", 2, "--seed", 7) == 0
    one, two = finished / "run", tmp_path / "run"
    assert (two / "statistics.npz").read_bytes() == (one / "statistics.npz").read_bytes()
    splits = [json.loads((folder / "run.json").read_text())["splits"] for folder in (one, two)]
    assert splits[0] == splits[1]
    printed = capsys.readouterr().out
    assert "12 settings, 8 of them with scales of their own" in printed
    assert "winner" in printed


def run_some_in_float(project: Project, tmp_path: Path, *more: object) -> dict[str, Any]:
    """A search that leaves some in float, cut after the first set and gone on with: the same. Returns its result."""
    few = ("--int8-share", 0.6, "--wprec", 3, "--aprec", 3, "--target", "tensorrt", "--latency", "1,2")
    assert run_tune(project, tmp_path, *few, *more) == 0
    folder = tmp_path / "run"
    result = json.loads((folder / "result.json").read_text())
    lines = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    kinds = [json.loads(line)["event"] for line in lines]
    (folder / "trials.jsonl").write_text("".join(lines[: kinds.index("float_set") + 1]))
    (folder / "result.json").unlink()
    assert tune_calib.main(["--resume", str(folder)]) == 0
    again = json.loads((folder / "result.json").read_text())
    others = ("seconds", "options", "engine", "checksum", "latency")
    assert {k: v for k, v in again.items() if k not in others} == {k: v for k, v in result.items() if k not in others}
    events = [json.loads(line)["event"] for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert all(events.count(kind) == kinds.count(kind) for kind in ("chunk", "effect", "float_set"))
    return again


def test_some_of_the_winner_in_float(ray_cluster: None, project: Project, tmp_path: Path) -> None:
    result = run_some_in_float(project, tmp_path)
    assert {c["setting"]["mode"] for c in result["candidates"].values()} == {"tensorrt"}
    whole, *sets = result["float_sets"]
    timed = {(row["candidate"], row["batch"]) for row in result["latency"]}
    assert timed == {
        (name, size) for name in ("float", *(one["name"] for one in result["float_sets"])) for size in (1, 2)
    }
    assert all(row["ms_per_image"] > 0 for row in result["latency"])
    assert whole["integer_share"] == 1
    assert sets
    assert all(0.6 <= one["integer_share"] < 1 for one in sets)
    chosen = next(one for one in result["float_sets"] if one["name"] == result["winner"]["name"])
    assert chosen["selection"]["kl"] == min(one["selection"]["kl"] for one in result["float_sets"])
    assert result["integer_share"] == chosen["integer_share"]
    checkpoint = load_calibrated(str(tmp_path / "run" / "best" / "vit_calib.pth"))
    assert checkpoint.sidecar.setting.to_dict() == chosen["setting"]


@pytest.mark.slow
def test_refined(ray_cluster: None, project: Project, tmp_path: Path) -> None:
    result = run_some_in_float(project, tmp_path, "--refine")
    assert [c["setting"] for c in result["candidates"].values() if c["setting"]["rules"]]


def test_best_evaluates_to_the_reported_counts(finished: Path, tmp_path: Path) -> None:
    result = json.loads((finished / "run" / "result.json").read_text())
    report = json.loads((finished / "run" / "run.json").read_text())["splits"]["report"]
    checkpoint = ("--pretrained_dir", finished / "run" / "best" / "vit_calib.pth")
    logits = tmp_path / "logits.npz"
    output = ("--data-path", finished / "project", "--output", tmp_path / "again", "--save-logits", logits)
    assert load_script("evaluate").main([str(a) for a in (*checkpoint, *output)]) == 0
    saved = np.load(logits)
    correct = saved["logits"].argmax(1) == saved["labels"]
    assert correct[report].sum() == result["top1_correct"]


def test_splits_depend_on_the_split_seed(project: Project, tmp_path: Path) -> None:
    def splits(*argv: object) -> Splits:
        given = [str(a) for a in (*project.options, "--calib-batchsz", 1, *argv)]
        return prepare(parse(TuneOptions, given, "tune"), SILENT).splits

    first, same, other = splits(), splits("--seed", 7), splits("--split-seed", 7)
    for name in ("calibration", "selection", "report"):
        assert np.array_equal(getattr(first, name), getattr(same, name))
    assert not np.array_equal(first.selection, other.selection)
    assert not np.array_equal(np.sort(first.selection), first.selection), "the race's order is random"


def test_broken_images_are_skipped_and_listed(ray_cluster: None, project: Project, tmp_path: Path) -> None:
    """A quarter of train, and one image of val: others move up, all that was met is in result.json."""
    for split, step in (("train", 4), ("val", 22)):
        with zipfile.ZipFile(project.folder / f"{split}.zip") as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(project.folder / f"{split}.zip", "w") as archive:
            for i, (name, data) in enumerate(members.items()):
                archive.writestr(name, f"not an image {i}" if i % step == 0 else data)
    assert run_tune(project, tmp_path) == 2
    assert run_tune(project, tmp_path, "--on-bad-image", "skip", "--output", tmp_path / "skip") == 0
    result = json.loads((tmp_path / "skip" / "result.json").read_text())
    places = [row["image"].split("!")[0].rpartition("/")[2] for row in result["bad_images"]]
    assert places.count("val.zip") == 1
    assert places.count("train.zip") >= 1
    assert all("not a readable image" in row["reason"] for row in result["bad_images"])
    assert result["selection"]["float"]["images"] + result["images"] == 21
    (tmp_path / "skip" / "result.json").unlink()  # a search that goes on does not read the calibration images again
    with open(tmp_path / "skip" / "bad_images.jsonl", "a") as stream:
        stream.write('["half a li')
    assert tune_calib.main(["--resume", str(tmp_path / "skip")]) == 0
    again = json.loads((tmp_path / "skip" / "result.json").read_text())["bad_images"]
    assert sorted(again, key=str) == sorted(result["bad_images"], key=str)


def test_only_val_is_divided_in_three(project: Project, tmp_path: Path) -> None:
    (project.folder / "train.zip").unlink()
    (tmp_path / "space.py").write_text(SPACE)
    given = [*project.options, "--calib-batchsz", "2", "--search-space", str(tmp_path / "space.py")]
    job = prepare(parse(TuneOptions, given, "tune"), SILENT)
    parts = [set(ids.tolist()) for ids in (job.splits.calibration, job.splits.selection, job.splits.report)]
    assert job.splits.calib_split == "val"
    assert job.calib.fingerprint == job.val.fingerprint
    assert len(parts[0]) == 2 * max(job.snapshots) == 6
    assert sum(map(len, parts)) == len(set.union(*parts)) == 22


@pytest.mark.slow
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
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "trials.jsonl").read_text().splitlines()]
    assert events == ["begun", "float"], "nothing was searched"


def test_output_that_holds_a_run(
    ray_cluster: None, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert run_tune(project, tmp_path) == 2
    assert "already holds a run" in capsys.readouterr().err


def resume(tmp_path: Path, *argv: object) -> int:
    return tune_calib.main(["--resume", str(tmp_path / "run"), *map(str, argv)])


def test_resume_of_a_finished_run_changes_nothing(copied: Path) -> None:
    before = json.loads((copied / "run" / "result.json").read_text())
    log = (copied / "run" / "trials.jsonl").read_text()
    assert resume(copied) == 0
    assert json.loads((copied / "run" / "result.json").read_text()) == before
    assert (copied / "run" / "trials.jsonl").read_text() == log


def test_a_checkpoint_may_move_and_not_change(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = Project(copied / "project")
    (copied / "elsewhere").mkdir()
    moved = Path(project.checkpoint).rename(copied / "elsewhere" / "vit.npz")
    assert resume(copied) == 2
    assert "vit.npz" in capsys.readouterr().err
    assert resume(copied, "--pretrained_dir", moved) == 0
    assert "this search is finished" in capsys.readouterr().out
    moved.rename(project.checkpoint)
    change_weights(project)
    Path(project.checkpoint).rename(moved)
    assert resume(copied, "--pretrained_dir", moved) == 2
    assert "this is another search: weights_fingerprint: " in capsys.readouterr().err


def change_weights(project: Project) -> None:
    arrays = dict(np.load(project.checkpoint))
    arrays["head/bias"] = arrays["head/bias"] + np.float32(1e-3)
    np.savez(project.checkpoint, **arrays)


def change_labels(project: Project) -> None:
    path = project.folder / "val_map.txt"
    first, *rest = path.read_text().splitlines(keepends=True)
    name, label = first.split("\t")
    path.write_text("".join([f"{name}\t{(int(label) + 1) % 7}\n", *rest]))


def change_space(project: Project) -> None:
    path = project.folder.parent / "space.py"
    path.write_text(path.read_text().replace("95.0", "96.0"))


@pytest.mark.parametrize(
    ("change", "argv", "message"),
    [
        (None, ("--alpha", 0.01), "--alpha: 0.01 given, but "),
        (None, ("--seed", 1), "was started with 42"),
        (change_weights, (), "this is another search: weights_fingerprint: "),
        (change_labels, (), "this is another search: splits.selection: "),
        (
            change_space,
            (),
            "space.py was changed since it was begun; bring it back, or name it as the search space",
        ),
    ],
)
def test_resume_as_another_search_is_refused(
    change: Callable[[Project], None] | None,
    argv: tuple[object, ...],
    message: str,
    copied: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if change is not None:
        change(Project(copied / "project"))
    before = (copied / "run" / "trials.jsonl").read_text()
    assert resume(copied, *argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert (copied / "run" / "trials.jsonl").read_text() == before


def test_resume_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(tmp_path) == 2
    assert "has no run.json; expected the folder of a run of tune_calib" in capsys.readouterr().err


def test_metrics_are_served(finished: Path) -> None:
    """As Prometheus reads them, from the node's metrics port."""
    wanted = ("images_evaluated", "images_per_second", "candidates", "candidate_accuracy", "best_accuracy")
    text = until(lambda t: all(f"ray_vitq_{name}" in t for name in wanted), scrape)
    assert 'run="run"' in text
    assert 'state="finished"' in text
    assert "ray_vitq_calibration_batches" in text


def until(good: Callable[[str], bool], read: Callable[[], str], seconds: float = 40) -> str:
    """What `read` returns once it is good, or at the end of the time."""
    end = time.monotonic() + seconds
    while not good(text := read()) and time.monotonic() < end:
        time.sleep(0.5)
    assert good(text), text[-2000:]
    return text
