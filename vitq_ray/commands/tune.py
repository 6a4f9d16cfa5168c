"""A whole search: one float pass, a race of settings under Ray Tune, the winner on images no decision has seen.

    calibration images ──► statistics            one float pass, on one worker or several
    selection images   ──► contest, trials       decoded once, shared through the object store
    report images      ──► winner and float model, side by side
    (QAT)              ──► where the space has it and the winner misses the target: training runs from the best settings

Everything is checked before anything is computed. Everything computed is in the run folder before it is used, so a
search that was killed goes on from there (`resume`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.files import write_json
from vitq_ray.calibration.setting import Setting, read_setting
from vitq_ray.calibration.statistics import CalibrationStatistics
from vitq_ray.cluster.metrics import Metrics
from vitq_ray.cluster.qat_trials import run_training
from vitq_ray.cluster.start import Cluster
from vitq_ray.cluster.stream import stream_batches
from vitq_ray.cluster.trials import ImageSet, Resources, nodes_for, require_room, run_trials, share
from vitq_ray.cluster.workers import WorkerPool, collect_with, torch_threads
from vitq_ray.commands import live
from vitq_ray.commands import options as cli
from vitq_ray.data.loader import Batch
from vitq_ray.data.samples import Ids, SampleIndex, open_split
from vitq_ray.data.splits import Splits, default_calib_split, make_splits, race_order
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.measure.calibration import calibration_pass, collect_here
from vitq_ray.measure.evaluation import Evaluation, evaluate, evaluate_variants, sanity_problem
from vitq_ray.measure.metrics import pack_text, unpack_text
from vitq_ray.measure.racing import Decision, Race, Verdict
from vitq_ray.models.checkpoint import Sidecar, load_calibrated, save_calibrated
from vitq_ray.models.load import LoadedModel, load_model
from vitq_ray.models.weights import weights_fingerprint
from vitq_ray.qat.ranks import QatData, steps_per_epoch
from vitq_ray.qat.state import read_outcome
from vitq_ray.qat.teacher import TEACHER_LOGITS
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import apply_plan, float_copy, frozen_weights, quantize_vit, quantizers_off, scales_of
from vitq_ray.run.folder import RunFolder, read_bad_images, record_bad_images
from vitq_ray.run.results import SEARCH, Stopwatch, read_result, result_of, versions
from vitq_ray.search.asha import Epoch, QatContest, TrainingRun, training_runs
from vitq_ray.search.contest import Candidate, Contest, Listeners, race_rules
from vitq_ray.search.proposals import ListProposals, Proposals, proposals
from vitq_ray.search.space import QatSpace, SearchSpace, load_space

MOST_SELECTION_IMAGES = 10_000  # by default: they are kept decoded
# Options that may differ when a search is resumed: they decide where and how fast, not what.
FREE_OPTIONS = frozenset(
    {"output", "resume", "ray_address", "dashboard", "max_trials_in_flight", "num_workers", "object_store_memory"}
    | {"decode_threads"}  # of runs that an earlier version began
)


@dataclass
class Search:
    """What a search works with, made by `prepare` before anything is computed."""

    args: argparse.Namespace
    space: SearchSpace
    defaults: Setting
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

    fixed: tuple[Setting, ...] | None = None  # with --from-run: what is tried, instead of the space

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) on the driver's device."""
        return self.transform.normalize(images.to(self.device))

    def proposals(self) -> Proposals:
        """Where the settings come from."""
        if self.fixed is not None:
            return ListProposals(self.fixed)
        args = self.args
        return proposals(args.search_alg, self.space, self.defaults, args.num_samples, args.seed)

    def stream(self, index: SampleIndex, ids: Ids, batch_size: int) -> Iterator[Batch]:
        args = self.args
        return stream_batches(index, ids, self.transform, batch_size, args.on_bad_image, self.bad_images)

    @property
    def snapshots(self) -> list[int]:
        """Batch counts at which scales can be asked for: all of the space."""
        if self.fixed is not None:
            return sorted({setting.num_batches for setting in self.fixed})
        return sorted(set(self.space.values(self.defaults)["num_batches"]))

    @property
    def selection_bytes(self) -> int:
        """Memory of the decoded selection images."""
        return len(self.splits.selection) * self.loaded.geometry.img_size**2 * 3


def prepare(args: argparse.Namespace) -> Search:
    """Check every option and open every file."""
    cli.apply_sample_defaults(args)
    space, defaults = load_space(args.search_space), cli.setting_from(args)
    if args.from_run is None:
        proposals(args.search_alg, space, defaults, args.num_samples, args.seed)  # raises where options do not fit
    device = cli.device_from(args)
    loaded = load_model(args.model_type, args.pretrained_dir, args.img_size)
    classes = loaded.geometry.num_classes
    val = open_split(args.data_path, "val", classes)
    split = default_calib_split(args.data_path)
    calib = open_split(args.data_path, "train", classes) if split == "train" else val
    fixed = None if args.from_run is None else settings_of_run(Path(args.from_run))
    counts = space.values(defaults)["num_batches"] if fixed is None else [s.num_batches for s in fixed]
    needed = max(counts) * args.calib_batchsz
    splits = search_splits(args, split, calib, val, needed)
    gpus = args.gpus_per_trial if args.gpus_per_trial is not None else 1.0 if args.use_gpu else 0.0
    resources = Resources(args.threads_per_trial, gpus, args.max_trials_in_flight)
    model = quantize_vit(loaded.model).to(device).eval()
    transform = cli.eval_transform(loaded, args.crop_pct)
    search = Search(args, space, defaults, loaded, model, transform, device, calib, val, splits, resources, fixed=fixed)
    _require_memory(search)
    if args.from_run is not None:
        _require_unseen_report(search, Path(args.from_run))
    if space.qat is not None:
        _require_trainable(search, space.qat)
    return search


def settings_of_run(path: Path) -> tuple[Setting, ...]:
    """The best setting of a finished search and those tied with it."""
    try:
        result = read_result(path)
        size = RunFolder(path).read_run()["options"]["calib_batchsz"]
        candidates = result["candidates"].values()
        chosen = [c for outcome in ("best", "tied") for c in candidates if c["outcome"] == outcome]
        return tuple(read_setting(c["setting"], result["format"], size) for c in chosen if c["same_as"] is None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"--from-run: {path} is not the folder of a finished search ({reason})") from None


def _require_unseen_report(search: Search, path: Path) -> None:
    """What is reported on must not be what the earlier search selected on, nor its model another one."""
    there = RunFolder(path).read_run()
    for name, here in (
        ("weights_fingerprint", search.loaded.fingerprint),
        ("data_fingerprint", search.val.fingerprint),
    ):
        if there[name] != here:
            raise InputError(f"--from-run: {path} is a search of another {name.partition('_')[0]} than given here")
    if set(search.splits.report.tolist()) & set(there["splits"]["selection"]):
        raise InputError(
            f"--from-run: {path} selected on images that would be reported on here; "
            f"expected --split-seed {there['options']['split_seed']}, as there"
        )


def _require_trainable(search: Search, space: QatSpace) -> None:
    """What QAT needs, checked before the race: images of train, and configurations that can be built."""
    if search.splits.calib_split != "train":
        raise InputError(f"{search.args.data_path}: has no train split, which the QAT of {search.space.name} needs")
    try:
        for run in training_runs(space, ["a"], search.args.seed):
            steps_per_epoch(len(search.calib), run.config)
    except (InputError, TypeError) as error:
        raise InputError(f"{search.args.search_space}: QAT: {error}") from None


def search_splits(
    args: argparse.Namespace, calib_split: str, calib: SampleIndex, val: SampleIndex, needed: int
) -> Splits:
    """The three splits: functions of the data and `--split-seed` alone."""
    spare = max(32, needed // 8) if args.on_bad_image == "skip" else 0  # others move up where images are broken
    splits = make_splits(calib_split, calib, val, args.split_seed, needed, spare)
    half = splits.selection
    if args.select_images is not None and args.select_images > len(half):
        raise InputError(f"--select-images: {args.select_images} asked for, the selection half has {len(half)}")
    count = args.select_images or MOST_SELECTION_IMAGES
    return replace(splits, selection=race_order(val.labels, half, count, args.split_seed))


def _require_memory(search: Search) -> None:
    budget = search.args.object_store_memory
    if budget is not None and search.selection_bytes > 0.8e9 * budget:
        raise InputError(
            f"--object-store-memory: {budget:g} GB cannot hold {len(search.splits.selection)} decoded selection images "
            f"({search.selection_bytes / 1e9:.2f} GB of at most 80 %); expected more, or fewer --select-images"
        )


def _require_store(search: Search) -> None:
    """Every node that can hold a trial needs the images. InputError where the object store of one is too small: that of
    a cluster that was joined is as large as it is."""
    store = min(node.get("object_store_memory", 0.0) for node in nodes_for(search.resources))
    if search.selection_bytes > 0.8 * store:
        raise InputError(
            f"object store: {store / 1e9:.2f} GB of a node cannot hold {len(search.splits.selection)} decoded "
            f"selection images ({search.selection_bytes / 1e9:.2f} GB of at most 80 %); expected a larger one, or "
            f"fewer --select-images"
        )


def object_store_bytes(search: Search) -> int:
    """Memory of the object store: what the option says, or room for the images and as much again to stream."""
    if search.args.object_store_memory is not None:
        return int(search.args.object_store_memory * 1e9)
    return max(3 * search.selection_bytes, 300_000_000) if search.selection_bytes < 1e9 else 2 * search.selection_bytes


def describe(search: Search) -> dict[str, Any]:
    """run.json: everything that decides the outcome."""
    args = search.args
    return {
        "options": vars(args),
        "search_space": {
            "name": search.space.name,
            "choices": dict(search.space.choices),
            "qat": None if search.space.qat is None else search.space.qat.to_dict(),
        },
        "splits": search.splits.to_dict(),
        "weights_fingerprint": search.loaded.fingerprint,
        "data_fingerprint": search.val.fingerprint,
        "calibration_fingerprint": search.calib.fingerprint,
        "geometry": search.loaded.geometry.to_dict(),
    }


def open_folder(search: Search, path: Path) -> RunFolder:
    """The run's folder: a new one, or with `--resume` the old one, if it is the same search."""
    description = describe(search)
    if search.args.resume is not None:
        folder = RunFolder.resume(path, SEARCH)
        if (difference := folder.require_same(description, FREE_OPTIONS)) is not None:
            cli.warn(f"--resume {path}: the run was begun with other versions: {difference}")
        if not folder.finished:
            folder.append("resumed")
        return folder
    folder = RunFolder.create(path, SEARCH)
    folder.write_run(description)
    return folder


# The stages ---------------------------------------------------------------------------------------------------------


def calibrate(search: Search, folder: RunFolder, metrics: Metrics) -> CalibrationStatistics:
    """Statistics of the calibration images, with a snapshot at every batch count of the space."""
    if folder.statistics.exists():
        return CalibrationStatistics.from_bytes(folder.statistics.read_bytes())
    size, wanted = search.args.calib_batchsz, search.snapshots[-1]
    batches = cli.track(search.stream(search.calib, search.splits.calibration, size), wanted, "calibrate")
    args = search.args

    def pool() -> WorkerPool:
        gpus = search.resources.gpus
        return WorkerPool(search.model, search.transform, args.num_workers, args.threads_per_trial, gpus)

    with torch_threads(args.threads_per_trial):
        statistics = calibration_pass(
            search.model,
            batches,
            size,
            search.snapshots,
            search.to_input,
            collect_here if args.num_workers == 1 else collect_with(pool, args.threads_per_trial),
            lambda: metrics.add("vitq_calibration_batches", 1),
            bad_images=search.bad_images,
        ).statistics
    record_bad_images(folder.path, list(search.bad_images))  # a resumed search does not read these images again
    folder.write_statistics(statistics.to_bytes())
    return statistics


def selection(search: Search, folder: RunFolder) -> tuple[ImageSet, Evaluation]:
    """The selection images, decoded, in the order of the race, and the float model's results on them."""
    kept: list[Batch] = []
    ids, size = search.splits.selection, search.args.batch_size

    def batches() -> Iterator[Batch]:
        for batch in cli.track(search.stream(search.val, ids, size), -(-len(ids) // size), "float model"):
            kept.append(batch)
            yield batch

    logged = [event for event in folder.events() if event["event"] == "float"]
    if logged:
        images = ImageSet.of(list(search.stream(search.val, ids, size)))
        return images, _float_from(logged[-1], images)
    with quantizers_off(search.model):
        baseline = evaluate(search.model, batches(), search.to_input)
    images = ImageSet.of(kept)
    folder.append("float", sample_ids=baseline.sample_ids.tolist(), **pack_text(baseline.results))
    return images, baseline


def _float_from(event: Mapping[str, Any], images: ImageSet) -> Evaluation:
    """The float model's results as logged; the same images must have been readable then as now."""
    if event["sample_ids"] != images.sample_ids.tolist():
        raise InputError("selection: other images can be read now than when the run was begun")
    return Evaluation(images.sample_ids, images.labels, unpack_text(event, len(images)))


def race(
    search: Search,
    folder: RunFolder,
    statistics: CalibrationStatistics,
    images: ImageSet,
    baseline: Evaluation,
    metrics: Metrics,
) -> Contest:
    """Race the settings of the space on the selection images."""
    args = search.args
    rules = race_rules(len(images), args.chunk_images, args.batch_size, args.alpha, args.tie_margin)
    field_of_race = Race(rules)
    shared = share(search.model, images, rules, search.transform, args.batch_size, search.resources)
    with live.LiveRace(field_of_race, baseline) as table:

        def on_candidate(candidate: Candidate) -> None:
            shared.add(candidate.name, candidate.plan)
            table.enter(candidate.name, candidate.setting.label)

        def on_chunk(name: str, images: int) -> None:
            metrics.add("vitq_images_evaluated", images, candidate=name)
            metrics.set("vitq_images_per_second", table.images_per_second)
            metrics.set("vitq_candidate_accuracy", float(field_of_race.correct(name).mean()), candidate=name)
            _count_states(field_of_race, metrics)

        def on_decision(decision: Decision) -> None:
            table.decided(decision)
            _count_states(field_of_race, metrics)
            if (leader := field_of_race.leader()) is not None:
                metrics.set("vitq_best_accuracy", float(field_of_race.correct(leader).mean()))

        listeners = Listeners(on_candidate, on_chunk, on_decision)
        with search.watch.stage("scales"):
            contest = Contest(search.model, statistics, search.proposals(), field_of_race, folder, listeners)
        with search.watch.stage("trials"):
            if not contest.over:
                run_trials(shared, contest, search.resources, folder.path / ".tune")
    return contest


def _count_states(race: Race, metrics: Metrics) -> None:
    states = dict.fromkeys(("waiting", "racing", *(verdict.value for verdict in Verdict)), 0)
    for name in race.names:
        decision = race.decision(name)
        states[decision.verdict.value if decision else "racing" if race.seen(name) else "waiting"] += 1
    for state, count in states.items():
        metrics.set("vitq_candidates", count, state=state)


def report(search: Search, winner: Candidate) -> tuple[Evaluation, Evaluation]:
    """(winner, float model) on the report images; the model has the winner's scales afterwards."""
    ids, size = search.splits.report, search.args.batch_size
    batches = cli.track(search.stream(search.val, ids, size), -(-len(ids) // size), "report")
    apply_plan(search.model, winner.plan)

    def float_logits(x: Tensor) -> Tensor:
        with quantizers_off(search.model):
            return cast(Tensor, search.model(x))

    with frozen_weights(search.model):
        results = evaluate_variants({"winner": search.model, "float": float_logits}, batches, search.to_input)
    if not results["winner"].images:
        raise InputError("report: no readable image")
    return results["winner"], results["float"]


def sidecar_of(search: Search, setting: Setting, plan: Plan, accuracy: dict[str, Any]) -> Sidecar:
    """What is said of a checkpoint of this search."""
    loaded, args = search.loaded, search.args
    return Sidecar.of(
        loaded,
        setting,
        plan,
        data_fingerprint=search.val.fingerprint,
        seed=args.seed,
        crop_pct=args.crop_pct,
        calibration={
            "split": search.splits.calib_split,
            "batches": setting.num_batches,
            "batch_size": args.calib_batchsz,
            "data_fingerprint": search.calib.fingerprint,
            # Which half of val it was selected by, for `qat.py`.
            **({"split_seed": args.split_seed} if search.splits.calib_split == "train" else {}),
        },
        accuracy=accuracy,
        versions=versions(),
    )


def save_best(search: Search, folder: RunFolder, winner: Candidate, accuracy: dict[str, Any]) -> Path:
    """best/: the setting and the calibrated checkpoint of the model as it is now. Returns the checkpoint's path."""
    sidecar = sidecar_of(search, winner.setting, winner.plan, accuracy)
    write_json(folder.best / "setting.json", winner.setting.to_dict())
    return save_calibrated(folder.best, cli.checkpoint_name(search.args), search.model, winner.plan, sidecar)


# QAT ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """The best epoch of all training runs, on the report images."""

    epoch: Epoch
    run: TrainingRun
    report: Evaluation
    path: Path
    summary: dict[str, Any]


def misses_target(search: Search, contest: Contest, baseline: Evaluation) -> bool:
    """Whether the winner's drop below the float model, on the selection images, is more than `--target-drop`."""
    winner = contest.race.leader()
    assert winner is not None
    drop = baseline.top1 - float(contest.race.correct(winner).mean())
    met = 100 * drop <= search.args.target_drop
    verdict = "met, no QAT" if met else "missed: QAT"
    print(
        f"the best setting is {100 * drop:.2f} points below float, target {search.args.target_drop:g}: {verdict}",
        flush=True,
    )
    return not met


def train(search: Search, space: QatSpace, folder: RunFolder, contest: Contest) -> Trained:
    """QAT from the best and tied settings; the best epoch by the selection images, reported on the report images."""
    home = folder.path / "qat"
    starts = _save_starts(search, home / "starts", contest, space.starts)
    runs = training_runs(space, list(starts), search.args.seed)
    training = QatContest(runs, space, folder.append)
    training.replay(folder.events())
    data = QatData(
        search.calib, np.arange(len(search.calib)), search.val, np.sort(search.splits.selection), search.transform
    )
    teacher = float_copy(search.model).cpu().eval()
    with search.watch.stage("qat"):
        run_training(
            training, starts, teacher, data, home, search.resources, search.args.on_bad_image, _print_epoch(training)
        )
    for name in training.runs:
        search.bad_images += read_bad_images(home / name)
        (home / name / TEACHER_LOGITS).unlink(missing_ok=True)
    best = training.best()
    return _report_trained(search, folder, training, best, starts)


def _save_starts(search: Search, home: Path, contest: Contest, count: int) -> dict[str, str]:
    """{candidate: path of its checkpoint} of the best and tied settings, best first."""
    outcome = contest.outcome()
    names = [n for n in contest.race.names if outcome[n] in ("best", "tied")]
    names.sort(key=lambda n: (outcome[n] != "best", -float(contest.race.correct(n).mean())))
    paths = {}
    for name in names[:count]:
        chosen = contest.candidates[name]
        sidecar = sidecar_of(search, chosen.setting, chosen.plan, {})
        paths[name] = str(save_calibrated(home, name, search.model, chosen.plan, sidecar).absolute())
    return paths


def _print_epoch(training: QatContest) -> Callable[[Epoch], None]:
    def show(epoch: Epoch) -> None:
        loss = "start" if epoch.loss is None else f"loss {epoch.loss:.4f}"
        stop = ", stopped" if epoch.name in training.stopped else ""
        lr = training.runs[epoch.name].config.lr
        print(
            f"{epoch.name} lr {lr:g}, epoch {epoch.epoch}: {loss}, "
            f"selection {live.accuracy(epoch.top1_correct, epoch.images)}{stop}",
            flush=True,
        )

    return show


def _report_trained(
    search: Search, folder: RunFolder, training: QatContest, best: Epoch, starts: Mapping[str, str]
) -> Trained:
    run = training.runs[best.name]
    outcome = read_outcome(folder.path / "qat" / run.name)
    known = outcome.epochs[outcome.best_epoch].selection  # the state may be an epoch ahead of the log
    best = Epoch(run.name, outcome.best_epoch, known.images, known.top1_correct, best.loss)
    start = load_calibrated(starts[run.start])
    model = start.loaded.model.to(search.device)
    model.load_state_dict(outcome.best_state)
    size, ids = search.args.batch_size, search.splits.report
    with search.watch.stage("report"), frozen_weights(model):
        evaluation = evaluate(model, search.stream(search.val, ids, size), search.to_input)
    recipe = {"config": run.config.to_dict(), "best_epoch": best.epoch, "run": run.name}
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("._amax")}
    sidecar = replace(
        start.sidecar,
        weights_fingerprint=weights_fingerprint(weights),
        calibration={**start.sidecar.calibration, "qat": recipe},
        accuracy={"qat": evaluation.summary()},
    )
    plan = start.plan.with_amax(scales_of(model))
    path = save_calibrated(folder.best, cli.checkpoint_name(search.args), model, plan, sidecar, suffix="qat")
    histories = {name: [asdict(epoch) for epoch in epochs] for name, epochs in training.history.items()}
    summary = {
        **evaluation.summary(),
        **recipe,
        "start": start.sidecar.setting.to_dict(),
        "selection": {"images": best.images, "top1_correct": best.top1_correct, "top1": best.top1},
        "runs": {n: {"config": r.config.to_dict(), "start": r.start} for n, r in training.runs.items()},
        "stopped": sorted(training.stopped),
        "failed": training.failed,
        "epochs": histories,
    }
    return Trained(best, run, evaluation, path, summary)


# All of it ----------------------------------------------------------------------------------------------------------


def run(search: Search, folder: RunFolder, ray_cluster: Cluster) -> None:
    """Every stage; what was done before, of a resumed run, is read from its folder."""
    url = ray_cluster.dashboard_url
    print(f"run folder {folder.path}" + cli.dashboard_hint(url), flush=True)
    require_room(search.resources)
    _require_store(search)
    metrics = Metrics(folder.path.name)
    with search.watch.stage("calibrate"):
        statistics = calibrate(search, folder, metrics)
    with search.watch.stage("float"):
        images, baseline = selection(search, folder)
    if problem := sanity_problem(baseline, search.loaded.geometry.num_classes, search.args.min_float_top1):
        raise InputError(f"{search.args.pretrained_dir}: {problem}; nothing was searched")
    print(f"float: {live.accuracy_of(baseline)} on the {baseline.images} selection images", flush=True)
    contest = race(search, folder, statistics, images, baseline, metrics)
    results = {"float": baseline} | contest.evaluations(images.labels, images.sample_ids)
    folder.write_correct(results)
    best = contest.race.leader()
    assert best is not None  # the first candidate is never stopped
    winner = contest.candidates[best]
    with search.watch.stage("report"):
        of_winner, of_float = report(search, winner)
    counts = {"winner": of_winner.summary(), "float": of_float.summary()}
    path = save_best(search, folder, winner, counts)
    trained = None
    if search.space.qat is not None and misses_target(search, contest, baseline):
        trained = train(search, search.space.qat, folder, contest)
    folder.append("winner", name=winner.name, report=counts["winner"])
    result = _result(search, folder, contest, results, winner, of_winner, of_float)
    folder.write_result(result if trained is None else {**result, "qat": trained.summary})
    _print_outcome(search, contest, results, winner, (of_winner, of_float))
    if trained is not None:
        _print_trained(trained, of_winner, of_float)
        path = trained.path
    print(f"\nwrote {path} and {folder.path / 'result.json'}")
    print("seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in search.watch.seconds.items()))


def _result(
    search: Search,
    folder: RunFolder,
    contest: Contest,
    results: Mapping[str, Evaluation],
    winner: Candidate,
    of_winner: Evaluation,
    of_float: Evaluation,
) -> dict[str, Any]:
    race, outcome = contest.race, contest.outcome()
    candidates = {
        c.name: {
            "setting": c.setting.to_dict(),
            "outcome": outcome[c.name],
            "same_as": c.same_as,
            "predicted_noise": c.noise,
        }
        for c in contest.candidates.values()
    }
    return result_of(
        SEARCH,
        of_winner,
        options=vars(search.args),
        setting=winner.setting.to_dict(),
        weights_fingerprint=search.loaded.fingerprint,
        data_fingerprint=search.val.fingerprint,
        bad_images=read_bad_images(folder.path) + search.bad_images,
        seconds=search.watch.seconds,
        winner={"name": winner.name, "setting": winner.setting.to_dict()},
        float=of_float.summary(),
        selection={name: evaluation.summary() for name, evaluation in results.items()},
        candidates=candidates,
        race={
            **race.rules.to_dict(),
            "images_evaluated": race.images_evaluated,
            "images_of_full_evaluation": len(race.names) * race.rules.images,
        },
    )


def _print_outcome(
    search: Search,
    contest: Contest,
    results: Mapping[str, Evaluation],
    winner: Candidate,
    reported: tuple[Evaluation, Evaluation],
) -> None:
    race, outcome = contest.race, contest.outcome()
    counts = {what: list(outcome.values()).count(what) for what in ("tied", "behind", "beaten")}
    share = race.images_evaluated / (len(race.names) * race.rules.images)
    worst = min(race.names, key=lambda name: results[name].top1)
    rows = [
        ("float", results["float"], live.accuracy_of(reported[1]), ""),
        ("winner", results[winner.name], live.accuracy_of(reported[0]), winner.setting.label),
        ("worst", results[worst], "", contest.candidates[worst].setting.label),
    ]
    print(
        f"\n{len(contest.candidates)} settings, {len(race.names)} of them with scales of their own: "
        f"{counts['tied']} are tied with the winner, {counts['behind']} behind, {counts['beaten']} beaten; "
        f"{race.images_evaluated:,} images evaluated, {share:.0%} of a full evaluation"
    )
    print(f"{'':8}{'on selection':>26}   {'images':>6}   {'on report':>26}")
    for name, evaluation, report, label in rows:
        print(f"{name:8}{live.accuracy_of(evaluation):>26}   {evaluation.images:>6}   {report:>26}   {label}".rstrip())


def _print_trained(trained: Trained, of_winner: Evaluation, of_float: Evaluation) -> None:
    epoch, config = trained.epoch, trained.run.config
    shown = live.accuracy(epoch.top1_correct, epoch.images)
    label = f"run {epoch.name}, epoch {epoch.epoch}, lr {config.lr:g}, batch {config.global_batch}"
    print(f"{'QAT':8}{shown:>26}   {epoch.images:>6}   {live.accuracy_of(trained.report):>26}   {label}")
    if (drop := of_float.top1 - of_winner.top1) > 0:
        print(f"QAT won back {(trained.report.top1 - of_winner.top1) / drop:.0%} of the winner's drop on report")
