"""Candidates as Ray Tune trials: one step is one chunk of images, on warm, reused workers.

    Referee.next() ──► candidate ──► trial on a worker: follow its plan, evaluate chunk after chunk
    chunk results ──► Referee.take() ──► CONTINUE or STOP                     (a Tune scheduler that says nothing else)

A worker process builds its model once and keeps it; a trial only changes numbers in it. All that is decided is
decided by the referee, in the driver; what a lost worker had not reported is evaluated again elsewhere.
"""

from __future__ import annotations

import asyncio
import copy
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import ray
import torch
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.device import device_for
from vitq_ray.cluster.images import StoredImages
from vitq_ray.cluster.start import environment
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.execute import Engine, Execution
from vitq_ray.measure.evaluation import Evaluation, evaluate
from vitq_ray.measure.metrics import Results, pack, unpack
from vitq_ray.measure.racing import RaceRules, chunks_left
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import apply_plan


class Referee(Protocol):
    """Hands out candidates and judges their results; lives in the driver."""

    def next(self) -> str | None:
        """Name of the next candidate; None where there is none (yet, unless `over`)."""

    @property
    def over(self) -> bool:
        """No candidate will follow."""

    def seen(self, name: str) -> int:
        """Images for which results of the candidate are known."""

    def take(self, name: str, start: int, results: Results, seconds: float) -> bool:
        """Take in results, every metric of images `start` … of the race's order; whether the candidate is to stop."""


class _Witness:
    """A referee, and its first error, such as a full disk: Tune would wrap it, or take it for a failure of a trial."""

    def __init__(self, referee: Referee) -> None:
        self._referee = referee
        self.error: Exception | None = None

    def next(self) -> str | None:
        with self._remembering():
            return self._referee.next()

    @property
    def over(self) -> bool:
        return self._referee.over

    def seen(self, name: str) -> int:
        return self._referee.seen(name)

    def take(self, name: str, start: int, results: Results, seconds: float) -> bool:
        with self._remembering():
            return self._referee.take(name, start, results, seconds)

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        if self.error is not None:  # whatever Tune tries next
            raise self.error
        try:
            yield
        except Exception as error:
            self.error = error
            raise


@dataclass(frozen=True)
class Resources:
    """What one trial takes, and how many run at once (None: as many as fit)."""

    threads: int = 1
    gpus: float = 0.0
    in_flight: int | None = None


@ray.remote(num_cpus=0)
class _Desk:
    """Where trials fetch the plan of their candidate; who comes too early waits."""

    def __init__(self) -> None:
        self._plans: dict[str, tuple[Plan, dict[str, Any]]] = {}

    async def put(self, name: str, plan: Plan, weights: dict[str, Any]) -> None:
        """`weights` are references into the object store."""
        self._plans[name] = plan, weights

    async def get(self, name: str) -> tuple[Plan, dict[str, Any]]:
        while name not in self._plans:
            await asyncio.sleep(0.01)
        return self._plans[name]


class _StoredTensors:
    """Tensors in the object store, each once, for as long as this is there; it stays in the driver."""

    def __init__(self) -> None:
        self._refs: dict[int, tuple[Tensor, Any]] = {}  # with the tensor, so that no other one gets its number

    def put(self, tensor: Tensor) -> Any:
        if id(tensor) not in self._refs:
            self._refs[id(tensor)] = tensor, ray.put(tensor.detach().cpu().numpy())
        return self._refs[id(tensor)][1]

    def __getstate__(self) -> dict[str, Any]:
        return {"_refs": {}}


@dataclass(frozen=True)
class Shared:
    """What all trials read: references into the object store, small enough to travel with each of them."""

    run: str
    model: ray.ObjectRef[nn.Module]
    images: StoredImages
    desk: Any
    rules: RaceRules
    transform: EvalTransform
    batch_size: int
    engine: Engine
    threads: int
    use_gpu: bool
    stored: _StoredTensors

    def add(self, name: str, plan: Plan) -> None:
        """Make a candidate known to the trials. Changed weights that plans share are stored once."""
        refs = {weight: self.stored.put(tensor) for weight, tensor in plan.weights.items()}
        self.desk.put.remote(name, replace(plan, weights={}), refs)


@contextmanager
def share(
    model: nn.Module,
    images: StoredImages,
    rules: RaceRules,
    transform: EvalTransform,
    batch_size: int,
    engine: Engine,
    resources: Resources,
) -> Iterator[Shared]:
    """What trials read, for as long as the context lasts: the model goes into the object store, once.

    The desk stays on the driver's node, since others may be lost. It is a process, and ends with the context.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk = _Desk.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    shared = Shared(
        run=uuid.uuid4().hex,
        model=ray.put(copy.deepcopy(model).cpu()),
        images=images,
        desk=desk,
        rules=rules,
        transform=transform,
        batch_size=batch_size,
        engine=engine,
        threads=resources.threads,
        use_gpu=resources.gpus > 0,
        stored=_StoredTensors(),
    )
    try:
        yield shared
    finally:
        if ray.is_initialized():
            ray.kill(desk)


class Worker:
    """One process: a quantized model that follows the plan of one candidate after the other."""

    def __init__(self, shared: Shared) -> None:
        torch.set_num_threads(shared.threads)
        self.shared = shared
        self.device = device_for(shared.use_gpu)
        # A copy: what comes from the object store is read-only memory.
        self.model = copy.deepcopy(ray.get(shared.model)).to(self.device).eval()
        self.images = shared.images.fetch()
        self.run: Execution | None = None

    def take_on(self, name: str) -> None:
        """Become a candidate."""
        plan, refs = ray.get(self.shared.desk.get.remote(name))
        arrays = ray.get(list(refs.values()))
        weights = {weight: torch.tensor(array) for weight, array in zip(refs, arrays, strict=True)}
        apply_plan(self.model, replace(plan, weights=weights))
        if self.run is None:
            self.run = Execution(self.model, self.shared.engine)
        else:
            self.run.follow()

    def evaluate(self, start: int, end: int) -> Evaluation:
        """The candidate on images `start` to `end`."""
        assert self.run is not None
        return evaluate(self.run, self.images.batches(self.shared.batch_size, start, end), self._prepare)

    def _prepare(self, images: Tensor) -> Tensor:
        return self.shared.transform.normalize(images.to(self.device))


_worker: Worker | None = None  # of this process; Tune reuses processes, so it outlives a trial


def _worker_of(shared: Shared) -> Worker:
    global _worker
    if _worker is None or _worker.shared.run != shared.run:
        _worker = Worker(shared)
    return _worker


class CandidateTrial(tune.Trainable):
    """One candidate on the images of the race, a chunk a step."""

    def setup(self, config: dict[str, Any], shared: Shared) -> None:  # type: ignore[override]
        self._worker = _worker_of(shared)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._name = config["candidate"]
        self._left = list(chunks_left(self._worker.shared.rules, config["seen"]))
        self._worker.take_on(self._name)

    def step(self) -> dict[str, Any]:
        clock = time.perf_counter()
        start, end = self._left.pop(0)
        evaluation = self._worker.evaluate(start, end)
        return {
            "candidate": self._name,
            "start": start,
            "images": evaluation.images,
            **pack(evaluation.results),  # flat: Tune takes nested ones apart
            "seconds": time.perf_counter() - clock,
            "done": not self._left,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: results are in the driver already, plans at the desk."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, as above."""


def _tell(referee: Referee, result: Mapping[str, Any]) -> bool:
    results = unpack(result, result["images"])
    return referee.take(result["candidate"], result["start"], results, result["seconds"])


class _OfReferee:
    """Tune saves its parts for its own restore, which is not used here; a referee, with its files, is not saved."""

    _referee: Referee

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_referee"}


class RacingScheduler(_OfReferee, FIFOScheduler):
    """Lets the referee see every chunk; trials go on or stop, none is paused."""

    def __init__(self, referee: Referee) -> None:
        super().__init__()
        self._referee = referee

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        stop = _tell(self._referee, result)
        # Where the trial begins again, should its worker die.
        trial.set_config(trial.config | {"seen": self._referee.seen(result["candidate"])})
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        _tell(self._referee, result)


class _Queue(_OfReferee, Searcher):
    """Tune asks for configurations; the referee has them."""

    def __init__(self, referee: Referee) -> None:
        super().__init__()
        self._referee = referee

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        name = self._referee.next()
        if name is None:
            return Searcher.FINISHED if self._referee.over else None
        return {"candidate": name, "seen": self._referee.seen(name)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The scheduler has told the referee."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: trials.jsonl is the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as above."""

    def get_state(self) -> dict[str, Any]:
        return {}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing, as above."""


def run_trials(shared: Shared, referee: Referee, resources: Resources, folder: Path, max_failures: int = 3) -> None:
    """Run candidates as Tune trials until the referee has no more.

    `folder` is Tune's while it works, and gone afterwards; on a cluster all nodes must see it.

    Raises InputError where no node can hold one trial, RuntimeError where a trial failed for good, and what the referee
    raises.
    """
    slots = require_room(resources)
    witness = _Witness(referee)
    # By default Tune asks a searcher for one trial at a time, and starts the next worker only when the one before it
    # runs. A worker then takes longer to start than a short trial on a warm one, which Tune prefers: it would start and
    # drop the other workers for ever.
    pending = {"TUNE_MAX_PENDING_TRIALS_PG": str(slots)}
    need = {"cpu": resources.threads, "gpu": resources.gpus}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(CandidateTrial, shared=shared), need),
        tune_config=tune.TuneConfig(
            search_alg=_Queue(witness),
            scheduler=RacingScheduler(witness),
            num_samples=-1,
            max_concurrent_trials=resources.in_flight,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder.absolute()),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        ),
    )
    with environment(pending):
        outcome = fit(tuner, folder, lambda: witness.error)
    if outcome.num_errors:
        raise RuntimeError(f"{outcome.num_errors} of {len(outcome)} trials failed; the first: {outcome.errors[0]}")


def fit(tuner: tune.Tuner, folder: Path, own_error: Callable[[], Exception | None]) -> tune.ResultGrid:
    """Run Tune in `folder`, which is gone afterwards: trials.jsonl is the record.

    Where a part of ours raised, `own_error()`, that is raised, and not what Tune makes of it.
    """
    try:
        outcome = tuner.fit()
    except Exception:
        if (ours := own_error()) is not None:
            raise ours from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if (ours := own_error()) is not None:  # Tune took it for a failure of a trial
        raise ours
    return outcome


def _trial_name(trial: Any) -> str:
    return str(trial.config["candidate"])


def require_room(resources: Resources) -> int:
    """How many trials fit at once. A trial that no node can hold would wait forever: InputError instead."""
    slots = sum(_slots(node, resources) for node in nodes_for(resources))
    if not slots:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        have = ", ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise InputError(
            f"trials: one needs {resources.threads} CPUs and {resources.gpus:g} GPUs, no node has them; found {have}"
        )
    return slots if resources.in_flight is None else min(slots, resources.in_flight)


def nodes_for(resources: Resources) -> list[dict[str, float]]:
    """Resources of the living nodes that can hold at least one trial."""
    nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [node for node in nodes if _slots(node, resources)]


def _slots(node: Mapping[str, float], resources: Resources) -> int:
    by_cpu = node.get("CPU", 0) // resources.threads
    return int(by_cpu if not resources.gpus else min(by_cpu, node.get("GPU", 0) // resources.gpus))
