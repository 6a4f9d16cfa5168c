"""Write a calibrated model as an ONNX file for a runtime, and verify it on images of val.

checkpoint, or best of a run ──► plan ──► what the target refuses ──► ONNX with Q/DQ ──► runtimes, beside the plan here
    ──► verification.json, result.json
"""

from __future__ import annotations

import copy
import dataclasses
import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.files import atomic_file, output_folder, write_json
from vitq_ray.commands import combinations
from vitq_ray.commands.inputs import eval_transform, images_as, open_images, require_as_calibrated
from vitq_ray.commands.options import ExportOptions
from vitq_ray.commands.outputs import require_apart
from vitq_ray.commands.passes import KeptLogits
from vitq_ray.commands.runs import checkpoint_of_run
from vitq_ray.commands.screen import SILENT, Screen, percent, result_line, warn_of_bad_images, warn_of_left_out
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.samples import SampleIndex
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.conditions import tensorrt_conditions
from vitq_ray.engines.execute import evaluation_batch, executed, find_engine
from vitq_ray.engines.gemm import HAS_VNNI
from vitq_ray.engines.onnx import Encoding, needed, onnx_model
from vitq_ray.engines.runtimes import METADATA, OPENVINO, ORT, Census, open_file
from vitq_ray.engines.targets import TARGETS, TENSORRT, Shape, Target, reduced_range, symmetric
from vitq_ray.measure.comparison import Comparison, compare
from vitq_ray.measure.evaluation import Evaluation, evaluate_variants
from vitq_ray.measure.latency import milliseconds
from vitq_ray.models.checkpoint import CalibratedModel, load_calibrated
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import apply_plan
from vitq_ray.run.results import EXPORT, Stopwatch, left_out_rows, result_of, versions, write_result

VERIFICATION = "verification.json"
FLOAT, PLAN = "float", "plan"  # variants beside the files: the float model, and the plan as it is executed here
ORT_FLOAT = "ort, Q/DQ in float"
SYMMETRIC = "plan, symmetric"  # signed integers without zero points in place of unsigned ones
NUDGED = "plan, input nudged"  # by one part in ten million: what other roundings alone may change
_LEAST_AGREEMENT = 0.995
_MOST_SIZE = 0.3  # of the float weights
_SATURATES = 1.05  # times the KL without integer kernels


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote.

    Attributes:
        file: the ONNX file.
        verification: what `verification.json` holds.
        result: what `result.json` holds.
    """

    file: Path
    verification: dict[str, Any]
    result: dict[str, Any]


@dataclass(frozen=True)
class ExportJob:
    """What is exported, and the images it is verified on."""

    name: str
    calibrated: CalibratedModel
    plan: Plan
    target: Target
    transform: EvalTransform
    index: SampleIndex
    ids: range
    bad_images: list[tuple[str, str]] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        return self.calibrated.loaded.model

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S)."""
        return self.transform.normalize(images)


def export(options: ExportOptions, screen: Screen = SILENT) -> ExportResult:
    """Write the file, run it on images of val, and say what came of it.

    Raises InputError for what is wrong with options, checkpoint or images, and for what the target has no integer
    kernels for, unless `force` is given.
    """
    watch = Stopwatch()
    with watch.stage("load"):
        needed("onnx", "onnx"), needed("onnxruntime", "onnx")
        if options.target == OPENVINO:
            needed("openvino", "openvino")
        combinations.require_used(options, combinations.EXPORT)
        options = with_run(options)
        require_apart(options)
        job = prepare(options, screen)
        warn_of_left_out(screen, {"val": job.index})
        file = output_folder(options.output, options.name_of("output")) / f"{job.name}_{job.target.name}.onnx"
    with watch.stage("write"):
        write_file(job, options, file)
        screen.say(f"wrote {file}")
    with watch.stage("verify"):
        verification, evaluation = verify(job, options, file, screen)
    write_json(file.parent / VERIFICATION, verification)
    loaded, sidecar = job.calibrated.loaded, job.calibrated.sidecar
    result = result_of(
        EXPORT,
        evaluation,
        options=options.to_dict(),
        setting=sidecar.setting.to_dict(),
        weights_fingerprint=loaded.fingerprint,
        data_fingerprint=job.index.fingerprint,
        bad_images=job.bad_images,
        left_out=left_out_rows({"val": job.index}),
        seconds=watch.seconds,
        images_as=images_as(job.transform),
        verification=verification,
    )
    write_result(file.parent, result)
    warn_of_bad_images(screen, job.bad_images)
    screen.say(f"wrote {VERIFICATION} and result.json")
    return ExportResult(file, verification, result)


# What is exported ---------------------------------------------------------------------------------------------------


def with_run(options: ExportOptions) -> ExportOptions:
    """The checkpoint and the images of a finished run, where one is named."""
    if options.run is None:
        if options.pretrained_dir is None:
            raise InputError(f"{options.name_of('pretrained_dir')}: needed, a calibrated checkpoint, or a finished run")
        if options.data_path is None:
            raise InputError(f"{options.name_of('data_path')}: needed: the file is verified on images of val")
        return options
    checkpoint, data = checkpoint_of_run(options)
    return dataclasses.replace(options, pretrained_dir=checkpoint, data_path=data)


def prepare(options: ExportOptions, screen: Screen) -> ExportJob:
    """Open every file, and refuse what the target has no kernels for."""
    assert options.pretrained_dir is not None
    calibrated, target = load_calibrated(options.pretrained_dir), TARGETS[options.target]
    require_as_calibrated(options, calibrated.sidecar)
    geometry, plan = calibrated.loaded.geometry, calibrated.plan
    problems = list(target.problems(plan, Shape.of(geometry), geometry.depth))
    if problems and not options.force:
        raise InputError(
            f"{options.name_of('target')}: {target.name}: {'; '.join(problems)}; {options.name_of('force')} exports it "
            "all the same"
        )
    for problem in problems:
        screen.warn(f"{target.name}: {problem}; exported all the same: expect it to be slow or refused there")
    if options.reduce_range:
        plan = reduced_range(plan)
        apply_plan(calibrated.loaded.model, plan)
    index = open_images(options, "val", geometry.num_classes)
    return ExportJob(
        name=Path(options.pretrained_dir).stem,
        calibrated=calibrated,
        plan=plan,
        target=target,
        transform=eval_transform(calibrated.loaded, calibrated.sidecar.crop_pct),
        index=index,
        ids=range(min(len(index), options.limit)),
    )


def write_file(job: ExportJob, options: ExportOptions, path: Path) -> None:
    """The file, with what is known of it under `METADATA`."""
    loaded, sidecar = job.calibrated.loaded, job.calibrated.sidecar
    known = {
        **images_as(job.transform),
        "img_size": loaded.geometry.img_size,
        "num_classes": loaded.geometry.num_classes,
        "model_type": loaded.geometry.model_type,
        "target": job.target.name,
        "setting": sidecar.setting.to_dict(),
        "weights_fingerprint": loaded.fingerprint,
        "checkpoint_fingerprint": sidecar.checkpoint_fingerprint,
        "versions": versions(),
    }
    encoding = Encoding(job.target, options.float16, options.unsigned_weights)
    made = onnx_model(loaded.model, job.plan, encoding, {METADATA: json.dumps(known)})
    with atomic_file(path) as stream:
        stream.write(made.SerializeToString())


# Verification -------------------------------------------------------------------------------------------------------


def verify(job: ExportJob, options: ExportOptions, file: Path, screen: Screen) -> tuple[dict[str, Any], Evaluation]:
    """(what verification.json holds, what every image came to with the file in its own runtime)."""
    files = {ORT: open_file(str(file), ORT), ORT_FLOAT: open_file(str(file), ORT, integers=False)}
    if job.target.name == OPENVINO:
        files[OPENVINO] = open_file(str(file), OPENVINO)
    engine = find_engine("auto", job.model, job.transform.size, torch.device("cpu"))
    with ExitStack() as stack:
        plan = stack.enter_context(executed(job.model, engine))
        variants: dict[str, nn.Module] = {FLOAT: job.calibrated.without_quantizers(), PLAN: plan, NUDGED: Nudged(plan)}
        if any(site.rule.on and not site.rule.signed for site in job.plan.sites.values()):
            twin = copy.deepcopy(job.model)
            apply_plan(twin, symmetric(job.plan))
            variants[SYMMETRIC] = stack.enter_context(executed(twin, engine))
        variants |= files
        evaluations, logits = run_all(job, options, variants, screen)
        timed = {name: run for name, run in variants.items() if name not in (NUDGED, SYMMETRIC)}
        latency = measured(job, options, timed, screen)
    kl = {name: compare(logits[name], logits[FLOAT]) for name in variants if name != FLOAT}
    agree = {name: compare(logits[name], logits[PLAN]) for name in (NUDGED, *files)}
    census = {name: model.census() for name, model in files.items() if name != ORT_FLOAT}
    bytes_of_float = 4 * sum(parameter.numel() for parameter in job.model.parameters())
    for name in variants:
        screen.say(line_of(name, evaluations[name], agree.get(name), census.get(name)))
    if SYMMETRIC in kl:
        change = f"{kl[SYMMETRIC].kl:.4f} to {kl[PLAN].kl:.4f}"
        screen.say(f"unsigned and asymmetric grids bring the plan's KL to float from {change}")
    ratio = file.stat().st_size / bytes_of_float
    screen.say(f"size: {file.stat().st_size} bytes, {percent(ratio)} of the float weights")
    notes = [*remarks(options, kl, agree), *notes_of_file(job, file, ratio)]
    for note in notes:
        screen.warn(note)
    own = OPENVINO if job.target.name == OPENVINO else ORT
    verification = {
        "file": file.name,
        "target": job.target.name,
        "engine": engine.to_dict(),
        "images": evaluations[PLAN].images,
        "bytes": file.stat().st_size,
        "bytes_of_float": bytes_of_float,
        "variants": {
            name: {
                **evaluations[name].summary(),
                "to_float": kl[name].to_dict() if name in kl else None,
                "to_plan": agree[name].to_dict() if name in agree else None,
                **(census[name].to_dict() if name in census else {}),
            }
            for name in variants
        },
        "latency": latency,
        "conditions": conditions(job, file),
        "notes": notes,
        "versions": versions() | {name: needed(name, "onnx").__version__ for name in ("onnx", "onnxruntime")},
    }
    return verification, evaluations[own]


class Nudged(nn.Module):
    """A model whose input is changed by one part in ten million."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, classes)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        logits: Tensor = self._model(images * (1 + 1e-7 * noise))
        return logits


def run_all(
    job: ExportJob, options: ExportOptions, variants: dict[str, nn.Module], screen: Screen
) -> tuple[dict[str, Evaluation], dict[str, Tensor]]:
    """All variants on the same images: what came of them, and their logits."""
    kept = {name: KeptLogits() for name in variants}
    size = min(evaluation_batch(job.model, torch.device("cpu")) * torch.get_num_threads(), 100)
    batches = iter_batches(
        job.index, job.ids, job.transform, size, options.decode_threads, options.on_bad_image, job.bad_images
    )
    shown = screen.track(batches, -(-len(job.ids) // size), "verify")
    evaluations = evaluate_variants(
        variants, shown, job.to_input, lambda name, batch, rows: kept[name].add(batch, rows)
    )
    if evaluations[PLAN].images == 0:
        raise InputError(f"{options.data_path}: no readable image in val")
    return evaluations, {name: rows.logits() for name, rows in kept.items()}


def measured(
    job: ExportJob, options: ExportOptions, variants: dict[str, nn.Module], screen: Screen
) -> list[dict[str, Any]]:
    """Milliseconds per image of every variant at the batch sizes that were asked for."""
    rows = []
    for size in options.latency or ():
        images = torch.randn(size, 3, job.transform.size, job.transform.size)
        found = milliseconds(variants, images)
        rows += [{"variant": name, "batch": size, "ms_per_image": ms} for name, ms in found.items()]
        screen.say(f"ms per image, batch {size}: " + ", ".join(f"{name} {ms:.2f}" for name, ms in found.items()))
    return rows


def conditions(job: ExportJob, file: Path) -> dict[str, bool]:
    """What TensorRT's fusions ask of the file, and whether it is so."""
    if job.target.name != TENSORRT:
        return {}
    return tensorrt_conditions(needed("onnx", "onnx").load(file), Shape.of(job.calibrated.loaded.geometry))


def notes_of_file(job: ExportJob, file: Path, ratio: float) -> list[str]:
    """What a reader must know of the file; `ratio` is its size over that of the float weights."""
    notes = []
    if corrections := job.calibrated.sidecar.setting.corrections:
        names = ", ".join(map(str, corrections))
        notes.append(
            f"float: these weights have corrections ({names}); without quantizers they are not the float model"
        )
    if ratio > _MOST_SIZE:
        notes.append(f"size: {percent(ratio)} of the float weights; what is not a weight of a block stays in float")
    if job.target.name == TENSORRT:
        notes.append("tensorrt: no engine was built here; what was run is the file in ONNX Runtime")
        notes += [f"tensorrt: not met: {text}" for text, met in conditions(job, file).items() if not met]
    return notes


def remarks(options: ExportOptions, to_float: dict[str, Comparison], to_plan: dict[str, Comparison]) -> list[str]:
    """What a reader must know of what the variants gave, compared with the float model and with the plan."""
    notes = []
    floor = to_plan[NUDGED].agreement
    for name, found in to_plan.items():
        if name != NUDGED and found.agreement < _LEAST_AGREEMENT:
            notes.append(
                f"{name}: gives another class than the plan here for {percent(1 - found.agreement)} of the images; "
                f"so does the plan itself for {percent(1 - floor)}, its input changed by one part in ten million"
            )
    exact = to_float[ORT_FLOAT].kl
    for runtime in (ORT, OPENVINO):
        kernels = to_float[runtime].kl if runtime in to_float else 0.0
        if not HAS_VNNI and kernels > _SATURATES * exact and not options.unsigned_weights:
            ways = ("reduce_range",) if options.target == TENSORRT else ("unsigned_weights", "reduce_range")
            notes.append(
                f"{runtime}: KL to float {kernels:.4f} with integer kernels, {exact:.4f} in ONNX Runtime without; they "
                "may saturate, since this CPU has no VNNI; files that do not: with "
                f"{' or '.join(map(options.name_of, ways))}"
            )
    return notes


def line_of(name: str, evaluation: Evaluation, to_plan: Comparison | None, census: Census | None) -> str:
    text = result_line(name, evaluation)
    if to_plan is not None:
        text += f"; same class as the plan here {percent(to_plan.agreement)}"
    if census is not None:
        text += f"; {len(census.integer)} products, {percent(census.share)} of the multiply-accumulates, in integers"
        if census.floating:
            text += f"; in float: {', '.join(list(census.floating)[:6])}" + (" …" if len(census.floating) > 6 else "")
    return text
