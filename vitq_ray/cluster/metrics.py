"""Numbers for Ray's metrics endpoint, next to its own: Prometheus and the dashboard read them as `ray_vitq_…`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge


@dataclass(frozen=True)
class RayMetric:
    """One row of the table of metrics: Prometheus adds `ray_` before its name, and `_total` behind a counter's."""

    kind: type[Counter] | type[Gauge]
    description: str
    tags: tuple[str, ...] = ("run",)


RAY_METRICS: dict[str, RayMetric] = {
    "vitq_calibration_batches": RayMetric(Counter, "calibration batches observed"),
    "vitq_images_evaluated": RayMetric(Counter, "images evaluated, by candidate", ("run", "candidate")),
    "vitq_images_per_second": RayMetric(Gauge, "images evaluated per second since the race began"),
    "vitq_candidates": RayMetric(
        Gauge, "candidates by state: waiting, racing, beaten, tied, behind, finished", ("run", "state")
    ),
    "vitq_candidate_accuracy": RayMetric(
        Gauge, "top-1 of a candidate on the images it has seen, a fraction", ("run", "candidate")
    ),
    "vitq_candidate_kl": RayMetric(
        Gauge, "mean KL to the float model of a candidate on the images it has seen, nats", ("run", "candidate")
    ),
    "vitq_best_accuracy": RayMetric(Gauge, "selection top-1 of the best finished candidate, a fraction"),
    "vitq_best_kl": RayMetric(Gauge, "selection mean KL to the float model of the best finished candidate, nats"),
    "vitq_qat_epoch": RayMetric(Gauge, "epoch of QAT"),
    "vitq_qat_step": RayMetric(Gauge, "step of QAT, over all epochs"),
    "vitq_qat_loss": RayMetric(Gauge, "training loss of the last step"),
    "vitq_qat_images_per_second": RayMetric(Gauge, "training speed of the last step"),
    "vitq_qat_selection_top1": RayMetric(Gauge, "top-1 on the selection images after the last epoch, a fraction"),
}

CANDIDATE_GAUGES = {"correct": "vitq_candidate_accuracy", "kl": "vitq_candidate_kl"}  # of means of `METRICS`
BEST_GAUGES = {"correct": "vitq_best_accuracy", "kl": "vitq_best_kl"}


class Metrics:
    """The metrics of one run; needs a running Ray. Each is made when it is first used."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._metrics: dict[str, Any] = {}

    def add(self, name: str, count: float, **tags: str) -> None:
        """Count up a Counter."""
        if count:  # Ray refuses to add nothing
            self._metric(name).inc(count, tags=self._tags(tags))

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a Gauge."""
        self._metric(name).set(value, tags=self._tags(tags))

    def _tags(self, tags: dict[str, str]) -> dict[str, str]:
        """Ray takes ASCII only: other characters, of a run's folder, are escaped as Python does."""
        return {key: ascii(text)[1:-1] for key, text in ({"run": self._run} | tags).items()}

    def _metric(self, name: str) -> Any:
        if name not in self._metrics:
            row = RAY_METRICS[name]
            self._metrics[name] = row.kind(name, description=row.description, tag_keys=row.tags)
        return self._metrics[name]
