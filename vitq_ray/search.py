"""The search: every setting of a search space as a Ray Tune trial, on images decoded once.

    settings × CalibrationStatistics -> candidates: settings with distinct scales, and the amax of each
    selection images, float weights, amax -> object store, shared by all trials
    one trial = one candidate on warm, reused workers: set numbers in a model, evaluate, report per-image results

A worker process builds its model once and keeps it; a trial only changes numbers in it.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray import tune
from torch import Tensor, nn

from vitq_ray.calibrate import CalibrationStatistics, setting_amax
from vitq_ray.config import InputError, QuantSetting
from vitq_ray.data.loader import Batch
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.evaluate import Evaluation, evaluate
from vitq_ray.models import Geometry, build_model
from vitq_ray.quant.modes import MODES
from vitq_ray.quant.vit import apply_amax, frozen_weights, quantize_vit, sites_of

Amax = dict[str, npt.NDArray[np.float32]]
OnResult = Callable[[str, Evaluation, float], None]


@dataclass(frozen=True)
class Candidate:
    """One setting of the search; `same_as` names the earlier candidate whose scales it shares, if any."""

    name: str
    setting: QuantSetting
    same_as: str | None = None


@dataclass(frozen=True)
class ImageSet:
    """Decoded images, kept in memory: uint8 (N, S, S, 3), labels (N,), sample ids (N,)."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    sample_ids: npt.NDArray[np.int64]

    @staticmethod
    def of(batches: Sequence[Batch]) -> ImageSet:
        if not batches:
            raise InputError("selection: no readable image")
        columns = ([getattr(b, name).numpy() for b in batches] for name in ("images", "labels", "sample_ids"))
        return ImageSet(*(np.concatenate(column) for column in columns))

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self.labels), size):
            part = slice(start, start + size)
            # Copies: what the object store holds is read-only, and PyTorch wants memory it may write to.
            arrays = (a[part].copy() for a in (self.images, self.labels, self.sample_ids))
            yield Batch(*map(torch.from_numpy, arrays))


def make_candidates(
    model: nn.Module, statistics: CalibrationStatistics, settings: Sequence[QuantSetting]
) -> tuple[list[Candidate], dict[str, Amax]]:
    """Candidates in the order of `settings`, and the amax of those that are not the same as an earlier one."""
    candidates: list[Candidate] = []
    scales: dict[str, Amax] = {}
    first_with: dict[str, str] = {}
    width = len(str(max(len(settings) - 1, 0)))
    for i, setting in enumerate(settings):
        amax = setting_amax(model, statistics, setting)
        key = scale_key(model, amax, setting)
        name = f"c{i:0{width}d}"
        candidates.append(Candidate(name, setting, first_with.get(key)))
        if key not in first_with:
            first_with[key] = name
            scales[name] = {site: value.cpu().numpy() for site, value in amax.items()}
    return candidates, scales


def scale_key(model: nn.Module, amax: Mapping[str, Tensor], setting: QuantSetting) -> str:
    """Equal for settings that compute the same model: mode, bits, and amax of the sites the mode quantizes."""
    mode = MODES[setting.mode]
    digest = hashlib.sha256(f"{setting.mode} {setting.weight_bits} {setting.act_bits}".encode())
    for key, site, _ in sites_of(model):
        if mode.quantizes(site):
            digest.update(amax[key].detach().cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Resources:
    """What one trial takes, and how many run at once (None: as many as fit)."""

    threads: int = 1
    gpus: float = 0.0
    in_flight: int | None = None


@dataclass(frozen=True)
class Shared:
    """What all trials read, as references into the object store; small enough to travel with each of them."""

    run: str
    geometry: Geometry
    weights: ray.ObjectRef
    images: ray.ObjectRef
    amax: Mapping[str, ray.ObjectRef]
    settings: Mapping[str, QuantSetting]
    transform: EvalTransform
    batch_size: int
    threads: int
    use_gpu: bool


def share(
    model: nn.Module,
    geometry: Geometry,
    images: ImageSet,
    candidates: Sequence[Candidate],
    scales: Mapping[str, Amax],
    transform: EvalTransform,
    batch_size: int,
    resources: Resources,
) -> Shared:
    """Put weights, images and scales into the object store, once."""
    weights = {k: v.cpu().numpy() for k, v in model.state_dict().items() if not k.endswith("._amax")}
    return Shared(
        run=uuid.uuid4().hex,
        geometry=geometry,
        weights=ray.put(weights),
        images=ray.put(images),
        amax={name: ray.put(amax) for name, amax in scales.items()},
        settings={c.name: c.setting for c in candidates},
        transform=transform,
        batch_size=batch_size,
        threads=resources.threads,
        use_gpu=resources.gpus > 0,
    )


class Worker:
    """One process: a quantized model, built once, that takes on the scales of one candidate after the other."""

    def __init__(self, shared: Shared) -> None:
        torch.set_num_threads(shared.threads)
        self.run = shared.run
        self.device = torch.device("cuda" if shared.use_gpu else "cpu")
        model = build_model(shared.geometry)
        weights = ray.get(shared.weights)
        model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()})
        self.model = quantize_vit(model).to(self.device)
        self.images: ImageSet = ray.get(shared.images)
        self.shared = shared

    def evaluate(self, name: str) -> Evaluation:
        """One candidate on all images."""
        setting = self.shared.settings[name]
        amax = {site: torch.from_numpy(value.copy()) for site, value in ray.get(self.shared.amax[name]).items()}
        apply_amax(self.model, amax, setting.mode, setting.weight_bits, setting.act_bits)
        with frozen_weights(self.model):
            return evaluate(self.model, self.images.batches(self.shared.batch_size), self._prepare)

    def _prepare(self, images: Tensor) -> Tensor:
        return self.shared.transform.normalize(images.to(self.device))


_worker: Worker | None = None  # of this process; Tune reuses processes, so it outlives a trial


def _trial(config: dict[str, Any], shared: Shared) -> None:
    """What a Tune worker runs for one candidate."""
    global _worker
    start = time.perf_counter()
    if _worker is None or _worker.run != shared.run:
        _worker = Worker(shared)
    evaluation = _worker.evaluate(config["candidate"])
    tune.report(
        {
            "candidate": config["candidate"],
            "top1_correct": evaluation.top1_correct,
            "correct": np.packbits(evaluation.correct).tobytes(),
            "correct5": np.packbits(evaluation.correct5).tobytes(),
            "seconds": time.perf_counter() - start,
        }
    )


class _Collector(tune.Callback):
    """Hands every result to the driver as it arrives."""

    def __init__(self, images: ImageSet, on_result: OnResult) -> None:
        self._images = images
        self._on_result = on_result

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its callbacks for its own restore, which is not used here; a live table cannot be pickled.
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        count = len(self._images.labels)
        correct, correct5 = (
            np.unpackbits(np.frombuffer(result[key], np.uint8), count=count).astype(bool)
            for key in ("correct", "correct5")
        )
        evaluation = Evaluation(self._images.sample_ids, self._images.labels, correct, correct5)
        self._on_result(result["candidate"], evaluation, result["seconds"])


def run_trials(
    shared: Shared, names: Sequence[str], images: ImageSet, resources: Resources, folder: Path, on_result: OnResult
) -> None:
    """Evaluate the named candidates as Tune trials; `on_result` sees each evaluation as soon as it is there.

    `folder` is Tune's while it works, and gone afterwards; on a cluster all nodes must see it.

    Raises InputError where no node can hold one trial, and RuntimeError where a trial failed.
    """
    require_room(resources)
    need = {"cpu": resources.threads, "gpu": resources.gpus}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, shared=shared), need),
        param_space={"candidate": tune.grid_search(list(names))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=resources.in_flight, reuse_actors=True, trial_name_creator=_trial_name
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder.absolute()),
            verbose=0,
            callbacks=[_Collector(images, on_result)],
        ),
    )
    try:
        outcome = tuner.fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # Tune's own bookkeeping; trials.jsonl is the record
    if outcome.num_errors:
        raise RuntimeError(f"{outcome.num_errors} of {len(names)} trials failed; the first: {outcome.errors[0]}")


def _trial_name(trial: Any) -> str:
    return str(trial.config["candidate"])


def require_room(resources: Resources) -> None:
    """A trial that no node can hold would wait forever: say so instead."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = [n for n in nodes if n.get("CPU", 0) >= resources.threads and n.get("GPU", 0) >= resources.gpus]
    if not fits:
        have = ", ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise InputError(
            f"trials: one needs {resources.threads} CPUs and {resources.gpus:g} GPUs, no node has them; found {have}"
        )


def bytes_of(num_images: int, size: int) -> int:
    """Memory of decoded RGB images."""
    return num_images * size * size * 3


def gigabytes(count: float) -> str:
    return f"{math.ceil(count / 1e7) / 100:.2f} GB"
