"""The commands as functions of Python: their options are keywords, their outcome is a value, nothing is printed.

Warnings go to the log `vitq_ray`. What is wrong with options, checkpoint or images is an `InputError`.
"""

from __future__ import annotations

from typing import Any

from vitq_ray.commands import calibrate as _calibrate
from vitq_ray.commands import evaluate as _evaluate
from vitq_ray.commands import export as _export
from vitq_ray.commands import report as _report
from vitq_ray.commands import sensitivity as _sensitivity
from vitq_ray.commands import train as _train
from vitq_ray.commands import tune as _tune
from vitq_ray.commands.declare import signature_of
from vitq_ray.commands.options import (
    CalibrateOptions,
    EvaluateOptions,
    ExportOptions,
    ReportOptions,
    SensitivityOptions,
    TrainOptions,
    TuneOptions,
)


def calibrate(**options: Any) -> _calibrate.CalibrateResult:
    """Calibrate one INT8 setting, evaluate it on all of val, and write the calibrated checkpoint."""
    return _calibrate.calibrate(CalibrateOptions.of(options))


def evaluate(**options: Any) -> _evaluate.EvaluateResult:
    """Evaluate a float or a calibrated checkpoint on all of val."""
    return _evaluate.evaluate(EvaluateOptions.of(options))


def tune(**options: Any) -> _tune.TuneResult:
    """Find the best setting of a search space; `resume=folder` goes on with a search."""
    return _tune.tune(TuneOptions.of(options))


def train(**options: Any) -> _train.TrainResult:
    """Train a calibrated checkpoint with its quantizers on; `resume=folder` goes on with a training."""
    return _train.train(TrainOptions.of(options))


def export(**options: Any) -> _export.ExportResult:
    """Write a calibrated model as an ONNX file for a runtime, and verify it on images."""
    return _export.export(ExportOptions.of(options))


def sensitivity(**options: Any) -> _sensitivity.SensitivityResult:
    """Say what each part of a plan costs; `resume=folder` goes on with it."""
    return _sensitivity.sensitivity(SensitivityOptions.of(options))


def report(**options: Any) -> _report.ReportResult:
    """Draw what a run found as one page, `report(run=folder)`, from its folder alone."""
    return _report.report(ReportOptions.of(options))


for _function, _options, _result in (
    (calibrate, CalibrateOptions, _calibrate.CalibrateResult),
    (evaluate, EvaluateOptions, _evaluate.EvaluateResult),
    (tune, TuneOptions, _tune.TuneResult),
    (train, TrainOptions, _train.TrainResult),
    (export, ExportOptions, _export.ExportResult),
    (sensitivity, SensitivityOptions, _sensitivity.SensitivityResult),
    (report, ReportOptions, _report.ReportResult),
):
    _function.__signature__ = signature_of(_options, _result)  # type: ignore[union-attr]
