"""Evaluate a float or a calibrated checkpoint on all of val, in map order."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.files import output_file, output_folder
from vitq_ray.cluster.address import require_cluster
from vitq_ray.commands import combinations
from vitq_ray.commands.evaluate_file import evaluate_file, is_file
from vitq_ray.commands.inputs import (
    device_of,
    eval_transform,
    images_as,
    images_calibrated_on,
    load_float,
    open_images,
    paths_of,
    require_as_calibrated,
    require_batch_fits,
    require_labels,
    setting_by_hand,
    with_sample,
)
from vitq_ray.commands.options import EvaluateOptions
from vitq_ray.commands.outlets import begun, numbers, outlets_of
from vitq_ray.commands.outputs import require_apart
from vitq_ray.commands.passes import (
    KeptLogits,
    ValImages,
    Workers,
    engine_for,
    evaluate_val,
    ignore,
    ray_for,
    workers_of,
)
from vitq_ray.commands.screen import SILENT, Screen, result_line, warn_of_bad_images, warn_of_left_out
from vitq_ray.data.samples import SampleIndex
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.execute import Engine, evaluation_batch
from vitq_ray.measure.evaluation import Counts, Evaluation, sanity_problem
from vitq_ray.models.checkpoint import BY_HAND, CalibratedModel, Sidecar, open_checkpoint
from vitq_ray.models.load import LoadedModel
from vitq_ray.run.outlets import Outlets
from vitq_ray.run.results import EVALUATION, Stopwatch, left_out_rows, result_of, write_result


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` found.

    Attributes:
        what: `float`, or the label of the setting.
        evaluation: every image, in the order of val.
        result: what `result.json` holds.
    """

    what: str
    evaluation: Evaluation
    result: dict[str, Any]


@dataclass(frozen=True)
class EvaluationJob:
    """What is evaluated on what. `sidecar` is that of a calibrated checkpoint, `float_model` what it is compared to."""

    loaded: LoadedModel
    sidecar: Sidecar | None
    transform: EvalTransform
    device: torch.device
    index: SampleIndex
    ids: range
    float_model: nn.Module | None
    bad_images: list[tuple[str, str]] = field(default_factory=list)

    @property
    def what(self) -> str:
        return "float" if self.sidecar is None else self.sidecar.label

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) on the model's device."""
        return self.transform.normalize(images.to(self.device))

    def engine(self, name: str, workers: Workers) -> Engine | None:
        """What runs the model if it is a calibrated one."""
        if self.sidecar is None:
            return None  # a float model runs in PyTorch
        return engine_for(name, self.loaded.model, self.loaded.geometry.img_size, self.device, workers)


def evaluate(options: EvaluateOptions, screen: Screen = SILENT) -> EvaluateResult:
    """Classify every image of val and write result.json.

    Raises InputError for what is wrong with options, checkpoint or images.
    """
    watch = Stopwatch()
    with watch.stage("load"):
        combinations.require_used(options, combinations.EVALUATE)
        require_cluster(options.ray_address)
        outlets = outlets_of(options, screen)
        options = with_sample(options, screen)
        require_apart(options)
        if is_file(options):
            return EvaluateResult(*evaluate_file(options, outlets, screen))
        job = prepare(options)
        warn_of_left_out(screen, {"val": job.index})
    with begun(outlets, options, EVALUATION, Path(options.output)):
        return evaluate_job(job, options, watch, outlets, screen)


def evaluate_job(
    job: EvaluationJob, options: EvaluateOptions, watch: Stopwatch, outlets: Outlets, screen: Screen
) -> EvaluateResult:
    """All that is computed, written and shown."""
    kept = KeptLogits()
    with ray_for(options), watch.stage("evaluate"):
        engine = job.engine(options.engine, workers_of(options, options.use_gpu))
        if engine is not None:
            screen.say(f"engine: {engine}")
        evaluation = classify_all(job, options, engine, kept, screen)
    if options.save_logits:
        kept.save(Path(options.save_logits))
    if problem := sanity_problem(evaluation, job.loaded.geometry.num_classes, what=job.what):
        screen.warn(problem)
    result = describe(job, options, engine, evaluation, watch)
    write_result(Path(options.output), result)
    outlets.params({"label": job.what})
    outlets.metrics("images", evaluation.images, numbers(Counts.of(evaluation)))
    report(job, options, evaluation, screen)
    return EvaluateResult(job.what, evaluation, result)


def prepare(options: EvaluateOptions) -> EvaluationJob:
    """Check every option, open every file and make the output folder before a second is spent computing."""
    device = device_of(options)
    loaded, sidecar = load(options)
    loaded.model.to(device)
    index = open_images(options, "val", loaded.geometry.num_classes)
    float_model = None if options.reference is None else load_float(options, "reference", loaded, "the checkpoint")
    if float_model is not None:
        float_model.to(device)
    else:
        require_labels(index, f"expected a float checkpoint to compare with, {options.name_of('reference')}")
    ids = range(min(len(index), options.limit or len(index)))
    size = min(options.batch_size or evaluation_batch(loaded.model, device), len(ids))
    require_batch_fits(options, loaded.geometry, size, sees_attention=sidecar is not None)
    output_folder(options.output, options.name_of("output"))
    if options.save_logits:
        output_file(options.save_logits, options.name_of("save_logits"))
    transform = eval_transform(loaded, options.crop_pct if sidecar is None else sidecar.crop_pct)
    return EvaluationJob(loaded, sidecar, transform, device, index, ids, float_model)


def load(options: EvaluateOptions) -> tuple[LoadedModel, Sidecar | None]:
    """The model, and its sidecar if it is a calibrated one."""
    checkpoint, _ = paths_of(options)
    opened = open_checkpoint(checkpoint, options.model_type, options.img_size, options.heads, setting_by_hand(options))
    if isinstance(opened, CalibratedModel):
        require_as_calibrated(options, opened.sidecar)
        return opened.loaded, opened.sidecar
    for name, value in options.only(("quant_mode", "wprec", "aprec", "engine")).items():
        raise InputError(
            f"{options.name_of(name)}: {value} given, but {checkpoint} is a float checkpoint; calibrate it first"
        )
    return opened, None


def classify_all(
    job: EvaluationJob, options: EvaluateOptions, engine: Engine | None, kept: KeptLogits, screen: Screen
) -> Evaluation:
    """Every image, here or on workers; logits are kept where they are to be saved."""
    images = ValImages(job.index, job.ids, job.transform, job.device, job.to_input, job.bad_images)
    on_batch = kept.add if options.save_logits else ignore
    return evaluate_val(job.loaded.model, images, options, screen, engine, on_batch, job.float_model)


def describe(
    job: EvaluationJob, options: EvaluateOptions, engine: Engine | None, evaluation: Evaluation, watch: Stopwatch
) -> dict[str, Any]:
    """result.json"""
    sidecar = job.sidecar
    return result_of(
        EVALUATION,
        evaluation,
        options=options.to_dict(),
        setting=None if sidecar is None or sidecar.calibration.get("by") == BY_HAND else sidecar.setting.to_dict(),
        weights_fingerprint=job.loaded.fingerprint,
        data_fingerprint=job.index.fingerprint,
        bad_images=job.bad_images,
        left_out=left_out_rows({"val": job.index}),
        seconds=watch.seconds,
        calibration=None if sidecar is None else sidecar.calibration,
        images_also_calibrated_on=images_also_calibrated_on(job),
        checkpoint=options.to_dict()["pretrained_dir"],
        engine=None if engine is None else engine.to_dict(),
        model_type=job.loaded.geometry.model_type,
        img_size=job.loaded.geometry.img_size,
        images_as=images_as(job.transform),
    )


def images_also_calibrated_on(job: EvaluationJob) -> int:
    """As `images_calibrated_on`; a float model has none."""
    return 0 if job.sidecar is None else images_calibrated_on(job.sidecar, job.index)


def report(job: EvaluationJob, options: EvaluateOptions, evaluation: Evaluation, screen: Screen) -> None:
    screen.say(result_line(job.what, evaluation))
    if overlap := images_also_calibrated_on(job):
        screen.warn(f"{overlap} of the images of this val were calibrated on")
    screen.say(f"wrote {Path(options.output) / 'result.json'}")
    warn_of_bad_images(screen, job.bad_images)
