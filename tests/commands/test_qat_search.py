"""QAT in a search: ASHA and the contest without Ray, and a whole escalation on a small one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from tests.conftest import ROOT, Project, load_script, make_project, scalars
from vitq_ray.base.config import InputError
from vitq_ray.commands.screen import Screen
from vitq_ray.commands.tune_qat import TrainingsProgress
from vitq_ray.qat.state import StepReport
from vitq_ray.search.asha import Asha, Epoch, QatContest, TrainingRun, config_of, training_runs
from vitq_ray.search.optuna_journal import JOURNAL
from vitq_ray.search.space import LogUniform, QatSpace, load_space, loguniform, qat_space_of

tune_calib = load_script("tune_calib")
SPACE = QatSpace({"lr": loguniform(1e-4, 1e-1), "global_batch": (32, 48)}, num_samples=5, epochs=8)


def test_asha_keeps_the_better_half_of_what_has_come_so_far() -> None:
    asha = Asha(epochs=8, grace=1, reduction=2)
    assert [asha.stops(1, v) for v in (0.5, 0.6, 0.4, 0.6, 0.45)] == [False, False, True, False, True]
    assert not asha.stops(3, 0.0), "no milestone"
    assert [asha.stops(2, v) for v in (0.3, 0.2)] == [False, True]
    assert not asha.stops(8, 0.0), "the end is no milestone"


def test_asha_thirds() -> None:
    asha = Asha(epochs=9, grace=3, reduction=3)
    assert not asha.stops(1, 0.0)
    values = np.random.default_rng(0).random(60)
    stopped = [asha.stops(3, v) for v in values]
    for i, v in enumerate(values):
        better = int((values[: i + 1] > v).sum())
        assert stopped[i] == (better >= -(-(i + 1) // 3))


def test_runs_are_a_function_of_space_and_seed() -> None:
    runs = training_runs(SPACE, ["a", "b"], 3)
    assert runs == training_runs(SPACE, ["a", "b"], 3)
    assert runs != training_runs(SPACE, ["a", "b"], 4)
    assert [r.name for r in runs] == ["q00", "q01", "q02", "q03", "q04"]
    assert [r.start for r in runs] == ["a", "b", "a", "b", "a"]
    rates = [r.config.lr for r in training_runs(QatSpace(SPACE.choices, num_samples=300), ["a"], 0)]
    assert 1e-4 <= min(rates) < 2e-4
    assert 5e-2 < max(rates) <= 1e-1
    assert np.median(np.log10(rates)) == pytest.approx(-2.5, abs=0.2)


def test_a_row_becomes_a_configuration() -> None:
    config = config_of({"lr": 0.01, "global_batch": 64, "distill_scale": 7.0, "temperature": 2.0}, 4, 9)
    assert (config.lr, config.global_batch, config.micro_batch, config.epochs, config.seed) == (0.01, 64, 32, 4, 9)
    assert config.distillation is not None
    assert (config.distillation.scale, config.distillation.temperature) == (7.0, 2.0)
    assert config_of({"global_batch": 20}, 1, 0).micro_batch == 20
    with pytest.raises(InputError, match="learning rate: expected a number > 0, got -1"):
        config_of({"lr": -1}, 1, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": (1,)}, "QAT has the key 'learning_rate'; the keys are lr, global_batch"),
        ({"lr": 0.1}, r"QAT\['lr'\] is 0.1, expected a list of values"),
        ({"epochs": 0}, "QAT epochs: expected an integer >= 1, got 0"),
        ([], "QAT is list, expected a dictionary"),
        ({"lr": (0.1, -1)}, "learning rate: expected a number > 0, got -1"),
        ({"augment": ("heavy",)}, "augmentation: 'heavy' is not one of none, light, toolkit"),
    ],
)
def test_bad_spaces(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        qat_space_of(values)
    with pytest.raises(InputError, match="loguniform: expected 0 < low < high, got 2, 1"):
        loguniform(2, 1)


@pytest.mark.parametrize("name", ["qat", "calib_qat"])
def test_the_spaces_that_come_with_it(name: str) -> None:
    space = load_space(str(ROOT / "search_spaces" / f"{name}.py")).qat
    assert space is not None
    assert isinstance(space.choices["lr"], LogUniform)
    assert len(training_runs(space, ["a"], 0)) == space.num_samples


def epochs_of(run: TrainingRun, count: int) -> list[Epoch]:
    """A learning curve that depends on the run only."""
    rng = np.random.default_rng(int(run.name[1:]))
    return [Epoch(run.name, e, 100, int(50 + 5 * e + rng.integers(20)), None if e == 0 else 1.0) for e in range(count)]


def test_a_contest_replayed_from_its_log_decides_the_same() -> None:
    runs, log = training_runs(SPACE, ["a"], 0), []

    def append(event: str, **values: Any) -> None:
        log.append({"event": event, **values})

    contest = QatContest(runs, SPACE, append)
    for epoch in (e for step in zip(*(epochs_of(r, 5) for r in runs), strict=True) for e in step):
        if epoch.name not in contest.stopped:
            contest.take(epoch)
    assert contest.stopped
    assert contest.unfinished() == [r.name for r in runs if r.name not in contest.stopped]

    again = QatContest(runs, SPACE, append)
    written = len(log)
    again.replay(log)
    assert len(log) == written
    assert (again.stopped, again.history) == (contest.stopped, contest.history)
    assert again.best() == contest.best()
    again.take(contest.history[again.unfinished()[0]][-1])
    assert len(log) == written, "an epoch that is reported twice is logged once"


def _rows(seed: int) -> list[dict[str, Any]]:
    space = {"lr": (0.01, 1e30), "global_batch": (8,), "augment": ("none",), "dropout": (0.0,), "optimizer": ("sgd",)}
    return QatSpace(space, num_samples=2, epochs=2).sample(seed)


ESCALATE = """
SPACE = {"mode": ("ft2",), "calibrator": ("max", "percentile"), "percentile": (90.0,), "num_batches": (1,),
         "act_bits": (3,), "weight_bits": (3,)}
QAT = {"lr": (0.01, 0.003), "global_batch": (8,), "augment": ("none",), "dropout": (0.0,),
       "num_samples": 2, "epochs": 2, "optimizer": ("adamw",)}
"""


# Its two runs draw both learning rates.
DIVERGING_SEED = next(s for s in range(50) if len({r["lr"] for r in _rows(s)}) == 2)


def options(folder: Path, *argv: object) -> list[str]:
    project = Project(folder / "project")
    small = ("--search-space", folder / "space.py", "--calib-batchsz", 4, "--batch-size", 20)
    return [str(a) for a in (*project.options, *small, *argv)]


@pytest.mark.slow
def test_escalation(ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where calibration misses the target, QAT follows; its checkpoint evaluates as reported; resume is free."""
    (tmp_path / "project").mkdir()
    make_project(tmp_path / "project", train=64, val=60)
    (tmp_path / "space.py").write_text(ESCALATE)
    run = tmp_path / "run"
    assert tune_calib.main(options(tmp_path, "--output", run, "--log-to", "tensorboard")) == 0
    assert "missed: QAT" in capsys.readouterr().out
    result = json.loads((run / "result.json").read_text())
    qat = result["qat"]
    for name, history in qat["epochs"].items():
        found = scalars(run / "tensorboard" / name)
        _, *steps = map(json.loads, (run / "qat" / name / "steps.jsonl").read_text().splitlines())
        assert len(steps) == 7 * (len(history) - 1)
        assert found["loss"] == {s["step"]: pytest.approx(s["loss"]) for s in steps}
        assert list(found["loss"]) == list(found["lr"]) == list(range(1, len(steps) + 1))
        top1 = [e["top1_correct"] / e["images"] for e in history]
        assert list(found["selection_top1"].values()) == [pytest.approx(value) for value in top1]
    study = optuna.load_study(study_name="run QAT", storage=JournalStorage(JournalFileBackend(str(run / JOURNAL))))
    assert study.best_value == max(e["top1_correct"] / e["images"] for h in qat["epochs"].values() for e in h)
    points = scalars(run / "tensorboard")
    assert {len(history) for history in qat["epochs"].values()} <= {2, 3}
    best = max(e["top1_correct"] for history in qat["epochs"].values() for e in history)
    assert qat["selection"]["top1_correct"] == best

    report = json.loads((run / "run.json").read_text())["splits"]["report"]
    logits = tmp_path / "logits.npz"
    checkpoint = ("--pretrained_dir", run / "best" / "vit_qat.pth", "--data-path", tmp_path / "project")
    argv = (*checkpoint, "--output", tmp_path / "again", "--save-logits", logits)
    assert load_script("evaluate").main([str(a) for a in argv]) == 0
    saved = np.load(logits)
    correct = (saved["logits"].argmax(1) == saved["labels"])[report]
    assert (correct.sum(), len(correct)) == (qat["top1_correct"], qat["images"])

    log = (run / "trials.jsonl").read_text()
    (run / "result.json").unlink()  # killed just before the end
    assert tune_calib.main(["--resume", str(run)]) == 0
    added = [json.loads(line)["event"] for line in (run / "trials.jsonl").read_text().removeprefix(log).splitlines()]
    assert added == ["resumed", "engine", "winner"], "no epoch is trained again"
    assert json.loads((run / "result.json").read_text())["qat"] == qat
    assert scalars(run / "tensorboard") == points, "told as before"

    capsys.readouterr()
    assert tune_calib.main(options(tmp_path, "--output", tmp_path / "b", "--target-drop", 100)) == 0
    assert "met, no QAT" in capsys.readouterr().out
    assert "qat" not in json.loads((tmp_path / "b" / "result.json").read_text())

    # The best and tied settings of a finished search, again.
    argv = options(tmp_path, "--output", tmp_path / "c", "--from-run", run, "--target-drop", 100)
    assert tune_calib.main(argv) == 0
    chosen = [c for c in result["candidates"].values() if c["outcome"] in ("best", "tied") and c["same_as"] is None]
    again = json.loads((tmp_path / "c" / "result.json").read_text())["candidates"].values()
    assert {json.dumps(c["setting"]) for c in again} == {json.dumps(c["setting"]) for c in chosen}


def test_time_left_of_all_trainings() -> None:
    """At most: a run that is stopped leaves its steps undone."""
    now, said = [0.0], Screen()
    lines: list[str] = []
    said.say = lines.append  # type: ignore[method-assign]
    space = QatSpace({"global_batch": (8, 16)}, num_samples=2, epochs=2)
    runs = [replace(run, config=config_of({"global_batch": 8}, 2, 0)) for run in training_runs(space, ["a"], 0)]
    contest = QatContest(runs, space, lambda event, **values: None)
    progress = TrainingsProgress(contest, 66, said, lambda: now[0])  # 8 steps an epoch, 16 a run
    for i in range(1, 8):
        now[0] += 10
        progress.step("q00" if i % 2 else "q01", StepReport(1, -(-i // 2), 16, 1.0, 0.1, 1.0, 8, 1.0))
    # 7 steps of 32 are done, at 10 seconds each
    assert lines == [
        "training: 0 of 2 runs done, at most 4 min 50 s left",
        "training: 0 of 2 runs done, at most 4 min 20 s left",
    ]
    contest.fail("q01", "the loss is not finite")
    assert progress.text == "training: 1 of 2 runs done, at most 2 min 0 s left"


@pytest.mark.slow
def test_a_run_that_diverges_does_not_end_the_others(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    make_project(tmp_path / "project", train=64, val=60)
    (tmp_path / "space.py").write_text(ESCALATE.replace("(0.01, 0.003)", "(0.01, 1e30)").replace("adamw", "sgd"))
    assert tune_calib.main(options(tmp_path, "--output", tmp_path / "run", "--seed", DIVERGING_SEED)) == 0
    qat = json.loads((tmp_path / "run" / "result.json").read_text())["qat"]
    (reason,) = qat["failed"].values()
    assert "not finite at step" in reason
    assert "1e+30" in reason


def test_bad_input_before_anything_is_computed(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "project").mkdir()
    project = make_project(tmp_path / "project", train=24, val=60)
    (tmp_path / "space.py").write_text(ESCALATE.replace("(8,)", "(32,)"))
    assert tune_calib.main(options(tmp_path, "--output", tmp_path / "a")) == 2
    assert "24" in capsys.readouterr().err
    assert tune_calib.main(options(tmp_path, "--output", tmp_path / "b", "--from-run", tmp_path)) == 2
    assert "is not the folder of a finished search" in capsys.readouterr().err
    (project.folder / "train.zip").unlink()
    (project.folder / "train_map.txt").unlink()
    assert tune_calib.main(options(tmp_path, "--output", tmp_path / "c")) == 2
    assert "has no train split, which the QAT of space needs" in capsys.readouterr().err
    assert not any((tmp_path / name).exists() for name in "abc")
