"""What each site, family and block of a plan costs: predicted by gradients, and measured on images of val.

checkpoint, best of a run, or calibrated here ──► gradients on calibration images ──► predicted KL of every site
images of val ──► each part alone quantized ──► KL to the float model, image by image ──► sensitivity.json, result.json
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.files import write_json
from vitq_ray.calibration.scales import Scales, grids_of_plan
from vitq_ray.calibration.sensitivity import collect_sensitivity, images_to_look_at
from vitq_ray.calibration.setting import Setting
from vitq_ray.commands import combinations
from vitq_ray.commands.calibrate import apply, collect
from vitq_ray.commands.calibrate import prepare as prepare_calibration
from vitq_ray.commands.inputs import (
    eval_transform,
    images_as,
    open_images,
    paths_of,
    require_as_calibrated,
    require_batch_fits,
    with_sample,
)
from vitq_ray.commands.options import SensitivityOptions
from vitq_ray.commands.outputs import require_apart
from vitq_ray.commands.passes import IN_THIS_PROCESS
from vitq_ray.commands.resume import stored_run, with_stored
from vitq_ray.commands.runs import checkpoint_of_run, search_of
from vitq_ray.commands.screen import SILENT, Screen, percent, seconds_line, warn_of_bad_images, warn_of_left_out
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.samples import SampleIndex
from vitq_ray.data.splits import calibration_ids, default_calib_split
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.execute import Engine, evaluation_batch, find_engine
from vitq_ray.measure.calibration import first_images
from vitq_ray.measure.evaluation import Counts
from vitq_ray.measure.metrics import Results, pack_text, unpack_text
from vitq_ray.models.checkpoint import CalibratedModel, open_checkpoint
from vitq_ray.models.load import LoadedModel
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import float_copy, quant_blocks
from vitq_ray.quant.work import integer_share, products_of
from vitq_ray.run.folder import WITHOUT_CORRECTIONS, RunFolder
from vitq_ray.run.results import SENSITIVITY, Stopwatch, left_out_rows, result_of, versions
from vitq_ray.search.site_effects import KINDS, WHOLE, Effect, effects, parts_of, predicted_of

SENSITIVITY_FILE = "sensitivity.json"
_SHOWN = 12  # sites, and blocks, in the table
FREE_OPTIONS = frozenset({"data_path", "pretrained_dir", "resume", "output", "run", "decode_threads", "engine"})


@dataclass(frozen=True)
class SensitivityResult:
    """What `sensitivity` found.

    Attributes:
        folder: of the run.
        effects: of every part, the whole plan first, then what costs most.
        result: what `result.json` holds.
    """

    folder: Path
    effects: list[Effect]
    result: dict[str, Any]


@dataclass(frozen=True)
class SensitivityJob:
    """A model that follows a plan, and the images it is looked at with.

    Attributes:
        gradient_images: as the model takes them, (B, 3, S, S).
        ids: images of val that parts are measured on.
        calibrated_on: how many of them the scales come from, as far as it is known.
    """

    loaded: LoadedModel
    model: nn.Module
    setting: Setting
    plan: Plan
    transform: EvalTransform
    gradient_images: Tensor
    val: SampleIndex
    ids: list[int]
    calibrated_on: int
    bad_images: list[tuple[str, str]] = field(default_factory=list)

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S)."""
        return self.transform.normalize(images)


def sensitivity(options: SensitivityOptions, screen: Screen = SILENT) -> SensitivityResult:
    """Measure what every part of a plan costs, or go on with it; what was measured is kept.

    Raises InputError for what is wrong with options, checkpoint or images.
    """
    watch = Stopwatch()
    if options.resume is not None:
        options = with_stored(options, stored_run(options.resume, SENSITIVITY)["options"], FREE_OPTIONS)
    combinations.require_used(options, combinations.SENSITIVITY)
    options, of_run = with_run(options, screen)
    options = with_sample(options, screen)
    require_apart(options)
    with watch.stage("load"):
        start = open_checkpoint(paths_of(options)[0], options.model_type, options.img_size, options.heads)
    with open_folder(options) as folder:
        stored = None if options.resume is None else folder.read_run()["images"]
        job = prepare(options, start, stored, watch, screen)
        begin(options, folder, job)
        try:
            found, engine = run(options, folder, job, watch, screen)
        except KeyboardInterrupt:
            screen.interrupted(folder.path)
            raise
        result = write(options, folder, of_run, job, found, engine, watch)
    screen.say(table(found))
    warn_of_bad_images(screen, job.bad_images)
    screen.say(
        f"wrote {folder.path / SENSITIVITY_FILE}" + ("" if of_run is None else f" and {of_run / SENSITIVITY_FILE}")
    )
    screen.say(seconds_line(watch.seconds))
    return SensitivityResult(folder.path, found, result)


# What is looked at ---------------------------------------------------------------------------------------------------


def with_run(options: SensitivityOptions, screen: Screen) -> tuple[SensitivityOptions, Path | None]:
    """The checkpoint and the images of a finished run, where one is named, and its folder.

    Of weights with corrections no part alone can be told from: then it is the checkpoint without them.
    """
    if options.run is None:
        return options, None
    if options.resume is not None:  # the checkpoint was found when the run was begun
        return options, Path(options.run)
    checkpoint, data = checkpoint_of_run(options)
    plain = Path(checkpoint).parent / WITHOUT_CORRECTIONS / Path(checkpoint).name
    if plain.exists():
        screen.say(f"{checkpoint} has corrections, which concern all of it: its parts are looked at without them")
        checkpoint = str(plain)
    return replace(options, pretrained_dir=checkpoint, data_path=data), Path(options.run)


def open_folder(options: SensitivityOptions) -> RunFolder:
    if options.resume is not None:
        return RunFolder.resume(Path(options.resume), SENSITIVITY)
    output = Path(options.output) if options.output else None
    return RunFolder.create(output, SENSITIVITY, options.name_of("output"))


def prepare(
    options: SensitivityOptions,
    start: LoadedModel | CalibratedModel,
    stored: list[int] | None,
    watch: Stopwatch,
    screen: Screen,
) -> SensitivityJob:
    """Open the images; calibrate a float checkpoint with the setting of the options. `stored` are the images of
    val that a resumed run measures on."""
    bad_images: list[tuple[str, str]] = []
    loaded = start if isinstance(start, LoadedModel) else start.loaded
    require_batch_fits(options, loaded.geometry, 4, sees_attention=True)
    classes = loaded.geometry.num_classes
    val = open_images(options, "val", classes)
    if isinstance(start, CalibratedModel):
        require_as_calibrated(options, start.sidecar)
        model: nn.Module = loaded.model
        setting, plan, crop = start.sidecar.setting, start.plan, start.sidecar.crop_pct
    else:
        with watch.stage("calibrate"):
            calibration = prepare_calibration(options, None, "shuffled", start)
            _require_no_corrections(options, calibration.setting)
            _, look, looked_at = collect(calibration, options, IN_THIS_PROCESS, screen)
            plan = apply(calibration, look, looked_at, options.seed, screen)
        setting, model, crop = calibration.setting, calibration.model, options.crop_pct
        bad_images += calibration.bad_images
    _require_no_corrections(options, setting)
    transform = eval_transform(loaded, crop)
    used = val_calibrated_on(options, start, val, setting, images_to_look_at(model))
    drawn = np.random.default_rng(options.seed).permutation(len(val)).tolist()
    ids = stored or sorted(drawn, key=lambda image: image in used)[: options.images]
    if overlap := len(used.intersection(ids)):
        screen.warn(f"{overlap} of the {len(ids)} images that parts are measured on were calibrated on")
    images = gradient_images(options, model, transform, classes, bad_images)
    warn_of_left_out(screen, {"val": val})
    return SensitivityJob(loaded, model, setting, plan, transform, images, val, ids, overlap, bad_images)


def _require_no_corrections(options: SensitivityOptions, setting: Setting) -> None:
    if setting.corrections:
        names = ", ".join(map(str, setting.corrections))
        raise InputError(
            f"{options.pretrained_dir}: its weights have corrections ({names}), which no part alone can be told from; "
            + (
                "expected a setting without corrections, or with --run the folder of a search"
                if options.run is None
                else "this run holds no checkpoint without them (trained since, or made by an earlier version)"
            )
        )


def val_calibrated_on(
    options: SensitivityOptions,
    start: LoadedModel | CalibratedModel,
    val: SampleIndex,
    setting: Setting,
    gradients: int,
) -> set[int]:
    """Images of val that scales come from, and those of the first `gradients` that predictions come from."""
    checkpoint, data = paths_of(options)
    count, order, seed = setting.num_batches * setting.batch_size, "shuffled", options.seed
    only_val = default_calib_split(data) == "val"
    used: set[int] = set()
    if only_val:
        used.update(calibration_ids(len(val), min(gradients, len(val)), order, seed).tolist())
    if isinstance(start, CalibratedModel):
        if start.sidecar.calibration.get("data_fingerprint") != val.fingerprint:
            return used
        if (search := search_of(checkpoint)) is not None:
            return used | set(search["splits"]["calibration"]["sample_ids"])
        order, seed = start.sidecar.calibration.get("order", order), start.sidecar.seed
    elif not only_val:
        return used
    return used | set(calibration_ids(len(val), min(count, len(val)), order, seed).tolist())


def gradient_images(
    options: SensitivityOptions,
    model: nn.Module,
    transform: EvalTransform,
    num_classes: int,
    bad_images: list[tuple[str, str]],
) -> Tensor:
    """The first calibration images, as `calib` draws them."""
    split = default_calib_split(paths_of(options)[1])
    index = open_images(options, split, num_classes)
    ids = calibration_ids(len(index), len(index), "shuffled", options.seed)
    batches = iter_batches(index, ids.tolist(), transform, 8, options.decode_threads, options.on_bad_image, bad_images)
    return first_images(batches, transform.normalize, min(images_to_look_at(model), len(index)))


def begin(options: SensitivityOptions, folder: RunFolder, job: SensitivityJob) -> None:
    """Write run.json, or see that a resumed run is about the same plan and images."""
    description = {
        "options": options.to_dict(),
        "plan": job.plan.key,
        "images": job.ids,
        "weights_fingerprint": job.loaded.fingerprint,
        "data_fingerprint": job.val.fingerprint,
    }
    if options.resume is None:
        folder.write_run(description)
    else:
        folder.require_same(description, FREE_OPTIONS)


# Looking -------------------------------------------------------------------------------------------------------------


def run(
    options: SensitivityOptions, folder: RunFolder, job: SensitivityJob, watch: Stopwatch, screen: Screen
) -> tuple[list[Effect], Engine]:
    """The effect of every part; what the folder's log has is not measured again."""
    with watch.stage("gradients"):
        predicted = predicted_losses(job, options.seed, screen)
    engine = find_engine(options.engine, job.model, job.transform.size, torch.device("cpu"))
    screen.say(f"engine: {engine}")
    parts = parts_of(job.plan, [kind for kind in KINDS if kind == WHOLE or kind in options.parts.split(",")])
    known: dict[tuple[str, str], Results] = {
        (event["kind"], event["name"]): unpack_text(event, event["images"]) for event in folder.events()
    }
    with watch.stage("measure"):
        left = [part for part in parts if (part.kind, part.name) not in known]
        measured = effects(job.model, job.plan, left, batches_of(options, job), engine) if left else ()
        for part, results in screen.track(measured, len(left), "parts"):
            values = {"kind": part.kind, "name": part.name, "images": len(results["kl"])}
            folder.append("effect", **values, **pack_text(results))
            known[part.kind, part.name] = results
    found = [Effect(part, known[part.kind, part.name], predicted_of(part, predicted)) for part in parts]
    return sorted(found, key=lambda effect: (KINDS.index(effect.part.kind), -effect.mean)), engine


def predicted_losses(job: SensitivityJob, seed: int, screen: Screen) -> dict[str, float]:
    """{site that is on: predicted KL, nats}."""

    def track(parts: Sequence[int]) -> Iterable[int]:
        return screen.track(parts, len(parts), "gradients")

    twin = float_copy(job.model).eval()
    grids = grids_of_plan(job.plan, len(quant_blocks(twin)))
    found = collect_sensitivity(twin, job.gradient_images, grids, seed, track)
    return Scales(twin, None, found).predicted_kl(job.plan)


def batches_of(options: SensitivityOptions, job: SensitivityJob) -> list[Tensor]:
    """Images of val as the model takes them, a few at a time. InputError where none can be read."""
    size = evaluation_batch(job.model, torch.device("cpu"))
    read = iter_batches(
        job.val, job.ids, job.transform, size, options.decode_threads, options.on_bad_image, job.bad_images
    )
    batches = [job.to_input(batch.images) for batch in read if len(batch.labels)]
    if not batches:
        raise InputError(f"{options.data_path}: no readable image in val")
    return batches


# What is written and shown ------------------------------------------------------------------------------------------


def write(
    options: SensitivityOptions,
    folder: RunFolder,
    of_run: Path | None,
    job: SensitivityJob,
    found: list[Effect],
    engine: Engine,
    watch: Stopwatch,
) -> dict[str, Any]:
    """sensitivity.json, also in the folder of the run that was looked at, and result.json."""
    whole = found[0]
    content = {
        "setting": job.setting.to_dict(),
        "plan": job.plan.key,
        "images": whole.images,
        "images_of_gradients": len(job.gradient_images),
        "integer_share": integer_share(products_of(job.model), job.plan),
        "parts": [effect.to_dict() for effect in found],
        "versions": versions(),
    }
    for place in (folder.path, of_run):
        if place is not None:
            write_json(place / SENSITIVITY_FILE, content)
    result = result_of(
        SENSITIVITY,
        Counts.summed(whole.results),
        options=options.to_dict(),
        setting=job.setting.to_dict(),
        weights_fingerprint=job.loaded.fingerprint,
        data_fingerprint=job.val.fingerprint,
        bad_images=job.bad_images,
        left_out=left_out_rows({"val": job.val}),
        seconds=watch.seconds,
        images_as=images_as(job.transform),
        images_also_calibrated_on=job.calibrated_on,
        engine=engine.to_dict(),
        **{name: content[name] for name in ("integer_share", "images_of_gradients", "parts")},
    )
    folder.write_result(result)
    return result


def table(found: Sequence[Effect]) -> str:
    """The parts that cost most, of every kind."""
    lines = [f"{'part, alone quantized':<42} {'predicted':>10} {'measured KL, nats':>18}   95 % interval"]
    for kind in dict.fromkeys(effect.part.kind for effect in found):
        of_kind = [effect for effect in found if effect.part.kind == kind]
        for effect in of_kind[:_SHOWN]:
            low, high = effect.interval95
            predicted = "" if effect.predicted is None else f"{effect.predicted:.5f}"
            lines.append(f"{effect.part.name:<42} {predicted:>10} {effect.mean:>18.5f}   {low:.5f} to {high:.5f}")
        if len(of_kind) > _SHOWN:
            rest = percent(sum(e.mean for e in of_kind[_SHOWN:]) / max(sum(e.mean for e in of_kind), 1e-300))
            lines.append(f"… {len(of_kind) - _SHOWN} more {kind} parts, {rest} of their sum")
    return "\n".join(lines)
