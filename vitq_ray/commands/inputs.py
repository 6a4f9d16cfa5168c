"""From options to what a command works with: checkpoint and images, device, setting, how images are prepared."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import torch

from vitq_ray.base.config import InputError
from vitq_ray.commands.options import (
    ModelOptions,
)
from vitq_ray.commands.screen import Screen
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.models.geometry import AUTO
from vitq_ray.models.load import LoadedModel

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


def device_of(options: ModelOptions) -> torch.device:
    """The first GPU with `use_gpu`, else the CPU; InputError where there is no GPU."""
    if options.use_gpu and not torch.cuda.is_available():
        name = options.name_of("use_gpu")
        raise InputError(f"{name}: this PyTorch finds no CUDA GPU; leave the option out to run on the CPU")
    return torch.device("cuda" if options.use_gpu else "cpu")


def eval_transform(loaded: LoadedModel, crop_pct: float | None = None) -> EvalTransform:
    """How images are prepared for this model."""
    return EvalTransform(loaded.geometry.img_size, loaded.mean, loaded.std, loaded.interpolation, crop_pct)


def checkpoint_name(options: ModelOptions) -> str:
    """Name of the files a checkpoint goes into: the model type given, or with `auto` the stem of its file."""
    return Path(paths_of(options)[0]).stem if options.model_type == AUTO else options.model_type


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
