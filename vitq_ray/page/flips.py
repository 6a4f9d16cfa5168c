"""Images on which the quantized model says another class than the float model, and how each class fares."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vitq_ray.data.samples import NO_LABEL
from vitq_ray.measure.paired import Interval, accuracy_difference
from vitq_ray.run.image_table import ImageTable


@dataclass(frozen=True)
class Flip:
    """One image. Margins are probabilities of the class that a model says, less that of its second choice."""

    name: str
    source: str  # of the picture: a data URI, or nothing
    label: str
    float_class: str
    float_margin: float
    quantized_class: str
    quantized_margin: float
    kl: float
    verdict: str  # lost, won, or neither


def flips_of(images: ImageTable) -> list[Flip]:
    """Those with pictures, the surest of the float model first."""
    names = class_names(images)
    return [_flip(images, row, data, names) for row, data in images.pictures.items()]


def _flip(images: ImageTable, row: int, data: bytes, names: Mapping[int, str]) -> Flip:
    label, said, says = (int(images[name][row]) for name in ("label", "float_class", "quantized_class"))
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return Flip(
        images.names[row],
        f"data:image/{kind};base64,{base64.b64encode(data).decode()}",
        "" if label == NO_LABEL else _name(names, label),
        _name(names, said),
        float(images["float_margin"][row]),
        _name(names, says),
        float(images["quantized_margin"][row]),
        float(images["kl"][row]),
        "lost" if label == said else "won" if label == says else "neither",
    )


def class_names(images: ImageTable) -> dict[int, str]:
    """{class: its folder} where every class has one of its own; else nothing."""
    folders: dict[int, set[str]] = {}
    for label, name in zip(images["label"].tolist(), images.names, strict=True):
        folders.setdefault(label, set()).add(name.rpartition("/")[0].rpartition("/")[2])
    single = {label: next(iter(found)) for label, found in folders.items() if len(found) == 1}
    distinct = len(set(single.values())) == len(folders) and "" not in single.values() and NO_LABEL not in single
    return single if distinct else {}


def _name(names: Mapping[int, str], label: int) -> str:
    return names.get(label, f"class {label}")


def per_class(images: ImageTable) -> dict[str, tuple[int, int, int, int]]:
    """{class: (images, float right, quantized right, flipped)}; nothing without labels."""
    labels = images["label"]
    if not len(labels) or (labels == NO_LABEL).any():
        return {}
    names, flipped = class_names(images), images.flipped
    right = {model: images[f"{model}_class"] == labels for model in ("float", "quantized")}
    counts = {}
    for label in np.unique(labels).tolist():
        mine = labels == label
        rows = (mine, mine & right["float"], mine & right["quantized"], mine & flipped)
        images_, floats, quantized, flips = (int(row.sum()) for row in rows)
        counts[_name(names, label)] = images_, floats, quantized, flips
    return counts


def drop(images: ImageTable | None) -> Interval | None:
    """Top-1 of the quantized model less that of the float model, paired; None without labels."""
    if images is None or not len(images.names) or (images["label"] == NO_LABEL).any():
        return None
    right = {model: images[f"{model}_class"] == images["label"] for model in ("float", "quantized")}
    return accuracy_difference(right["quantized"], right["float"])
