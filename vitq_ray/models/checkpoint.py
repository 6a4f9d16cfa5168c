"""Calibrated checkpoints: `<name>_calib.pth` in FasterTransformer key names, `<name>_calib.json` beside it.

The `.pth` is a plain state dict: the weights in the order in which the INT8 engine's loader consumes them, then one
`<site>._amax` per quantizer, those that the mode leaves out included. The JSON says what it is: setting, geometry,
preprocessing, accuracy, fingerprints, seed and versions. Reading both back gives bit-identical logits.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitq_ray.base.config import Config, InputError, require_int
from vitq_ray.base.files import atomic_file, exists, one_line, read_bytes, write_json
from vitq_ray.base.formats import FORMATS, require_format
from vitq_ray.calibration.corrections import SPLIT
from vitq_ray.calibration.setting import Setting, read_setting
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.models.architecture import AMAX, Architecture, vit_pytorch_architecture
from vitq_ray.models.fastertransformer import from_fastertransformer, to_fastertransformer
from vitq_ray.models.geometry import AUTO, Geometry, build_model, named_geometry
from vitq_ray.models.load import Channels, LoadedModel, load_model
from vitq_ray.models.weights import VIT_PYTORCH, Checkpoint, State, read_checkpoint, weights_fingerprint
from vitq_ray.quant.plan import Plan, SitePlan, SiteRule, rules_of_mode
from vitq_ray.quant.sites import FC2_INPUT, MODES, sites_of_blocks
from vitq_ray.quant.vit import apply_plan, clipped, float_copy, quantize_vit, require_follows, site_weights

log = logging.getLogger(__name__)

_MOST_BYTES = 2**26  # of a sidecar
_DESCRIBED = (
    "patch_kernel",
    "width",
    "depth",
    "mlp_width",
    "num_classes",
    "pre_logits",
    "hybrid_stages",
    "hybrid_widths",
)
_DECIDES = ("mean", "std", "interpolation", "crop_pct", "setting", "geometry", "sites")  # the logits of a checkpoint


@dataclass(frozen=True)
class Sidecar(Config):
    """What `<name>_calib.json` holds.

    `calibration`, `accuracy` and `versions` are for the reader; the rest is needed to run the checkpoint. `sites` is
    what every site of the plan does apart from its amax, which the `.pth` has; `changed_weights` names, as timm does,
    those that the plan changed. `checkpoint_fingerprint` ties the `.pth` and what is said of it here together
    (`fingerprint_of`); `sidecar_fingerprint` is that of all else in the JSON.
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
    sidecar_fingerprint: str = ""
    format: int = FORMATS["sidecar"]

    def __post_init__(self) -> None:
        EvalTransform(self.geometry.img_size, self.mean, self.std, self.interpolation, self.crop_pct)  # raises
        _require_timms(self.geometry)
        if "split_seed" in self.calibration:
            require_int("calibration: split_seed", self.calibration["split_seed"], 0)
        depth = self.geometry.depth
        wanted = sites_of_blocks(depth)
        for key in sorted(set(wanted) ^ set(self.sites)):
            problem = "is missing" if key in wanted else "is not a site"
            raise InputError(f"sites: {key} {problem} of a model of {depth} blocks")

    @property
    def label(self) -> str:
        """Short name of what was calibrated, for tables."""
        if self.calibration.get("by") != BY_HAND:
            return self.setting.label
        return f"{self.setting.mode} w{self.setting.weight_bits}a{self.setting.act_bits}, scales of the file"

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
    def parse(cls, values: Mapping[str, Any], path: str, found: Architecture | None = None) -> Sidecar:
        """From the JSON of any known format; InputError naming the file otherwise.

        With `found`, what the arrays of the checkpoint show, it is compared first: nothing is made of numbers that
        the checkpoint does not bear out.
        """
        number = require_format("sidecar", path, values)
        try:
            return cls._parse(dict(values), number, found)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a sidecar of this checkpoint: {error}") from None

    @classmethod
    def _parse(cls, values: dict[str, Any], number: int, found: Architecture | None) -> Sidecar:
        if number >= 3 and sidecar_fingerprint(values) != values.get("sidecar_fingerprint"):
            raise InputError(
                "its fingerprint (sidecar_fingerprint) is that of another content: it was changed or damaged"
            )
        calibration = values.get("calibration", {})
        size = calibration.get("batch_size", 8) if isinstance(calibration, Mapping) else 8
        values["setting"] = read_setting(values.get("setting", {}), number, size)
        geometry = values.get("geometry")
        if number < 3:
            geometry = {"pool": None, **geometry} if isinstance(geometry, Mapping) else geometry
            values.setdefault("sidecar_fingerprint", "")
        values["geometry"] = Geometry.from_dict(geometry, complete=True)  # type: ignore[arg-type]
        if found is not None:
            _require_described(values["geometry"], found)
        if number == 1:
            setting, depth = values["setting"], values["geometry"].depth
            values["sites"] = rules_of_mode(MODES[setting.mode], setting.weight_bits, setting.act_bits, depth)
            values["changed_weights"] = []
        sites = values.get("sites", {})
        values["sites"] = {key: _site_rule(rule) for key, rule in sites.items()}
        return cls.from_dict({**values, "format": FORMATS["sidecar"]}, complete=True)


BY_HAND = "another program"  # `calibration.by` of a checkpoint without sidecar, whose mode and bits the user gave


def _require_timms(geometry: Geometry) -> None:
    """A geometry with a timm name must be that of the timm model."""
    if geometry.timm_name is None:
        return
    named = named_geometry(geometry.timm_name)  # raises for what timm cannot build
    for name in ("patch_size", "width", "depth", "heads", "mlp_width", "num_prefix_tokens"):
        if named is None or getattr(named, name) != getattr(geometry, name):
            raise InputError(f"geometry: {name} {getattr(geometry, name)} is not that of timm's {geometry.timm_name}")


def _require_described(geometry: Geometry, found: Architecture) -> None:
    for name in _DESCRIBED:
        if getattr(geometry, name) != getattr(found, name):
            raise InputError(
                f"geometry: {name} {getattr(geometry, name)}, but the checkpoint has {getattr(found, name)}"
            )


def _site_rule(values: Any) -> SiteRule:
    return values if isinstance(values, SiteRule) else SiteRule.from_dict(values, complete=True)


def _read_sidecar(path: str, found: Architecture) -> tuple[Sidecar, dict[str, Any]]:
    """A sidecar, and its JSON as the file has it."""
    data = read_bytes(path, "the JSON sidecar of a calibrated checkpoint", _MOST_BYTES)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a sidecar of a calibrated checkpoint: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a sidecar of a calibrated checkpoint: a {type(values).__name__}")
    return Sidecar.parse(values, path, found), values


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
    values = replace(sidecar, checkpoint_fingerprint=fingerprint).to_dict()
    write_json(path.with_suffix(".json"), {**values, "sidecar_fingerprint": sidecar_fingerprint(values)})
    return path


def sidecar_fingerprint(values: Mapping[str, Any]) -> str:
    """sha256 of everything else that a sidecar says."""
    said = {name: value for name, value in values.items() if name != "sidecar_fingerprint"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def fingerprint_of(state: Mapping[str, Tensor], described: Mapping[str, Any]) -> str:
    """sha256 of every tensor of a checkpoint and of what its sidecar's JSON says that decides its logits."""
    said = {name: described[name] for name in _DECIDES if name in described}  # format 1 has no `sites`
    text = json.dumps(said, sort_keys=True) + weights_fingerprint(state)
    return hashlib.sha256(text.encode()).hexdigest()


def fastertransformer_state(model: torch.nn.Module, plan: Plan, geometry: Geometry) -> dict[str, Tensor]:
    """Weights and `_amax` of every site, under FasterTransformer's names, in its order."""
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith(AMAX)}
    amax = {key + AMAX: value for key, value in plan.amax.items()}
    state = to_fastertransformer(weights, geometry) | amax
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


@dataclass(frozen=True)
class CalibratedModel:
    """A quantized model ready to run, the plan that it follows, and what its sidecar says of it."""

    loaded: LoadedModel
    plan: Plan
    sidecar: Sidecar

    def without_quantizers(self) -> VisionTransformer:
        """A float copy, in evaluation mode. With the correction `split` its activations clip, as the weights expect;
        even then, weights with corrections are close to those of the float model that was calibrated, and not it."""
        twin = float_copy(self.loaded.model).eval()
        if any(correction.name == SPLIT for correction in self.sidecar.setting.corrections):
            inputs = {key: site for key, site in self.plan.sites.items() if key.endswith(FC2_INPUT)}
            clips = {key: float(site.amax) for key, site in inputs.items() if site.rule.on and site.rule.signed}
            clipped(twin, clips)
        return cast(VisionTransformer, twin)


@dataclass(frozen=True)
class ByHand:
    """What the user says of a calibrated checkpoint that has no sidecar, as the old toolkit wrote them.

    Attributes:
        setting: mode and bits; the rest of it is only recorded.
        model_type, img_size, heads: as in `load_model`.
    """

    setting: Setting
    model_type: str = AUTO
    img_size: int | None = None
    heads: int | None = None


def load_calibrated(path: str, by_hand: ByHand | None = None) -> CalibratedModel:
    """Read a calibrated checkpoint and its sidecar. InputError for anything missing, extra or misshapen.

    `by_hand` stands for a sidecar that is not there.
    """
    return _calibrated(read_checkpoint(path), by_hand)


def open_checkpoint(
    path: str,
    model_type: str,
    img_size: int | None,
    heads: int | None = None,
    setting: Setting | None = None,
) -> LoadedModel | CalibratedModel:
    """A float model, or a calibrated one where the file is that, from one reading of the file.

    `model_type`, `img_size` and `heads` are as in `load_model`, for float checkpoints; with a `setting`, that of the
    user, also for calibrated ones without a sidecar.
    """
    checkpoint = read_checkpoint(path)
    if any(name.endswith(AMAX) for name in checkpoint.arrays):
        by_hand = None if setting is None else ByHand(setting, model_type, img_size, heads)
        return _calibrated(checkpoint, by_hand)
    return load_model(model_type, checkpoint, img_size, heads=heads)


def _calibrated(checkpoint: Checkpoint, by_hand: ByHand | None) -> CalibratedModel:
    path, state = checkpoint.path, checkpoint.arrays
    if checkpoint.names != VIT_PYTORCH:
        raise InputError(
            f"{path}: not a calibrated checkpoint: no array is named as {next(iter(sites_of_blocks(1)))}{AMAX}"
        )
    sidecar_path = _sidecar_path(path)
    if exists(sidecar_path):
        sidecar, described = _read_sidecar(sidecar_path, vit_pytorch_architecture(checkpoint))
    elif by_hand is None:
        raise InputError(
            f"{sidecar_path}: not found; a calibrated checkpoint needs its JSON sidecar beside it, or, if another "
            "program wrote it, --quant-mode, --wprec and --aprec"
        )
    else:
        sidecar, described = _sidecar_by_hand(checkpoint, by_hand), None
    model, weights = _float_model(checkpoint, sidecar.geometry)
    quantize_vit(model)
    sites = _sites_of(path, model, state, sidecar)
    if described is not None and fingerprint_of(state, described) != sidecar.checkpoint_fingerprint:
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


def _sidecar_path(path: str) -> str:
    stem, dot, _ = path.rpartition(".")
    return (stem if dot and "/" not in path[len(stem) :] else path) + ".json"


def _sidecar_by_hand(checkpoint: Checkpoint, by_hand: ByHand) -> Sidecar:
    """What a sidecar would say, as far as it is known. How it was calibrated is not."""
    weights = {name: tensor for name, tensor in checkpoint.arrays.items() if not name.endswith(AMAX)}
    loaded = load_model(by_hand.model_type, replace(checkpoint, arrays=weights), by_hand.img_size, heads=by_hand.heads)
    setting = by_hand.setting
    if MODES[setting.mode].asymmetric:
        raise InputError(f"{checkpoint.path}: has no sidecar, which holds the zero points of mode {setting.mode}")
    rules = rules_of_mode(MODES[setting.mode], setting.weight_bits, setting.act_bits, loaded.geometry.depth)
    log.warning(
        "%s: no sidecar: taken as %s, weights of %d bits, activations of %d bits, as given; %s",
        checkpoint.path,
        setting.mode,
        setting.weight_bits,
        setting.act_bits,
        loaded.prepared,
    )
    return Sidecar(
        setting=setting,
        geometry=loaded.geometry,
        mean=loaded.mean,
        std=loaded.std,
        interpolation=loaded.interpolation,
        weights_fingerprint=loaded.fingerprint,
        data_fingerprint="",
        seed=0,
        sites=dict(rules),
        checkpoint_fingerprint=fingerprint_of(checkpoint.arrays, {"setting": setting.to_dict()}),
        calibration={"by": BY_HAND},
    )


def _float_model(checkpoint: Checkpoint, geometry: Geometry) -> tuple[VisionTransformer, State]:
    """The float model of this geometry with the checkpoint's weights, and these under timm's names. It is compared with
    the file before it takes memory."""
    path, weights = checkpoint.path, from_fastertransformer(checkpoint.arrays, geometry)
    with torch.device("meta"):
        model = build_model(geometry)
    wanted = model.state_dict()
    for key in sorted(set(wanted) ^ set(weights)):
        problem = "is missing" if key in wanted else "is not known"
        raise InputError(f"{path}: weight {key} {problem}; the sidecar describes another architecture")
    for key, tensor in weights.items():
        found, expected = (tuple(tensor.shape), tensor.dtype), (tuple(wanted[key].shape), wanted[key].dtype)
        if found != expected:
            raise InputError(
                f"{path}: weight {key} has shape and dtype {found}, the sidecar's geometry needs {expected}"
            )
    model.load_state_dict(weights, strict=True, assign=True)
    return model, weights


def _sites_of(path: str, model: torch.nn.Module, state: Mapping[str, Tensor], sidecar: Sidecar) -> dict[str, SitePlan]:
    """The plan of every site, checked: its amax is there, of the shape of its axis, not negative."""
    rows = {key: len(weight) for key, weight in site_weights(model).items()}
    for key in sorted({k.removesuffix(AMAX) for k in state if k.endswith(AMAX)} - set(sidecar.sites)):
        raise InputError(f"{path}: {key}{AMAX} belongs to no quantizer of this model")
    sites = {}
    for key in sites_of_blocks(sidecar.geometry.depth):
        if key + AMAX not in state:
            raise InputError(f"{path}: {key}{AMAX} is missing")
        rule = sidecar.sites[key]
        shape = () if rule.axis is None else (rows.get(key, 1), 1)
        sites[key] = SitePlan(_checked_amax(path, key, state[key + AMAX], shape), rule)
    return sites


def _checked_amax(path: str, key: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape or value.dtype != torch.float32:
        found = f"shape {tuple(value.shape)}, {value.dtype}"
        raise InputError(f"{path}: {key}{AMAX} has {found}, its mode needs {shape} and float32")
    if (value < 0).any():
        raise InputError(f"{path}: {key}{AMAX} has negative values")
    return value
