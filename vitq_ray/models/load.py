"""Strict loading of a float Vision Transformer from a checkpoint.

A checkpoint is compared array by array with the model it is meant for: nothing is left random, dropped or guessed in
silence.

    path or s3://  ->  weights: Checkpoint, finite float32 arrays under the file's own names
                   ->  architecture: what their shapes say  ->  geometry: what is asked for, or `auto`
                   ->  timm VisionTransformer without memory  ->  same arrays, same shapes?  ->  LoadedModel

Google's `.npz` names are translated by the table in `google`; timm's own `.pth` and `.safetensors` need none.

Legend: C width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitq_ray.base.config import InputError
from vitq_ray.models.architecture import (
    OLD_PRE_LOGITS,
    POSITIONS,
    PRE_LOGITS,
    Architecture,
    google_architecture,
    grid_side,
    require_known_layout,
    timm_architecture,
)
from vitq_ray.models.geometry import Geometry, auto_geometry, build_model, named_geometry
from vitq_ray.models.google import google_rules, to_google
from vitq_ray.models.weights import Checkpoint, State, read_checkpoint, weights_fingerprint
from vitq_ray.quant.vit import require_supported

Channels = tuple[float, float, float]
HALF: Channels = (0.5, 0.5, 0.5)  # Google's mean and std


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


def load_model(
    model_type: str, pretrained: str | Path | Checkpoint, img_size: int | None = None, num_classes: int | None = None
) -> LoadedModel:
    """Load a float classifier strictly.

    `model_type` is one of `GOOGLE_MODEL_TYPES` (resolution 384, the `-224` variants 224), a timm ViT name
    (timm's resolution), or `auto`, which reads geometry and resolution from the arrays of the file. A timm
    file does not tell its number of heads: `auto` then assumes width // 64, logs so, and reads only the plain
    layout (class token, biases, final norm); any other needs the timm name.

    `pretrained` is a path or `s3://` URI of an `.npz`, `.pth` or `.safetensors`, or what `read_checkpoint` made of
    one. The classes are those of its head. Where `img_size`, in pixels, differs from the file's, position embeddings
    are resized: of `.npz` files as Google does, of timm files as timm does.

    Raises InputError for an unknown name, an unreadable file, another architecture, missing, extra or
    misshapen arrays, NaN, no classifier, or a `num_classes` that is not the file's.
    """
    named = named_geometry(model_type)
    checkpoint = pretrained if isinstance(pretrained, Checkpoint) else read_checkpoint(str(pretrained))
    require_known_layout(checkpoint)
    found = google_architecture(checkpoint) if checkpoint.is_google else timm_architecture(checkpoint)
    if num_classes not in (None, found.num_classes):
        raise InputError(f"num_classes: {num_classes}, but {checkpoint.path} has {found.num_classes} classes")
    geometry = named or auto_geometry(checkpoint, found)
    geometry = replace(geometry, num_classes=found.num_classes, pre_logits=found.pre_logits)
    geometry = geometry if img_size is None else replace(geometry, img_size=img_size)
    model = _load(checkpoint, found, geometry)
    fingerprint = weights_fingerprint(model.state_dict())
    return LoadedModel(model, geometry, *_preprocessing(model, geometry), fingerprint)


def _load(checkpoint: Checkpoint, found: Architecture, geometry: Geometry) -> VisionTransformer:
    with torch.device("meta"):  # the file's arrays become the parameters: random ones would only cost time
        model = build_model(geometry)
    require_supported(model)
    asked = replace(timm_architecture(Checkpoint(geometry.model_type, False, model.state_dict())), heads=geometry.heads)
    if not found.same_as(asked):
        raise InputError(f"{checkpoint.path}: another architecture, {found}; {geometry.model_type} is {asked}")
    to_state = _google_state if checkpoint.is_google else _timm_state
    model.load_state_dict(to_state(checkpoint, geometry, model), strict=True, assign=True)
    return model


def _google_state(checkpoint: Checkpoint, geometry: Geometry, model: VisionTransformer) -> State:
    expected = to_google(model.state_dict(), geometry)
    arrays = {**checkpoint.arrays, POSITIONS: _resize_as_google(checkpoint, geometry.grid)}
    _require_same_arrays(checkpoint.path, arrays, expected)
    return {rule.timm: rule.to_timm(arrays) for rule in google_rules(geometry)}


def _timm_state(checkpoint: Checkpoint, geometry: Geometry, model: VisionTransformer) -> State:
    expected = model.state_dict()
    old = re.compile(rf"^{re.escape(OLD_PRE_LOGITS)}\b")
    arrays = {old.sub(PRE_LOGITS, name): tensor for name, tensor in checkpoint.arrays.items()}
    if "pos_embed" in arrays and "pos_embed" in expected:
        arrays["pos_embed"] = _resize_as_timm(checkpoint, geometry, model)
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


def _resize_as_google(checkpoint: Checkpoint, side: int) -> Tensor:
    """(1, 1 + old², C) -> (1, 1 + side², C): bilinear with aligned corners, the class token's part untouched.

    Google's rule is `scipy.ndimage.zoom(order=1)` of the grid (load_pretrained in vit_jax/checkpoint.py),
    which maps corner to corner and computes in float64, as done here.
    """
    positions = checkpoint.arrays[POSITIONS]
    old = grid_side(checkpoint, positions.shape[1] - 1)
    if old == side:
        return positions
    token, grid = positions[:, :1], positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.double(), size=(side, side), mode="bilinear", align_corners=True)
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2).to(token.dtype)], dim=1)


def _resize_as_timm(checkpoint: Checkpoint, geometry: Geometry, model: VisionTransformer) -> Tensor:
    """timm's rule (its `checkpoint_filter_fn`): bicubic with antialiasing; plain bilinear for FlexiViT."""
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


def _preprocessing(model: VisionTransformer, geometry: Geometry) -> tuple[Channels, Channels, str]:
    if geometry.timm_name is None:
        return HALF, HALF, "bilinear"
    config = resolve_model_data_config(model)
    return tuple(config["mean"]), tuple(config["std"]), config["interpolation"]
