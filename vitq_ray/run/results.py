"""result.json, the same for all scripts: how it is made, written and read.

    images, top1_correct, …, kl, agreement, …    what the script was run for: counts and means of `measure.metrics`;
                                                 without labels no accuracy
    format, script, versions                     which version of what wrote it
    options, setting, weights_fingerprint, data_fingerprint, bad_images, seconds
    and what is the script's own, such as `candidates` of a search or `epochs` of a training

Files of format 1 do not all say which script wrote them; `script_of` tells from what is its own.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from vitq_ray import __version__
from vitq_ray.base.formats import FORMATS
from vitq_ray.base.records import NUMBER, Schema, read_sealed, require_whole, write_sealed
from vitq_ray.data.samples import SampleIndex
from vitq_ray.measure.evaluation import Counts, Evaluation

CALIBRATION, EVALUATION, SEARCH, TRAINING = "calib", "evaluate", "tune_calib", "qat"  # names of the scripts
EXPORT, SENSITIVITY = "export", "sensitivity"
RESULT = "result.json"
_FIDELITY: Schema = {"images": int, "kl_total": NUMBER, "agreed": int}
_TOP1: Schema = {"images": int, "top1_correct": int}
_PARTS: Schema = dict.fromkeys(("selection", "report", "val"), _TOP1)
SCHEMAS: dict[str, Schema] = {  # what a script's own result has beside the counts
    SEARCH: {"winner": {"setting": dict}, "candidates": dict},
    TRAINING: {"best_epoch": int, **dict.fromkeys(("float", "ptq", "qat"), _PARTS)},
}


def result_of(
    script: str,
    counts: Evaluation | Counts,
    *,
    options: Mapping[str, Any],
    setting: Mapping[str, Any] | None,
    weights_fingerprint: str,
    data_fingerprint: str,
    bad_images: Iterable[tuple[str, str]],
    seconds: Mapping[str, float],
    **own: Any,
) -> dict[str, Any]:
    """The contents of result.json.

    Args:
        counts: what stands at the top: of the checkpoint that was calibrated, evaluated, found or trained.
        setting: of that checkpoint, as JSON; None for a float one.
        bad_images: (address, reason) of broken images, however often each was met.
        own: what only this script has.
    """
    return {
        "format": FORMATS["result"],
        "script": script,
        **counts.summary(),
        "setting": setting,
        **own,
        "bad_images": bad_image_rows(bad_images),
        "options": dict(options),
        "weights_fingerprint": weights_fingerprint,
        "data_fingerprint": data_fingerprint,
        "versions": versions(),
        "seconds": dict(seconds),
    }


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    write_sealed(folder / RESULT, result)


def read_result(folder: Path) -> dict[str, Any]:
    """result.json of a folder, of any format up to ours; `format` and `script` are always there.

    Raises:
        InputError: where there is none, it is damaged, or a newer version wrote it.
    """
    path = folder / RESULT
    values = read_sealed(path, "result", {})
    without_labels = "kl_total" in values and "top1_correct" not in values
    require_whole(path, "result", values, _FIDELITY if without_labels else _TOP1)
    script = script_of(values)
    require_whole(path, "result", values, SCHEMAS.get(script, {}))
    return {**values, "script": script}


def script_of(result: Mapping[str, Any]) -> str:
    """Which script wrote a result.json."""
    if "script" in result:
        return str(result["script"])
    own = {"candidates": SEARCH, "best_epoch": TRAINING, "checkpoint": EVALUATION}
    return next((script for key, script in own.items() if key in result), CALIBRATION)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "timm", "numpy", "pillow")
    own = {"python": platform.python_version(), "vitq_ray": __version__}
    return own | {name: metadata.version(name) for name in names}


def bad_image_rows(bad_images: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Every broken image once, however often it was met."""
    return [{"image": name, "reason": reason} for name, reason in dict(bad_images).items()]


def left_out_rows(splits: Mapping[str, SampleIndex]) -> dict[str, list[dict[str, Any]]]:
    """{split: what of it is no image, by reason: how many, and the first}."""
    return {split: [asdict(row) for row in index.left_out] for split, index in splits.items() if index.left_out}


class Stopwatch:
    """Seconds per named stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)
