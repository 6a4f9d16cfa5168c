"""Which timm model a timm file is of, where nobody said: what the file says, its name, and what its arrays show.

    arch of timm's train.py, or config.json of the Hugging Face hub   ──► the file's own word
    deit_tiny_patch16_224-a1311bcf.pth                                ──► its name
    head_dist.weight, reg_token, blocks.0.ls1.gamma                   ──► arrays that only some families have

A model counts only where it has exactly these arrays. Plain ViTs, DeiTs and DINOs have the same ones: nothing then
tells how images were prepared.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules

from vitq_ray.base.config import InputError
from vitq_ray.base.files import exists, read_bytes
from vitq_ray.models.architecture import Architecture, is_square
from vitq_ray.models.geometry import TIMM_MODULES, Geometry, build_model, named_geometry
from vitq_ray.models.weights import Checkpoint

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # beside which the hub keeps config.json
_SIZES = {192: "tiny", 384: "small", 512: "medium", 768: "base", 1024: "large", 1280: "huge"}  # by width
_SIGNS = (  # an array that only these have, and their names
    ("head_dist.weight", "deit_{size}_distilled_patch{patch}_{pixels}"),
    ("reg_token", "vit_{size}_patch{patch}_reg{registers}_dinov2"),
    ("blocks.0.ls1.gamma", "deit3_{size}_patch{patch}_{pixels}"),
    ("blocks.0.ls1.gamma", "vit_{size}_patch{patch}_dinov2"),
)
_MOST_BYTES = 2**20  # of config.json


@dataclass(frozen=True)
class Family:
    """A timm model, and why a file is taken for it; `images` is what config.json says of mean, std, interpolation."""

    geometry: Geometry
    why: str
    images: Mapping[str, Any] = field(default_factory=dict)


def family_of(checkpoint: Checkpoint, found: Architecture) -> Family | None:
    """The timm model that has these arrays, at the resolution of the file; None where none is known to."""
    for name, why, images in _candidates(checkpoint, found):
        if not (timm.is_model(name) and is_model_in_modules(name.split(".")[0], TIMM_MODULES)):
            continue
        try:
            geometry = named_geometry(name)
        except InputError:  # blocks that cannot be quantized, or a tag that timm does not know
            continue
        assert geometry is not None
        geometry = replace(geometry, num_classes=found.num_classes, pre_logits=found.pre_logits)
        if (side := _side_where_it_fits(checkpoint, geometry)) is not None:
            return Family(replace(geometry, img_size=side * geometry.patch_size), why, images)
    return None


def _candidates(checkpoint: Checkpoint, found: Architecture) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    if checkpoint.arch is not None:
        yield checkpoint.arch, "the file says so", {}
    yield from _of_hub(checkpoint.path)
    stem = PurePath(checkpoint.path).name
    for end in sorted({match.start() for match in re.finditer(r"[-_.]", stem)} | {len(stem)}, reverse=True):
        yield stem[:end], "after the name of the file", {}
    side = math.isqrt(found.position_tokens)
    registers = checkpoint.shape("reg_token", 3)[1] if "reg_token" in checkpoint.arrays else 0
    words = {"size": _SIZES.get(found.width), "patch": found.patch_kernel, "pixels": side * found.patch_kernel}
    for sign, name in _SIGNS:
        if sign in checkpoint.arrays and words["size"] is not None:
            yield name.format(**words, registers=registers), f"it has the array {sign}", {}


def _of_hub(path: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """What timm's config.json says, with the tag of the weights and without."""
    folder, _, name = path.rpartition("/")
    config_path = f"{folder}/config.json" if folder else "config.json"
    if name not in _HUB_FILES or not exists(config_path):
        return
    try:
        config = json.loads(read_bytes(config_path, "timm's config.json", _MOST_BYTES))
        arch, images = str(config["architecture"]), dict(config.get("pretrained_cfg") or {})
    except (ValueError, TypeError, KeyError, RecursionError):  # not timm's
        return
    images = {key: images[key] for key in ("mean", "std", "interpolation") if key in images}
    yield arch, "config.json says so", images


def _side_where_it_fits(checkpoint: Checkpoint, geometry: Geometry) -> int | None:
    """Patches per side of the file's positions; None where the model has other arrays."""
    with torch.device("meta"):
        model = build_model(geometry)
    wanted, found = model.state_dict(), checkpoint.arrays
    if set(wanted) != set(found) or "pos_embed" not in found or found["pos_embed"].ndim != 3:
        return None
    if any(wanted[name].shape != found[name].shape for name in wanted if name != "pos_embed"):
        return None
    patches = found["pos_embed"].shape[1] - (0 if model.no_embed_class else geometry.num_prefix_tokens)
    return math.isqrt(patches) if is_square(patches) else None
