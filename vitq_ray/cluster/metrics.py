"""Numbers for Ray's metrics endpoint, next to its own: Prometheus and the dashboard read them as `ray_vitq_…`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge


@dataclass(frozen=True)
class Metric:
    """One row of the table of metrics: Prometheus adds `ray_` before its name, and `_total` behind a counter's."""

    kind: type[Counter] | type[Gauge]
    description: str
    tags: tuple[str, ...] = ("run",)


METRICS: dict[str, Metric] = {
    "vitq_calibration_batches": Metric(Counter, "calibration batches observed"),
    "vitq_images_evaluated": Metric(Counter, "images evaluated, by candidate", ("run", "candidate")),
    "vitq_images_per_second": Metric(Gauge, "images evaluated per second since the race began"),
    "vitq_candidates": Metric(
        Gauge, "candidates by state: waiting, racing, beaten, tied, behind, finished", ("run", "state")
    ),
    "vitq_candidate_accuracy": Metric(
        Gauge, "top-1 of a candidate on the images it has seen, a fraction", ("run", "candidate")
    ),
    "vitq_best_accuracy": Metric(Gauge, "largest selection top-1 of the finished candidates, a fraction"),
}


class Metrics:
    """The metrics of one run; needs a running Ray."""

    def __init__(self, run: str, table: Mapping[str, Metric] = METRICS) -> None:
        self._tags = {"run": run}
        self._metrics: dict[str, Any] = {
            name: metric.kind(name, description=metric.description, tag_keys=metric.tags)
            for name, metric in table.items()
        }

    def add(self, name: str, count: float, **tags: str) -> None:
        """Count up a Counter."""
        if count:  # Ray refuses to add nothing
            self._metrics[name].inc(count, tags=self._tags | tags)

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a Gauge."""
        self._metrics[name].set(value, tags=self._tags | tags)
