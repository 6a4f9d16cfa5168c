"""Calibrate one INT8 setting, evaluate it on all of val, and write the calibrated checkpoint.

calibration images ──► statistics ──► scales of the setting ──► all of val ──► checkpoint, sidecar, result.json
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitq_ray.base.files import output_folder
from vitq_ray.calibration.planner import Look, Planner, images_needed, look_at, needs_of, require_techniques
from vitq_ray.calibration.sensitivity import images_to_look_at
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import RANGE, CalibrationStatistics
from vitq_ray.cluster.address import require_cluster
from vitq_ray.commands import combinations
from vitq_ray.commands.inputs import (
    checkpoint_name,
    device_of,
    drawn_by,
    eval_transform,
    images_as,
    open_images,
    paths_of,
    require_batch_fits,
    with_sample,
)
from vitq_ray.commands.options import CalibrateOptions, OneSettingOptions
from vitq_ray.commands.outlets import begun, numbers, outlets_of
from vitq_ray.commands.outputs import require_apart
from vitq_ray.commands.passes import ValImages, Workers, engine_for, evaluate_val, looking, ray_for, workers_of
from vitq_ray.commands.report import report_at_end
from vitq_ray.commands.screen import (
    SILENT,
    Screen,
    result_line,
    seconds_line,
    warn_of_bad_images,
    warn_of_left_out,
    warn_of_no_labels,
)
from vitq_ray.data.copies import without_images_of
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.data.samples import SampleIndex
from vitq_ray.data.splits import calibration_ids, default_calib_split, require_images
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.execute import Engine, evaluation_batch
from vitq_ray.measure.calibration import CalibrationPass, calibration_pass, first_images
from vitq_ray.measure.evaluation import Counts, Evaluation, sanity_problem
from vitq_ray.models.checkpoint import Sidecar, save_calibrated
from vitq_ray.models.load import LoadedModel, load_model
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import apply_plan, float_copy, quantize_vit, site_weights
from vitq_ray.run.outlets import Outlets
from vitq_ray.run.results import CALIBRATION, Stopwatch, left_out_rows, result_of, versions, write_result


@dataclass(frozen=True)
class CalibrateResult:
    """What `calibrate` found and wrote.

    Attributes:
        evaluation: every image of val, classified by the quantized model.
        float_on_calibration: the float model on the calibration images.
        checkpoint: path of `<name>_calib.pth`; its sidecar is beside it.
        result: what `result.json` holds.
    """

    setting: Setting
    evaluation: Evaluation
    float_on_calibration: Evaluation
    checkpoint: Path
    result: dict[str, Any]


@dataclass(frozen=True)
class CalibrationJob:
    """What one setting is calibrated with, made before a second is spent computing.

    Attributes:
        split: which split the calibration images come from, `train` or `val`.
        images: that split.
        order: `shuffled` or `map`.
        val: what is evaluated, or only named in the sidecar.
        bad_images: (address, reason) of every broken image met, appended to.
    """

    setting: Setting
    loaded: LoadedModel
    model: nn.Module
    transform: EvalTransform
    device: torch.device
    split: str
    order: str
    images: SampleIndex
    val: SampleIndex
    bad_images: list[tuple[str, str]] = field(default_factory=list)

    @property
    def splits(self) -> dict[str, SampleIndex]:
        return {self.split: self.images, "val": self.val}

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) on the model's device."""
        return self.transform.normalize(images.to(self.device))


def calibrate(options: CalibrateOptions, screen: Screen = SILENT) -> CalibrateResult:
    """Calibrate one setting, evaluate it, and write checkpoint, sidecar and result.json.

    Raises InputError for what is wrong with options, checkpoint or images.
    """
    watch = Stopwatch()
    with watch.stage("load"):
        combinations.require_used(options, combinations.CALIBRATE)
        require_cluster(options.ray_address)
        outlets = outlets_of(options, screen)
        options = with_sample(options, screen)
        require_apart(options)
        job = prepare(options, options.calib_split, options.calib_order)
        warn_of_left_out(screen, job.splits)
        if not job.val.has_labels:
            warn_of_no_labels(screen, job.val)
        size = options.batch_size or evaluation_batch(job.model, job.device)
        require_batch_fits(options, job.loaded.geometry, min(size, len(job.val)), sees_attention=True)
        workers = workers_of(options, options.use_gpu)
        folder = output_folder(options.calib_output_path, options.name_of("calib_output_path"))
    with begun(outlets, options, CALIBRATION, folder):
        return calibrate_job(job, options, workers, folder, watch, outlets, screen)


def calibrate_job(
    job: CalibrationJob,
    options: CalibrateOptions,
    workers: Workers,
    folder: Path,
    watch: Stopwatch,
    outlets: Outlets,
    screen: Screen,
) -> CalibrateResult:
    """All that is computed, written and shown."""
    with ray_for(options):
        with watch.stage("calibrate"):
            seen, look, images = collect(job, options, workers, screen)
        with watch.stage("scales"):
            plan = apply(job, look, images, options.seed, screen)
        screen.say(plan_summary(job.model, plan))
        with watch.stage("evaluate"):
            engine = engine_for(options.engine, job.model, job.loaded.geometry.img_size, job.device, workers)
            screen.say(f"engine: {engine}")
            evaluation = evaluate_all(job, options, engine, screen)
    overlap = images_also_evaluated(job, seen)
    calibration = {
        **calibration_of(job, options),
        "images_also_evaluated": overlap,
        **({"float_top1": seen.evaluation.top1} if seen.evaluation.has_accuracy else {}),
    }
    with watch.stage("save"):
        sidecar = Sidecar.of(
            job.loaded,
            job.setting,
            plan,
            job.val.fingerprint,
            options.seed,
            options.crop_pct,
            calibration,
            evaluation.accuracy(),
            versions(),
        )
        path = save_calibrated(folder, checkpoint_name(options), job.model, plan, sidecar)
    result = result_of(
        CALIBRATION,
        evaluation,
        options=options.to_dict(),
        setting=job.setting.to_dict(),
        weights_fingerprint=job.loaded.fingerprint,
        data_fingerprint=job.val.fingerprint,
        bad_images=job.bad_images,
        left_out=left_out_rows(job.splits),
        seconds=watch.seconds,
        model_type=options.model_type,
        img_size=job.loaded.geometry.img_size,
        images_as=images_as(job.transform),
        name=options.name,
        seed=options.seed,
        engine=engine.to_dict(),
        calibration={**calibration, "sample_ids": seen.sample_ids.tolist()},
        degenerate_sites=plan.degenerate_sites(),
    )
    write_result(folder, result)
    outlets.params({"label": job.setting.label})
    outlets.metrics("images", evaluation.images, numbers(Counts.of(evaluation)))
    if overlap:
        screen.warn(f"{overlap} calibration images are in val, and so among the images evaluated")
    report(job, evaluation, path, watch, screen)
    report_at_end(folder, CALIBRATION, screen)
    return CalibrateResult(job.setting, evaluation, seen.evaluation, path, result)


def prepare(
    options: OneSettingOptions, split: str | None, order: str, loaded: LoadedModel | None = None
) -> CalibrationJob:
    """Check every option and open every file.

    `split` None is train if there is one, else val; `loaded` is the checkpoint where it was read already.
    """
    checkpoint, data = paths_of(options)
    setting, device = options.setting, device_of(options)
    setting.require_images()
    split = split or default_calib_split(data)
    loaded = loaded or load_model(options.model_type, checkpoint, options.img_size, heads=options.heads)
    require_batch_fits(options, loaded.geometry, options.calib_batchsz, sees_attention=True)
    val = open_images(options, "val", loaded.geometry.num_classes)
    images = val if split == "val" else open_images(options, split, loaded.geometry.num_classes)
    require_images(len(images), options.num_calib_batch * options.calib_batchsz)
    model = quantize_vit(loaded.model).to(device)
    require_techniques(model, [setting])
    return CalibrationJob(
        setting=setting,
        loaded=loaded,
        model=model,
        transform=eval_transform(loaded, options.crop_pct),
        device=device,
        split=split,
        order=order,
        images=images,
        val=val,
    )


def collect(
    job: CalibrationJob, options: OneSettingOptions, workers: Workers, screen: Screen, unseen: bool = False
) -> tuple[CalibrationPass, Look, Tensor | None]:
    """The float pass over the calibration images, what was seen in it, and the first images, for corrections.

    With `unseen`, images of train that are in val too are not calibrated on.
    """
    # Every image of the split in order, so that others move up where a broken one is skipped.
    drawn = calibration_ids(len(job.images), len(job.images), job.order, options.seed)
    ids = without_images_of(job.val, job.images, drawn) if unseen else drawn.tolist()
    size, count = options.calib_batchsz, options.num_calib_batch
    passes: list[CalibrationPass] = []

    def batches(bad_images: list[tuple[str, str]]) -> Iterator[Batch]:
        threads, on_bad = options.decode_threads, options.on_bad_image
        return iter_batches(job.images, list(ids), job.transform, size, threads, on_bad, bad_images)

    def statistics(model: nn.Module, kinds: tuple[str, ...]) -> CalibrationStatistics:
        shown = screen.track(batches(job.bad_images), count, "calibrate")
        args = (model, shown, size, [count], job.to_input, how.collect)
        passes.append(calibration_pass(*args, kinds=kinds, bad_images=job.bad_images))
        return passes[0].statistics

    setting = job.setting
    needs = needs_of([setting], job.loaded.geometry.depth)[setting.transforms]
    needs = replace(needs, kinds=needs.kinds or (RANGE,))  # the float model is judged on these images in any case
    images = None
    if needs.grids:
        images = first_images(batches([]), job.to_input, images_needed(job.model, [setting], size * count))

    def track(parts: Sequence[int]) -> Iterable[int]:
        return screen.track(parts, len(parts), "gradients")

    with looking(workers, job.transform, bool(needs.grids)) as how:
        looked_at = None if images is None else images[: images_to_look_at(job.model)]
        look = look_at(job.model, setting.transforms, needs, looked_at, statistics, options.seed, track, how.spread)
    if problem := sanity_problem(passes[0].evaluation, job.loaded.geometry.num_classes):
        screen.warn(f"{problem} (measured on the calibration images)")
    return passes[0], look, images


def apply(job: CalibrationJob, look: Look, images: Tensor | None, seed: int, screen: Screen) -> Plan:
    """Let the model follow the plan of the setting; sites that quantize to zeros are warned of."""

    def first() -> Tensor:
        assert images is not None  # corrections have needed gradients, and so images
        return images

    planner = Planner(job.model, {job.setting.transforms: look}, first, seed)
    plan = planner.plan(job.setting)
    if look.sensitivity is not None:
        screen.say(f"predicted KL to the float model: {planner.forecast(job.setting, plan):.4g} nats")
    apply_plan(job.model, plan)
    for site in plan.degenerate_sites():
        if plan.sites[site].rule.on:
            screen.warn(f"{site}: amax is 0, this tensor quantizes to zeros")
    return plan


def evaluate_all(job: CalibrationJob, options: CalibrateOptions, engine: Engine, screen: Screen) -> Evaluation:
    """All of val, by the quantized model, compared with the float model where that was asked for or all there is."""
    images = ValImages(job.val, range(len(job.val)), job.transform, job.device, job.to_input, job.bad_images)
    float_model = float_copy(job.model) if options.fidelity or not job.val.has_labels else None
    return evaluate_val(job.model, images, options, screen, engine, float_model=float_model)


def images_also_evaluated(job: CalibrationJob, seen: CalibrationPass) -> int:
    """Calibration images that are in val too."""
    if job.split == "val":
        return len(seen.sample_ids)
    return len(seen.sample_ids) - len(list(without_images_of(job.val, job.images, seen.sample_ids)))


# What is written and shown ------------------------------------------------------------------------------------------


def calibration_of(job: CalibrationJob, options: OneSettingOptions) -> dict[str, Any]:
    """What a sidecar says of how it was calibrated."""
    return {
        "split": job.split,
        "order": job.order,
        "drawn_by": drawn_by(job.order, "seed", options.seed),
        "batches": options.num_calib_batch,
        "batch_size": options.calib_batchsz,
        "data_fingerprint": job.images.fingerprint,
    }


def plan_summary(model: nn.Module, plan: Plan) -> str:
    """Every site: bits, axis, amax, grid, on or off; then the share of all weights that are quantized."""
    lines = [f"{'site':<70} {'bits':>4} {'axis':>10} {'amax':>23}  {'grid':<12}  state"]
    for key, site in plan.sites.items():
        rule, low, high = site.rule, site.amax.min().item(), site.amax.max().item()
        axis = "per tensor" if rule.axis is None else f"axis {rule.axis}"
        amax = f"{high:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
        grid = "signed" if rule.signed else f"zero at {rule.zero_point}" if rule.zero_point else "unsigned"
        lines.append(f"{key:<70} {rule.bits:>4} {axis:>10} {amax:>23}  {grid:<12}  {'on' if rule.on else 'off'}")
    on, share = sum(site.rule.on for site in plan.sites.values()), quantized_weight_share(model, plan)
    return "\n".join((*lines, f"quantizers: {on} of {len(plan.sites)} on; {share:.2%} of all weights quantized"))


def quantized_weight_share(model: nn.Module, plan: Plan) -> float:
    """Quantized parameters over all parameters, a fraction."""
    quantized = sum(w.numel() for key, w in site_weights(model).items() if plan.sites[key].rule.on)
    return quantized / sum(parameter.numel() for parameter in model.parameters())


def report(job: CalibrationJob, evaluation: Evaluation, path: Path, watch: Stopwatch, screen: Screen) -> None:
    screen.say(result_line(job.setting.label, evaluation))
    warn_of_bad_images(screen, job.bad_images)
    screen.say(f"wrote {path}, {path.with_suffix('.json').name} and result.json")
    screen.say(seconds_line(watch.seconds))
