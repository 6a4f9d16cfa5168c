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

from vitq_ray.base.config import Config, InputError
from vitq_ray.base.files import atomic_file, exists, read_bytes, write_json
from vitq_ray.base.formats import FORMATS, require_format
from vitq_ray.calibration.setting import Setting, read_setting
from vitq_ray.models.fastertransformer import from_fastertransformer, is_fastertransformer, to_fastertransformer
from vitq_ray.models.geometry import Geometry, build_model, named_geometry
from vitq_ray.models.load import Channels, LoadedModel, load_model
from vitq_ray.models.weights import read_checkpoint, read_state, weights_fingerprint
from vitq_ray.quant.plan import Plan, SitePlan, SiteRule, rules_of_mode
from vitq_ray.quant.sites import MODES, sites_of_blocks
from vitq_ray.quant.vit import apply_plan, quantize_vit, require_follows, site_weights

_AMAX = "._amax"
_DECIDES = ("mean", "std", "interpolation", "crop_pct", "setting", "geometry", "sites")  # the logits of a checkpoint


@dataclass(frozen=True)
class Sidecar(Config):
    """What `<name>_calib.json` holds.

    `calibration`, `accuracy` and `versions` are for the reader; the rest is needed to run the checkpoint. `sites` is
    what every site of the plan does apart from its amax, which the `.pth` has; `changed_weights` names, as timm does,
    those that the plan changed. `checkpoint_fingerprint` ties the `.pth` and what is said of it here together
    (`fingerprint_of`).
    """

    setting: Setting
    geometry: Geometry
    mean: Channels
    std: Channels
    interpolation: str
    weights_fingerprint: str
    data_fingerprint: str
    seed: int
    sites: dict[str, SiteRule]
    changed_weights: tuple[str, ...] = ()
    crop_pct: float | None = None
    checkpoint_fingerprint: str = ""
    calibration: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMATS["sidecar"]

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(f"mean, std: expected three numbers each, std > 0, got {self.mean} and {self.std}")
        if self.geometry.timm_name is not None:
            named_geometry(str(self.geometry.timm_name))  # raises for what timm cannot build
        wanted = sites_of_blocks(self.geometry.depth)
        for key in sorted(set(wanted) ^ set(self.sites)):
            problem = "is missing" if key in wanted else "is not a site"
            raise InputError(f"sites: {key} {problem} of a model of {self.geometry.depth} blocks")

    @staticmethod
    def of(
        loaded: LoadedModel,
        setting: Setting,
        plan: Plan,
        data_fingerprint: str,
        seed: int,
        crop_pct: float | None,
        calibration: Mapping[str, Any],
        accuracy: Mapping[str, Any],
        versions: Mapping[str, str],
    ) -> Sidecar:
        """What is said of a plan for this model. `data_fingerprint` is that of the images it was judged on."""
        return Sidecar(
            setting=setting,
            geometry=loaded.geometry,
            mean=loaded.mean,
            std=loaded.std,
            interpolation=loaded.interpolation,
            weights_fingerprint=loaded.fingerprint,
            data_fingerprint=data_fingerprint,
            seed=seed,
            sites=plan.rules,
            changed_weights=tuple(plan.weights),
            crop_pct=crop_pct,
            calibration=dict(calibration),
            accuracy=dict(accuracy),
            versions=dict(versions),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        sites = {key: rule.to_dict() for key, rule in self.sites.items()}
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**own, "setting": self.setting.to_dict(), "geometry": self.geometry.to_dict(), "sites": sites}

    @classmethod
    def parse(cls, values: Mapping[str, Any], path: str) -> Sidecar:
        """From the JSON of any known format; InputError naming the file otherwise."""
        try:
            found = require_format("sidecar", path, values)
            values = dict(values)
            calibration = values.get("calibration", {})
            size = calibration.get("batch_size", 8) if isinstance(calibration, Mapping) else 8
            values["setting"] = read_setting(values.get("setting", {}), found, size)
            values["geometry"] = Geometry.from_dict(values.get("geometry", {}), complete=True)
            for key in ("mean", "std"):
                values[key] = tuple(map(float, values.get(key, ())))
            if found == 1:
                setting, depth = values["setting"], values["geometry"].depth
                values["sites"] = rules_of_mode(MODES[setting.mode], setting.weight_bits, setting.act_bits, depth)
                values["changed_weights"] = []
            sites = values.get("sites", {})
            values["sites"] = {key: _site_rule(rule) for key, rule in sites.items()}
            return cls.from_dict({**values, "format": FORMATS["sidecar"]}, complete=True)
        except (ValueError, TypeError, AttributeError) as error:
            if str(error).startswith(f"{path}: "):
                raise
            raise InputError(f"{path}: not a sidecar of a calibrated checkpoint: {error}") from None


def _site_rule(values: Any) -> SiteRule:
    return values if isinstance(values, SiteRule) else SiteRule.from_dict(values, complete=True)


def _read_sidecar(path: str) -> tuple[Sidecar, dict[str, Any]]:
    """A sidecar, and its JSON as the file has it."""
    data = read_bytes(path, "the JSON sidecar of a calibrated checkpoint")
    try:
        values = json.loads(data)
    except ValueError as error:
        raise InputError(f"{path}: not a sidecar of a calibrated checkpoint: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a sidecar of a calibrated checkpoint: a {type(values).__name__}")
    return Sidecar.parse(values, path), values


def save_calibrated(
    folder: Path, name: str, model: torch.nn.Module, plan: Plan, sidecar: Sidecar, suffix: str = "calib"
) -> Path:
    """Write `<name>_<suffix>.pth` and `.json`; returns the path of the `.pth`. The sidecar comes last.

    Raises ValueError unless `model` follows `plan`, whose weights and scales are saved.
    """
    require_follows(model, plan)
    path = folder / f"{name}_{suffix}.pth"
    state = fastertransformer_state(model, plan, sidecar.geometry)
    fingerprint = fingerprint_of(state, json.loads(json.dumps(sidecar.to_dict())))
    with atomic_file(path) as stream:
        torch.save(state, stream)
    sidecar = dataclasses.replace(sidecar, checkpoint_fingerprint=fingerprint)
    write_json(path.with_suffix(".json"), sidecar.to_dict())
    return path


def fingerprint_of(state: Mapping[str, Tensor], described: Mapping[str, Any]) -> str:
    """sha256 of every tensor of a checkpoint and of what its sidecar's JSON says that decides its logits."""
    said = {name: described[name] for name in _DECIDES if name in described}  # format 1 has no `sites`
    text = json.dumps(said, sort_keys=True) + weights_fingerprint(state)
    return hashlib.sha256(text.encode()).hexdigest()


def fastertransformer_state(model: torch.nn.Module, plan: Plan, geometry: Geometry) -> dict[str, Tensor]:
    """Weights and `_amax` of every site, under FasterTransformer's names, in its order."""
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith(_AMAX)}
    amax = {key + _AMAX: value for key, value in plan.amax.items()}
    state = to_fastertransformer(weights, geometry) | amax
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


@dataclass(frozen=True)
class CalibratedModel:
    """A quantized model ready to run, the plan that it follows, and what its sidecar says of it."""

    loaded: LoadedModel
    plan: Plan
    sidecar: Sidecar


def load_calibrated(path: str) -> CalibratedModel:
    """Read a calibrated checkpoint and its sidecar. InputError for anything missing, extra or misshapen."""
    return _calibrated(path, read_state(path))


def open_checkpoint(path: str, model_type: str, img_size: int | None) -> LoadedModel | CalibratedModel:
    """A float model, or a calibrated one where the file is that, from one reading of the file.

    `model_type` and `img_size` are as in `load_model`, for float checkpoints.
    """
    checkpoint = read_checkpoint(path)
    if is_fastertransformer(checkpoint.arrays):
        return _calibrated(path, checkpoint.arrays)
    return load_model(model_type, checkpoint, img_size)


def _calibrated(path: str, state: Mapping[str, Tensor]) -> CalibratedModel:
    stem, dot, _ = path.rpartition(".")
    sidecar_path = (stem if dot and "/" not in path[len(stem) :] else path) + ".json"
    if not exists(sidecar_path):
        raise InputError(f"{sidecar_path}: not found; a calibrated checkpoint needs its JSON sidecar beside it")
    sidecar, described = _read_sidecar(sidecar_path)
    model = quantize_vit(build_model(sidecar.geometry))
    weights = from_fastertransformer(state, sidecar.geometry)
    _load_weights(path, model, weights)
    sites = _sites_of(path, model, state, sidecar)
    if fingerprint_of(state, described) != sidecar.checkpoint_fingerprint:
        raise InputError(f"{path}: is not the checkpoint that {sidecar_path} describes; one of the two was changed")
    for name in sidecar.changed_weights:
        if name not in weights:
            raise InputError(f"{path}: has no weight {name}, which {sidecar_path} says was changed")
    plan = Plan(sidecar.setting.mode, sites, {name: weights[name].clone() for name in sidecar.changed_weights})
    apply_plan(model, plan)
    loaded = LoadedModel(
        model=model.eval(),
        geometry=sidecar.geometry,
        mean=sidecar.mean,
        std=sidecar.std,
        interpolation=sidecar.interpolation,
        fingerprint=sidecar.weights_fingerprint,
    )
    return CalibratedModel(loaded, plan, sidecar)


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


def _sites_of(path: str, model: torch.nn.Module, state: Mapping[str, Tensor], sidecar: Sidecar) -> dict[str, SitePlan]:
    """The plan of every site, checked: its amax is there, of the shape of its axis, not negative."""
    rows = {key: len(weight) for key, weight in site_weights(model).items()}
    for key in sorted({k.removesuffix(_AMAX) for k in state if k.endswith(_AMAX)} - set(sidecar.sites)):
        raise InputError(f"{path}: {key}{_AMAX} belongs to no quantizer of this model")
    sites = {}
    for key in sites_of_blocks(sidecar.geometry.depth):
        if key + _AMAX not in state:
            raise InputError(f"{path}: {key}{_AMAX} is missing")
        rule = sidecar.sites[key]
        shape = () if rule.axis is None else (rows.get(key, 1), 1)
        sites[key] = SitePlan(_checked_amax(path, key, state[key + _AMAX], shape), rule)
    return sites


def _checked_amax(path: str, key: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape:
        raise InputError(f"{path}: {key}{_AMAX} has shape {tuple(value.shape)}, its mode needs {shape}")
    if (value < 0).any():
        raise InputError(f"{path}: {key}{_AMAX} has negative values")
    return value
