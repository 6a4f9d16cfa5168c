"""Find the best INT8 settings for a Vision Transformer, and prove them.

    import vitq_ray

    result = vitq_ray.tune(pretrained_dir="ViT-B_16.npz", data_path="/data/imagenet", output="runs/vit")
    print(result.winner.label, result.checkpoint)

Names are loaded when they are first used, so that importing this package is quick and workers load what they need.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitq_ray.base.config import InputError as InputError
    from vitq_ray.calibration.calibrators import Calibration as Calibration
    from vitq_ray.calibration.setting import Rule as Rule
    from vitq_ray.calibration.setting import Setting as Setting
    from vitq_ray.commands.api import calibrate as calibrate
    from vitq_ray.commands.api import evaluate as evaluate
    from vitq_ray.commands.api import export as export
    from vitq_ray.commands.api import report as report
    from vitq_ray.commands.api import sensitivity as sensitivity
    from vitq_ray.commands.api import train as train
    from vitq_ray.commands.api import tune as tune
    from vitq_ray.commands.calibrate import CalibrateResult as CalibrateResult
    from vitq_ray.commands.evaluate import EvaluateResult as EvaluateResult
    from vitq_ray.commands.export import ExportResult as ExportResult
    from vitq_ray.commands.sensitivity import SensitivityResult as SensitivityResult
    from vitq_ray.commands.train import TrainResult as TrainResult
    from vitq_ray.commands.tune import TuneResult as TuneResult
    from vitq_ray.measure.evaluation import Evaluation as Evaluation
    from vitq_ray.models.checkpoint import load_calibrated as load_calibrated
    from vitq_ray.quant.plan import Plan as Plan
    from vitq_ray.search.space import loguniform as loguniform
    from vitq_ray.search.space import percentiles as percentiles

__version__ = "0.2.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # else Python prints warnings that nobody listens to

_WHERE = {
    "calibrate": "commands.api",
    "evaluate": "commands.api",
    "tune": "commands.api",
    "train": "commands.api",
    "export": "commands.api",
    "report": "commands.api",
    "sensitivity": "commands.api",
    "CalibrateResult": "commands.calibrate",
    "EvaluateResult": "commands.evaluate",
    "ExportResult": "commands.export",
    "SensitivityResult": "commands.sensitivity",
    "TrainResult": "commands.train",
    "TuneResult": "commands.tune",
    "Evaluation": "measure.evaluation",
    "InputError": "base.config",
    "Calibration": "calibration.calibrators",
    "Rule": "calibration.setting",
    "Setting": "calibration.setting",
    "Plan": "quant.plan",
    "load_calibrated": "models.checkpoint",
    "loguniform": "search.space",
    "percentiles": "search.space",
}
__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
