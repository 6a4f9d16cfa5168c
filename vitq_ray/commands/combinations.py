"""Options that do nothing in a combination: given there, they are an error that says why. Defaults never are.

One table per command. Seeds are in none of them: a run that draws nothing is the same for every seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vitq_ray.base.config import InputError
from vitq_ray.calibration.calibrators import CALIBRATORS
from vitq_ray.commands.declare import Options
from vitq_ray.commands.options import parameters
from vitq_ray.engines.targets import TENSORRT

SETTING_FIELDS = {  # option: the field of a search space that stands for it
    "quant_mode": "mode",
    "calibrator": "calibrator",
    **{name: name for name in parameters()},
    "num_calib_batch": "num_batches",
    "wprec": "weight_bits",
    "aprec": "act_bits",
    "weight_calibrator": "weights",
    "transforms": "transforms",
    "corrections": "corrections",
    "rules": "rules",
}


@dataclass(frozen=True)
class Idle:
    """An option, when it does nothing, and why.

    Attributes:
        when: of the options of the command, defaults filled in.
        why: `{option}` in it stands for another option as the user knows it.
    """

    option: str
    when: Callable[[Any], bool]
    why: str


def _parameter(name: str) -> Idle:
    def not_taken(options: Any) -> bool:
        return name not in [parameter.name for parameter in CALIBRATORS[options.calibrator].parameters]

    return Idle(name, not_taken, "the calibrator ({calibrator}) does not take it")


_PARAMETERS = tuple(map(_parameter, parameters()))
_DASHBOARD = Idle(
    "dashboard",
    lambda o: o.dashboard and o.ray_address is not None,
    "a cluster that is joined ({ray_address}) has its own",
)
_OUTPUT = Idle("output", lambda o: o.resume is not None, "a run that goes on ({resume}) stays in its folder")
_IN_THIS_PROCESS = "without {num_workers} everything runs in this process"
_WORKERS = (
    Idle("threads_per_worker", lambda o: o.num_workers is None, _IN_THIS_PROCESS),
    Idle("ray_address", lambda o: o.num_workers is None, _IN_THIS_PROCESS),
)

CALIBRATE = (*_PARAMETERS, *_WORKERS)
EVALUATE = _WORKERS
TUNE = (
    *(
        Idle(name, lambda o: o.from_run is not None, "the settings are those of the search that {from_run} names")
        for name in ("search_alg", "num_samples", "target", *SETTING_FIELDS)
    ),
    Idle("quant_mode", lambda o: o.target is not None, "{target} says which mode is searched"),
    Idle(
        "num_samples",
        lambda o: o.search_alg == "grid",
        "a grid tries every setting; expected {search_alg} random or optuna",
    ),
    Idle(
        "object_store_memory",
        lambda o: o.ray_address is not None,
        "the object store of a cluster that is joined ({ray_address}) is as large as it is",
    ),
    _DASHBOARD,
    _OUTPUT,
)
TRAIN = (
    *_PARAMETERS,
    Idle("teacher", lambda o: not o.distill, "nothing is learned from it without {distill}"),
    Idle("temperature", lambda o: not o.distill, "there is no teacher without {distill}"),
    Idle("distill_scale", lambda o: not o.distill, "there is no teacher without {distill}"),
    Idle("max_failures", lambda o: o.num_workers == 1, "one worker ({num_workers} 1) trains in this process"),
    _DASHBOARD,
    _OUTPUT,
)


_FILE = "an ONNX file says it, or has none"
EVALUATE_FILE = (
    *(Idle(name, lambda o: True, _FILE) for name in ("quant_mode", "wprec", "aprec", "heads")),
    Idle("num_workers", lambda o: o.num_workers is not None, "an ONNX file is run in this process"),
    Idle("use_gpu", lambda o: o.use_gpu, "an ONNX file is run on the CPU"),
    Idle("reference", lambda o: True, "an ONNX file is compared with the float model when it is exported"),
)
SENSITIVITY = (*_PARAMETERS, Idle("use_gpu", lambda o: o.use_gpu, "parts are measured on the CPU"), _OUTPUT)
EXPORT = (
    Idle("use_gpu", lambda o: o.use_gpu, "a file is verified on the CPU"),
    Idle("unsigned_weights", lambda o: o.unsigned_weights and o.target == TENSORRT, "TensorRT takes signed ones only"),
)


def require_used(options: Options, table: Iterable[Idle]) -> None:
    """Raise InputError for the first option that was given and does nothing."""
    for row in table:
        if row.option in options.given and row.when(options):
            raise idle_error(options, row.option, row.why)


def idle_error(options: Options, name: str, why: str) -> InputError:
    """E.g. `--max-failures: 5 given, but one worker (--num-workers 1) trains in this process`."""
    names = {other: options.name_of(other) for other in options.declared()}
    return InputError(f"{names[name]}: {getattr(options, name)} given, but {why.format(**names)}")
