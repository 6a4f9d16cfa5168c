"""Which images are calibrated on, selected by and reported on: the one place that divides them. No Ray, no decoding.

    train ──► calibration images
    val   ──► selection and report, halves; where only val exists, calibration images first

The halves are class-balanced, where there are labels. The three are disjoint, so nothing is tuned on what it is
reported on: no image is in two of them, nor is a copy of it under another name (`copies`). How val is divided is a
function of the data's content and the split seed only, so a search and the training that follows it share one division.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from vitq_ray.base.config import InputError, require_choice
from vitq_ray.data.copies import first_copies, without_images_of
from vitq_ray.data.samples import Ids, SampleIndex, has_split


@dataclass(frozen=True)
class Splits:
    """Sample ids: what is calibrated on (in the split `calib_split`), selected by and reported on (both in val).

    `calibration` is in the order of the batches, and may have more images than are needed, for others to move up where
    some are broken. `selection` ascends, or is in the order of a race.
    """

    calib_split: str
    calibration: Ids
    selection: Ids
    report: Ids

    def to_dict(self) -> dict[str, Any]:
        """As run.json has it."""
        return {
            "calibration": {"split": self.calib_split, "sample_ids": self.calibration.tolist()},
            "selection": self.selection.tolist(),
            "report": self.report.tolist(),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Splits:
        """The inverse of `to_dict`; what says nothing of calibration has none of its own, as that of a training."""
        calibration = values.get("calibration", {"split": "train", "sample_ids": []})
        columns = (calibration["sample_ids"], values["selection"], values["report"])
        return Splits(calibration["split"], *(np.array(ids, np.int64) for ids in columns))


def default_calib_split(root: str) -> str:
    """`train` where the data has it, else `val`."""
    return "train" if has_split(root, "train") else "val"


def make_splits(
    calib_split: str,
    calib: SampleIndex,
    val: SampleIndex,
    split_seed: int,
    calibration_images: int = 0,
    spare_images: int = 0,
) -> Splits:
    """The splits of a search or a training.

    Args:
        calib, calib_split: the images to calibrate on, of train or of val; for `val` they are taken out of it.
        calibration_images: how many are needed; 0 where the model is calibrated already.
        spare_images: how many more to take where train has them.

    Raises:
        InputError: where there are too few images for any of the three.
    """
    if calib_split == "val":
        calibration, selection, report = split_val(
            val.labels, val.fingerprint, split_seed, calibration_images, first_copies(val)
        )
        return Splits("val", class_balanced_order(val.labels, calibration, split_seed), selection, report)
    require_images(len(calib), calibration_images)
    drawn = calibration_ids(len(calib), len(calib), "shuffled", split_seed)
    unseen = islice(without_images_of(val, calib, drawn), calibration_images + spare_images)
    calibration = np.fromiter(unseen, np.int64)
    if len(calibration) < calibration_images:
        raise InputError(
            f"calibration: needs {calibration_images} images (batches x batch size); of the {len(calib)} images of "
            f"train, all but {len(calibration)} are in val too"
        )
    _, selection, report = split_val(val.labels, val.fingerprint, split_seed, first_copy=first_copies(val))
    return Splits("train", calibration, selection, report)


def split_val(
    labels: npt.ArrayLike,
    fingerprint: str,
    split_seed: int,
    calibration_images: int = 0,
    first_copy: Ids | None = None,
) -> tuple[Ids, Ids, Ids]:
    """val as (calibration, selection, report): random, class-balanced, disjoint, together everything. Ids ascend.

    With `first_copy`, from `copies.first_copies`, copies of an image go where the first of them goes; those of a
    calibration image go nowhere. A function of the data's content and `split_seed` only. Selection and report differ by
    at most one image per class, copies apart.

    Raises:
        InputError: where selection or report would be empty.
    """
    labels = np.asarray(labels)
    if first_copy is not None and len(own := np.unique(first_copy)) < len(labels):
        parts = split_val(labels[own], fingerprint, split_seed, calibration_images)
        calibration, selection, report = (own[ids] for ids in parts)
        selection, report = (np.flatnonzero(np.isin(first_copy, half)) for half in (selection, report))
        return calibration, selection, report
    if len(labels) < 2:
        raise InputError(f"val: {len(labels)} images cannot be halved into selection and report")
    if calibration_images > len(labels) - 2:
        raise InputError(
            f"calibration: needs {calibration_images} of the {len(labels)} images of val; "
            "none would be left to select and to report on"
        )
    order = class_balanced_order(labels, np.arange(len(labels)), _seed(fingerprint, split_seed))
    calibration, rest = np.sort(order[:calibration_images]), np.sort(order[calibration_images:])
    selection, report = _halves(labels[rest], fingerprint, split_seed)
    return calibration, rest[selection], rest[report]


def _halves(labels: npt.NDArray[Any], fingerprint: str, split_seed: int) -> tuple[Ids, Ids]:
    """(selection, report): per class they differ by at most one image, and the odd ones go to either side in turn."""
    rng = np.random.default_rng(_seed(fingerprint, split_seed))
    sides: tuple[list[Ids], list[Ids]] = ([], [])
    turn = 0
    for label in np.unique(labels):
        ids = rng.permutation(np.flatnonzero(labels == label))
        half = len(ids) // 2
        if len(ids) % 2:
            half, turn = half + (turn == 0), 1 - turn
        sides[0].append(ids[:half])
        sides[1].append(ids[half:])
    selection, report = (np.sort(np.concatenate(side)).astype(np.int64) for side in sides)
    return selection, report


def race_order(labels: npt.ArrayLike, selection: Ids, count: int, split_seed: int) -> Ids:
    """At most `count` of the selection images, class-balanced, in the order of a race: uniformly random.

    `labels` are those of all of val.
    """
    chosen = class_balanced_order(labels, selection, split_seed)[:count]
    return random_order(np.sort(chosen), split_seed)


def calibration_ids(n_images: int, count: int, order: str, seed: int) -> Ids:
    """The first `count` images of the map, or `count` by seed (`shuffled`); a smaller count is a prefix of a larger.

    Raises InputError where there are fewer than `count` images.
    """
    require_choice("calibration order", order, ("shuffled", "map"))
    require_images(n_images, count)
    ids = np.arange(n_images) if order == "map" else np.random.default_rng(seed).permutation(n_images)
    return ids[:count].astype(np.int64)


def require_images(n_images: int, count: int) -> None:
    """Raise InputError unless the split has the `count` images that calibration needs."""
    if count > n_images:
        raise InputError(f"calibration: needs {count} images (batches x batch size), the split has {n_images}")


def class_balanced_order(labels: npt.ArrayLike, ids: npt.ArrayLike, seed: int | list[int]) -> Ids:
    """The ids in a random order of which every prefix is as balanced over classes as their counts allow.

    `labels` are those of the whole split, indexed by id.
    """
    ids = np.asarray(ids, np.int64)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(ids)
    classes = np.asarray(labels)[shuffled]
    by_class = np.argsort(classes, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(classes[by_class]) > 0])
    rank = np.arange(len(ids)) - np.repeat(starts, np.diff(np.r_[starts, len(ids)]))
    round_of = np.empty(len(ids), np.int64)
    round_of[by_class] = rank
    return shuffled[np.argsort(round_of, kind="stable")]


def random_order(ids: npt.ArrayLike, seed: int) -> Ids:
    """One uniformly random permutation of the ids."""
    return np.random.default_rng(seed).permutation(np.asarray(ids, np.int64))


def _seed(fingerprint: str, split_seed: int) -> list[int]:
    return [split_seed, int(fingerprint[:16], 16)]
