"""QAT on Ray Train: workers do not change the result, failures do not end it; plans, records, following."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import nn

from tests.conftest import make_project, scrape
from tests.qat.test_qat_loop import CONFIG, TRANSFORM, Setup, calibrated
from vitq_ray.base.config import InputError
from vitq_ray.base.formats import FORMATS
from vitq_ray.cluster.qat_group import (
    QatMetrics,
    RankResources,
    TrainWorkers,
    rank_resources,
    run_on_workers,
    worker_bytes,
)
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.data.samples import SampleIndex, open_split
from vitq_ray.measure.evaluation import Counts
from vitq_ray.models.load import load_model
from vitq_ray.qat.loop import DivergedError
from vitq_ray.qat.ranks import QatData, Ranks, thread_reader
from vitq_ray.qat.recipe import QatConfig
from vitq_ray.qat.state import EpochReport, QatOutcome, StepReport
from vitq_ray.qat.task import Follower, QatTask, Recorder, judge, read_judgement, run_task
from vitq_ray.quant.vit import float_copy
from vitq_ray.run.folder import read_bad_images, record_bad_images

GB = 1e9
RESOURCES = RankResources(1.0, 1)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("project")
    project = make_project(folder, train=48, val=150)
    start = calibrated(project, folder)
    train, val = (open_split(str(folder), split) for split in ("train", "val"))
    data = QatData(train, np.arange(48), val, np.arange(0, 150, 2), TRANSFORM)
    return Setup(start, data, float_copy(start.loaded.model))


def task_of(setup: Setup, folder: Path, config: QatConfig, **changes: Any) -> QatTask:
    folder.mkdir(exist_ok=True)
    report = np.arange(1, 150, 2)
    task = QatTask(config, setup.start, setup.teacher, setup.data, report, folder, checkpoint_steps=4)
    return dataclasses.replace(task, **changes)


def losses_alone(task: QatTask) -> list[float]:
    steps: list[StepReport] = []
    run_task(task, thread_reader(), Ranks(), steps.append, lambda report: None)
    return [report.loss for report in steps]


def losses_on_workers(
    task: QatTask, count: int, on_step: Any = lambda report: None, **options: Any
) -> dict[int, float]:
    """{step: loss}; of a step that was done again, the last."""
    seen: dict[int, float] = {}

    def keep(report: StepReport) -> None:
        seen[report.step] = report.loss
        on_step(report)

    run_on_workers(task, TrainWorkers(count, **options), "error", keep, lambda report: None, RESOURCES)
    return seen


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_follow_one_with_quantizers_on(setup: Setup, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, dropout=0.0, lr=1e-3, epochs=1, augment="toolkit")
    one = losses_alone(task_of(setup, tmp_path / "one", config))
    two = losses_on_workers(task_of(setup, tmp_path / "two", config), 2)
    assert [two[step] for step in range(1, 4)] == pytest.approx(one[:3], rel=2e-3)
    assert [two[step] for step in range(1, 7)] == pytest.approx(one, rel=0.05)
    judged = [read_judgement(tmp_path / name) for name in ("one", "two")]
    assert judged[0]["float"] == judged[1]["float"]
    assert judged[0]["ptq"] == judged[1]["ptq"]
    assert judged[0]["qat"]["val"].images == 150
    assert not (tmp_path / "two" / ".train").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_follow_one_for_long_with_quantizers_off(setup: Setup, tmp_path: Path) -> None:
    """Without rounding to a grid, a difference in the last bit stays one. Dropout is on: its masks are the same."""
    loaded = dataclasses.replace(setup.start.loaded, model=float_copy(setup.start.loaded.model))
    start = dataclasses.replace(setup.start, loaded=loaded)
    config = dataclasses.replace(CONFIG, lr=0.02, epochs=5, augment="none")
    one = losses_alone(task_of(setup, tmp_path / "one", config, start=start))
    two = losses_on_workers(task_of(setup, tmp_path / "two", config, start=start), 2)
    assert len(two) == len(one) == 30
    assert [two[step + 1] for step in range(30)] == pytest.approx(one, rel=1e-3)
    assert np.std(one) > 0.01


class DeadlyTeacher(nn.Module):
    """A teacher at whose n-th forward pass one of the processes that ask it is killed; once only."""

    def __init__(self, model: nn.Module, calls: int, mark: Path) -> None:
        super().__init__()
        self.model, self.calls, self.mark = model, calls, mark

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls -= 1
        if self.calls == 0:
            with contextlib.suppress(FileExistsError):
                self.mark.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        result: torch.Tensor = self.model(x)
        return result


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_does_not_end_training(setup: Setup, tmp_path: Path) -> None:
    """Killed at step 10, training goes on from the state of step 8 and follows the run that was not disturbed."""
    loaded = dataclasses.replace(setup.start.loaded, model=float_copy(setup.start.loaded.model))
    start = dataclasses.replace(setup.start, loaded=loaded)
    config = dataclasses.replace(CONFIG, lr=0.02, epochs=3)
    one = losses_alone(task_of(setup, tmp_path / "one", config, start=start))
    teacher = DeadlyTeacher(setup.teacher, 10, tmp_path / "killed")
    module = sys.modules[DeadlyTeacher.__module__]
    ray.cloudpickle.register_pickle_by_value(module)  # workers do not have the tests
    order: list[int] = []
    try:
        task = task_of(setup, tmp_path / "two", config, start=start, teacher=teacher)
        two = losses_on_workers(task, 2, lambda report: order.append(report.step))
    finally:
        ray.cloudpickle.unregister_pickle_by_value(module)
    assert (tmp_path / "killed").exists()
    assert order.count(1) == 1, "started from the beginning"
    assert len(order) > 18, "nothing was done again"
    assert [two[step + 1] for step in range(18)] == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_diverging_loss_is_one_clear_error_and_not_tried_again(setup: Setup, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, lr=1e38, augment="none")
    with pytest.raises(DivergedError, match=r"not finite at step 2 \(epoch 1\) with learning rate 1e\+38"):
        losses_on_workers(task_of(setup, tmp_path / "run", config), 2, max_failures=0)
    assert (tmp_path / "run" / "state.pt").exists()


# Resources ----------------------------------------------------------------------------------------------------------


def node(cpus: float, gpus: float = 0, memory: float = 100 * GB) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus, "memory": memory}


@pytest.mark.parametrize(
    ("count", "nodes", "cpus", "threads"),
    [
        (2, [node(2)], 1.0, 1),
        (2, [node(8)], 1.0, 4),
        (4, [node(2)], 0.5, 1),
        (3, [node(2)], 0.5, 1),
        (6, [node(3), node(2)], 0.5, 1),
        (5, [node(1)], 0.2, 1),
        (7, [node(1), node(1)], 0.25, 1),
    ],
)
def test_cpus_are_shared_out(count: int, nodes: list[dict[str, float]], cpus: float, threads: int) -> None:
    resources = rank_resources(TrainWorkers(count), nodes, int(GB))
    assert (resources.cpus, resources.threads) == (cpus, threads)
    assert (resources.warning is not None) == (cpus < 1)
    assert sum(int(n["CPU"] / resources.cpus + 1e-6) for n in nodes) >= count


def test_missing_gpus_and_memory_are_refused() -> None:
    with pytest.raises(InputError, match="2 workers need a GPU each, the cluster has 1"):
        rank_resources(TrainWorkers(2, use_gpu=True), [node(8, gpus=1)], int(GB))
    with pytest.raises(InputError, match=r"3 workers of about 4.0 GB each do not fit into memory; 2 would"):
        rank_resources(TrainWorkers(3), [node(8, memory=10 * GB)], int(4 * GB))
    assert rank_resources(TrainWorkers(2, use_gpu=True), [node(8, gpus=1), node(8, gpus=1)], int(GB)).warning is None


def test_of_a_range_of_workers_the_least_must_fit() -> None:
    resources = rank_resources(TrainWorkers(8, least=2), [node(3, memory=3 * GB)], int(GB))
    assert (resources.cpus, resources.threads, resources.warning) == (1.0, 1, None)
    with pytest.raises(InputError, match=r"4 workers of about 1\.0 GB"):
        rank_resources(TrainWorkers(8, least=4), [node(3, memory=3 * GB)], int(GB))


def test_a_worker_of_the_sample_is_small(setup: Setup, tmp_path: Path) -> None:
    assert 0.4 * GB < worker_bytes(task_of(setup, tmp_path, CONFIG)) < GB


# Records ------------------------------------------------------------------------------------------------------------


def step_report(step: int) -> StepReport:
    return StepReport(1, step, 10, 0.5, 0.1, 1.0, 8, 100.0)


def test_what_is_recorded_can_be_followed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.step(step_report(1))
    steps: list[StepReport] = []
    epochs: list[EpochReport] = []
    follower = Follower(tmp_path, steps.append, epochs.append)
    follower.look()
    recorder.step(step_report(2))
    report = EpochReport(1, 2, 0.5, Counts(10, {"top1_correct": 5, "top5_correct": 9}), True)
    recorder.epoch(report)
    with open(tmp_path / "steps.jsonl", "a") as stream:
        stream.write('{"half')
    follower.look()
    follower.look()
    assert steps == [step_report(2)]
    assert epochs == [report]


@pytest.mark.usefixtures("ray_cluster")
def test_metrics_are_set(tmp_path: Path) -> None:
    """As Prometheus reads them, of a run that no other test uses."""
    recorder = Recorder(tmp_path, QatMetrics("metered"))
    recorder.step(StepReport(2, 7, 10, 0.625, 0.1, 1.0, 8, 96.0))
    recorder.epoch(EpochReport(2, 7, 0.5, Counts(10, {"top1_correct": 5, "top5_correct": 9}), True))
    expected = {"epoch": 2, "step": 7, "loss": 0.625, "images_per_second": 96, "selection_top1": 0.5}
    read = {}
    for _ in range(100):
        read = qat_metrics(scrape(), "metered")
        if len(read) == len(expected):
            break
        time.sleep(0.4)
    assert read == expected


def qat_metrics(text: str, run: str) -> dict[str, float]:
    """{name: value} of one run on a page of metrics."""
    lines = (line for line in text.splitlines() if line.startswith("ray_vitq_qat_") and f'run="{run}"' in line)
    return {line.partition("{")[0].removeprefix("ray_vitq_qat_"): float(line.rpartition(" ")[2]) for line in lines}


def test_bad_images_of_several_ranks_are_listed_once(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=record_bad_images, args=(tmp_path, [("a", "broken"), (f"b{i}", "broken")]))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read_bad_images(tmp_path)) == [("a", "broken"), *((f"b{i}", "broken") for i in range(3))]


def test_judgement_reads_every_image_once_and_counts_as_models_alone_do(setup: Setup, tmp_path: Path) -> None:
    start, data = setup.start, setup.data
    other = float_copy(start.loaded.model).state_dict()
    trained = {k: v if k.endswith("._amax") else v * 0.7 for k, v in other.items()}
    read: list[int] = []
    threads = thread_reader()

    def counting(index: SampleIndex, ids: Any, transform: Any, batch_size: int) -> Iterator[Batch]:
        read.extend(ids.tolist())
        return threads(index, ids, transform, batch_size)

    judgement = judge(task_of(setup, tmp_path, CONFIG), QatOutcome((), 0, trained), counting, Ranks())
    assert read == list(range(150))
    model = load_model("auto", str(Path(data.val.source).parent / "vit.npz")).model
    alone = copy.deepcopy(start.loaded.model)
    alone.load_state_dict(trained)
    models = {"float": model.eval(), "ptq": start.loaded.model.eval(), "qat": alone.eval()}
    images = torch.cat([b.images for b in iter_batches(data.val, range(150), TRANSFORM, 50)])
    labels = torch.from_numpy(data.val.labels.astype(np.int64))
    assert len({judgement[name]["val"].top1_correct for name in models}) == 3
    for name, one in models.items():
        with torch.inference_mode():
            hits = one(TRANSFORM.normalize(images)).argmax(1) == labels
        assert judgement[name]["val"].top1_correct == int(hits.sum())
        assert judgement[name]["report"].top1_correct == int(hits[1::2].sum())


def test_records_say_their_format_once(tmp_path: Path) -> None:
    for number in (1, 2):
        Recorder(tmp_path).step(step_report(number))  # a second one goes on in the same file
    first, *rows = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    assert first == {"format": 2, "vitq_ray": metadata.version("vitq_ray")}
    assert [row["step"] for row in rows] == [1, 2]


def test_a_judged_run_is_not_judged_again(setup: Setup, tmp_path: Path) -> None:
    """Neither images nor the teacher are looked at: nothing of either would change."""
    task = task_of(setup, tmp_path, dataclasses.replace(CONFIG, epochs=1, augment="none"))
    nothing = lambda report: None  # noqa: E731
    outcome = run_task(task, thread_reader(), Ranks(), nothing, nothing)
    judgement = (tmp_path / "judgement.json").read_bytes()
    (tmp_path / "teacher_logits.npy").unlink()

    def no_reader(index: Any, ids: Any, transform: Any, batch_size: int) -> Any:
        raise AssertionError("an image is read")

    again = run_task(task, no_reader, Ranks(), nothing, nothing)
    assert again.epochs == outcome.epochs
    assert (tmp_path / "judgement.json").read_bytes() == judgement
    assert not (tmp_path / "teacher_logits.npy").exists()
    other = dataclasses.replace(task, config=dataclasses.replace(task.config, lr=0.1))
    with pytest.raises(InputError, match=r"was started with lr 0.05, now it is 0.1"):
        run_task(other, no_reader, Ranks(), nothing, nothing)


def test_a_trained_run_needs_no_table_of_its_teacher(setup: Setup, tmp_path: Path) -> None:
    """Killed after its last epoch, before its judgement: val is judged, train is not read again."""
    task = task_of(setup, tmp_path, dataclasses.replace(CONFIG, epochs=1, augment="none"))
    nothing = lambda report: None  # noqa: E731
    run_task(task, thread_reader(), Ranks(), nothing, nothing)
    judgement = read_judgement(tmp_path)
    (tmp_path / "judgement.json").unlink()
    (tmp_path / "teacher_logits.npy").unlink()

    def only_val(index: Any, ids: Any, transform: Any, batch_size: int) -> Any:
        assert index is setup.data.val
        return thread_reader()(index, ids, transform, batch_size)

    run_task(task, only_val, Ranks(), nothing, nothing)
    assert read_judgement(tmp_path) == judgement
    assert not (tmp_path / "teacher_logits.npy").exists()


def test_a_judgement_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    counts = {"images": 4, "top1_correct": 2, "top5_correct": 3}
    parts = ("selection", "report", "val")
    whole = {model: dict.fromkeys(parts, counts) for model in ("float", "ptq", "qat")}
    (tmp_path / "judgement.json").write_text(json.dumps(whole))  # format 1
    expected = dict.fromkeys(parts, Counts(4, {"top1_correct": 2, "top5_correct": 3}))
    assert read_judgement(tmp_path) == dict.fromkeys(whole, expected)
    (tmp_path / "judgement.json").write_text(json.dumps({"format": 9, "vitq_ray": "7.0"}))
    newest = FORMATS["judgement"]
    with pytest.raises(InputError, match=rf"judgement.json: written by vitq_ray 7.0 in format 9; .* up to {newest}"):
        read_judgement(tmp_path)


def test_judgement_leaves_the_start_as_it_was(setup: Setup, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in setup.start.loaded.model.state_dict().items()}
    task = task_of(setup, tmp_path, dataclasses.replace(CONFIG, epochs=1, distillation=None), teacher=None)
    run_task(task, thread_reader(), Ranks(), lambda report: None, lambda report: None)
    judgement = read_judgement(tmp_path)
    assert judgement["float"]["val"] == Counts(150, {"top1_correct": 150, "top5_correct": 150})
    for parts in judgement.values():
        assert parts["selection"].top1_correct + parts["report"].top1_correct == parts["val"].top1_correct
    assert all(torch.equal(before[k], v) for k, v in setup.start.loaded.model.state_dict().items())
