"""What the scripts share: an argument parser, option groups, exit codes, and the default sample.

Every option can be spelled with dashes or underscores. Exit codes: 0 done, 2 bad input or options (one line on
stderr), 1 anything else, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import rich.progress
import torch

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line
from vitq_ray.calibration.calibrators import CALIBRATORS, Calibration
from vitq_ray.calibration.setting import Setting
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.models.geometry import AUTO
from vitq_ray.models.load import LoadedModel
from vitq_ray.qat.loop import DivergedError
from vitq_ray.qat.recipe import RECIPE_OPTIONS, RecipeOption
from vitq_ray.quant.plan import MAX_BITS, MIN_BITS
from vitq_ray.quant.sites import MODES

T = TypeVar("T")

DEFAULT_PERCENTILE = 99.99
MODE_ALIASES = {"1": "ft1", "2": "ft2"}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Docstrings as they are written, and the default of every option."""


class Parser(argparse.ArgumentParser):
    """argparse with both spellings of every option, no abbreviations, and one-line errors."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)

    def add(self, name: str, **settings: Any) -> None:
        """`add_argument` that takes `--calib-batchsz` and `--calib_batchsz` alike."""
        spellings = dict.fromkeys((name, "--" + name[2:].replace("-", "_"), "--" + name[2:].replace("_", "-")))
        self.add_argument(*spellings, dest=name[2:].replace("-", "_"), **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def number(kind: type[int] | type[float], low: float, high: float | None = None) -> Callable[[str], Any]:
    """An argparse type: `kind` (int or float) within [low, high], or an error that says so."""

    def parse(text: str) -> Any:
        value: float | None
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= low or (high is not None and not value <= high):
            limits = f">= {low}" if high is None else f"from {low} to {high}"
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} {limits}, got {text!r}")
        return value

    return parse


def add_recipe_options(parser: Parser) -> None:
    """What a training run can vary, from the table of recipes."""
    for row in RECIPE_OPTIONS:
        if row.argument is None:
            continue
        name = "--" + row.argument.replace("_", "-")
        if row.kind is bool:
            parser.add(name, action="store_true", help=row.help)
        elif row.choices:
            parser.add(name, choices=row.choices, default=row.default, help=row.help)
        else:
            parser.add(name, type=_recipe_value(row), default=row.default, help=row.help)


def _recipe_value(row: RecipeOption) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = row.kind(text)
        except ValueError:
            value = text
        try:
            row.check(value)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    return parse


def recipe_values(args: argparse.Namespace) -> dict[str, Any]:
    """{name in RECIPE_OPTIONS: value} of the options that `add_recipe_options` adds."""
    return {row.name: getattr(args, row.argument) for row in RECIPE_OPTIONS if row.argument is not None}


def quant_mode(text: str) -> str:
    """An argparse type: a mode name; the old toolkit's `1` and `2` mean ft1 and ft2."""
    mode = MODE_ALIASES.get(text, text)
    if mode not in MODES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join((*MODES, *MODE_ALIASES))}")
    return mode


def add_model_options(parser: Parser, decode_threads: bool = True) -> None:
    """Which checkpoint, which images, on what. Without `--pretrained_dir` and `--data-path`: the bundled sample."""
    parser.add("--pretrained_dir", help="checkpoint file: .npz, .pth, .safetensors, or *_calib.pth (path or URI)")
    parser.add("--data-path", help="folder with train.zip, val.zip and their maps, or with train/ and val/")
    parser.add("--model_type", default="auto", help="ViT-B_16, …, a timm name, or auto: read it from the file")
    parser.add("--img_size", type=number(int, 1, 4096), help="pixels; default: the model type's, with auto the file's")
    parser.add("--crop-pct", type=number(float, 0.01, 1), help="crop the centre of evaluation images, by timm's rule")
    parser.add("--on-bad-image", choices=("error", "skip"), default="error", help="what to do with a broken image")
    if decode_threads:
        parser.add("--decode-threads", type=number(int, 1), default=2, help="threads that decode images")
    parser.add("--use-gpu", action="store_true", help="run the model on the first GPU")


def add_setting_options(parser: Parser) -> None:
    """One quantization setting, and the seed of what is drawn for it."""
    parser.add("--seed", type=number(int, 0), default=42, help="seed of every random choice")
    parser.add("--quant-mode", type=quant_mode, default="ft2", help="ft1, ft2, ft3 or trt")
    parser.add("--calibrator", choices=CALIBRATORS, default="percentile", help="how amax is chosen")
    parser.add("--percentile", type=number(float, 0, 100), help=f"in [0, 100]; default: {DEFAULT_PERCENTILE}")
    parser.add("--num-calib-batch", type=number(int, 1), default=10, help="number of calibration batches")
    parser.add("--wprec", type=number(int, MIN_BITS, MAX_BITS), default=8, help="bits of weights")
    parser.add("--aprec", type=number(int, MIN_BITS, MAX_BITS), default=8, help="bits of activations")


def setting_from(args: argparse.Namespace) -> Setting:
    """The setting that the options describe; the percentile belongs to the percentile calibrator only."""
    percentile = DEFAULT_PERCENTILE if args.percentile is None else args.percentile
    if args.calibrator != "percentile" and args.percentile is not None:
        warn(f"--percentile {args.percentile:g} is not used by the {args.calibrator} calibrator")
    values = (percentile,) if args.calibrator == "percentile" else ()
    return Setting(
        mode=args.quant_mode,
        calibrator=Calibration(args.calibrator, values),
        num_batches=args.num_calib_batch,
        batch_size=args.calib_batchsz,
        weight_bits=args.wprec,
        act_bits=args.aprec,
    )


def apply_sample_defaults(args: argparse.Namespace) -> None:
    """Neither checkpoint nor data given: the bundled sample. Only one of them given: an error."""
    given = {"--pretrained_dir": args.pretrained_dir, "--data-path": args.data_path}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 1:
        raise InputError(f"{missing[0]}: needed, since {next(n for n in given if n not in missing)} is given")
    if missing:
        sample = files("vitq_ray") / "sample"
        args.data_path, args.pretrained_dir = str(sample), str(sample / "vit.npz")
        print(f"no checkpoint and no data given: using the bundled sample in {sample}")


def device_from(args: argparse.Namespace) -> torch.device:
    if args.use_gpu and not torch.cuda.is_available():
        raise InputError("--use-gpu: this PyTorch finds no CUDA GPU; leave the option out to run on the CPU")
    return torch.device("cuda" if args.use_gpu else "cpu")


def eval_transform(loaded: LoadedModel, crop_pct: float | None = None) -> EvalTransform:
    """How images are prepared for this model."""
    return EvalTransform(loaded.geometry.img_size, loaded.mean, loaded.std, loaded.interpolation, crop_pct)


def checkpoint_name(args: argparse.Namespace) -> str:
    """Name of the files a checkpoint goes into: the model type given, or with `auto` the stem of its file."""
    return Path(args.pretrained_dir).stem if args.model_type == AUTO else args.model_type


def track(items: Iterable[T], total: int, label: str) -> Iterable[T]:
    """Pass items on under a progress bar, which shows on a terminal only."""
    return rich.progress.track(items, label, total, disable=not sys.stdout.isatty(), transient=True)


def add_worker_options(parser: Parser) -> None:
    """Several workers instead of this process; their results do not depend on how many they are."""
    parser.add("--num-workers", type=number(int, 1), help="compute on N Ray workers; default: in this process")
    parser.add("--threads-per-worker", type=number(int, 1), default=1, help="threads of one such worker")
    parser.add("--ray-address", help="host:port of a Ray cluster, or auto; default: start Ray on this machine")


def add_search_options(parser: Parser) -> None:
    """Where and how a search runs on Ray."""
    parser.add("--max-trials-in-flight", type=number(int, 1), help="trials at once; default: as many as fit")
    parser.add("--threads-per-trial", type=number(int, 1), default=1, help="CPUs of one trial or worker")
    parser.add("--gpus-per-trial", type=number(float, 0), help="GPUs of one trial; default: 1 with --use-gpu, else 0")
    parser.add("--num-workers", type=number(int, 1), default=1, help="workers that collect calibration statistics")
    parser.add("--object-store-memory", type=number(float, 0.1), help="GB a node keeps decoded images in")
    parser.add("--ray-address", help="host:port of a Ray cluster, or auto; default: start Ray on this machine")
    parser.add("--dashboard", action=argparse.BooleanOptionalAction, default=True, help="serve Ray's dashboard")


def dashboard_hint(url: str | None) -> str:
    """Where Ray's dashboard is, for the line that names the run folder; empty where there is none."""
    return f"; dashboard {url} (its token: ray get-auth-token)" if url else ""


def warn_of_bad_images(bad_images: list[tuple[str, str]]) -> None:
    if bad_images:
        warn(f"{len(dict(bad_images))} broken images were skipped; they are listed in result.json")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Call a script's `main` and translate how it ended into an exit code."""
    try:
        main(argv)
    except InputError as error:
        return _fail(2, one_line(error))
    except DivergedError as error:
        return _fail(1, one_line(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail(1, "disk full: nothing was left half written")
        raise
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    return 0


def _fail(code: int, message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
