"""Evaluate an ONNX file on all of val, in map order: one that `export` wrote, or another program."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch

from vitq_ray.base.config import InputError
from vitq_ray.base.files import output_file, output_folder, read_bytes
from vitq_ray.commands import combinations
from vitq_ray.commands.inputs import images_as, open_images, paths_of, require_labels
from vitq_ray.commands.options import EvaluateOptions
from vitq_ray.commands.outlets import begun, numbers
from vitq_ray.commands.passes import KeptLogits
from vitq_ray.commands.screen import Screen, result_line, warn_of_bad_images, warn_of_left_out
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.execute import AUTO
from vitq_ray.engines.runtimes import ORT, RUNTIMES, FileModel, open_file, read_metadata
from vitq_ray.measure.evaluation import Counts, Evaluation, evaluate, sanity_problem
from vitq_ray.models.geometry import AUTO as AUTO_TYPE
from vitq_ray.models.geometry import named_geometry
from vitq_ray.models.load import HALF, prepared_for
from vitq_ray.run.outlets import Outlets
from vitq_ray.run.results import EVALUATION, Stopwatch, left_out_rows, result_of, write_result

log = logging.getLogger(__name__)

_BATCH = 16  # images, by default
_ENDING = ".onnx"


def is_file(options: EvaluateOptions) -> bool:
    """Whether what is evaluated is an ONNX file. InputError where its engine is asked for and it is not."""
    path = str(options.pretrained_dir)
    if options.engine in RUNTIMES and not path.endswith(_ENDING):
        raise InputError(
            f"{options.name_of('engine')}: {options.engine} runs ONNX files, got {path}; `export` writes them"
        )
    return path.endswith(_ENDING)


def evaluate_file(options: EvaluateOptions, outlets: Outlets, screen: Screen) -> tuple[str, Evaluation, dict[str, Any]]:
    """Classify every image of val and write result.json. (What it is, every image, what result.json holds)

    Raises InputError for what is wrong with options, file or images.
    """
    watch, bad_images = Stopwatch(), list[tuple[str, str]]()
    combinations.require_used(options, combinations.EVALUATE_FILE)
    if options.engine not in (AUTO, *RUNTIMES):
        raise InputError(f"{options.name_of('engine')}: {options.engine} runs checkpoints; expected ort or openvino")
    path, _ = paths_of(options)
    runtime = ORT if options.engine == AUTO else options.engine
    with watch.stage("load"):
        known = read_metadata(path)
        model = open_file(path, runtime)
        transform = transform_of(options, path, known, model)
        classes = model(torch.zeros(1, 3, transform.size, transform.size)).shape[1]
        index = open_images(options, "val", classes)
        require_labels(index, "expected labels: an ONNX file is compared with the float model when it is exported")
        warn_of_left_out(screen, {"val": index})
        output_folder(options.output, options.name_of("output"))
        if options.save_logits:
            output_file(options.save_logits, options.name_of("save_logits"))
    ids, size, kept = range(min(len(index), options.limit or len(index))), options.batch_size or _BATCH, KeptLogits()
    with begun(outlets, options, EVALUATION, Path(options.output)):
        with watch.stage("evaluate"):
            batches = iter_batches(
                index, ids, transform, size, options.decode_threads, options.on_bad_image, bad_images
            )
            shown = screen.track(batches, -(-len(ids) // size), "evaluate")
            evaluation = evaluate(model, shown, transform.normalize, kept.add)
        if evaluation.images == 0:
            raise InputError(f"{options.data_path}: no readable image in val")
        if options.save_logits:
            kept.save(Path(options.save_logits))
        what = f"{Path(path).name} in {runtime}"
        if problem := sanity_problem(evaluation, classes, what=what):
            screen.warn(problem)
        result = result_of(
            EVALUATION,
            evaluation,
            options=options.to_dict(),
            setting=known.get("setting"),
            weights_fingerprint=known.get("weights_fingerprint")
            or hashlib.sha256(read_bytes(path, "an ONNX file")).hexdigest(),
            data_fingerprint=index.fingerprint,
            bad_images=bad_images,
            left_out=left_out_rows({"val": index}),
            seconds=watch.seconds,
            checkpoint=options.to_dict()["pretrained_dir"],
            engine={"name": runtime},
            model_type=known.get("model_type", options.model_type),
            img_size=transform.size,
            images_as=images_as(transform),
        )
        write_result(Path(options.output), result)
        outlets.params({"label": what})
        outlets.metrics("images", evaluation.images, numbers(Counts.of(evaluation)))
        screen.say(result_line(what, evaluation))
        screen.say(f"wrote {Path(options.output) / 'result.json'}")
        warn_of_bad_images(screen, bad_images)
        return what, evaluation, result


def transform_of(options: EvaluateOptions, path: str, known: dict[str, Any], model: FileModel) -> EvalTransform:
    """How images are prepared: as the file says, else as `model_type`, else as Google's models, which is said.

    InputError where the options say something else than the file, and where nothing says the image size.
    """
    size = known.get("img_size") or model.img_size
    said = {"img_size": size} if size else {}
    said |= {name: known.get(name) for name in ("crop_pct", "model_type") if known}
    for name, there in said.items():
        if name in options.given and getattr(options, name) not in (there, AUTO_TYPE):
            raise InputError(
                f"{options.name_of(name)}: {getattr(options, name)} given, but {path} takes {there or 'none'}"
            )
    size = options.img_size or size
    if size is None:
        raise InputError(f"{options.name_of('img_size')}: needed, {path} does not say which size of images it takes")
    if known:
        try:
            return EvalTransform(size, known["mean"], known["std"], known["interpolation"], known.get("crop_pct"))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: what it says of its images is damaged: {error}") from None
    named = named_geometry(options.model_type)
    mean, std, interpolation = (HALF, HALF, "bilinear") if named is None else prepared_for(named)
    transform = EvalTransform(size, mean, std, interpolation, options.crop_pct)
    if named is None:
        log.warning(
            "%s: does not say how its images are prepared: mean 0.5, std 0.5, bilinear assumed; %s says otherwise",
            path,
            options.name_of("model_type"),
        )
    return transform
