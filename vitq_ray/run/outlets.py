"""Where a run is also shown: MLflow, TensorBoard, Weights & Biases, behind one small interface.

    --log-to mlflow:URI       one run, and below it one for every candidate and every training of a search
    --log-to tensorboard      event files in the folder `tensorboard` of the run, one folder for each of these
    --log-to wandb:PROJECT    one run; metrics of a candidate have its name before them

Each outlet has a thread of its own, so that a server that is slow, or away, does not hold up the run. One that fails
costs one warning, and gets nothing more. What a run is recorded in is its folder: nothing is read back from here.
Packages are imported when they are asked for. URIs may hold keys: they are used, and neither stored nor printed.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from vitq_ray import __version__
from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line
from vitq_ray.run.results import RESULT

MLFLOW, TENSORBOARD, WANDB = "mlflow", "tensorboard", "wandb"
PACKAGES = {  # what is imported, and what to install
    MLFLOW: ("mlflow", "'vitq_ray[mlflow]'"),
    TENSORBOARD: ("tensorboardX", "tensorboardX"),
    WANDB: ("wandb", "'vitq_ray[wandb]'"),
}
_FILES = (RESULT,)  # not the page: it has pictures
_SECONDS_AT_THE_END = 60.0
_THREAD = "outlet-"
_LONGEST_VALUE = 500  # of a parameter, for MLflow's older servers
Values = Mapping[str, Any]


@dataclass(frozen=True)
class About:
    """A run as outlets name it.

    Attributes:
        id: of run.json; of scripts that cannot be resumed, of this time.
        resumed: it goes on: what was told before is not told twice.
    """

    id: str
    name: str
    script: str
    folder: Path
    resumed: bool = False


class Outlet(Protocol):
    """One place. `part` is the name of a candidate or a training of a search, "" of the run itself."""

    def begin(self, about: About) -> None:
        """Before anything else, in the thread of the run. What it raises ends the run before anything is computed."""

    def params(self, part: str, values: Values) -> None:
        """What was asked for."""

    def metrics(self, part: str, axis: str, step: int, values: Mapping[str, float]) -> None:
        """Measured at a step, of what the axis says: images, or steps of training."""

    def artifact(self, path: Path) -> None:
        """A file of the outcome."""

    def end(self, part: str, status: str) -> None:
        """How a part ended; `finished`, `failed` or `killed` the run itself, with which nothing comes any more."""


# The places ---------------------------------------------------------------------------------------------------------


class TensorBoard:
    """Scalars, in a folder for every part."""

    def begin(self, about: About) -> None:
        self._home, self._resumed = about.folder / "tensorboard", about.resumed
        self._writers: dict[str, Any] = {}

    def params(self, part: str, values: Values) -> None:
        text = "\n".join(f"    {name}: {value}" for name, value in values.items())
        if not self._resumed:
            self._writer(part, 0).add_text("options", text, 0)

    def metrics(self, part: str, axis: str, step: int, values: Mapping[str, float]) -> None:
        writer = self._writer(part, step)
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def artifact(self, path: Path) -> None:
        """It has no place for files."""

    def end(self, part: str, status: str) -> None:
        ended = list(self._writers) if part == "" else [part] if part in self._writers else []
        for name in ended:
            self._writers.pop(name).close()

    def _writer(self, part: str, step: int) -> Any:
        """Of a run that goes on, readers drop what was written at this step or later: it is computed again."""
        if part not in self._writers:
            from tensorboardX import SummaryWriter

            purge = step if self._resumed else None
            self._writers[part] = SummaryWriter(str(self._home / part), purge_step=purge, flush_secs=5)
        return self._writers[part]


class Mlflow:
    """A run of the experiment `vitq_ray` (or MLFLOW_EXPERIMENT_NAME); parts are runs below it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def begin(self, about: About) -> None:
        with _environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}):
            from mlflow import MlflowClient

            for handler in logging.getLogger("mlflow").handlers:
                handler.addFilter(_not_of_an_outlet)
            self._client = MlflowClient(tracking_uri=self._uri)
            self._experiment = self._experiment_id(os.environ.get("MLFLOW_EXPERIMENT_NAME", "vitq_ray"))
            self._about = about
            self._runs: dict[str, str] = {}
            self._told: dict[str, set[str]] = {}  # {part: its parameters}, which a server lets nobody change
            self._last: dict[tuple[str, str], float] = {}  # step that is known of a metric
            self._ended: set[str] = set()
            if about.resumed:
                self._find_runs()
            self._run("")

    def _experiment_id(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def _find_runs(self) -> None:
        """Those of a run that goes on."""
        query, token = f"tags.`vitq_ray.run` = '{self._about.id}'", None
        while True:
            page = self._client.search_runs([self._experiment], query, page_token=token)
            for run in page:
                part = run.data.tags["vitq_ray.part"]
                self._runs[part] = run.info.run_id
                self._told[part] = set(run.data.params)
                if run.info.status != "RUNNING":
                    self._ended.add(part)
            if not (token := page.token):
                break
        if "" in self._ended:
            self._ended.remove("")
            self._client.update_run(self._runs[""], status="RUNNING")

    def _run(self, part: str) -> str:
        if part not in self._runs:
            about = self._about
            tags = {"vitq_ray.run": about.id, "vitq_ray.part": part, "vitq_ray.script": about.script}
            tags |= {"vitq_ray.version": __version__}
            tags |= {"mlflow.parentRunId": self._runs[""]} if part else {}
            run = self._client.create_run(self._experiment, tags=tags, run_name=part or about.name)
            self._runs[part] = run.info.run_id
        return self._runs[part]

    def params(self, part: str, values: Values) -> None:
        from mlflow.entities import Param

        told = self._told.setdefault(part, set())
        rows = [Param(name, str(v)[:_LONGEST_VALUE]) for name, v in values.items() if name not in told]
        told |= set(values)
        for start in range(0, len(rows), 100):
            self._client.log_batch(self._run(part), params=rows[start : start + 100])

    def metrics(self, part: str, axis: str, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        fresh = [Metric(n, v, now, step) for n, v in values.items() if step > self._last_step(part, n)]
        if fresh:
            self._client.log_batch(self._run(part), metrics=fresh)

    def _last_step(self, part: str, name: str) -> float:
        """A server keeps both of two values at the same step: what it has of a run that goes on is not told again."""
        if not self._about.resumed:
            return -math.inf
        if (part, name) not in self._last:
            history = self._client.get_metric_history(self._run(part), name)
            self._last[part, name] = max((metric.step for metric in history), default=-math.inf)
        return self._last[part, name]

    def artifact(self, path: Path) -> None:
        self._client.log_artifact(self._run(""), str(path))

    def end(self, part: str, status: str) -> None:
        if part in self._ended:
            return
        run = self._run(part)
        self._client.set_tag(run, "vitq_ray.outcome", status)
        self._client.set_terminated(run, {"failed": "FAILED", "killed": "KILLED"}.get(status, "FINISHED"))


class Wandb:
    """One run of a project; WANDB_MODE, WANDB_API_KEY and the like are wandb's own."""

    def __init__(self, project: str) -> None:
        self._project = project

    def begin(self, about: About) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=self._project,
            name=about.name,
            id=about.id,
            resume="allow",
            job_type=about.script,
            dir=str(about.folder),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._axes: set[str] = set()
        self._known: dict[str, Any] = dict(self._run.summary) if about.resumed else {}  # last value of everything

    def params(self, part: str, values: Values) -> None:
        self._run.config.update({part: dict(values)} if part else dict(values), allow_val_change=True)

    def metrics(self, part: str, axis: str, step: int, values: Mapping[str, float]) -> None:
        home = f"{part}/" if part else ""
        known = self._known.get(home + axis, -1)
        values = {name: value for name, value in values.items() if step > known or home + name not in self._known}
        if not values:
            return
        for name in values:
            if home + name not in self._axes:
                self._axes.add(home + name)
                self._run.define_metric(home + name, step_metric=home + axis)
        self._run.log({home + axis: step, **{home + name: value for name, value in values.items()}})

    def artifact(self, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"{path.stem}-{self._run.id}", type="result")
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def end(self, part: str, status: str) -> None:
        if part:
            self._run.summary[f"{part}/outcome"] = status
        else:
            self._run.finish(exit_code=0 if status == "finished" else 1)


def _not_of_an_outlet(record: logging.LogRecord) -> bool:
    """What goes wrong in the thread of an outlet is said once, and by us."""
    return not str(record.threadName).startswith(_THREAD)


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Variables for as long as the context lasts, where they are not set."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


# All of them --------------------------------------------------------------------------------------------------------


def outlet_of(target: str) -> Outlet:
    """From `mlflow:URI`, `tensorboard` or `wandb:PROJECT`. InputError for anything else, and without its package."""
    kind = require_target(target)
    package, install = PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{kind}: needs the package {package}, which is not installed; pip install {install}")
    rest = target.partition(":")[2]
    return Mlflow(rest) if kind == MLFLOW else Wandb(rest) if kind == WANDB else TensorBoard()


def require_target(target: str) -> str:
    """The kind of a target. InputError where it is none."""
    kind, _, rest = target.partition(":")
    if kind not in PACKAGES or bool(rest.strip()) != (kind != TENSORBOARD) or (kind == TENSORBOARD and ":" in target):
        raise InputError(f"expected mlflow:URI, tensorboard or wandb:PROJECT, got {target!r}")
    return kind


class _Worker:
    """An outlet and its thread."""

    def __init__(self, name: str, outlet: Outlet, warn: Callable[[str], None]) -> None:
        self.name = name
        self._outlet = outlet
        self._warn = warn
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name=_THREAD + name, daemon=True)

    def begin(self, about: About) -> None:
        try:
            self._outlet.begin(about)
        except Exception as error:
            raise InputError(f"{self.name}: cannot be opened: {one_line(error) or type(error).__name__}") from None
        self._thread.start()

    def call(self, method: str, *arguments: Any) -> None:
        self._calls.put((method, arguments))
        self.tell()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._error is None:
                try:
                    getattr(self._outlet, call[0])(*call[1])
                except Exception as error:
                    self._error = error

    def tell(self) -> None:
        """Warn of what went wrong, once, in the thread of the run."""
        if self._error is not None and self._warn is not _ignore:
            text = one_line(self._error) or type(self._error).__name__
            self._warn(f"{self.name}: gets nothing more of this run: {text}")
            self._warn = _ignore

    def close(self, seconds: float) -> None:
        self._calls.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive() and self._error is None:
            self._error = TimeoutError(f"it has not taken all within {seconds:.0f} s")
        self.tell()


def _ignore(message: str) -> None:
    pass


class Outlets:
    """All outlets of a run, none where none was asked for: a context manager, which tells them how the run ended.

    Nothing of what it does raises, once it is begun.
    """

    def __init__(self, outlets: Mapping[str, Outlet], warn: Callable[[str], None] = _ignore) -> None:
        self._workers = [_Worker(name, outlet, warn) for name, outlet in outlets.items()]
        self._about: About | None = None
        self._last: dict[tuple[str, str], int] = {}  # step

    @staticmethod
    def to(targets: Iterable[str], warn: Callable[[str], None]) -> Outlets:
        """InputError as `outlet_of`. Each is named without what may be secret of it."""
        return Outlets({one_line(target): outlet_of(target) for target in targets}, warn)

    def __bool__(self) -> bool:
        return bool(self._workers)

    def begin(self, about: About) -> Outlets:
        """InputError where one cannot be opened; those that are open already then end, too."""
        for i, worker in enumerate(self._workers):
            try:
                worker.begin(about)
            except InputError:
                for opened in self._workers[:i]:
                    opened.call("end", "", "failed")
                    opened.close(_SECONDS_AT_THE_END / 10)
                raise
        self._about = about
        return self

    def params(self, values: Values, part: str = "") -> None:
        """None is left out."""
        self._call("params", part, {name: value for name, value in values.items() if value is not None})

    def metrics(self, axis: str, step: int, values: Mapping[str, float], part: str = "") -> None:
        """Left out are NaN and infinity, and steps that were told: a lost worker's are computed again."""
        new = {n: float(v) for n, v in values.items() if math.isfinite(v) and step > self._last.get((part, n), -1)}
        self._last |= {(part, name): step for name in new}
        if new:
            self._call("metrics", part, axis, step, new)

    def end(self, part: str, status: str) -> None:
        """A candidate or a training has ended."""
        self._call("end", part, status)

    def __enter__(self) -> Outlets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._about is None:
            return
        status = "finished" if kind is None else "killed" if issubclass(kind, KeyboardInterrupt) else "failed"
        if kind is None:
            for path in existing(self._about.folder, _FILES):
                self._call("artifact", path)
        self._call("end", "", status)
        deadline = time.monotonic() + (_SECONDS_AT_THE_END if kind is None else _SECONDS_AT_THE_END / 10)
        for worker in self._workers:
            worker.close(max(0.1, deadline - time.monotonic()))

    def _call(self, method: str, *arguments: Any) -> None:
        for worker in self._workers:
            worker.call(method, *arguments)


def existing(folder: Path, names: Sequence[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


NO_OUTLETS = Outlets({})
