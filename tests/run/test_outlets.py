"""Outlets: what they are told reaches them once; what they do wrong costs a warning, and never the run."""

from __future__ import annotations

import math
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.conftest import scalars
from vitq_ray.base.config import InputError
from vitq_ray.commands.options import EvaluateOptions
from vitq_ray.commands.outlets import OutletMeter, begun, outlets_of
from vitq_ray.commands.parser import parse
from vitq_ray.commands.screen import Screen
from vitq_ray.measure.evaluation import Counts
from vitq_ray.qat.state import EpochReport, StepReport
from vitq_ray.run import outlets as module
from vitq_ray.run.outlets import About, Mlflow, Outlets, TensorBoard, Wandb, outlet_of


class Fake:
    """Remembers what it is told; raises where it is told to."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._fails_at = fails_at

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any, **named: Any) -> None:
            self.calls.append((method, *arguments))
            if method == self._fails_at:
                raise RuntimeError("no answer\nof http://me:secret@host/api")

        return call


@pytest.fixture
def about(tmp_path: Path) -> About:
    return About("0123abcd", "runs-x", "qat", tmp_path)


def test_everybody_is_told_everything_in_order(about: About) -> None:
    fakes = {"a": Fake(), "b": Fake()}
    (about.folder / "result.json").write_text("{}")
    with Outlets(fakes).begin(about) as outlets:
        outlets.params({"lr": 0.1, "teacher": None})
        outlets.metrics("images", 10, {"kl": 0.5, "top1": math.nan}, "c000")
        outlets.metrics("images", 20, {"kl": math.inf}, "c000")
        outlets.end("c000", "beaten")
    for fake in fakes.values():
        assert fake.calls == [
            ("begin", about),
            ("params", "", {"lr": 0.1}),
            ("metrics", "c000", "images", 10, {"kl": 0.5}),
            ("end", "c000", "beaten"),
            ("artifact", about.folder / "result.json"),
            ("end", "", "finished"),
        ]


def test_steps_that_are_done_again_are_not_told_again(about: About) -> None:
    """A lost worker goes back to its last state."""
    fake = Fake()
    with Outlets({"a": fake}).begin(about) as outlets:
        for step in (1, 2, 1, 2, 3):
            outlets.metrics("step", step, {"loss": 1.0}, "q00")
        outlets.metrics("step", 1, {"loss": 1.0}, "q01")
    assert [call[3] for call in fake.calls if call[0] == "metrics"] == [1, 2, 3, 1]


@pytest.mark.parametrize("method", ["params", "metrics", "artifact", "end"])
def test_one_that_fails_costs_one_warning(method: str, about: About) -> None:
    warnings: list[str] = []
    broken, fine = Fake(method), Fake()
    (about.folder / "result.json").write_text("{}")
    with Outlets({"broken": broken, "fine": fine}, warnings.append).begin(about) as outlets:
        for step in range(50):
            outlets.params({"x": 1})
            outlets.metrics("step", step, {"loss": 1.0})
    assert warnings == ["broken: gets nothing more of this run: no answer of http://host/api"]
    assert [call[0] for call in broken.calls].count(method) == 1
    assert broken.calls[-1][0] == method
    assert len(fine.calls) == 1 + 100 + 2


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("x"), "failed"), (KeyboardInterrupt(), "killed"), (SystemExit(), "failed")]
)
def test_they_are_told_how_a_run_ends(error: BaseException, status: str, about: About) -> None:
    fake = Fake()
    (about.folder / "result.json").write_text("{}")
    with pytest.raises(type(error)), Outlets({"a": fake}).begin(about):
        raise error
    assert fake.calls == [("begin", about), ("end", "", status)]


def test_one_that_does_not_answer_holds_up_nothing(about: About, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    warnings: list[str] = []

    class Deaf(Fake):
        def metrics(self, *arguments: Any) -> None:
            released.wait(10)

    monkeypatch.setattr(module, "_SECONDS_AT_THE_END", 0.05)
    with Outlets({"deaf": Deaf()}, warnings.append).begin(about) as outlets:
        for step in range(1000):
            outlets.metrics("step", step, {"loss": 1.0})
    released.set()
    assert warnings == ["deaf: gets nothing more of this run: it has not taken all within 0 s"]


def test_one_that_cannot_be_opened_is_an_error_before_anything_is_computed(about: About) -> None:
    first = Fake()
    with pytest.raises(InputError, match=r"^bad: cannot be opened: no answer of http://host/api$"):
        Outlets({"good": first, "bad": Fake("begin")}).begin(about)
    assert first.calls == [("begin", about), ("end", "", "failed")]


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["mlflow", "mlflow:", "wandb: ", "tensorboard:x", "tensorboard:", "grafana:x"])
def test_no_outlets(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(EvaluateOptions, ["--log-to", text], "x")
    assert str(caught.value) == f"--log-to: expected mlflow:URI, tensorboard or wandb:PROJECT, got {text!r}"


def test_several_outlets_and_keys_that_nobody_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    uri = "mlflow:https://me:secret@host:5000/x?token=secret"
    given = ["--log-to", uri, "--log_to", "wandb:p", "--log-to", "wandb:p"]
    options = parse(EvaluateOptions, given, "x")
    assert options.log_to == (uri, "wandb:p")
    assert EvaluateOptions.of({"log_to": ["tensorboard"]}).log_to == ("tensorboard",)
    assert options.to_dict()["log_to"] == ["mlflow:https://host:5000/x?token=…", "wandb:p"]
    assert "secret" not in str(options.to_dict())
    warnings: list[str] = []
    fake = Fake("metrics")
    monkeypatch.setattr(module, "outlet_of", lambda target: fake)
    screen = Screen()
    monkeypatch.setattr(screen, "warn", warnings.append)
    with begun(outlets_of(options, screen), options, "evaluate", tmp_path) as outlets:
        outlets.metrics("images", 1, {"top1": 1.0})
    assert len(warnings) == 2
    assert "secret" not in str((warnings, fake.calls))
    assert ("params", "", {name: v for name, v in options.to_dict().items() if v is not None and name != "log_to"}) in (
        fake.calls
    )


@pytest.mark.parametrize(
    ("target", "package", "install"),
    [("mlflow:x.db", "mlflow", "'vitq_ray[mlflow]'"), ("wandb:p", "wandb", "'vitq_ray[wandb]'")],
)
def test_a_package_that_is_missing(target: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        outlets_of(EvaluateOptions.of({"log_to": target}, typed=True), Screen())
    kind = target.partition(":")[0]
    assert str(caught.value) == (
        f"--log-to: {kind}: needs the package {package}, which is not installed; pip install {install}"
    )


# TensorBoard --------------------------------------------------------------------------------------------------------


def report(step: int) -> StepReport:
    return StepReport(1 + step // 3, step, 6, 2.0 / step, 0.5, 1.0, 8, 4.0)


def trained(about: About, steps: range) -> None:
    """Steps, with an epoch behind every third, as a training tells them."""
    outlet = TensorBoard()
    with Outlets({"tensorboard": outlet}).begin(about) as outlets:
        outlets.params({"lr": 0.5})
        meter = OutletMeter(outlets, "q00")
        if steps.start == 1:
            meter.epoch(EpochReport(0, 0, None, Counts(4, {"top1_correct": 1}), True))
        for step in steps:
            meter.step(report(step))
            if step % 3 == 0:
                meter.epoch(EpochReport(step // 3, step, 1.0, Counts(4, {"top1_correct": step // 3}), True))


def test_scalars_of_a_training_are_read_back(about: About) -> None:
    trained(about, range(1, 7))
    found = scalars(about.folder / "tensorboard" / "q00")
    assert set(found) == {"loss", "lr", "grad_norm", "images_per_second", "selection_top1", "epoch_loss"}
    assert found["loss"] == {step: pytest.approx(2.0 / step) for step in range(1, 7)}
    assert found["lr"] == dict.fromkeys(range(1, 7), 0.5)
    assert found["images_per_second"] == dict.fromkeys(range(1, 7), 4.0)
    assert found["selection_top1"] == {0: 0.25, 3: 0.25, 6: 0.5}


def test_a_training_that_goes_on_doubles_no_point(about: About, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind step 5, it goes on behind step 3, where its state is."""
    trained(about, range(1, 6))
    later = module.time.time() + 2
    monkeypatch.setattr("tensorboardX.event_file_writer.time.time", lambda: later)  # names of files
    trained(About(about.id, about.name, about.script, about.folder, resumed=True), range(4, 7))
    found = scalars(about.folder / "tensorboard" / "q00")
    assert found["loss"] == {step: pytest.approx(2.0 / step) for step in range(1, 7)}
    assert found["selection_top1"] == {0: 0.25, 3: 0.25, 6: 0.5}
    assert len(list((about.folder / "tensorboard" / "q00").iterdir())) == 2


# MLflow -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of its own parts
def test_mlflow_has_a_run_for_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)  # its artifacts
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    uri = f"sqlite:///{tmp_path / 'store.db'}"
    about = About("0123abcd", "search", "tune_calib", tmp_path)
    (tmp_path / "result.json").write_text("{}")

    def told(about: About, steps: range, error: type[BaseException] | None = None) -> None:
        warnings: list[str] = []
        with Outlets({"mlflow": Mlflow(uri)}, warnings.append).begin(about) as outlets:
            outlets.params({"alpha": 0.05, "num_workers": steps.start})
            outlets.params({"mode": "ft1", "label": "x" * 9000}, "c000")
            for step in steps:
                outlets.metrics("images", step, {"kl": 1.0 / step}, "c000")
            outlets.end("c000", "beaten")
            if error is not None:
                raise error
        assert not warnings

    with pytest.raises(KeyboardInterrupt):
        told(about, range(1, 4), KeyboardInterrupt)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("vitq_ray").experiment_id
    assert {run.info.run_name: run.info.status for run in client.search_runs([experiment])} == {
        "search": "KILLED",
        "c000": "FINISHED",
    }
    told(About(about.id, about.name, about.script, about.folder, resumed=True), range(2, 6))
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {"search", "c000"}
    whole, part = runs["search"], runs["c000"]
    assert whole.data.params == {"alpha": "0.05", "num_workers": "1"}, "as it was begun"
    assert whole.info.status == "FINISHED"
    assert part.data.tags["mlflow.parentRunId"] == whole.info.run_id
    assert part.data.tags["vitq_ray.outcome"] == "beaten"
    assert part.data.params["mode"] == "ft1"
    history = client.get_metric_history(part.info.run_id, "kl")
    assert [(m.step, m.value) for m in history] == [(step, 1.0 / step) for step in range(1, 6)], "none twice"
    assert [file.path for file in client.list_artifacts(whole.info.run_id)] == ["result.json"]
    with pytest.raises(InputError, match=r"^m: cannot be opened: "):
        Outlets({"m": Mlflow("http://me:secret@127.0.0.1:9")}).begin(about)


# Weights & Biases ---------------------------------------------------------------------------------------------------


def test_calls_of_wandb(about: About, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the package: what its documentation says of `init`, `define_metric`, `log` and artifacts."""
    run, artifact = Fake(), Fake()
    run.__dict__ |= {"id": about.id, "config": Fake(), "summary": {}}
    begun: dict[str, Any] = {}
    wandb = ModuleType("wandb")
    members = {
        "init": lambda **options: begun.update(options) or run,
        "Settings": SimpleNamespace,
        "Artifact": lambda name, type: (artifact.calls.append((name, type)), artifact)[1],
    }
    wandb.__dict__.update(members)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (about.folder / "result.json").write_text("{}")
    with Outlets({"wandb": Wandb("p")}).begin(about) as outlets:
        outlets.params({"alpha": 0.05})
        outlets.params({"mode": "ft1"}, "c000")
        for images in (10, 20):
            outlets.metrics("images", images, {"kl": 1.0 / images}, "c000")
        outlets.end("c000", "beaten")
    assert {name: begun[name] for name in ("project", "name", "id", "resume", "job_type", "dir")} == {
        "project": "p",
        "name": "runs-x",
        "id": "0123abcd",
        "resume": "allow",
        "job_type": "qat",
        "dir": str(about.folder),
    }
    assert run.config.calls == [
        ("update", {"alpha": 0.05}),
        ("update", {"c000": {"mode": "ft1"}}),
    ]
    assert run.calls == [
        ("define_metric", "c000/kl"),
        ("log", {"c000/images": 10, "c000/kl": 0.1}),
        ("log", {"c000/images": 20, "c000/kl": 0.05}),
        ("log_artifact", artifact),
        ("finish",),
    ]
    assert run.summary == {"c000/outcome": "beaten"}
    assert artifact.calls == [("result-0123abcd", "result"), ("add_file", str(about.folder / "result.json"))]


def test_wandb_is_not_told_again_what_it_knows(about: About, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Fake()
    run.__dict__ |= {"id": about.id, "config": Fake(), "summary": {"step": 5, "loss": 0.5}}
    wandb = ModuleType("wandb")
    wandb.__dict__.update({"init": lambda **options: run, "Settings": SimpleNamespace})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    again = About(about.id, about.name, about.script, about.folder, resumed=True)
    with Outlets({"wandb": Wandb("p")}).begin(again) as outlets:
        for step in (4, 5, 6):
            outlets.metrics("step", step, {"loss": 0.5})
        outlets.metrics("step", 5, {"selection_top1": 1.0})
    told = [call[1] for call in run.calls if call[0] == "log"]
    assert told == [{"step": 6, "loss": 0.5}, {"step": 5, "selection_top1": 1.0}]


def test_wandb_itself_offline(about: About, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    warnings: list[str] = []
    (about.folder / "result.json").write_text("{}")
    with Outlets({"wandb": outlet_of("wandb:p")}, warnings.append).begin(about) as outlets:
        outlets.params({"alpha": 0.05})
        for step in (1, 2):
            outlets.metrics("step", step, {"loss": 1.0 / step})
        outlets.metrics("images", 10, {"kl": 0.5}, "c000")
        outlets.end("c000", "beaten")
    assert not warnings
    (stored,) = about.folder.glob("wandb/offline-run-*-0123abcd/run-0123abcd.wandb")
    text = stored.read_bytes()
    for name in (b"loss", b"c000/kl", b"alpha", b"beaten"):
        assert name in text
