"""Outputs never cost an input: checked before anything is read for long, or written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vitq_ray.base.config import InputError
from vitq_ray.base.files import real_path
from vitq_ray.commands.inputs import checkpoint_name
from vitq_ray.commands.options import ModelOptions
from vitq_ray.data.samples import SPLITS
from vitq_ray.run.folder import RUN, WITHOUT_CORRECTIONS, run_around
from vitq_ray.run.results import RESULT

_OUTPUT_FOLDERS = ("output", "calib_output_path")
_OUTPUT_FILES = ("save_logits",)


def require_apart(options: ModelOptions) -> None:
    """Raise InputError where something that would be written is an input, lies among the images of a split or in the
    folder of a run, or is written twice. What goes on with a run writes into its folder.

    `options` have checkpoint and data, as after `with_sample`.
    """
    if getattr(options, "resume", None) is not None:
        return
    inputs = list(_inputs(options))
    results: list[Path] = []
    for name, path in _outputs(options):
        what = f"{options.name_of(name)}: {path}"
        written = [path] if name in _OUTPUT_FILES else list(_written(path, checkpoint_name(options)))
        for file in written:
            for other, source in inputs:
                if _same(file, source):
                    raise InputError(f"{what}: {source} of {options.name_of(other)} would be overwritten")
            if any(_same(file, result) for result in results):
                raise InputError(f"{what}: is written twice; choose another name")
        for split in _split_folders(options):
            if split in (path, *path.parents):
                raise InputError(f"{what}: lies among the images of {options.name_of('data_path')}")
        if (run := run_around(path)) is not None:
            place = "already holds a run" if run == path else f"lies in the folder of a run, {run}"
            way_out = "resume it, or choose" if hasattr(options, "resume") and run == path else "choose"
            raise InputError(f"{what}: {place}; {way_out} another place")
        results += written


def _inputs(options: ModelOptions) -> Iterator[tuple[str, Path]]:
    """(option, file) of every file that is read; a calibrated checkpoint has its sidecar beside it."""
    for name, value in options.to_dict().items():
        if value is None or "://" in str(value):
            continue
        if name in ("pretrained_dir", "teacher", "reference"):
            yield name, Path(value).absolute()
            yield name, Path(value).absolute().with_suffix(".json")
        elif name == "search_space" and Path(value).is_file():
            yield name, Path(value).absolute()
        elif name == "data_path":
            for split in SPLITS:
                yield name, Path(value).absolute() / f"{split}.zip"
                yield name, Path(value).absolute() / f"{split}_map.txt"


def _written(folder: Path, name: str) -> Iterator[Path]:
    """Files that a command may write into its output folder, those of checkpoints included."""
    yield from (folder / RESULT, folder / RUN)
    for place in (folder, folder / "best", folder / "best" / WITHOUT_CORRECTIONS, folder / "start"):
        for kind in ("calib", "qat"):
            yield from (place / f"{name}_{kind}{ending}" for ending in (".pth", ".json"))


def _outputs(options: ModelOptions) -> Iterator[tuple[str, Path]]:
    for name, value in options.to_dict().items():
        if value is not None and name in (*_OUTPUT_FOLDERS, *_OUTPUT_FILES):
            yield name, real_path(value)


def _split_folders(options: ModelOptions) -> list[Path]:
    data = options.to_dict()["data_path"]
    return [] if data is None or "://" in data else [real_path(data) / split for split in SPLITS]


def _same(path: Path, other: Path) -> bool:
    """Also where one is a link to the other, or both to a third."""
    try:
        return path.samefile(other)
    except OSError:  # one of them is not there
        return path == real_path(str(other))
