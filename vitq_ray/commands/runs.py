"""A finished run as what another command works on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitq_ray.base.config import InputError
from vitq_ray.commands.options import ExportOptions, SensitivityOptions
from vitq_ray.run.folder import RUN, WITHOUT_CORRECTIONS, RunFolder
from vitq_ray.run.results import SEARCH, read_result


def search_of(checkpoint: str) -> dict[str, Any] | None:
    """run.json of the search whose `best/` this checkpoint lies in; None where it lies elsewhere."""
    if "://" in checkpoint:
        return None
    best = Path(checkpoint).absolute().parent
    if best.name == WITHOUT_CORRECTIONS:
        best = best.parent
    if best.name != "best" or not (best.parent / RUN).is_file():
        return None
    description = RunFolder(best.parent).read_run()
    return description if description["script"] == SEARCH else None


def checkpoint_of_run(options: ExportOptions | SensitivityOptions) -> tuple[str, str]:
    """(calibrated checkpoint, images) of the finished run that `run` names.

    InputError where it holds no checkpoint, where another one is given, or nobody says where the images are.
    """
    assert options.run is not None
    if options.pretrained_dir is not None:
        raise InputError(f"{options.name_of('run')}: {options.run} given, and a checkpoint, too; expected one of them")
    folder = Path(options.run)
    made = read_result(folder)
    found = [
        path for place in (folder / "best", folder) for kind in ("qat", "calib") for path in place.glob(f"*_{kind}.pth")
    ]
    if not found:
        raise InputError(f"{folder}: holds no calibrated checkpoint; expected the folder of a finished run")
    data = options.data_path or made["options"].get("data_path")
    if data is None:
        raise InputError(f"{options.name_of('data_path')}: needed: the run does not say where images are")
    return str(found[0]), data
