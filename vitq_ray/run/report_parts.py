"""What else a run folder may hold for a report: a part may be missing, and of one that is damaged is told, no more."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from vitq_ray.base.config import InputError, is_number
from vitq_ray.calibration.setting import Technique
from vitq_ray.calibration.statistics import CalibrationStatistics
from vitq_ray.models.architecture import AMAX
from vitq_ray.models.checkpoint import Sidecar
from vitq_ray.quant.plan import SiteRule
from vitq_ray.quant.sites import LAYER_PREFIX

T = TypeVar("T")
SENSITIVITY, VERIFICATION = "sensitivity.json", "verification.json"
_SITE = re.compile(re.escape(LAYER_PREFIX) + r"\d+\..*_quantizer")  # not a pattern of several


@dataclass(frozen=True)
class SiteMap:
    """What one plan does at every site.

    Attributes:
        sites: full names, block by block.
        amax: (S,) the largest of a weight's rows.
        bits: (S,) 0 where the site is off.
        loss: (S,) forecast of what is lost; None where it is not known.
        forecasts: what `loss` is, as in `SiteTable`.
        measured: {site: KL in nats}, where it was measured.
    """

    sites: tuple[str, ...]
    amax: npt.NDArray[np.float32]
    bits: npt.NDArray[np.uint8]
    loss: npt.NDArray[np.float32] | None = None
    forecasts: str = ""
    measured: Mapping[str, float] | None = None


def tolerant(read: Callable[[], T], notes: list[str]) -> T | None:
    """What is read; None, with a note, where it is damaged."""
    try:
        return read()
    except InputError as error:
        notes.append(str(error))
        return None


def checkpoints(folder: Path) -> list[Path]:
    """Calibrated and trained checkpoints of a run, the outcome first."""
    places = (folder / "best", folder, folder / "start")
    found = [path for kind in ("qat", "calib") for place in places for path in sorted(place.glob(f"*_{kind}.pth"))]
    return [path for path in found if path.with_suffix(".json").is_file()]


def sites_of_checkpoint(path: Path) -> SiteMap:
    """amax and rules of a checkpoint's sites. InputError where it, or its sidecar, is damaged."""
    try:
        sidecar = Sidecar.parse(json.loads(path.with_suffix(".json").read_bytes()), str(path.with_suffix(".json")))
        arrays = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        rules: dict[str, SiteRule] = {key: rule for key, rule in sidecar.sites.items() if key + AMAX in arrays}
        amax = [float(arrays[key + AMAX].max()) for key in rules]
    except InputError:
        raise
    except Exception as error:  # damaged bytes make PyTorch raise nearly anything
        raise InputError(f"{path}: not a calibrated checkpoint ({type(error).__name__})") from None
    bits = [rule.bits * rule.on for rule in rules.values()]
    return SiteMap(tuple(rules), np.array(amax, np.float32), np.array(bits, np.uint8))


def statistics_of(folder: Path, transforms: tuple[Technique, ...]) -> CalibrationStatistics | None:
    """What was seen of the model under these transforms; None where nothing was kept."""
    plain, wanted = folder / "statistics.npz", ", ".join(map(str, transforms))
    if not transforms and plain.is_file():
        return CalibrationStatistics.from_bytes(plain.read_bytes(), str(plain))
    for path in sorted(folder.glob("look-*.npz")):
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                same = json.loads(str(file["of"])).get("transforms") == wanted
                data = file["statistics"].tobytes() if same and "statistics" in file.files else None
        except Exception as error:  # as above
            raise InputError(f"{path}: truncated or damaged ({type(error).__name__})") from None
        if data is not None:
            return CalibrationStatistics.from_bytes(data, str(path))
    return None


def measured_sites(folder: Path, setting: Mapping[str, Any] | None = None) -> dict[str, float] | None:
    """{site: measured KL in nats} of a sensitivity.json, if there is one. InputError where it is of another setting.

    They are numbers, or objects with a `kl`, under the names of sites, wherever these stand in it. What does not fit is
    passed over.
    """
    path = folder / SENSITIVITY
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        there = values.get("setting") if isinstance(values, dict) else None
        found = dict(_numbers_of_sites(values))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({type(error).__name__})") from None
    if None not in (setting, there) and there != setting:
        raise InputError(f"{path}: of another setting than the one shown")
    return found or None


def _numbers_of_sites(values: Any) -> Iterator[tuple[str, float]]:
    if isinstance(values, list):
        for row in values:
            site = row.get("site", row.get("name")) if isinstance(row, dict) else None
            yield from _numbers_of_sites({site: row} if isinstance(site, str) else row)
    elif isinstance(values, dict):
        for key, value in values.items():
            number: Any = value.get("kl") if isinstance(value, dict) else value
            full = key if key.startswith(LAYER_PREFIX) else LAYER_PREFIX + key
            if _SITE.fullmatch(full) and is_number(number):
                yield full, float(number)
            else:
                yield from _numbers_of_sites(value)


def verification_of(folder: Path) -> Mapping[str, Any] | None:
    """verification.json of an export into this folder, or one below it."""
    for path in (folder / VERIFICATION, *sorted(folder.glob(f"*/{VERIFICATION}"))):
        if path.is_file():
            try:
                values = json.loads(path.read_bytes())
            except ValueError:
                raise InputError(f"{path}: not JSON") from None
            if not _is_verification(values):
                raise InputError(f"{path}: not what an export writes")
            return dict(values)
    return None


def _is_verification(values: Any) -> bool:
    if not isinstance(values, dict) or not isinstance(variants := values.get("variants"), dict):
        return False
    rows = values.get("latency") or []
    return all(isinstance(row, dict) for row in variants.values()) and (
        isinstance(rows, list)
        and all(isinstance(row, dict) and {"variant", "batch", "ms_per_image"} <= row.keys() for row in rows)
    )


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file such as epochs.jsonl, without the first line, which says its format, and half a last one."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError:
        raise InputError(f"{path}: not lines of JSON") from None
    return [row for row in rows if isinstance(row, dict) and "format" not in row]
