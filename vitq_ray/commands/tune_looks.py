"""The looks of a search: what its settings need to have seen of the model, one look for each set of transforms.

calibration images ──► float pass, and on a few of them gradients ──► statistics.npz, look-N.npz ──► Planner
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from vitq_ray.base.cpus import available_cpus
from vitq_ray.base.files import atomic_file
from vitq_ray.base.records import checked, own_error
from vitq_ray.calibration.look_files import look_from_bytes, look_to_bytes
from vitq_ray.calibration.planner import Look, Needs, Planner, Transforms, images_needed, look_at, needs_of
from vitq_ray.calibration.sensitivity import images_to_look_at
from vitq_ray.calibration.statistics import CalibrationStatistics
from vitq_ray.cluster.workers import torch_threads
from vitq_ray.commands.passes import Workers, looking
from vitq_ray.commands.screen import Screen
from vitq_ray.commands.tune_job import TuneJob, calibrated_on
from vitq_ray.measure.calibration import Collect, calibration_pass, first_images
from vitq_ray.quant.vit import tensor_keys
from vitq_ray.run.folder import RunFolder, record_bad_images


def planner_of(job: TuneJob, folder: RunFolder, on_batch: Callable[[], None], screen: Screen) -> Planner:
    """Whatever turns the settings of the search into plans; what a resumed run has seen is read from its folder."""
    images = _LazyImages(job)
    looks: dict[Transforms, Look] = {}
    with torch_threads(available_cpus()):  # nothing else runs
        for index, (transforms, needs) in enumerate(needs_of(job.settings_to_come, job.loaded.geometry.depth).items()):
            looks[transforms] = without_moments(_look(job, folder, index, transforms, needs, images, on_batch, screen))
    record_bad_images(folder.path, list(job.bad_images))  # a resumed search does not read these images again
    return Planner(job.model, looks, images, job.options.seed)


def without_moments(look: Look) -> Look:
    """As large as the weights. A resumed search has none, so that others compute them in the same way: the sums of
    workers are rounded otherwise, and corrections round weights up or down by them."""
    sensitivity = look.sensitivity
    return look if sensitivity is None else replace(look, sensitivity=replace(sensitivity, moments=None))


class _LazyImages:
    """The first calibration images as the model takes them, (B, 3, S, S), read when somebody asks."""

    def __init__(self, job: TuneJob) -> None:
        self._job = job
        self._images: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._images is None:
            job, size = self._job, self._job.options.calib_batchsz
            count = images_needed(job.model, job.settings_to_come, size * job.snapshots[-1])
            job = replace(job, bad_images=[])  # those of the pass count
            self._images = first_images(job.stream(job.calib, job.splits.calibration, size), job.to_input, count)
        return self._images


def _look(
    job: TuneJob,
    folder: RunFolder,
    index: int,
    transforms: Transforms,
    needs: Needs,
    images: Callable[[], Tensor],
    on_batch: Callable[[], None],
    screen: Screen,
) -> Look:
    path, of = folder.path / f"look-{index}.npz", {**calibrated_on(job), "transforms": ", ".join(map(str, transforms))}
    plain = not transforms and not needs.grids  # as searches have always begun: statistics.npz is all there is
    if plain and folder.statistics.exists():
        return Look({}, read_statistics(job, folder), None)
    if path.exists():
        return _read(path, of, needs)

    def track(parts: Sequence[int]) -> Iterable[int]:
        return screen.track(parts, len(parts), "gradients")

    with looking(_workers(job), job.transform, bool(needs.grids)) as how:

        def collect(model: nn.Module, kinds: tuple[str, ...]) -> CalibrationStatistics:
            return statistics_of(job, model, kinds, on_batch, screen, how.collect)

        shown = None if plain else images()[: images_to_look_at(job.model)]
        look = look_at(job.model, transforms, needs, shown, collect, job.options.seed, track, how.spread)
    if plain:
        assert look.statistics is not None
        folder.write_statistics(look.statistics, calibrated_on(job))
    else:
        with atomic_file(path) as stream:
            stream.write(look_to_bytes(look, of))
    return look


def _read(path: Path, of: dict[str, str], needs: Needs) -> Look:
    look = look_from_bytes(checked(path, "look", path.read_bytes), str(path), of)
    curves = {} if look.sensitivity is None else look.sensitivity.curves
    if any((key, grid) not in curves for key, grids in needs.grids.items() for grid in grids):
        raise own_error(path, "look", "was not at all the grids that this search needs")
    return look


def _workers(job: TuneJob) -> Workers:
    options = job.options
    count = options.num_workers if options.num_workers > 1 else None
    return Workers(count, options.threads_per_trial, job.resources.gpus)


def statistics_of(
    job: TuneJob,
    model: nn.Module,
    kinds: tuple[str, ...],
    on_batch: Callable[[], None],
    screen: Screen,
    collect: Collect,
) -> CalibrationStatistics:
    """Of all calibration images, with a snapshot at every batch count of the space."""
    size, count = job.options.calib_batchsz, job.snapshots[-1]
    shown = screen.track(job.stream(job.calib, job.splits.calibration, size), count, "calibrate")
    args = (model, shown, size, job.snapshots, job.to_input, collect, on_batch, kinds, job.bad_images)
    with torch_threads(job.options.threads_per_trial):  # as workers do
        return calibration_pass(*args).statistics


def read_statistics(job: TuneJob, folder: RunFolder) -> CalibrationStatistics:
    """Those of the run's folder. InputError where they are damaged, of something else, or not all that is needed."""
    statistics = folder.read_statistics(calibrated_on(job))
    if statistics.keys != tensor_keys(job.model) or not set(job.snapshots) <= set(statistics.snapshots):
        problem = "are not of the tensors and batches that this search needs"
        raise own_error(folder.statistics, "statistics", problem)
    return statistics
