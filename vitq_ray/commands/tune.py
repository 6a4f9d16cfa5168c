"""A whole search: one float pass, a race of settings under Ray Tune, the winner on images no decision has seen.

    calibration images ──► statistics            one float pass, on one worker or several
    selection images   ──► contest, trials       decoded once, in the object store
    report images      ──► winner and float model, side by side
    (QAT)              ──► where the space has it and the winner misses the target: `tune_qat`

Everything is checked before anything is computed (`tune_job`). Everything computed is in the run folder before it is
used, so a search that was killed goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vitq_ray.base.config import InputError
from vitq_ray.base.cpus import available_cpus
from vitq_ray.base.files import write_json
from vitq_ray.calibration.planner import Planner
from vitq_ray.calibration.setting import Setting, read_setting
from vitq_ray.cluster.address import require_cluster
from vitq_ray.cluster.images import ImageStore, StoredImages
from vitq_ray.cluster.metrics import BEST_GAUGES, CANDIDATE_GAUGES, Metrics
from vitq_ray.cluster.start import cluster
from vitq_ray.cluster.trials import require_room, run_trials, share
from vitq_ray.cluster.workers import torch_threads
from vitq_ray.commands.inputs import checkpoint_name
from vitq_ray.commands.live_race import LiveRace
from vitq_ray.commands.options import TuneOptions
from vitq_ray.commands.outlets import begun, numbers, outlets_of, racing
from vitq_ray.commands.report import report_at_end
from vitq_ray.commands.resume import stored_run, with_stored
from vitq_ray.commands.screen import SILENT, Screen, accuracy_of, dashboard_hint, seconds_line
from vitq_ray.commands.sketch import SYMBOLS, sketch_text, table_text
from vitq_ray.commands.tune_float import FloatSet, leave_in_float
from vitq_ray.commands.tune_job import (
    BEFORE_FORMAT_4,
    FREE_OPTIONS,
    LOOKS_GROW_SINCE,
    TuneJob,
    describe,
    object_store_bytes,
    prepare,
    require_store,
    sidecar_of_search,
    space_of_run,
)
from vitq_ray.commands.tune_latency import latencies
from vitq_ray.commands.tune_looks import planner_of
from vitq_ray.commands.tune_outcome import Outcome, outcome_text, search_result
from vitq_ray.commands.tune_qat import escalate, misses_target
from vitq_ray.engines.execute import executed
from vitq_ray.measure.evaluation import Counts, Evaluation, evaluate, evaluate_variants, sanity_problem
from vitq_ray.measure.fidelity import float_part
from vitq_ray.measure.metrics import pack_text, unpack_text
from vitq_ray.measure.racing import Decision, Race, Verdict
from vitq_ray.models.checkpoint import save_calibrated
from vitq_ray.quant.vit import apply_plan, quantizers_off
from vitq_ray.run.folder import TUNE_FOLDER, WITHOUT_CORRECTIONS, RunFolder
from vitq_ray.run.image_table import ImageJudge, write_images
from vitq_ray.run.log import Log
from vitq_ray.run.outlets import Outlets
from vitq_ray.run.results import SEARCH
from vitq_ray.run.site_table import MOST_CANDIDATES, SiteTable, write_sites
from vitq_ray.search.contest import Candidate, Contest, Listeners, race_rules
from vitq_ray.search.optuna_journal import JournalFile, Searched


@dataclass(frozen=True)
class TuneResult:
    """What `tune` came to.

    Attributes:
        folder: of the run.
        winner: the best setting.
        checkpoint: of the winner, or where training followed, of the best epoch; its sidecar is beside it.
        result: what `result.json` holds; its counts are those of the winner on the report images.
    """

    folder: Path
    winner: Setting
    checkpoint: Path
    result: dict[str, Any]

    @staticmethod
    def of(folder: Path, name: str, batch_size: int, result: dict[str, Any]) -> TuneResult:
        """From what a run has written; `name` is that of its checkpoints, `batch_size` of calibration."""
        setting = read_setting(result["winner"]["setting"], result["format"], batch_size)
        suffix = "qat" if "qat" in result else "calib"
        return TuneResult(folder, setting, folder / "best" / f"{name}_{suffix}.pth", result)


def tune(options: TuneOptions, screen: Screen = SILENT) -> TuneResult:
    """Search, or go on with a search; a finished one is only read.

    Raises InputError for what is wrong with options, checkpoint or images.
    """
    began = time.perf_counter()
    require_cluster(options.ray_address)
    space = None
    if options.resume is not None:
        stored = stored_run(options.resume, SEARCH)
        if "search_space" not in options.given:  # nothing is executed that the user has not named
            space = space_of_run(stored, Path(options.resume))
        options = with_stored(options, {**BEFORE_FORMAT_4, **stored["options"]}, FREE_OPTIONS)
    outlets = outlets_of(options, screen)
    job = prepare(options, screen, space)
    with open_folder(job, screen) as folder:
        return search(job, folder, began, outlets, screen)


def search(job: TuneJob, folder: RunFolder, began: float, outlets: Outlets, screen: Screen) -> TuneResult:
    """All of a search, in its folder; `began` is `time.perf_counter()` of the start of the command."""
    options, name = job.options, checkpoint_name(job.options)
    if folder.finished:
        screen.say(f"{folder.path}: this search is finished; its outcome is in {folder.path / 'result.json'}")
        return TuneResult.of(folder.path, name, options.calib_batchsz, folder.read_result())
    store = object_store_bytes(job)
    try:
        with (
            begun(outlets, options, SEARCH, folder),
            cluster(options.ray_address, object_store_bytes=store, dashboard=options.dashboard) as ray_cluster,
        ):
            job.watch.seconds["start"] = round(time.perf_counter() - began, 3)  # checks, and Ray
            screen.say(f"run folder {folder.path}" + dashboard_hint(ray_cluster.dashboard_url))
            result = run(job, folder, outlets, screen)
    except KeyboardInterrupt:
        if folder.has_work:
            screen.interrupted(folder.path)
        raise
    return TuneResult.of(folder.path, name, options.calib_batchsz, result)


def open_folder(job: TuneJob, screen: Screen) -> RunFolder:
    """The run's folder: a new one, or of a resumed run the old one, if it is the same search."""
    options, description = job.options, describe(job)
    if options.resume is not None:
        folder = RunFolder.resume(Path(options.resume), SEARCH)
        if (difference := folder.require_same(description, FREE_OPTIONS)) is not None:
            screen.warn(f"{folder.path}: the run was begun with other versions: {difference}")
        if not folder.finished:
            folder.append("resumed")
        return folder
    output = Path(options.output) if options.output else None
    folder = RunFolder.create(output, SEARCH, options.name_of("output"))
    folder.write_run(description)
    return folder


def run(job: TuneJob, folder: RunFolder, outlets: Outlets, screen: Screen) -> dict[str, Any]:
    """Every stage; what was done before, of a resumed run, is read from its folder. Returns result.json."""
    require_room(job.resources)
    require_store(job)
    searched = Searched(job.space, job.defaults, job.options.objective, job.options.seed)
    watchers = Watchers(Metrics(folder.path.name), JournalFile(folder, searched, screen.warn), outlets)
    with job.watch.stage("calibrate"):
        planner = planner_of(job, folder, lambda: watchers.metrics.add("vitq_calibration_batches", 1), screen)
    with job.watch.stage("float"):
        images, baseline = evaluate_float(job, folder, screen)
    if problem := sanity_problem(baseline, job.loaded.geometry.num_classes, job.options.min_float_top1):
        raise InputError(f"{job.options.pretrained_dir}: {problem}; nothing was searched")
    say_float(baseline, screen)
    screen.say(f"engine: {job.engine}")
    folder.append("engine", **job.engine.to_dict())  # of this start: a resumed search may run elsewhere
    contest = race(job, folder, planner, images, baseline, watchers, screen)
    results = {"float": baseline} | contest.evaluations(images.labels, images.sample_ids)
    best = contest.race.leader()
    assert best is not None  # the first candidate is never stopped
    winner, tried = contest.candidates[best], list[FloatSet]()
    if job.options.int8_share is not None:
        with job.watch.stage("float sets"):
            chosen, tried = leave_in_float(job, folder, planner, images, winner, results[best], baseline, screen)
        winner = chosen.candidate
        results |= {one.candidate.name: one.selection for one in tried}
    folder.write_correct(results)
    with job.watch.stage("report"):
        of_winner, of_float = evaluate_report(job, folder, winner, screen)
    path = save_best(job, folder, planner, winner, {"winner": of_winner.summary(), "float": of_float.summary()})
    trained = None
    if job.space.qat is not None and misses_target(job, contest, baseline, screen):
        trained = escalate(job, job.space.qat, folder, contest, watchers.journal, outlets, screen)
        path = trained.path
    timed = {c.name: c.plan for c in (contest.candidates[best], winner)}  # the winner, and with some of it in float
    latency = latencies(job, timed, screen) if job.options.latency else []
    folder.append("winner", name=winner.name, report=of_winner.summary())
    watchers.journal.write()
    outlets.params({"winner": winner.setting.label})
    for name, evaluation in {"report_": of_winner, "report_float_": of_float}.items():
        outlets.metrics("images", evaluation.images, numbers(Counts.of(evaluation), name))
    outcome = Outcome(contest, results, winner, of_winner, of_float, trained, tuple(tried), latency)
    result = search_result(job, folder, outcome)
    folder.write_result(result)
    show(outcome, screen)
    screen.say(f"\nwrote {path} and {folder.path / 'result.json'}")
    screen.say(seconds_line(job.watch.seconds))
    report_at_end(folder.path, SEARCH, screen)
    return result


def say_float(baseline: Evaluation, screen: Screen) -> None:
    on_selection = f"{baseline.images} selection images"
    if baseline.has_accuracy:
        screen.say(f"float: {accuracy_of(baseline)} on the {on_selection}")
    else:
        screen.say(f"{on_selection}, without labels: settings are compared with the float model")


def show(outcome: Outcome, screen: Screen) -> None:
    """Table, sketch and summary of a finished search."""
    contest, unicode = outcome.contest, screen.can_show(SYMBOLS)
    for text in (table_text(contest, unicode), sketch_text(contest, unicode), outcome_text(outcome)):
        if text is not None:
            screen.say("\n" + text.strip("\n"))


# The stages ---------------------------------------------------------------------------------------------------------


def evaluate_float(job: TuneJob, folder: RunFolder, screen: Screen) -> tuple[StoredImages, Evaluation]:
    """The selection images, decoded, in the order of the race, and the float model's results on them.

    Images go to the object store as they come, with the float model's logits; this process keeps none. A run that goes
    on computes the logits again; what the log says of the float model counts.
    """
    ids, size = job.splits.selection, job.batch_size
    store = ImageStore()
    batches = screen.track(job.stream(job.val, ids, size), -(-len(ids) // size), "float model")
    with quantizers_off(job.model):
        baseline = evaluate(job.model, batches, job.to_input, store.add)
    images = store.stored()
    logged = [event for event in folder.events() if event["event"] == "float"]
    if logged:
        return images, _float_from(logged[-1], images, job.val.has_labels, folder.log)
    folder.append("float", sample_ids=baseline.sample_ids.tolist(), **pack_text(baseline.results))
    return images, baseline


def _float_from(event: Mapping[str, Any], images: StoredImages, has_labels: bool, log: Log) -> Evaluation:
    """The float model's results as logged; the same images must have been readable then as now."""
    if event["sample_ids"] != images.sample_ids.tolist():
        raise InputError("selection: other images can be read now than when the run was begun")
    try:
        logged = Evaluation(images.sample_ids, images.labels, unpack_text(event, len(images)))
        if logged.has_accuracy != has_labels:
            raise InputError("correct is missing" if has_labels else "correct is there, but there are no labels")
        return logged
    except InputError as error:
        raise log.error(None, f"results of the float model: {error}") from None


@dataclass(frozen=True)
class Watchers:
    """Who else follows a search."""

    metrics: Metrics
    journal: JournalFile
    outlets: Outlets

    def listeners(self, race: Race, table: LiveRace) -> tuple[Listeners, ...]:
        """Of a race that the table shows."""
        of_journal = Listeners(on_chunk=lambda name, images: self.journal.refresh())
        return metered(race, self.metrics, table), racing(race, self.outlets), of_journal


def race(
    job: TuneJob,
    folder: RunFolder,
    planner: Planner,
    images: StoredImages,
    baseline: Evaluation,
    watchers: Watchers,
    screen: Screen,
) -> Contest:
    """Race the settings of the space on the selection images."""
    options = job.options
    rules = race_rules(
        len(images),
        options.chunk_images,
        job.batch_size,
        options.alpha,
        options.tie_margin,
        options.objective,
        folder.read_run()["format"] >= LOOKS_GROW_SINCE,
    )
    field_of_race = Race(rules)
    rounds = options.refine or (options.search_alg == "optuna" and options.from_run is None)
    with (
        share(job.model, images, rules, job.transform, job.batch_size, job.engine, job.resources) as shared,
        LiveRace(field_of_race, baseline, screen, rounds) as table,
    ):

        def on_round(forecasts: str, candidates: Sequence[Candidate]) -> None:
            rows = [(c.name, c.plan, c.by_site) for c in candidates[:MOST_CANDIDATES]]
            write_sites(folder.path, SiteTable.of(forecasts, rows))

        listeners = Listeners.all(
            (
                Listeners(on_candidate=lambda candidate: shared.add(candidate.name, candidate.plan), on_round=on_round),
                table.listeners,
                *watchers.listeners(field_of_race, table),
            )
        )

        def losses(setting: Setting) -> Mapping[str, float]:
            return planner.losses(setting, planner.plan(replace(setting, corrections=())))  # forecasts are without

        with job.watch.stage("scales"), torch_threads(available_cpus()):
            contest = Contest(planner, job.proposals(losses), field_of_race, folder, listeners)
        with job.watch.stage("trials"):
            if not contest.over:
                run_trials(shared, contest, job.resources, folder.path / TUNE_FOLDER)
    return contest


def metered(race: Race, metrics: Metrics, table: LiveRace) -> Listeners:
    """Tells Ray's metrics of a race."""

    def on_chunk(name: str, images: int) -> None:
        metrics.add("vitq_images_evaluated", images, candidate=name)
        metrics.set("vitq_images_per_second", table.images_per_second)
        for metric, values in race.results(name).items():
            if metric in CANDIDATE_GAUGES:
                metrics.set(CANDIDATE_GAUGES[metric], float(values.mean(dtype=float)), candidate=name)
        _count_states(race, metrics)

    def on_decision(decision: Decision) -> None:
        _count_states(race, metrics)
        if (leader := race.leader()) is not None:
            for metric, values in race.results(leader).items():
                if metric in BEST_GAUGES:
                    metrics.set(BEST_GAUGES[metric], float(values.mean(dtype=float)))

    return Listeners(on_chunk=on_chunk, on_decision=on_decision)


def _count_states(race: Race, metrics: Metrics) -> None:
    states = dict.fromkeys(("waiting", "racing", *(verdict.value for verdict in Verdict)), 0)
    for name in race.names:
        decision = race.decision(name)
        states[decision.verdict.value if decision else "racing" if race.seen(name) else "waiting"] += 1
    for state, count in states.items():
        metrics.set("vitq_candidates", count, state=state)


def evaluate_report(
    job: TuneJob, folder: RunFolder, winner: Candidate, screen: Screen
) -> tuple[Evaluation, Evaluation]:
    """(winner, float model) on the report images; the model has the winner's scales afterwards."""
    ids, size = job.splits.report, job.batch_size
    batches = screen.track(job.stream(job.val, ids, size), -(-len(ids) // size), "report")
    apply_plan(job.model, winner.plan)
    judge = ImageJudge(job.val.name)
    with executed(job.model, job.engine) as quantized:
        variants: dict[str, Callable[[Tensor], Tensor]] = {"winner": quantized, "float": float_part(job.model)}
        results = evaluate_variants(variants, batches, job.to_input, judge)
    if not results["winner"].images:
        raise InputError("report: no readable image")
    write_images(folder.path, judge.table())
    return results["winner"], results["float"]


def save_best(job: TuneJob, folder: RunFolder, planner: Planner, winner: Candidate, accuracy: dict[str, Any]) -> Path:
    """best/: the winner's setting and calibrated checkpoint, whose path is returned. Where it has corrections, also
    the checkpoint without them: `sensitivity` looks at that."""
    name, setting = checkpoint_name(job.options), winner.setting
    if setting.corrections:
        plain = replace(setting, corrections=())
        with torch_threads(available_cpus()):
            plan = planner.plan(plain)
        apply_plan(job.model, plan)
        save_calibrated(
            folder.best / WITHOUT_CORRECTIONS, name, job.model, plan, sidecar_of_search(job, plain, plan, {})
        )
    apply_plan(job.model, winner.plan)
    write_json(folder.best / "setting.json", setting.to_dict())
    return save_calibrated(
        folder.best, name, job.model, winner.plan, sidecar_of_search(job, setting, winner.plan, accuracy)
    )
