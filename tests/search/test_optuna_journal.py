"""The journal for Optuna: its own reader loads it; a longer log only adds lines; a killed search is as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests.conftest import make_setting
from vitq_ray.calibration.setting import Setting
from vitq_ray.measure.metrics import pack_text
from vitq_ray.measure.racing import FIDELITY, TOP1
from vitq_ray.run.folder import RunFolder
from vitq_ray.search.optuna_journal import JOURNAL, JournalFile, Searched, journal
from vitq_ray.search.space import SearchSpace, loguniform, qat_space_of

SPACE = SearchSpace(
    "s",
    {
        "calibrator": ("max", "percentile"),
        "percentile": (99.0, 99.99),
        "num_batches": (1, 2),
        "gelu_output": (None, "x 0.9"),
    },
    qat_space_of({"lr": loguniform(1e-5, 1e-3), "num_samples": 4, "epochs": 2, "grace_epochs": 1}),
)
DEFAULTS = make_setting("ft1")
SETTINGS = (
    make_setting("ft1", "max", 1),
    make_setting("ft1", "percentile 99", 2),
    make_setting("ft1", "percentile 99.99", 2, rules=("gelu_output -> x 0.9",)),
    make_setting("ft1", "max", 2),  # the same plan as c000
    make_setting("ft1", "percentile 99", 1),
)
KL = np.array([[1, 3, 2, 4], [5, 5, 5, 9], [2, 4, 3, 5], [0, 0, 0, 0], [1, 1, 1, 1]], np.float32)
RIGHT = KL < 4


def candidate(folder: RunFolder, i: int, settings: tuple[Setting, ...] = SETTINGS, same_as: str | None = None) -> None:
    values = settings[i].to_dict()
    folder.append("candidate", format=4, name=f"c{i:03d}", setting=values, predicted_noise=0.1 * i, same_as=same_as)


def chunk(folder: RunFolder, i: int, start: int) -> None:
    part = slice(start, start + 2)
    results = {"correct": RIGHT[i][part], "kl": KL[i][part]}
    folder.append("chunk", name=f"c{i:03d}", start=start, images=2, **pack_text(results), seconds=0.1)


def decision(folder: RunFolder, i: int, verdict: str, images: int, **more: Any) -> None:
    folder.append("decision", name=f"c{i:03d}", verdict=verdict, images=images, **more)


def raced(folder: RunFolder) -> RunFolder:
    """c000 finishes, c001 is beaten, c002 ties, c003 is as c000, c004 waits."""
    for i in range(len(SETTINGS)):
        candidate(folder, i, same_as="c000" if i == 3 else None)
    for i in (0, 1, 2):
        chunk(folder, i, 0)
    decision(folder, 1, "beaten", 2, against="c000", wins=2, losses=0, evidence=3.1)
    chunk(folder, 1, 2)  # under way when it was decided
    for i in (0, 2):
        chunk(folder, i, 2)
    decision(folder, 0, "finished", 4, against=None, wins=0, losses=0, evidence=0.0)
    decision(folder, 2, "tied", 4, against="c000", wins=1, losses=1, evidence=3.0)
    return folder


def searched(objective: str = FIDELITY) -> Searched:
    return Searched(SPACE, DEFAULTS, objective, seed=3)


def load(path: Path, study: str | None = None) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(path / JOURNAL)))
    return optuna.load_study(study_name=study or path.name, storage=storage)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return raced(RunFolder(tmp_path))


def test_every_candidate_is_a_trial(folder: RunFolder) -> None:
    JournalFile(folder, searched()).write()
    study = load(folder.path)
    assert study.direction.name == "MINIMIZE"
    assert study.metric_names == ["mean KL to the float model (nats)"]
    trials = study.trials
    C, P, W = TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING
    assert [t.state for t in trials] == [C, P, C, C, W]
    assert [t.value for t in trials] == [2.5, 5.0, 3.5, 2.5, None], "over the images that count"
    assert [t.intermediate_values for t in trials[:3]] == [{2: 2.0, 4: 2.5}, {2: 5.0}, {2: 3.0, 4: 3.5}]
    assert trials[0].params == {"calibrator": "max", "num_batches": 1, "gelu_output": "none"}
    assert trials[2].params == {
        "calibrator": "percentile",
        "percentile": 99.99,
        "num_batches": 2,
        "gelu_output": "x 0.9",
    }
    assert trials[2].distributions == {
        "calibrator": CategoricalDistribution(("max", "percentile")),
        "percentile": FloatDistribution(99.0, 99.99),
        "num_batches": IntDistribution(1, 2),
        "gelu_output": CategoricalDistribution(("none", "x 0.9")),
    }
    assert trials[1].user_attrs == {
        "name": "c001",
        "label": SETTINGS[1].label,
        "forecast": 0.1,
        "verdict": "beaten",
        "images": 2,
        "won": 0,
        "lost": 2,
        "against": "c000",
        "top1": 0.0,
        "kl": 5.0,
    }
    assert trials[3].user_attrs["same as"] == "c000"
    assert study.best_trial.number == 0
    assert trials[0].datetime_start is not None
    assert study.best_trial.datetime_complete >= trials[0].datetime_start


def test_a_race_by_top1_is_maximized(folder: RunFolder) -> None:
    JournalFile(folder, searched(TOP1)).write()
    study = load(folder.path)
    assert study.direction.name == "MAXIMIZE"
    assert [t.value for t in study.trials] == [0.75, 0.0, 0.5, 0.75, None]


def test_a_longer_log_only_adds_lines(folder: RunFolder) -> None:
    """So that whoever reads the file meanwhile, by its own offsets, can go on."""
    events = folder.events()
    whole = journal(events, searched(), "x")
    assert journal(events, searched(), "x") == whole
    for end in range(len(SETTINGS), len(events)):
        assert whole.startswith(journal(events[:end], searched(), "x"))
    killed = journal(events[: len(SETTINGS) + 2], searched(), folder.path.name)
    (folder.path / JOURNAL).write_bytes(killed)
    R, W = TrialState.RUNNING, TrialState.WAITING
    assert [t.state for t in load(folder.path).trials] == [R, R, W, R, W]


def test_settings_of_an_earlier_search_are_none_of_the_space(tmp_path: Path) -> None:
    """`--from-run`: what they differ in are the parameters."""
    folder, settings = RunFolder(tmp_path), (make_setting("ft2", "mse", 7), make_setting("trt", "mse", 9, bits=4))
    for i in range(2):
        candidate(folder, i, settings)
    JournalFile(folder, Searched(SearchSpace("qat", {}), DEFAULTS, FIDELITY, 0)).write()
    rows = [t.params for t in load(tmp_path).trials]
    first = {"mode": "ft2", "num_batches": 7, "weight_bits": 8, "act_bits": 8}
    assert rows == [first, {"mode": "trt", "num_batches": 9, "weight_bits": 4, "act_bits": 4}]


def test_settings_that_leave_the_space_are_trials_too(folder: RunFolder) -> None:
    """As refinement proposes them, later."""
    refined = make_setting("ft1", "max", 1, rules=("0.attn.* -> 6 bits",))
    folder.append("candidate", format=4, name="c005", setting=refined.to_dict(), predicted_noise=0.1, same_as=None)
    JournalFile(folder, searched()).write()
    trials = load(folder.path).trials
    assert [t.params["rules"] for t in trials] == [*["none"] * 5, "0.attn.* -> 6 bits"]
    assert trials[0].distributions["rules"] == CategoricalDistribution(("none", "0.attn.* -> 6 bits"))


def test_trainings_are_a_study_of_their_own(folder: RunFolder) -> None:
    def epoch(name: str, number: int, correct: int) -> None:
        folder.append("qat_epoch", name=name, epoch=number, images=10, top1_correct=correct, loss=None)

    for name, correct in (("q00", 8), ("q01", 5)):
        epoch(name, 0, 4)
        epoch(name, 1, correct)  # of two, the worse stops
    epoch("q00", 2, 7)
    folder.append("qat_failed", name="q02", reason="the loss is not finite")
    JournalFile(folder, searched()).write()
    trials = load(folder.path, f"{folder.path.name} QAT").trials
    states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.WAITING]
    assert [t.state for t in trials] == states
    assert [t.value for t in trials] == [0.8, 0.5, None, None]
    assert trials[0].intermediate_values == {0: 0.4, 1: 0.8, 2: 0.7}
    assert [t.params for t in trials] == SPACE.qat.sample(3)  # type: ignore[union-attr]
    assert trials[2].user_attrs == {"name": "q02", "failure": "the loss is not finite"}


def test_it_is_written_as_often_as_it_costs_little(folder: RunFolder) -> None:
    times = iter([0, 0, 1.0, 20.9, 21.0, 21.0, 22.0])
    file, path = JournalFile(folder, searched(), clock=lambda: next(times)), folder.path / JOURNAL
    file.refresh()  # from 0 to 1.0: not again before 20 seconds are over
    path.unlink()
    file.refresh()
    assert not path.exists()
    file.refresh()
    assert path.exists()


def test_an_error_costs_one_warning(folder: RunFolder) -> None:
    warnings: list[str] = []
    (folder.path / JOURNAL).mkdir()
    file = JournalFile(folder, searched(), warnings.append)
    for _ in range(3):
        file.refresh()
    (warning,) = warnings
    assert "optuna-journal.log: is not written any more: [Errno 21] Is a directory" in warning
