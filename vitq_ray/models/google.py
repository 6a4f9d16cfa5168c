"""Google's names and layouts of a ViT's arrays, and timm's: one table, read in both directions.

Loading an `.npz` reads it from Google to timm, `google_arrays` from timm to Google.

Legend: C width, H heads, D head width, k kernel side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitq_ray.base.config import InputError
from vitq_ray.models.architecture import ATTENTION, POSITIONS, PRE_LOGITS
from vitq_ray.models.geometry import Geometry, geometry_of
from vitq_ray.models.weights import State


@dataclass(frozen=True)
class _Layout:
    """The two directions between a timm tensor and Google's array; `to_google` is also told the heads."""

    to_google: Callable[[Tensor, int], Tensor]
    to_timm: Callable[[Tensor], Tensor]


# timm <-> Google
_SAME = _Layout(lambda x, _: x, lambda x: x)
# (out, in) <-> (in, out)
_DENSE = _Layout(lambda x, _: x.T, lambda x: x.T)
# (out, in, k, k) <-> (k, k, in, out)
_CONV = _Layout(lambda x, _: x.permute(2, 3, 1, 0), lambda x: x.permute(3, 2, 0, 1))
# (H·D, C) <-> (C, H, D)
_INTO_HEADS = _Layout(lambda x, heads: x.T.unflatten(1, (heads, -1)), lambda x: x.flatten(1).T)
# (H·D) <-> (H, D)
_HEAD_BIAS = _Layout(lambda x, heads: x.unflatten(0, (heads, -1)), lambda x: x.flatten())
# (C, H·D) <-> (H, D, C)
_OUT_OF_HEADS = _Layout(lambda x, heads: x.T.unflatten(0, (heads, -1)), lambda x: x.flatten(0, 1).T)


@dataclass(frozen=True)
class _Rule:
    """One timm tensor is one of Google's arrays, or the rows of several (query, then key, then value)."""

    timm: str
    google: tuple[str, ...]
    layout: _Layout

    def under(self, timm_prefix: str, google_prefix: str) -> _Rule:
        google = tuple(google_prefix + name for name in self.google)
        return _Rule(timm_prefix + self.timm, google, self.layout)

    def to_google(self, tensor: Tensor, heads: int) -> State:
        parts = tensor.chunk(len(self.google))
        return {n: self.layout.to_google(part, heads) for n, part in zip(self.google, parts, strict=True)}

    def to_timm(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([self.layout.to_timm(arrays[name]) for name in self.google]).contiguous()


def _norm(timm_name: str, google: str) -> tuple[_Rule, ...]:
    return (
        _Rule(f"{timm_name}.weight", (f"{google}/scale",), _SAME),
        _Rule(f"{timm_name}.bias", (f"{google}/bias",), _SAME),
    )


def _linear(timm_name: str, *google: str, kernel: _Layout = _DENSE, bias: _Layout = _SAME) -> tuple[_Rule, ...]:
    return (
        _Rule(f"{timm_name}.weight", tuple(f"{name}/kernel" for name in google), kernel),
        _Rule(f"{timm_name}.bias", tuple(f"{name}/bias" for name in google), bias),
    )


def _convolution(timm_name: str, google: str, timm_norm: str, google_norm: str) -> tuple[_Rule, ...]:
    return (_Rule(f"{timm_name}.weight", (f"{google}/kernel",), _CONV), *_norm(timm_norm, google_norm))


_QKV = tuple(f"{ATTENTION}/{part}" for part in ("query", "key", "value"))
_EMBEDDING_RULES = (
    *_linear("patch_embed.proj", "embedding", kernel=_CONV),
    _Rule("cls_token", ("cls",), _SAME),
    _Rule("pos_embed", (POSITIONS,), _SAME),
)
_BLOCK_RULES = (
    *_norm("norm1", "LayerNorm_0"),
    *_linear("attn.qkv", *_QKV, kernel=_INTO_HEADS, bias=_HEAD_BIAS),
    *_linear("attn.proj", f"{ATTENTION}/out", kernel=_OUT_OF_HEADS),
    *_norm("norm2", "LayerNorm_2"),
    *_linear("mlp.fc1", "MlpBlock_3/Dense_0"),
    *_linear("mlp.fc2", "MlpBlock_3/Dense_1"),
)
_STEM_RULES = _convolution("conv", "conv_root", "norm", "gn_root")
_UNIT_RULES = (
    *_convolution("conv1", "conv1", "norm1", "gn1"),
    *_convolution("conv2", "conv2", "norm2", "gn2"),
    *_convolution("conv3", "conv3", "norm3", "gn3"),
)
_PROJECTION_RULES = _convolution("downsample.conv", "conv_proj", "downsample.norm", "gn_proj")
_HEAD_RULES = (*_norm("norm", "Transformer/encoder_norm"), *_linear("head", "head"))
_PRE_LOGITS_RULES = _linear(PRE_LOGITS, "pre_logits")


def google_rules(geometry: Geometry) -> tuple[_Rule, ...]:
    """Which timm tensor is which of Google's arrays in a model of this geometry, in a fixed order."""
    rules = list(_EMBEDDING_RULES)
    if geometry.hybrid_stages is not None:
        rules += [rule.under("patch_embed.backbone.stem.", "") for rule in _STEM_RULES]
    for stage, units in enumerate(geometry.hybrid_stages or ()):
        for unit in range(units):
            timm_unit = f"patch_embed.backbone.stages.{stage}.blocks.{unit}."
            of_unit = _UNIT_RULES + (_PROJECTION_RULES if unit == 0 else ())
            rules += [rule.under(timm_unit, f"block{stage + 1}/unit{unit + 1}/") for rule in of_unit]
    for i in range(geometry.depth):
        rules += [rule.under(f"blocks.{i}.", f"Transformer/encoderblock_{i}/") for rule in _BLOCK_RULES]
    rules += _HEAD_RULES + (() if geometry.pre_logits is None else _PRE_LOGITS_RULES)
    return tuple(rules)


def google_arrays(model: VisionTransformer, geometry: Geometry | None = None) -> dict[str, np.ndarray]:
    """The weights of `model` as the arrays of a Google `.npz`; `geometry` is read off the model if not given.

    Kernels are (in, out), convolutions (k, k, in, out), query, key and value (C, H, D), the output projection
    (H, D, C). Raises InputError naming the first parameter that Google's layout has no place for, such as a
    LayerScale or a register token.
    """
    arrays = to_google(model.state_dict(), geometry or geometry_of(model))
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in arrays.items()}


def to_google(state: Mapping[str, Tensor], geometry: Geometry) -> State:
    rules = google_rules(geometry)
    known = {rule.timm for rule in rules}
    lacks = [f"lacks {name!r}" for name in known if name not in state]
    has = [f"has {name!r}" for name in state if name not in known]
    for problem in sorted(lacks) + has:
        raise InputError(
            f"model {geometry.model_type}: does not fit Google's .npz layout, it {problem}; "
            "expected a timm .pth or .safetensors"
        )
    return {k: v for rule in rules for k, v in rule.to_google(state[rule.timm], geometry.heads).items()}
