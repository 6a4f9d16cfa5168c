"""Calibrated checkpoints: `<name>_calib.pth` in FasterTransformer key names, `<name>_calib.json` beside it.

The `.pth` is a plain state dict: the weights in the order in which the INT8 engine's loader consumes them, then one
`<site>._amax` per quantizer, those that the mode leaves out included. The JSON says what it is: setting, geometry,
preprocessing, accuracy, fingerprints, seed and versions. Reading both back gives bit-identical logits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitq_ray.base.config import Config, InputError, QuantSetting
from vitq_ray.base.files import atomic_file, exists, read_bytes, write_json
from vitq_ray.models.fastertransformer import from_fastertransformer, is_fastertransformer, to_fastertransformer
from vitq_ray.models.geometry import Geometry, build_model, named_geometry
from vitq_ray.models.load import Channels, LoadedModel
from vitq_ray.models.weights import read_state, weights_fingerprint
from vitq_ray.quant.sites import MODES, WEIGHT
from vitq_ray.quant.vit import apply_amax, quant_blocks, quantize_vit, sites_of

_FORMAT = 1
_AMAX = "._amax"


@dataclass(frozen=True)
class Sidecar(Config):
    """What `<name>_calib.json` holds.

    `calibration`, `accuracy` and `versions` are for the reader; the rest is needed to run the checkpoint.
    `checkpoint_fingerprint` ties the `.pth` and what is said of it here together (`fingerprint_of`).
    """

    setting: QuantSetting
    geometry: Geometry
    mean: Channels
    std: Channels
    interpolation: str
    weights_fingerprint: str
    data_fingerprint: str
    seed: int
    crop_pct: float | None = None
    checkpoint_fingerprint: str = ""
    calibration: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = _FORMAT

    def __post_init__(self) -> None:
        if self.format != _FORMAT:
            raise InputError(f"checkpoint sidecar: format {self.format} found, {_FORMAT} expected")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(f"mean, std: expected three numbers each, std > 0, got {self.mean} and {self.std}")
        if self.geometry.timm_name is not None:
            named_geometry(str(self.geometry.timm_name))  # raises for what timm cannot build

    @classmethod
    def read(cls, path: str) -> Sidecar:
        """Parse and validate a sidecar; InputError naming the file otherwise."""
        try:
            values = dict(json.loads(read_bytes(path, "the JSON sidecar of a calibrated checkpoint")))
            values["setting"] = QuantSetting.from_dict(values.get("setting", {}), complete=True)
            values["geometry"] = Geometry.from_dict(values.get("geometry", {}), complete=True)
            for key in ("mean", "std"):
                values[key] = tuple(map(float, values.get(key, ())))
            return cls.from_dict(values, complete=True)
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: not a sidecar of a calibrated checkpoint: {error}") from None


def save_calibrated(folder: Path, name: str, model: torch.nn.Module, sidecar: Sidecar, suffix: str = "calib") -> Path:
    """Write `<name>_<suffix>.pth` and `.json`; returns the path of the `.pth`. The sidecar comes last."""
    path = folder / f"{name}_{suffix}.pth"
    state = fastertransformer_state(model, sidecar.geometry)
    sidecar = dataclasses.replace(sidecar, checkpoint_fingerprint=fingerprint_of(state, sidecar))
    with atomic_file(path) as stream:
        torch.save(state, stream)
    write_json(path.with_suffix(".json"), sidecar.to_dict())
    return path


def fingerprint_of(state: Mapping[str, Tensor], sidecar: Sidecar) -> str:
    """sha256 of every tensor of a checkpoint and of what the sidecar says that decides its logits."""
    said = {name: getattr(sidecar, name) for name in ("mean", "std", "interpolation", "crop_pct")}
    said |= {"setting": sidecar.setting.to_dict(), "geometry": sidecar.geometry.to_dict()}
    text = json.dumps(said, sort_keys=True) + weights_fingerprint(state)
    return hashlib.sha256(text.encode()).hexdigest()


def fastertransformer_state(model: torch.nn.Module, geometry: Geometry) -> dict[str, Tensor]:
    """Weights and `_amax` of every site of a quantized model, under FasterTransformer's names, in its order."""
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith(_AMAX)}
    amax = {key + _AMAX: quantizer.amax for key, _, quantizer in sites_of(model)}
    state = to_fastertransformer(weights, geometry) | amax
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


@dataclass(frozen=True)
class CalibratedModel:
    """A quantized model ready to run, and what its sidecar says of it."""

    loaded: LoadedModel
    sidecar: Sidecar


def is_calibrated(path: str) -> bool:
    """Whether the file at `path` is a checkpoint in FasterTransformer key names."""
    return not path.endswith((".npz", ".safetensors")) and is_fastertransformer(read_state(path))


def load_calibrated(path: str) -> CalibratedModel:
    """Read a calibrated checkpoint and its sidecar. InputError for anything missing, extra or misshapen."""
    stem, dot, _ = path.rpartition(".")
    sidecar_path = (stem if dot and "/" not in path[len(stem) :] else path) + ".json"
    if not exists(sidecar_path):
        raise InputError(f"{sidecar_path}: not found; a calibrated checkpoint needs its JSON sidecar beside it")
    sidecar = Sidecar.read(sidecar_path)
    state = read_state(path)
    model = quantize_vit(build_model(sidecar.geometry))
    _load_weights(path, model, from_fastertransformer(state, sidecar.geometry))
    setting = sidecar.setting
    amax = _amax_of(path, model, state, setting)
    if fingerprint_of(state, sidecar) != sidecar.checkpoint_fingerprint:
        raise InputError(f"{path}: is not the checkpoint that {sidecar_path} describes; one of the two was changed")
    apply_amax(model, amax, setting.mode, setting.weight_bits, setting.act_bits)
    loaded = LoadedModel(
        model=model.eval(),
        geometry=sidecar.geometry,
        mean=sidecar.mean,
        std=sidecar.std,
        interpolation=sidecar.interpolation,
        fingerprint=sidecar.weights_fingerprint,
    )
    return CalibratedModel(loaded, sidecar)


def _load_weights(path: str, model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith(_AMAX)}
    for key in sorted(set(wanted) ^ set(weights)):
        problem = "is missing" if key in wanted else "is not known"
        raise InputError(f"{path}: weight {key} {problem}; the sidecar describes another architecture")
    for key, tensor in weights.items():
        if tensor.shape != wanted[key].shape:
            found, expected = tuple(tensor.shape), tuple(wanted[key].shape)
            raise InputError(f"{path}: weight {key} has shape {found}, the sidecar's geometry needs {expected}")
    model.load_state_dict(dict(weights), strict=False)


def _amax_of(
    path: str, model: torch.nn.Module, state: Mapping[str, Tensor], setting: QuantSetting
) -> dict[str, Tensor]:
    """{site name: amax} of the file, checked: every site present, of the mode's shape, not negative."""
    rows = {name: len(weight) for name, weight in quant_blocks(model)[0].weights().items()}
    known = {key for key, _, _ in sites_of(model)}
    for key in sorted({k.removesuffix(_AMAX) for k in state if k.endswith(_AMAX)} - known):
        raise InputError(f"{path}: {key}{_AMAX} belongs to no quantizer of this model")
    amax = {}
    for key, site, _ in sites_of(model):
        if key + _AMAX not in state:
            raise InputError(f"{path}: {key}{_AMAX} is missing")
        per_channel = site.family == WEIGHT and MODES[setting.mode].weight_axis is not None
        amax[key] = _checked_amax(path, key, state[key + _AMAX], (rows[site.name], 1) if per_channel else ())
    return amax


def _checked_amax(path: str, key: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape:
        raise InputError(f"{path}: {key}{_AMAX} has shape {tuple(value.shape)}, its mode needs {shape}")
    if (value < 0).any():
        raise InputError(f"{path}: {key}{_AMAX} has negative values")
    return value
