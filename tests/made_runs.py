"""Folders of runs, made without running anything: as searches and trainings leave them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import RUN_DESCRIPTION, make_setting
from vitq_ray.calibration.histogram import Histogram, Range
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import HISTOGRAM, CalibrationStatistics
from vitq_ray.measure.evaluation import Counts
from vitq_ray.measure.metrics import pack_text
from vitq_ray.quant.sites import observed_tensors, site_key, sites_of_blocks
from vitq_ray.run.folder import RunFolder
from vitq_ray.run.image_table import ImageTable, picture, write_images
from vitq_ray.run.results import SEARCH, TRAINING, result_of
from vitq_ray.run.site_table import SiteTable, write_sites

CALIBRATORS = ("max", "mse", "entropy", "percentile 99", "percentile 99.9", "percentile 99.99", "percentile 99.999")


def grid(count: int) -> list[Setting]:
    """Settings of a full grid, and no more than `count` of them."""
    modes, batches = ("ft1", "ft2"), (2, 8, 16, 32, 64, 96, 100, 128)
    return [make_setting(m, c, n) for n in batches for m in modes for c in CALIBRATORS][:count]


@dataclass(frozen=True)
class MadeSearch:
    """What is written; the first candidate wins, the second is tied with it, every further one is worse.

    Attributes:
        finished: else it was killed before its last candidates were decided.
        names: of the classes, the folders of their images.
    """

    candidates: int = 14
    images: int = 60
    depth: int = 2
    finished: bool = True
    names: Sequence[str] = ("boot", "coat", "dress")
    labels: bool = True

    def write(self, path: Path) -> Path:
        """Everything that a search writes but its checkpoint."""
        folder = RunFolder(path)
        path.mkdir(parents=True, exist_ok=True)
        options = {
            "split_seed": 0,
            "calib_batchsz": 8,
            "objective": "fidelity",
            "data_path": "/data/<b>x</b>",
            "seed": 3,
        }
        space = {"name": "s", "choices": {"mode": ["ft1", "ft2"]}, "qat": None}
        folder.write_run({**RUN_DESCRIPTION, "options": options, "search_space": space})
        rng, settings = np.random.default_rng(0), grid(self.candidates)
        results = [self._results(rng, place) for place in range(len(settings))]
        folder.append(
            "float", sample_ids=list(range(self.images)), **pack_text({"correct": np.ones(self.images, bool)})
        )
        self._log(folder, settings, results)
        self._sites(path, rng)
        self._statistics(path, folder, rng)
        if self.finished:
            self._images(path, rng)
            self._result(folder, settings, results)
        return path

    def _results(self, rng: np.random.Generator, place: int) -> dict[str, Any]:
        worse = 0 if place < 2 else place
        n = self.images if place < 2 else self.images // 2
        kl = (0.01 * (1 + worse) * rng.gamma(2.0, 1.0, n)).astype(np.float32)
        flags = {name: rng.random(n) > 0.02 * worse / self.candidates for name in ("correct", "correct5", "agree")}
        kept = flags if self.labels else {"agree": flags["agree"]}
        return {**kept, "kl": kl}

    def _log(self, folder: RunFolder, settings: Sequence[Setting], results: Sequence[dict[str, Any]]) -> None:
        for place, setting in enumerate(settings):
            values = {"setting": setting.to_dict(), "predicted_noise": 0.02 * (1 + place), "same_as": None}
            folder.append("candidate", format=4, name=_name(place), **values)
        shown = len(settings) if self.finished else len(settings) // 2
        for place in range(shown):
            n, half = len(results[place]["kl"]), len(results[place]["kl"]) // 2
            for start, end in ((0, half), (half, n)):
                part = {name: values[start:end] for name, values in results[place].items()}
                where = {"name": _name(place), "start": start, "images": end - start, "seconds": 0.5}
                folder.append("chunk", **where, **pack_text(part))
            if self.finished or place < shown - 1:
                told = {"against": None if place < 2 else "c000", "wins": place, "losses": 1, "evidence": 4.0}
                verdict = "finished" if place < 2 else "beaten"
                folder.append("decision", name=_name(place), verdict=verdict, images=n, **told)

    def _sites(self, path: Path, rng: np.random.Generator) -> None:
        keys = tuple(sites_of_blocks(self.depth))
        shape = self.candidates, len(keys)
        bits = np.where(rng.random(len(keys)) < 20 / 29, 8, 0).astype(np.uint8) * np.ones(shape, np.uint8)
        loss = (rng.gamma(0.5, 1e-3, shape) * np.arange(1, self.candidates + 1)[:, None] * (bits > 0)).astype(
            np.float32
        )
        names = tuple(map(_name, range(self.candidates)))
        write_sites(path, SiteTable("predicted_kl", names, keys, loss, rng.random(shape).astype(np.float32) * 9, bits))

    def _statistics(self, path: Path, folder: RunFolder, rng: np.random.Generator) -> None:
        keys = tuple(site_key(block, tensor) for block in range(self.depth) for tensor in observed_tensors())
        seen = []
        for _ in keys:
            counts = (1e4 * np.exp(-np.arange(2048) / 150) * rng.random(2048)).astype(np.int64)
            seen.append(Histogram(0.003, counts, 6.1, counts // 2, Range(-6.1, 6.0)))
        folder.write_statistics(CalibrationStatistics(keys, (2,), {HISTOGRAM: (tuple(seen),)}, (2,)), {})

    def _images(self, path: Path, rng: np.random.Generator) -> None:
        n, classes = 4 * self.images, len(self.names)
        label, said, says = np.arange(n) % classes, np.arange(n) % classes, np.arange(n) % classes
        says[: n // 5] = (says[: n // 5] + 1) % classes
        columns = {
            "sample_id": np.arange(n),
            "label": label.astype(np.int32) if self.labels else np.full(n, -1, np.int32),
            "float_class": said.astype(np.int32),
            "quantized_class": says.astype(np.int32),
            "float_margin": rng.random(n).astype(np.float32),
            "quantized_margin": rng.random(n).astype(np.float32),
            "kl": rng.random(n).astype(np.float32),
        }
        names = tuple(f"{self.names[i]}/{place}.png" for place, i in enumerate(label.tolist()))
        pixels = rng.integers(0, 256, (224, 224, 3)).astype(np.uint8)
        write_images(path, ImageTable(columns, names, {row: picture(pixels) for row in range(min(48, n // 5))}))

    def _result(self, folder: RunFolder, settings: Sequence[Setting], results: Sequence[dict[str, Any]]) -> None:
        outcomes = ["best", "tied"] + ["beaten"] * (len(settings) - 2)
        rows = {
            _name(place): {"setting": s.to_dict(), "outcome": outcomes[place], "same_as": None, "predicted_kl": 0.1}
            for place, s in enumerate(settings)
        }
        totals = {"top1_correct": 200, "top5_correct": 230} if self.labels else {}
        counts = Counts(240, {**totals, "kl_total": 2.4, "agreed": 192})
        floats = Counts(240, {"top1_correct": 230} if self.labels else {})
        made = result_of(
            SEARCH,
            counts,
            options=folder.read_run()["options"],
            setting=settings[0].to_dict(),
            weights_fingerprint="w",
            data_fingerprint="d",
            bad_images=[],
            seconds={"start": 1.5, "trials": 80.0},
            winner={"name": "c000", "setting": settings[0].to_dict()},
            float=floats.summary(),
            candidates=rows,
            race={"alpha": 0.05, "images_evaluated": 1000, "images_of_full_evaluation": 4000},
        )
        folder.write_result(made)


def _name(place: int) -> str:
    return f"c{place:03d}"


def made_training(path: Path, finished: bool = True) -> Path:
    """A training of three epochs, as its folder is without weights."""
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path, TRAINING)
    config = {"epochs": 3, "lr": 0.01, "global_batch": 32}
    folder.write_run({**RUN_DESCRIPTION, "config": config, "options": {"seed": 1}})
    epochs = 4 if finished else 2
    rows = [{"epoch": e, "step": 10 * e, "loss": 2 / e if e else None, "best": True} for e in range(epochs)]
    for row in rows:
        row["selection"] = {"images": 100, "top1_correct": 80 + 2 * int(row["epoch"] or 0)}
    steps = [{"epoch": 1 + s // 10, "step": s, "total_steps": 30, "loss": 2.0 - s / 30} for s in range(1, 30)]
    for name, lines in (("epochs.jsonl", rows), ("steps.jsonl", steps)):
        text = "".join(json.dumps(line) + "\n" for line in [{"format": 2}, *lines])
        (path / name).write_text(text + ('{"epoch": ' if not finished else ""))
    if finished:
        sites = {key: [1.0, 1.0 + 0.1 * place] for place, key in enumerate(list(sites_of_blocks(2))[:9])}
        (path / "scales.json").write_text(json.dumps({"format": 1, "sites": sites}))
        parts = {part: Counts(100, {"top1_correct": 90}).summary() for part in ("selection", "report", "val")}
        before = {part: Counts(100, {"top1_correct": 80}).summary() for part in parts}
        result = result_of(
            TRAINING,
            Counts(100, {"top1_correct": 86}),
            options={"seed": 1},
            setting=None,
            weights_fingerprint="w",
            data_fingerprint="d",
            bad_images=[],
            seconds={"train": 30.0},
            best_epoch=3,
            float=parts,
            ptq=before,
            qat={part: Counts(100, {"top1_correct": 86}).summary() for part in parts},
        )
        folder.write_result(result)
    return path
