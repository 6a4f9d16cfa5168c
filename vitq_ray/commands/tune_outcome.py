"""The outcome of a search: what result.json says, and what the screen shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitq_ray.commands.inputs import drawn_by
from vitq_ray.commands.screen import result_table
from vitq_ray.commands.tune_float import FloatSet
from vitq_ray.commands.tune_job import TuneJob
from vitq_ray.commands.tune_qat import Trained
from vitq_ray.measure.evaluation import Counts, Evaluation
from vitq_ray.quant.work import integer_share, products_of
from vitq_ray.run.folder import RunFolder, read_bad_images
from vitq_ray.run.results import SEARCH, left_out_rows, result_of
from vitq_ray.search.contest import Candidate, Contest


@dataclass(frozen=True)
class Outcome:
    """What a search came to.

    Attributes:
        results: {candidate with scales of its own, or `float`: its results on the selection images}.
        of_winner, of_float: on the report images.
        trained: where QAT followed.
        float_sets: what was tried where a part of the winner may stay in float, the whole winner first.
        latency: rows of `tune_latency.latencies`, where they were asked for.
    """

    contest: Contest
    results: Mapping[str, Evaluation]
    winner: Candidate
    of_winner: Evaluation
    of_float: Evaluation
    trained: Trained | None
    float_sets: tuple[FloatSet, ...] = ()
    latency: Sequence[Mapping[str, Any]] = ()


def search_result(job: TuneJob, folder: RunFolder, outcome: Outcome) -> dict[str, Any]:
    """result.json: the counts at its top are those of the winner on the report images."""
    contest, race = outcome.contest, outcome.contest.race
    standings = contest.outcome()
    candidates = {
        c.name: {
            "setting": c.setting.to_dict(),
            "outcome": standings[c.name],
            "same_as": c.same_as,
            **contest.forecast_of(c),
        }
        for c in contest.candidates.values()
    }
    trained = {} if outcome.trained is None else {"qat": outcome.trained.summary}
    sets = {"float_sets": [one.to_dict() for one in outcome.float_sets]} if outcome.float_sets else {}
    return result_of(
        SEARCH,
        outcome.of_winner,
        options=job.options.to_dict(),
        setting=outcome.winner.setting.to_dict(),
        weights_fingerprint=job.loaded.fingerprint,
        data_fingerprint=job.val.fingerprint,
        bad_images=read_bad_images(folder.path) + job.bad_images,
        left_out=left_out_rows({job.splits.calib_split: job.calib, "val": job.val}),
        seconds=job.watch.seconds,
        winner={"name": outcome.winner.name, "setting": outcome.winner.setting.to_dict()},
        degenerate_sites=outcome.winner.plan.degenerate_sites(),
        float=outcome.of_float.summary(),
        engine=job.engine.to_dict(),
        selection={name: evaluation.summary() for name, evaluation in outcome.results.items()},
        candidates=candidates,
        race={
            **race.rules.to_dict(),
            "images_evaluated": race.images_evaluated,
            "images_of_full_evaluation": len(race.names) * race.rules.images,
        },
        calibration={
            "split": job.splits.calib_split,
            "drawn_by": drawn_by("shuffled", "split seed", job.options.split_seed),
        },
        integer_share=integer_share(products_of(job.model), outcome.winner.plan),
        **sets,
        **({"latency": list(outcome.latency)} if outcome.latency else {}),
        **trained,
    )


def outcome_text(outcome: Outcome) -> str:
    """How the candidates ended, and the table of the float model, the winner, the worst, and what was trained."""
    contest, race = outcome.contest, outcome.contest.race
    standings = list(contest.outcome().values())
    counts = {what: standings.count(what) for what in ("tied", "behind", "beaten")}
    share = race.images_evaluated / (len(race.names) * race.rules.images)
    worst = min(race.names, key=lambda name: race.objective.sign * race.mean(name))
    selection = {name: Counts.of(evaluation) for name, evaluation in outcome.results.items()}
    of_winner, of_float = Counts.of(outcome.of_winner), Counts.of(outcome.of_float)
    rows = [
        ("float", selection["float"], of_float, ""),
        ("winner", selection[outcome.winner.name], of_winner, outcome.winner.setting.label),
        ("worst", selection[worst], None, contest.candidates[worst].setting.label),
        *([] if outcome.trained is None else [trained_row(outcome.trained)]),
    ]
    lines = [
        f"\n{len(contest.candidates)} settings, {len(race.names)} of them with scales of their own: "
        f"{counts['tied']} are tied with the winner, {counts['behind']} behind, {counts['beaten']} beaten; "
        f"{race.images_evaluated:,} images evaluated, {share:.0%} of a full evaluation",
        result_table(rows),
    ]
    return "\n".join([*lines, *([] if outcome.trained is None else won_back(outcome, outcome.trained))])


def trained_row(trained: Trained) -> tuple[str, Counts, Counts, str]:
    """Of the table of results: what was trained, which is judged by top-1."""
    epoch, config = trained.epoch, trained.run.config
    label = f"run {epoch.name}, epoch {epoch.epoch}, lr {config.lr:g}, batch {config.global_batch}"
    selection = Counts(epoch.images, {"top1_correct": epoch.top1_correct})
    return "QAT", selection, Counts.of(trained.report), label


def won_back(outcome: Outcome, trained: Trained) -> list[str]:
    """How much of the winner's drop training won back, where there was one."""
    drop = outcome.of_float.top1 - outcome.of_winner.top1
    if drop <= 0:
        return []
    share = (trained.report.top1 - outcome.of_winner.top1) / drop
    return [f"QAT won back {share:.0%} of the winner's drop on report"]
