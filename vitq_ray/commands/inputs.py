"""From options to what a command works with: checkpoint and images, device, setting, how images are prepared."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from vitq_ray.base.config import InputError
from vitq_ray.base.device import device_for
from vitq_ray.base.memory import machine_memory, size_text
from vitq_ray.calibration.setting import Setting
from vitq_ray.commands.options import ModelOptions, SettingOptions, parameters
from vitq_ray.commands.screen import Screen
from vitq_ray.data.copies import without_images_of
from vitq_ray.data.samples import Ids, SampleIndex, open_split
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.models.checkpoint import CalibratedModel, Sidecar, open_checkpoint
from vitq_ray.models.geometry import AUTO, Geometry, named_geometry
from vitq_ray.models.load import LoadedModel, prepared_for

_IMAGES = ("mean", "std", "interpolation")
_LONGEST_NAME = 200  # bytes; what is put behind it has room in the 255 of a file's name
M = TypeVar("M", bound=ModelOptions)


def with_sample(options: M, screen: Screen) -> M:
    """Neither checkpoint nor data given: the bundled sample. Only one of them given: an error."""
    given = {"pretrained_dir": options.pretrained_dir, "data_path": options.data_path}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 1:
        (there,) = set(given) - set(missing)
        raise InputError(f"{options.name_of(missing[0])}: needed, since {options.name_of(there)} is given")
    if not missing:
        return options
    sample = files("vitq_ray") / "sample"
    screen.say(f"no checkpoint and no data given: using the bundled sample in {sample}")
    return replace(options, data_path=str(sample), pretrained_dir=str(sample / "vit.npz"))


def paths_of(options: ModelOptions) -> tuple[str, str]:
    """(checkpoint, data) after `with_sample`."""
    assert options.pretrained_dir is not None
    assert options.data_path is not None
    return options.pretrained_dir, options.data_path


def open_images(options: ModelOptions, split: str, num_classes: int) -> SampleIndex:
    """A split of the data that the options name. InputError as `open_split`."""
    return open_split(paths_of(options)[1], split, num_classes, options.class_order)


def require_labels(index: SampleIndex, why: str) -> None:
    """Raise InputError where the images have no labels; `why` continues "has no labels"."""
    if not index.has_labels:
        raise InputError(f"{index.no_labels}; {why}")


def training_ids(train: SampleIndex, val: SampleIndex, screen: Screen) -> Ids:
    """Images to train on: all of train, but for those that are in val too. InputError where none is left."""
    ids = np.fromiter(without_images_of(val, train, np.arange(len(train))), np.int64)
    if len(ids) == 0:
        raise InputError(f"{train.source}: all {len(train)} images are in val too; expected others to train on")
    if len(ids) < len(train):
        screen.warn(f"{len(train) - len(ids)} of {len(train)} images of train are in val too: they are not trained on")
    return ids


def device_of(options: ModelOptions) -> torch.device:
    """The first GPU with `use_gpu`, else the CPU; InputError where there is no GPU."""
    if options.use_gpu and not torch.cuda.is_available():
        name = options.name_of("use_gpu")
        raise InputError(f"{name}: this PyTorch finds no CUDA GPU; leave the option out to run on the CPU")
    return device_for(options.use_gpu)


def eval_transform(loaded: LoadedModel, crop_pct: float | None = None) -> EvalTransform:
    """How images are prepared for this model."""
    return EvalTransform(loaded.geometry.img_size, loaded.mean, loaded.std, loaded.interpolation, crop_pct)


def images_as(transform: EvalTransform) -> dict[str, Any]:
    """How images are prepared, as JSON has it."""
    own = {"mean": list(transform.mean), "std": list(transform.std)}
    return {**own, "interpolation": transform.interpolation, "crop_pct": transform.crop_pct}


def require_as_calibrated(options: ModelOptions, sidecar: Sidecar) -> None:
    """What the user says of a calibrated checkpoint must be what its sidecar says; what is not said is not compared."""
    setting = sidecar.setting
    stored = {
        "quant_mode": setting.mode,
        "wprec": setting.weight_bits,
        "aprec": setting.act_bits,
        "calibrator": setting.calibrator.name,
        **dict.fromkeys(parameters()),
        **{p.name: v for p, v in zip(setting.calibrator.row.parameters, setting.calibrator.values, strict=True)},
        "num_calib_batch": setting.num_batches,
        "calib_batchsz": setting.batch_size,
        "img_size": sidecar.geometry.img_size,
        "heads": sidecar.geometry.heads,
        "crop_pct": sidecar.crop_pct,
    }
    rows: list[tuple[str, Any, Any]] = [
        (options.name_of(name), given, stored[name]) for name, given in options.only(stored).items()
    ]
    if "model_type" in options.given and (named := named_geometry(options.model_type)) is not None:
        what = f"{options.name_of('model_type')} {options.model_type}: its"
        for name in ("patch_size", "width", "depth", "heads", "mlp_width"):
            rows.append((f"{what} {name}", getattr(named, name), getattr(sidecar.geometry, name)))
        images = zip(_IMAGES, prepared_for(named), (sidecar.mean, sidecar.std, sidecar.interpolation), strict=True)
        rows += [(f"{what} {name}", its, there) for name, its, there in images]
    for what, given, there in rows:
        if given != there:
            raise InputError(f"{what}: {given} given, but {options.pretrained_dir} was calibrated with {there}")


def load_float(options: ModelOptions, option: str, model: LoadedModel, what: str) -> nn.Module:
    """The float model of the checkpoint that an option names, on images as `model`, here called `what`, takes them.

    Raises InputError where it is a calibrated one, or of other classes or images.
    """
    place = getattr(options, option)
    named = f"{options.name_of(option)}: {place}"
    loaded = open_checkpoint(place, options.model_type, options.img_size, options.heads)
    if isinstance(loaded, CalibratedModel):
        raise InputError(f"{named} is a calibrated checkpoint; expected a float one")
    classes = model.geometry.num_classes
    if loaded.geometry.num_classes != classes:
        raise InputError(f"{named} has {loaded.geometry.num_classes} classes, {what} {classes}")
    images = [(m.geometry.img_size, m.mean, m.std, m.interpolation) for m in (loaded, model)]
    if images[0] != images[1]:
        raise InputError(f"{named} takes images of (size, mean, std, interpolation) {images[0]}, {what} {images[1]}")
    return loaded.model.eval()


def setting_by_hand(options: ModelOptions) -> Setting | None:
    """Mode and bits, where all of them were given: what a calibrated checkpoint without a sidecar needs."""
    if not options.given >= {"quant_mode", "wprec", "aprec"}:
        return None
    if isinstance(options, SettingOptions):
        return options.setting
    given = options.only(("quant_mode", "wprec", "aprec"))
    return Setting(given["quant_mode"], weight_bits=given["wprec"], act_bits=given["aprec"])


def require_batch_fits(options: ModelOptions, geometry: Geometry, images: int, sees_attention: bool) -> None:
    """Raise InputError where a batch of so many images cannot fit, at the least that it needs.

    `sees_attention`: calibration and quantizers look at all scores, float evaluation does not.
    """
    if options.use_gpu:
        there, where = torch.cuda.get_device_properties(0).total_memory, "this GPU"
    else:
        there, where = machine_memory(), "this machine"
    needed = geometry.least_bytes(images, sees_attention)
    if needed > there:
        raise InputError(
            f"{options.name_of('img_size')}: {geometry.img_size} makes {geometry.num_tokens} tokens, and a batch of "
            f"{images} images needs at least {size_text(needed)}; {where} has {size_text(there)}"
        )


def images_calibrated_on(sidecar: Sidecar, val: SampleIndex) -> int:
    """How many calibration images of a checkpoint are in this val, too, as far as its sidecar tells."""
    if sidecar.calibration.get("data_fingerprint") == val.fingerprint:  # it was calibrated on images of val
        return sidecar.setting.num_batches * sidecar.setting.batch_size
    if sidecar.data_fingerprint == val.fingerprint:  # on images of train, some of which are copies
        return int(sidecar.calibration.get("images_also_evaluated", 0))
    return 0


def checkpoint_name(options: ModelOptions) -> str:
    """Name of the files a checkpoint goes into: the model type given, or with `auto` the stem of its file."""
    if options.model_type != AUTO:
        return options.model_type
    checkpoint, _ = paths_of(options)
    name = Path(checkpoint).stem
    if len(name.encode()) > _LONGEST_NAME:
        raise InputError(f"{options.name_of('pretrained_dir')}: {name}: too long to name files by; rename the file")
    return name


def drawn_by(order: str, option: str, seed: int) -> str:
    """For result files: what decided which images were calibrated on.

    `calib` and `qat` draw them by `--seed`, a search by `--split-seed`: two rules, kept so that the numbers of earlier
    versions stay.
    """
    return "order of the map" if order == "map" else f"{option} {seed}"


def bundled_spaces() -> dict[str, Path]:
    """{name: file} of the search spaces that come with the package."""
    folder = Path(str(files("vitq_ray") / "search_spaces"))
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def find_space(text: str) -> str:
    """The path of a search space, given as a path or as the name of a bundled one.

    A name may have `.py` behind it, and `search_spaces/` before it as in a checkout, also in one that is no longer
    there: earlier versions stored such paths.
    """
    path = Path(text)
    if path.is_file():
        return text
    bundled, name = bundled_spaces(), path.name.removesuffix(".py")
    if name in bundled and (path.parent == Path() or path.parent.name == "search_spaces"):
        return str(bundled[name])
    known = ", ".join(bundled)
    raise InputError(f"{text}: no such file; expected a Python file that defines SPACE, or one of {known}")
