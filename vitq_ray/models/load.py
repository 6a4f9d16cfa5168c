"""Strict loading of a float Vision Transformer from a checkpoint.

A checkpoint is compared array by array with the model it is meant for: nothing is left random, dropped or guessed in
silence.

    path or s3://  ->  weights: Checkpoint, finite float32 arrays under the file's own names
                   ->  architecture: what their shapes say  ->  geometry: what is asked for, or `auto` (family)
                   ->  timm VisionTransformer without memory  ->  same arrays, same shapes?  ->  LoadedModel

Google's `.npz` names are translated by the table in `google`, ViT-pytorch's by that in `fastertransformer`; timm's own
`.pth` and `.safetensors` need none.

Legend: C width.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitq_ray.base.config import InputError
from vitq_ray.base.memory import machine_memory, size_text
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.models.architecture import (
    OLD_PRE_LOGITS,
    POSITIONS,
    PRE_LOGITS,
    Architecture,
    architecture_of,
    grid_side,
    require_known_layout,
    timm_architecture,
)
from vitq_ray.models.family import Family, family_of
from vitq_ray.models.fastertransformer import from_fastertransformer
from vitq_ray.models.geometry import AUTO, Geometry, auto_geometry, build_model, named_geometry
from vitq_ray.models.google import google_rules, to_google
from vitq_ray.models.weights import (
    GOOGLE,
    TIMM,
    VIT_PYTORCH,
    Checkpoint,
    State,
    read_checkpoint,
    weights_fingerprint,
)
from vitq_ray.quant.vit import require_supported

log = logging.getLogger(__name__)

Channels = tuple[float, float, float]
HALF: Channels = (0.5, 0.5, 0.5)  # Google's mean and std
_OTHERS = "DeiT, DINO, MAE: mean 0.485 0.456 0.406, std 0.229 0.224 0.225, bicubic"


@dataclass(frozen=True)
class LoadedModel:
    """A float32 model in eval mode and what its images must look like.

    `mean` and `std` are per channel of RGB in [0, 1]; `fingerprint` is `weights_fingerprint` of the model.
    """

    model: VisionTransformer
    geometry: Geometry
    mean: Channels
    std: Channels
    interpolation: str
    fingerprint: str

    @property
    def prepared(self) -> str:
        """How images are prepared, in words."""
        mean, std = (" ".join(f"{value:g}" for value in channels) for channels in (self.mean, self.std))
        return f"mean {mean}, std {std}, {self.interpolation}, no crop without --crop-pct"


def load_model(
    model_type: str,
    pretrained: str | Path | Checkpoint,
    img_size: int | None = None,
    num_classes: int | None = None,
    heads: int | None = None,
) -> LoadedModel:
    """Load a float classifier strictly.

    `model_type` is one of `GOOGLE_MODEL_TYPES` (resolution 384, the `-224` variants 224), a timm ViT name
    (timm's resolution), or `auto`, which reads geometry and resolution from the arrays of the file. Only Google's
    arrays tell their number of heads: for others `auto` takes `heads`, else assumes width // 64 and logs so. A timm
    file is taken for a timm model where `family_of` knows one; else `auto` reads only the plain layout (class token,
    biases, one norm at the end), and logs the mean, std and interpolation that it assumes.

    `pretrained` is a path or `s3://` URI of an `.npz`, `.pth` or `.safetensors`, or what `read_checkpoint` made of
    one. The classes are those of its head. Where `img_size`, in pixels, differs from the file's, position embeddings
    are resized: of timm files as timm does, of others as Google does.

    Raises InputError for an unknown name, an unreadable file, another architecture, missing, extra or
    misshapen arrays, NaN, no classifier, or a `num_classes` or `heads` that is not the file's.
    """
    named = named_geometry(model_type)
    checkpoint = pretrained if isinstance(pretrained, Checkpoint) else read_checkpoint(str(pretrained))
    require_known_layout(checkpoint)
    found = architecture_of(checkpoint)
    if num_classes not in (None, found.num_classes):
        raise InputError(f"num_classes: {num_classes}, but {checkpoint.path} has {found.num_classes} classes")
    family = family_of(checkpoint, found) if named is None and checkpoint.names == TIMM else None
    geometry = named or (family.geometry if family is not None else auto_geometry(checkpoint, found, heads))
    geometry = replace(geometry, num_classes=found.num_classes, pre_logits=found.pre_logits)
    geometry = geometry if img_size is None else replace(geometry, img_size=img_size)
    if heads not in (None, geometry.heads):
        raise InputError(f"heads: {heads} given, but {checkpoint.path} has {geometry.heads} as {geometry.model_type}")
    _require_positions_fit(geometry)
    model, geometry = _load(checkpoint, found, geometry)
    images = _prepared(checkpoint, geometry, family)
    fingerprint = weights_fingerprint(model.state_dict())
    loaded = LoadedModel(model, geometry, images.mean, images.std, images.interpolation, fingerprint)
    _tell_of_assumptions(checkpoint, loaded, family)
    return loaded


def _require_positions_fit(geometry: Geometry) -> None:
    size = 12 * geometry.num_tokens * geometry.width
    if size > machine_memory():
        raise InputError(
            f"img_size: {geometry.img_size} makes {geometry.num_tokens} tokens, whose position embeddings alone need "
            f"{size_text(size)}; this machine has {size_text(machine_memory())}"
        )


def _load(checkpoint: Checkpoint, found: Architecture, geometry: Geometry) -> tuple[VisionTransformer, Geometry]:
    """The model, and its geometry with the pooling that the file shows."""
    with torch.device("meta"):  # the file's arrays become the parameters: random ones would only cost time
        model = build_model(geometry)
        if found.averages and "fc_norm.weight" not in model.state_dict():
            geometry = replace(geometry, pool="avg")
            model = build_model(geometry)
    require_supported(model)
    asked = timm_architecture(Checkpoint(geometry.model_type, TIMM, model.state_dict()))
    asked = replace(asked, heads=geometry.heads)
    if not found.same_as(asked):
        raise InputError(f"{checkpoint.path}: another architecture, {found}; {geometry.model_type} is {asked}")
    to_state = {GOOGLE: _google_state, TIMM: _timm_state, VIT_PYTORCH: _vit_pytorch_state}[checkpoint.names]
    model.load_state_dict(to_state(checkpoint, geometry, model), strict=True, assign=True)
    return model, geometry


def _google_state(checkpoint: Checkpoint, geometry: Geometry, model: VisionTransformer) -> State:
    expected = to_google(model.state_dict(), geometry)
    arrays = {**checkpoint.arrays, POSITIONS: _resize_as_google(checkpoint, POSITIONS, geometry.grid)}
    _require_same_arrays(checkpoint.path, arrays, expected)
    return {rule.timm: rule.to_timm(arrays) for rule in google_rules(geometry)}


def _timm_state(checkpoint: Checkpoint, geometry: Geometry, model: VisionTransformer) -> State:
    expected = model.state_dict()
    old = re.compile(rf"^{re.escape(OLD_PRE_LOGITS)}\b")
    arrays = {old.sub(PRE_LOGITS, name): tensor for name, tensor in checkpoint.arrays.items()}
    if "pos_embed" in arrays and "pos_embed" in expected:
        arrays["pos_embed"] = _resize_as_timm(checkpoint, geometry, model)
    try:
        _require_same_arrays(checkpoint.path, arrays, expected)
    except InputError as error:
        if geometry.model_type != AUTO:
            raise
        raise InputError(f"{error}; auto reads only the plain layout, others need their timm name") from None
    return {name: arrays[name].contiguous() for name in expected}


def _vit_pytorch_state(checkpoint: Checkpoint, geometry: Geometry, model: VisionTransformer) -> State:
    expected = model.state_dict()
    arrays = from_fastertransformer(checkpoint.arrays, geometry)
    translated = replace(checkpoint, arrays=arrays)
    if "pos_embed" in arrays and "pos_embed" in expected and geometry.num_prefix_tokens == 1:
        arrays["pos_embed"] = _resize_as_google(translated, "pos_embed", geometry.grid)
    _require_same_arrays(checkpoint.path, arrays, expected)
    return {name: arrays[name].contiguous() for name in expected}


def _require_same_arrays(path: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        count = f"{len(missing)} of {len(expected)} arrays"
        raise InputError(f"{path}: {count} are missing, first {missing[0]!r}")
    extra = [name for name in found if name not in expected]
    if extra:
        count = f"{len(extra)} of {len(found)} arrays"
        raise InputError(f"{path}: {count} have no place in the model, first {extra[0]!r}")
    for name, wanted in expected.items():
        shape, dtype = tuple(found[name].shape), found[name].dtype
        if shape != tuple(wanted.shape):
            raise InputError(f"{path}: array {name!r} has shape {shape}, expected {tuple(wanted.shape)}")
        if dtype != wanted.dtype:
            raise InputError(f"{path}: array {name!r} has dtype {dtype}, expected {wanted.dtype}")


def _resize_as_google(checkpoint: Checkpoint, name: str, side: int) -> Tensor:
    """(1, 1 + old², C) -> (1, 1 + side², C): bilinear with aligned corners, the class token's part untouched.

    Google's rule is `scipy.ndimage.zoom(order=1)` of the grid (load_pretrained in vit_jax/checkpoint.py),
    which maps corner to corner and computes in float64, as done here.
    """
    checkpoint.shape(name, 3)
    positions = checkpoint.arrays[name]
    old = grid_side(checkpoint, positions.shape[1] - 1)
    if old == side:
        return positions
    token, grid = positions[:, :1], positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.double(), size=(side, side), mode="bilinear", align_corners=True)
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2).to(token.dtype)], dim=1)


def _resize_as_timm(checkpoint: Checkpoint, geometry: Geometry, model: VisionTransformer) -> Tensor:
    """timm's rule (its `checkpoint_filter_fn`): bicubic with antialiasing; plain bilinear for FlexiViT."""
    checkpoint.shape("pos_embed", 3)
    positions = checkpoint.arrays["pos_embed"]
    prefix = 0 if model.no_embed_class else geometry.num_prefix_tokens
    side = grid_side(checkpoint, positions.shape[1] - prefix)
    flexible = "flexi" in (geometry.timm_name or "")
    resized: Tensor = resample_abs_pos_embed(
        positions,
        new_size=[geometry.grid, geometry.grid],
        old_size=[side, side],
        num_prefix_tokens=prefix,
        interpolation="bilinear" if flexible else "bicubic",
        antialias=not flexible,
    )
    return resized


def _prepared(checkpoint: Checkpoint, geometry: Geometry, family: Family | None) -> EvalTransform:
    """How images are prepared for this model."""
    mean, std, interpolation = prepared_for(geometry)
    if geometry.model_type == AUTO and geometry.pool == "avg":  # MAE's, which Google has none of
        mean, std, interpolation = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "bicubic"
    said = {"mean": mean, "std": std, "interpolation": interpolation} | dict({} if family is None else family.images)
    try:
        return EvalTransform(geometry.img_size, **said)
    except (InputError, TypeError) as error:
        raise InputError(f"{checkpoint.path}: how its images are prepared: {error}") from None


def prepared_for(geometry: Geometry) -> tuple[Channels, Channels, str]:
    """Mean, std and interpolation of a named model."""
    if geometry.timm_name is None:
        return HALF, HALF, "bilinear"
    known = get_pretrained_cfg(geometry.timm_name)
    config = resolve_data_config(pretrained_cfg={} if known is None else known.to_dict())
    return tuple(config["mean"]), tuple(config["std"]), config["interpolation"]


def _tell_of_assumptions(checkpoint: Checkpoint, loaded: LoadedModel, family: Family | None) -> None:
    if family is not None:
        what, why = loaded.geometry.timm_name, family.why
        log.warning("%s: taken for timm's %s (%s): %s", checkpoint.path, what, why, loaded.prepared)
    elif checkpoint.names == TIMM and loaded.geometry.timm_name is None:
        name = loaded.geometry.model_type
        what = "of unknown family" if name == AUTO else f"read as Google's {name}"
        message = "%s: a timm file %s: %s assumed; --model_type with a timm name settles it (%s)"
        log.warning(message, checkpoint.path, what, loaded.prepared, _OTHERS)
