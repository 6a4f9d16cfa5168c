"""FasterTransformer's weight names <-> timm's, one table for both directions.

A calibrated checkpoint carries the names and the order that FasterTransformer's INT8 loader consumes:

    transformer.embeddings.{position_embeddings, cls_token}, [hybrid_model.*], patch_embeddings
    transformer.encoder.layer.{i}.{attention_norm, ffn_norm, ffn.fc1, ffn.fc2, attn.{query, key, value, out}}
    transformer.encoder.encoder_norm, head
    timm.*                                           what the scheme has no name for, under its timm name

each module with `.weight` and `.bias`. timm keeps query, key and value as one matrix, FasterTransformer as
three: its rows [0, C), [C, 2C) and [2C, 3C). The ResNet of a hybrid is named, and ordered within a unit, as
in jeonsworld/ViT-pytorch, whose module tree FasterTransformer's toolkit saves. Values are never changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitq_ray.base.config import InputError
from vitq_ray.models.architecture import Architecture
from vitq_ray.models.geometry import Geometry
from vitq_ray.quant.sites import LAYER_PREFIX

OTHER_PREFIX = "timm."
AMAX_SUFFIX = "_amax"

_EMBEDDINGS = "transformer.embeddings."
_HYBRID = f"{_EMBEDDINGS}hybrid_model."
_QKV = ("query", "key", "value")

# (FasterTransformer's module, timm's module), in FasterTransformer's order
_LAYER = (
    ("attention_norm", "norm1"),
    ("ffn_norm", "norm2"),
    ("ffn.fc1", "mlp.fc1"),
    ("ffn.fc2", "mlp.fc2"),
    *((f"attn.{part}", "attn.qkv") for part in _QKV),
    ("attn.out", "attn.proj"),
)
_UNIT = (
    *(pair for i in (1, 2, 3) for pair in ((f"gn{i}", f"norm{i}"), (f"conv{i}", f"conv{i}"))),
    ("downsample", "downsample.conv"),
    ("gn_proj", "downsample.norm"),
)


@dataclass(frozen=True)
class _Name:
    """A FasterTransformer tensor and its source in timm's state: all of it, or third `part` of its rows."""

    ft: str
    timm: str
    part: int | None = None


def to_fastertransformer(state: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
    """timm's state dict under FasterTransformer's names, in the order of its loader.

    Tensors keep shape, dtype and bits; qkv (3C, C) becomes three of (C, C). A parameter that the model lacks,
    such as a qkv bias, is absent. The thirds of qkv are copies, so that each saves only its own bytes; the
    other tensors are those of `state`.
    """
    names = [name for name in _names(geometry) if name.timm in state]
    known = {name.timm for name in names}
    renamed = {name.ft: _read(state[name.timm], name.part) for name in names}
    others = {OTHER_PREFIX + name: tensor for name, tensor in state.items() if name not in known}
    return {**renamed, **others}


def from_fastertransformer(state: Mapping[str, Tensor], geometry: Geometry | Architecture) -> dict[str, Tensor]:
    """The inverse of `to_fastertransformer`, bit for bit; `_amax` keys are left out.

    Raises InputError naming the first unknown key, or the one of query, key and value that is missing, or of
    another shape, while the others are there.
    """
    weights = {key: tensor for key, tensor in state.items() if not key.endswith(AMAX_SUFFIX)}
    sources: dict[str, list[str]] = {}
    for name in _names(geometry):
        sources.setdefault(name.timm, []).append(name.ft)
    known = {ft for parts in sources.values() for ft in parts}
    others = [key for key in weights if _is_other(key, sources)]
    _require_known(weights, known | set(others))
    present = {timm: parts for timm, parts in sources.items() if any(part in weights for part in parts)}
    return {
        **{timm: _join(weights, parts) for timm, parts in present.items()},
        **{key.removeprefix(OTHER_PREFIX): weights[key] for key in others},
    }


def _names(geometry: Geometry | Architecture) -> Iterator[_Name]:
    """Every name that a model of this geometry may have, in FasterTransformer's order."""
    yield _Name(f"{_EMBEDDINGS}position_embeddings", "pos_embed")
    yield _Name(f"{_EMBEDDINGS}cls_token", "cls_token")
    if geometry.hybrid_stages is not None:
        yield from _hybrid_names(geometry.hybrid_stages)
    yield from _module(f"{_EMBEDDINGS}patch_embeddings", "patch_embed.proj")
    for index in range(geometry.depth):
        for ft, timm in _LAYER:
            yield from _module(f"{LAYER_PREFIX}{index}.{ft}", f"blocks.{index}.{timm}")
    yield from _module("transformer.encoder.encoder_norm", "norm")
    yield from _module("head", "head")


def _hybrid_names(stages: tuple[int, ...]) -> Iterator[_Name]:
    yield from _module(f"{_HYBRID}root.conv", "patch_embed.backbone.stem.conv")
    yield from _module(f"{_HYBRID}root.gn", "patch_embed.backbone.stem.norm")
    for stage, units in enumerate(stages):
        for unit in range(units):
            ft_unit = f"{_HYBRID}body.block{stage + 1}.unit{unit + 1}."
            for ft, timm in _UNIT:
                yield from _module(ft_unit + ft, f"patch_embed.backbone.stages.{stage}.blocks.{unit}.{timm}")


def _module(ft: str, timm: str) -> Iterator[_Name]:
    part = _QKV.index(ft.rsplit(".", 1)[-1]) if timm.endswith("attn.qkv") else None
    for kind in ("weight", "bias"):
        yield _Name(f"{ft}.{kind}", f"{timm}.{kind}", part)


def _read(tensor: Tensor, part: int | None) -> Tensor:
    return tensor if part is None else tensor.chunk(len(_QKV))[part].clone()


def _join(weights: Mapping[str, Tensor], parts: list[str]) -> Tensor:
    for part in parts:
        if part not in weights:
            raise InputError(f"checkpoint: {part!r} is missing; expected {', '.join(parts)}")
        if weights[part].shape != weights[parts[0]].shape:
            raise InputError(
                f"checkpoint: {part!r} has shape {tuple(weights[part].shape)}, "
                f"expected {tuple(weights[parts[0]].shape)} as {parts[0]!r}"
            )
    return weights[parts[0]] if len(parts) == 1 else torch.cat([weights[part] for part in parts])


def _is_other(key: str, sources: Mapping[str, list[str]]) -> bool:
    """Whether `key` keeps a timm name, and one that has no name in the scheme."""
    return key.startswith(OTHER_PREFIX) and key.removeprefix(OTHER_PREFIX) not in sources


def _require_known(weights: Mapping[str, Tensor], known: set[str]) -> None:
    unknown = [key for key in weights if key not in known]
    if unknown:
        count = f"{len(unknown)} of {len(weights)} weights"
        raise InputError(f"checkpoint: {count} have no place in the model, first {unknown[0]!r}")
