"""A look as a file: an `.npz` without pickle, with the changed weights, the loss curves, and where there are any, the
statistics."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line
from vitq_ray.base.formats import require_format, stamp
from vitq_ray.base.records import own_error
from vitq_ray.calibration.planner import Look
from vitq_ray.calibration.sensitivity import Curve, Grid, Sensitivity
from vitq_ray.calibration.statistics import CalibrationStatistics

_WEIGHT = "weight/"


def look_to_bytes(look: Look, of: Mapping[str, str]) -> bytes:
    """`of` says what was looked at, e.g. fingerprints of the model and of the images. Moments are not kept."""
    arrays: dict[str, Any] = {name: np.array(value) for name, value in stamp("look").items()}
    arrays |= {_WEIGHT + name: tensor.cpu().numpy() for name, tensor in look.weights.items()}
    if look.statistics is not None:
        arrays["statistics"] = np.frombuffer(look.statistics.to_bytes(of), np.uint8)
    if look.sensitivity is not None:
        curves = look.sensitivity.curves
        arrays["images"] = np.array(look.sensitivity.images)
        arrays["curves"] = np.array(json.dumps([[key, axis, *levels] for key, (axis, levels) in curves]))
        arrays["shapes"] = np.array([(*curve.amax.shape, 0)[:2] for curve in curves.values()], np.int64)
        arrays["amax"] = np.concatenate([curve.amax.ravel() for curve in curves.values()])
        arrays["loss"] = np.concatenate([curve.loss.ravel() for curve in curves.values()])
    buffer = io.BytesIO()
    np.savez(buffer, of=np.array(json.dumps(dict(of), sort_keys=True)), **arrays)
    return buffer.getvalue()


def look_from_bytes(data: bytes, where: str, of: Mapping[str, str]) -> Look:
    """The inverse. InputError, with `where` it is from, where it is not that, or of something else."""
    try:
        if not zipfile.is_zipfile(io.BytesIO(data)):
            raise ValueError("no archive of arrays")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        require_format("look", where, {"format": int(arrays["format"]), "vitq_ray": str(arrays["vitq_ray"])})
        there = json.loads(str(arrays["of"]))
        for name, wanted in of.items():
            if there.get(name) != wanted:
                raise own_error(where, "look", f"is at other {name} than this run's")
        weights = {
            name.removeprefix(_WEIGHT): torch.from_numpy(array)
            for name, array in arrays.items()
            if name.startswith(_WEIGHT)
        }
        statistics = None
        if "statistics" in arrays:
            statistics = CalibrationStatistics.from_bytes(arrays["statistics"].tobytes(), where, of)
        return Look(weights, statistics, _sensitivity_of(arrays) if "curves" in arrays else None)
    except InputError:
        raise
    except Exception as error:  # damaged bytes make zipfile, zlib and NumPy raise nearly anything
        raise own_error(where, "look", f"truncated or damaged ({one_line(error)[:200]})") from None


def _sensitivity_of(arrays: Mapping[str, Any]) -> Sensitivity:
    curves: dict[tuple[str, Grid], Curve] = {}
    start = 0
    for (key, axis, low, high), (rows, columns) in zip(
        json.loads(str(arrays["curves"])), arrays["shapes"].tolist(), strict=True
    ):
        shape = (rows, columns) if columns else (rows,)
        end = start + int(np.prod(shape))
        amax, loss = (arrays[name][start:end].reshape(shape) for name in ("amax", "loss"))
        curves[str(key), (axis, (low, high))] = Curve(amax, loss)
        start = end
    return Sensitivity(int(arrays["images"]), curves)
