"""What a search works with: every option checked and every file opened before anything is computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.memory import machine_memory, size_text
from vitq_ray.calibration.calibrators import CALIBRATORS
from vitq_ray.calibration.corrections import require_correctable
from vitq_ray.calibration.planner import require_techniques
from vitq_ray.calibration.scales import require_all_possible, require_possible
from vitq_ray.calibration.setting import Setting, read_setting, require_sites, techniques
from vitq_ray.calibration.transforms import require_transformable
from vitq_ray.cluster.stream import stream_batches
from vitq_ray.cluster.trials import Resources, nodes_for
from vitq_ray.cluster.workers import torch_threads
from vitq_ray.commands import combinations
from vitq_ray.commands.inputs import (
    device_of,
    drawn_by,
    eval_transform,
    find_space,
    open_images,
    paths_of,
    require_batch_fits,
    require_labels,
    with_sample,
)
from vitq_ray.commands.options import AUTO_SHARE, MOST_SELECTION_IMAGES, TuneOptions, parameters
from vitq_ray.commands.outputs import require_apart
from vitq_ray.commands.screen import Screen, warn_of_left_out, warn_of_no_labels
from vitq_ray.data.loader import Batch
from vitq_ray.data.samples import Ids, SampleIndex
from vitq_ray.data.splits import Splits, default_calib_split, make_splits, race_order
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.execute import Engine, evaluation_batch, find_engine, unit_plan
from vitq_ray.measure.racing import FIDELITY, TOP1
from vitq_ray.models.checkpoint import Sidecar
from vitq_ray.models.load import LoadedModel, load_model
from vitq_ray.qat.ranks import steps_per_epoch
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import apply_plan, quantize_vit
from vitq_ray.run.folder import RUN, RunFolder
from vitq_ray.run.results import Stopwatch, versions
from vitq_ray.search.asha import training_runs
from vitq_ray.search.proposals import DEFAULT_SAMPLES, ListProposals, Proposals, proposals
from vitq_ray.search.refine import Losses, Refinement, most_steps
from vitq_ray.search.space import QatSpace, SearchSpace, load_space

MOST_CHECKED = 100_000  # combinations of a grid that are looked through for impossible rules
_OF_STORE = 0.8  # of the object store that what trials read may take

# Options that may differ when a search is resumed: they decide where and how fast, not what. Images and checkpoint may
# have moved: their fingerprints are compared.
FREE_OPTIONS = frozenset(
    {
        "data_path",
        "pretrained_dir",
        "output",
        "resume",
        "ray_address",
        "dashboard",
        "log_to",
        "max_trials_in_flight",
        "num_workers",
        "object_store_memory",
        "engine",
        "latency",
    }
    | {"decode_threads"}  # of runs that an earlier version began
)
BEFORE_FORMAT_4 = {"objective": TOP1}  # options of runs that do not say them
LOOKS_GROW_SINCE = 5  # format of run.json


@dataclass(frozen=True)
class TuneJob:
    """A search, ready to begin.

    Attributes:
        defaults: the setting of the options, for fields that the space leaves out.
        fixed: with `from_run`, what is tried instead of the space.
        bad_images: (address, reason) of every broken image met, appended to.
    """

    options: TuneOptions
    space: SearchSpace
    defaults: Setting
    fixed: tuple[Setting, ...] | None
    loaded: LoadedModel
    model: nn.Module
    transform: EvalTransform
    device: torch.device
    calib: SampleIndex
    val: SampleIndex
    splits: Splits
    resources: Resources
    watch: Stopwatch = field(default_factory=Stopwatch)
    bad_images: list[tuple[str, str]] = field(default_factory=list)

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) on the driver's device."""
        return self.transform.normalize(images.to(self.device))

    @property
    def batch_size(self) -> int:
        """Images per evaluation batch."""
        return self.options.batch_size or evaluation_batch(self.model, self.device)

    @cached_property
    def engine(self) -> Engine:
        """What runs the candidates, measured with the threads that a trial has. Leaves the model with unit scales."""
        apply_plan(self.model, unit_plan(self.model, self.defaults.mode))
        with torch_threads(self.resources.threads):
            return find_engine(self.options.engine, self.model, self.loaded.geometry.img_size, self.device)

    def proposals(self, losses: Losses | None = None) -> Proposals:
        """Where the settings come from. `losses` are forecasts, by which the best is refined if that was asked for."""
        options, depth = self.options, self.loaded.geometry.depth
        require = partial(require_possible, depth=depth)
        source: Proposals = (
            proposals(options.search_alg, self.space, self.defaults, options.num_samples, options.seed, require)
            if self.fixed is None
            else ListProposals(self.fixed)
        )
        if losses is None or not options.refine:
            return source
        of_space = self.space.calibrations(self.defaults)
        calibrations = of_space if self.fixed is None else [c for s in self.fixed for c in s.calibrations]
        return Refinement(source, losses, calibrations, depth, require)

    def stream(self, index: SampleIndex, ids: Ids, batch_size: int) -> Iterator[Batch]:
        """Decoded by Ray Data, in the order of the ids."""
        return stream_batches(index, ids, self.transform, batch_size, self.options.on_bad_image, self.bad_images)

    @property
    def snapshots(self) -> list[int]:
        """Batch counts at which scales can be asked for: all of the space."""
        return sorted(set(batch_counts(self.space, self.defaults, self.fixed)))

    @property
    def settings_to_come(self) -> tuple[Setting, ...]:
        """Settings that together need all that any setting of the search will need to have seen."""
        return self.space.representatives(self.defaults) if self.fixed is None else self.fixed

    @property
    def selection_bytes(self) -> int:
        """Memory of the decoded selection images, and of the float model's logits of them."""
        geometry = self.loaded.geometry
        return len(self.splits.selection) * (geometry.img_size**2 * 3 + geometry.num_classes * 4)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights that candidates bring: a model's for each set of transforms, and for each setting with
        corrections."""
        values = self.space.values(self.defaults)
        if self.fixed is not None:
            transforms = len({setting.transforms for setting in self.fixed if setting.transforms})
            corrected = sum(bool(setting.corrections) for setting in self.fixed)
        else:
            transforms = len({tuple(map(str, names)) for names in values["transforms"] if names})
            tried, kinds = self.space.size(self.defaults), values["corrections"]
            if self.options.search_alg != "grid":
                tried = min(tried, self.options.num_samples or DEFAULT_SAMPLES)
            corrected = -(-tried * sum(bool(names) for names in kinds) // len(kinds))
        if self.options.refine and corrected:
            corrected += most_steps(len(self.space.calibrations(self.defaults)))
        of_model = sum(parameter.numel() * 4 for parameter in self.model.parameters())
        return (transforms + corrected) * of_model

    @property
    def stored_bytes(self) -> int:
        """What every node keeps in its object store."""
        return self.selection_bytes + self.weight_bytes


def prepare(options: TuneOptions, screen: Screen, space: SearchSpace | None = None) -> TuneJob:
    """Check every option and open every file. `space` is that of a run that goes on; else its file is executed."""
    combinations.require_used(options, combinations.TUNE)
    options = with_batches_of_run(with_sample(options, screen))
    require_apart(options)
    space, defaults = space or load_space(find_space(options.search_space)), options.setting
    require_used_with(options, space)
    if options.target is not None:
        space = space.with_values("mode", (options.target,))
    if options.from_run is None:
        proposals(
            options.search_alg, space, defaults, options.num_samples, options.seed
        )  # raises where they do not fit
    device = device_of(options)
    checkpoint, data = paths_of(options)
    loaded = load_model(options.model_type, checkpoint, options.img_size, heads=options.heads)
    require_sites([*space.rules, *defaults.rules], loaded.geometry.depth)
    classes = loaded.geometry.num_classes
    val = open_images(options, "val", classes)
    split = default_calib_split(data)
    calib = open_images(options, "train", classes) if split == "train" else val
    warn_of_left_out(screen, {split: calib, "val": val})
    require_labels_used(options, val, screen)
    fixed = None if options.from_run is None else settings_of_run(options)
    needed = max(batch_counts(space, defaults, fixed)) * options.calib_batchsz
    model = quantize_vit(loaded.model).to(device).eval()
    by_default = not {"search_space", "from_run", "resume"} & options.given
    if by_default:
        space = without_impossible_techniques(space, model, screen)
    job = TuneJob(
        options=options,
        space=space,
        defaults=defaults,
        fixed=fixed,
        loaded=loaded,
        model=model,
        transform=eval_transform(loaded, options.crop_pct),
        device=device,
        calib=calib,
        val=val,
        splits=search_splits(options, split, calib, val, needed),
        resources=Resources(options.threads_per_trial, gpus_per_trial(options), options.max_trials_in_flight),
    )
    if by_default:
        job = without_corrections_that_do_not_fit(job, screen)
    require_rules(job)
    require_techniques(job.model, job.settings_to_come)
    images = max(options.calib_batchsz, min(job.batch_size, len(job.splits.selection)))
    require_batch_fits(options, loaded.geometry, images, sees_attention=True)
    require_memory(job)
    if options.from_run is not None:
        require_unseen_report(job, Path(options.from_run))
    if space.qat is not None:
        require_trainable(job, space.qat)
    return job


def without_impossible_techniques(space: SearchSpace, model: nn.Module, screen: Screen) -> SearchSpace:
    """The default space without what the model's parts do not allow; who names a space gets an error instead."""
    problems: dict[str, str] = {}
    for kind, require in (("transforms", require_transformable), ("corrections", require_correctable)):
        if kind not in space.choices:
            continue
        rows = [techniques(kind, names) for names in space.choices[kind]]
        for name in dict.fromkeys(technique.name for row in rows for technique in row):
            try:
                require(model, name)
            except InputError as error:
                problems[name] = str(error)
        possible = [tuple(str(technique) for technique in row if technique.name not in problems) for row in rows]
        space = space.with_values(kind, tuple(dict.fromkeys(possible)))
    if problems:
        screen.warn(f"not tried: {'; '.join(problems.values())}")
    return space


def without_corrections_that_do_not_fit(job: TuneJob, screen: Screen) -> TuneJob:
    """The default space without corrections where their weights, in this process and in the object store, would take
    more than half of the memory, or more than the object store is given; who names a space gets an error there."""
    memory, store = machine_memory(), job.options.object_store_memory
    fits = 2 * job.weight_bytes <= memory / 2 and (store is None or job.stored_bytes <= _OF_STORE * 1e9 * store)
    if fits or not any(job.space.choices.get("corrections", ())):
        return job
    steps = ", one for every step of a refinement" if job.options.refine else ""
    screen.warn(
        f"not tried: corrections, whose weights{steps} would take {size_text(2 * job.weight_bytes)} of "
        f"{size_text(memory)} of memory (--search-space ptq tries them)"
    )
    return replace(job, space=job.space.with_values("corrections", ((),)))


def gpus_per_trial(options: TuneOptions) -> float:
    if options.gpus_per_trial is not None:
        return options.gpus_per_trial
    return 1.0 if options.use_gpu else 0.0


def batch_counts(space: SearchSpace, defaults: Setting, fixed: tuple[Setting, ...] | None) -> list[int]:
    """Numbers of calibration batches that a setting may ask for."""
    if fixed is not None:
        return [setting.num_batches for setting in fixed]
    return list(space.values(defaults)["num_batches"])


def require_labels_used(options: TuneOptions, val: SampleIndex, screen: Screen) -> None:
    """Without labels a search goes by fidelity, and says so. InputError for what needs labels."""
    if val.has_labels:
        return
    for name in ("objective", "min_float_top1"):
        value = getattr(options, name)
        if value is not None and value != FIDELITY:
            raise InputError(f"{options.name_of(name)}: {value} given, but {val.no_labels}")
    for name, wanted in (("tie_margin", options.tie_margin), ("int8_share", AUTO_SHARE)):
        if name in options.given and getattr(options, name) == wanted:
            raise combinations.idle_error(options, name, "there is no top-1 without labels")
    warn_of_no_labels(screen, val)


# Search spaces ------------------------------------------------------------------------------------------------------


def require_used_with(options: TuneOptions, space: SearchSpace) -> None:
    """Options that do nothing with this space, given nevertheless, are an error."""
    what = "the space " + space.name.replace("{", "{{").replace("}", "}}")
    for name, key in combinations.SETTING_FIELDS.items():
        if name in options.given and key in space.choices:
            raise combinations.idle_error(options, name, f"{what} ({{search_space}}) lists {key}")
    bare = [c for c in space.values(options.setting)["calibrator"] if isinstance(c, str) and c in CALIBRATORS]
    taken = {parameter.name for name in bare for parameter in CALIBRATORS[name].parameters}
    for name in parameters():
        if name in options.given and name not in taken:
            raise combinations.idle_error(options, name, f"no calibrator of {what} takes it")
    if "target_drop" in options.given and space.qat is None and options.int8_share != AUTO_SHARE:
        why = f"{what} ({{search_space}}) has no QAT, and {{int8_share}} is not {AUTO_SHARE}"
        raise combinations.idle_error(options, "target_drop", why)
    for name in ("int8_share", "refine"):
        if getattr(options, name) and space.qat is not None:
            raise combinations.idle_error(
                options, name, f"{what} ({{search_space}}) has QAT, which starts from its race"
            )
    if "search_space" in options.given and options.from_run is not None and space.qat is None:
        raise combinations.idle_error(
            options, "search_space", "{from_run} names the settings, and this space has no QAT"
        )


def require_rules(job: TuneJob) -> None:
    """Rules that are not possible end a search before anything is computed. Optuna goes round them, and grids that are
    too large to look through are left to the race."""
    if job.fixed is not None or job.options.search_alg == "optuna":
        return
    if job.options.search_alg == "grid" and job.space.size(job.defaults) > MOST_CHECKED:
        return
    try:
        require_all_possible(job.proposals().next_round(), job.loaded.geometry.depth)
    except InputError as error:
        raise InputError(f"{job.options.search_space}: {error}") from None


# An earlier search --------------------------------------------------------------------------------------------------


def finished_search(options: TuneOptions) -> RunFolder:
    """The folder that `from_run` names. InputError where it holds no finished search."""
    assert options.from_run is not None
    folder = RunFolder(Path(options.from_run))
    if not folder.finished:
        what = options.name_of("from_run")
        raise InputError(f"{what}: {folder.path} is not the folder of a finished search (no result.json of one)")
    return folder


def with_batches_of_run(options: TuneOptions) -> TuneOptions:
    """With `from_run`, calibration batches are as large as there. A run that goes on has its own size stored.

    Raises InputError where the folder holds no finished search, and for another size that was given.
    """
    if options.from_run is None or options.resume is not None:
        return options
    folder = finished_search(options)
    size = folder.read_run()["options"]["calib_batchsz"]
    if "calib_batchsz" in options.given and options.calib_batchsz != size:
        given = f"{options.name_of('calib_batchsz')}: {options.calib_batchsz} given"
        raise InputError(
            f"{given}, but the settings of {folder.path} ({options.name_of('from_run')}) were found with {size}"
        )
    return replace(options, calib_batchsz=size)


def settings_of_run(options: TuneOptions) -> tuple[Setting, ...]:
    """The best setting of a finished search and those tied with it, with batches as they are calibrated with here."""
    folder, size = finished_search(options), options.calib_batchsz
    result = folder.read_result()
    try:
        candidates = result["candidates"].values()
        chosen = [c for outcome in ("best", "tied") for c in candidates if c["outcome"] == outcome]
        settings = [read_setting(c["setting"], result["format"], size) for c in chosen if c["same_as"] is None]
        if result["winner"]["name"] not in result["candidates"]:  # a part of it was left in float behind the race
            settings.insert(0, read_setting(result["winner"]["setting"], result["format"], size))
        return tuple(replace(setting, batch_size=size) for setting in settings)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        what = options.name_of("from_run")
        raise InputError(f"{what}: {folder.path} is not the folder of a finished search ({reason})") from None


def require_unseen_report(job: TuneJob, path: Path) -> None:
    """What is reported on must not be what the earlier search selected on, nor its model another one."""
    there, what = RunFolder(path).read_run(), job.options.name_of("from_run")
    for name, here in (("weights_fingerprint", job.loaded.fingerprint), ("data_fingerprint", job.val.fingerprint)):
        if there[name] != here:
            raise InputError(f"{what}: {path} is a search of another {name.partition('_')[0]} than given here")
    if set(job.splits.report.tolist()) & set(there["splits"]["selection"]):
        raise InputError(
            f"{what}: {path} selected on images that would be reported on here; "
            f"expected {job.options.name_of('split_seed')} {there['options']['split_seed']}, as there"
        )


# Splits, memory, training -------------------------------------------------------------------------------------------


def search_splits(options: TuneOptions, calib_split: str, calib: SampleIndex, val: SampleIndex, needed: int) -> Splits:
    """The three splits: functions of the data and the split seed alone. `selection` is in the order of the race."""
    spare = max(32, needed // 8) if options.on_bad_image == "skip" else 0  # others move up where images are broken
    splits = make_splits(calib_split, calib, val, options.split_seed, needed, spare)
    half, wanted = splits.selection, options.select_images
    if wanted is not None and wanted > len(half):
        what = options.name_of("select_images")
        raise InputError(f"{what}: {wanted} asked for, the selection half has {len(half)}")
    return replace(splits, selection=race_order(val.labels, half, wanted or MOST_SELECTION_IMAGES, options.split_seed))


def require_memory(job: TuneJob) -> None:
    """Raise InputError where what trials read does not fit into the memory that the options give it."""
    budget = job.options.object_store_memory
    if budget is not None and job.stored_bytes > _OF_STORE * 1e9 * budget:
        what = job.options.name_of("object_store_memory")
        raise InputError(f"{what}: {budget:g} GB cannot hold {_stored(job)}")


def require_store(job: TuneJob) -> None:
    """Every node that can hold a trial needs images and weights. InputError where the object store of one is too small:
    that of a cluster that was joined is as large as it is."""
    store = min(node.get("object_store_memory", 0.0) for node in nodes_for(job.resources))
    if job.stored_bytes > _OF_STORE * store:
        raise InputError(f"object store: {store / 1e9:.2f} GB of a node cannot hold {_stored(job)}")


def _stored(job: TuneJob) -> str:
    weights, fewer = "", f"fewer {job.options.name_of('select_images')}"
    if job.weight_bytes:
        weights, fewer = (
            f" and {job.weight_bytes / 1e9:.2f} GB of changed weights",
            f"{fewer}, transforms or corrections",
        )
    return (
        f"{len(job.splits.selection)} decoded selection images{weights} ({job.stored_bytes / 1e9:.2f} GB of at most "
        f"80 %); expected more memory, or {fewer}"
    )


def object_store_bytes(job: TuneJob) -> int:
    """Memory of the object store: what the option says, or room for what trials read, and for images to stream."""
    if job.options.object_store_memory is not None:
        return int(job.options.object_store_memory * 1e9)
    images = max(3 * job.selection_bytes, 300_000_000) if job.selection_bytes < 1e9 else 2 * job.selection_bytes
    return images + 5 * job.weight_bytes // 4


def require_trainable(job: TuneJob, space: QatSpace) -> None:
    """What QAT needs, checked before the race: images of train, and configurations that can be built."""
    if job.splits.calib_split != "train":
        raise InputError(f"{job.options.data_path}: has no train split, which the QAT of {job.space.name} needs")
    for index in (job.calib, job.val):
        require_labels(index, f"which the QAT of {job.space.name} needs")
    try:
        for run in training_runs(space, ["a"], job.options.seed):
            steps_per_epoch(len(job.calib), run.config)
    except (InputError, TypeError) as error:
        raise InputError(f"{job.options.search_space}: QAT: {error}") from None


def describe(job: TuneJob) -> dict[str, Any]:
    """run.json: everything that decides the outcome."""
    return {
        "options": job.options.to_dict(),
        "search_space": job.space.to_dict(),
        "space_sha256": space_sha256(job.options.search_space),
        "splits": job.splits.to_dict(),
        "weights_fingerprint": job.loaded.fingerprint,
        "data_fingerprint": job.val.fingerprint,
        "calibration_fingerprint": job.calib.fingerprint,
        "geometry": job.loaded.geometry.to_dict(),
    }


def space_sha256(text: str) -> str | None:
    """Of the file of a search space; None of a bundled one, and where there is none."""
    path = Path(text)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def space_of_run(stored: Mapping[str, Any], folder: Path) -> SearchSpace:
    """The space that a search was begun with, as run.json has it: what a folder names is not executed.

    InputError where its file was changed since.
    """
    file, known = str(stored["options"].get("search_space")), stored.get("space_sha256")
    if None not in (known, now := space_sha256(file)) and now != known:
        raise InputError(
            f"{folder}: this is another search: {file} was changed since it was begun; bring it back, or name it as "
            "the search space, which compares what it says"
        )
    return SearchSpace.from_dict(stored["search_space"], str(folder / RUN))


def calibrated_on(job: TuneJob) -> dict[str, str]:
    """What statistics are of: model, data, and which images of it in which batches, prepared how."""
    t = job.transform
    images = [job.splits.calibration.tolist(), job.options.calib_batchsz, t.size, t.mean, t.std, t.interpolation]
    images.append(t.crop_pct)
    return {
        "weights": job.loaded.fingerprint,
        "data": job.calib.fingerprint,
        "images": hashlib.sha256(json.dumps(images).encode()).hexdigest(),
    }


def sidecar_of_search(job: TuneJob, setting: Setting, plan: Plan, accuracy: dict[str, Any]) -> Sidecar:
    """What is said of a checkpoint of this search."""
    options = job.options
    calibration = {
        "split": job.splits.calib_split,
        "drawn_by": drawn_by("shuffled", "split seed", options.split_seed),
        "batches": setting.num_batches,
        "batch_size": options.calib_batchsz,
        "data_fingerprint": job.calib.fingerprint,
        # Which half of val it was selected by, for training.
        **({"split_seed": options.split_seed} if job.splits.calib_split == "train" else {}),
    }
    return Sidecar.of(
        job.loaded,
        setting,
        plan,
        job.val.fingerprint,
        options.seed,
        options.crop_pct,
        calibration,
        accuracy,
        versions(),
    )
