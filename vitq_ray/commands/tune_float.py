"""Behind the race: the smallest part of the winner that must stay in float, for a share of integer work or a target.

winner ──► loss of every choice: predicted, and measured alone on a few selection images
       ──► knapsack by either ──► those sets on all selection images ──► the best, or the first that meets the target
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vitq_ray.base.cpus import available_cpus
from vitq_ray.calibration.planner import Planner
from vitq_ray.cluster.images import StoredImages
from vitq_ray.cluster.workers import torch_threads
from vitq_ray.commands.screen import Screen, percent, result_line
from vitq_ray.commands.tune_job import TuneJob
from vitq_ray.engines.execute import executed
from vitq_ray.measure.evaluation import Evaluation, evaluate, in_points
from vitq_ray.measure.metrics import pack_text, unpack_text
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import apply_plan
from vitq_ray.quant.work import Product, integer_share, products_of
from vitq_ray.run.folder import RunFolder
from vitq_ray.search.contest import Candidate
from vitq_ray.search.float_sets import Choice, choices_of, float_set, rules_of_set
from vitq_ray.search.site_effects import effects, predicted_of

SCAN_IMAGES = 32  # that choices are measured on
SHARES = (0.995, 0.99, 0.98, 0.96, 0.92, 0.85, 0.7)  # of integer work that are tried to meet a target


@dataclass(frozen=True)
class FloatSet:
    """The winner with some of it in float.

    Attributes:
        candidate: its setting has the rules that say so.
        by: what it was found by: `predicted` or `measured` losses; `all in integers` for the winner as it was.
        share: of the blocks' multiply-accumulates that run in integers.
        selection: its results on the selection images.
    """

    candidate: Candidate
    by: str
    share: float
    selection: Evaluation

    def to_dict(self) -> dict[str, Any]:
        own = {"name": self.candidate.name, "by": self.by, "integer_share": self.share}
        return {**own, "setting": self.candidate.setting.to_dict(), "selection": self.selection.summary()}


class FloatSets:
    """Makes and measures the sets of one winner; what the folder's log has of them is not measured again."""

    def __init__(
        self, job: TuneJob, folder: RunFolder, planner: Planner, images: StoredImages, whole: FloatSet, screen: Screen
    ) -> None:
        self._job, self._folder, self._planner = job, folder, planner
        self._images, self._whole, self._screen = images.fetch(), whole, screen
        self._products: Sequence[Product] = products_of(job.model)
        self._choices = choices_of(whole.candidate.plan, self._products)
        self.tried = [whole]

    def best_at(self, share: float) -> FloatSet:
        """The set that loses least of those that leave at least this share in integers."""
        spare = sum(product.macs for product in self._products) * (self._whole.share - share)
        sets: dict[tuple[Choice, ...], str] = {}
        for by, losses in self._losses.items():
            sets.setdefault(tuple(float_set(self._choices, losses, spare)), by)
        found = [self._measured(chosen, by) for chosen, by in sets.items() if chosen]
        return min([self._whole, *found], key=lambda one: float(one.selection.results["kl"].mean(dtype=float)))

    @property
    def _losses(self) -> dict[str, Mapping[str, float]]:
        """{what it is from: {choice: loss}}."""
        found: dict[str, Mapping[str, float]] = {"measured": self._scan}
        if self._planner.forecasts == "predicted_kl":
            winner = self._whole.candidate
            sites = self._planner.losses(winner.setting, winner.plan)
            found["predicted"] = {c.part.name: predicted_of(c.part, sites) for c in self._choices}
        return found

    @property
    def _scan(self) -> dict[str, float]:
        """{choice: KL of the plan with that choice alone quantized}, on the first selection images."""
        job, images = self._job, self._images
        logged = {
            event["name"]: unpack_text(event, event["images"])["kl"]
            for event in self._folder.events()
            if event["event"] == "effect"
        }
        left = [choice.part for choice in self._choices if choice.part.name not in logged]
        batches = [job.to_input(b.images) for b in images.batches(job.batch_size, 0, min(SCAN_IMAGES, len(images)))]
        found = effects(job.model, self._plan_of_parts, left, batches, job.engine) if left else ()
        for part, results in self._screen.track(found, len(left), "what each part loses"):
            logged[part.name] = results["kl"]
            values = {"kind": part.kind, "name": part.name, "images": len(results["kl"])}
            self._folder.append("effect", **values, **pack_text(results))
        return {choice.part.name: float(logged[choice.part.name].mean(dtype=float)) for choice in self._choices}

    @property
    def _plan_of_parts(self) -> Plan:
        """The winner without corrections: these change weights that a part alone leaves in float."""
        winner = self._whole.candidate
        if not winner.setting.corrections:
            return winner.plan
        return self._planner.plan(replace(winner.setting, corrections=()))

    def _measured(self, chosen: Sequence[Choice], by: str) -> FloatSet:
        """A set on all selection images."""
        job, winner = self._job, self._whole.candidate
        setting = replace(winner.setting, rules=(*winner.setting.rules, *rules_of_set(chosen)))
        for known in self.tried:
            if known.candidate.setting == setting:
                return known
        plan = self._planner.plan(setting)
        candidate = Candidate(f"f{len(self.tried):02d}", setting, plan, self._planner.losses(setting, plan))
        values = {"name": candidate.name, "setting": setting.to_dict(), "plan": plan.key}
        results = next(self._logged(values), None)
        if results is None:
            apply_plan(job.model, plan)
            with executed(job.model, job.engine) as run:
                results = evaluate(run, self._images.batches(job.batch_size), job.to_input).results
            self._folder.append("float_set", **values, **pack_text(results))
        selection = Evaluation(self._images.sample_ids, self._images.labels, results)
        found = FloatSet(candidate, by, integer_share(self._products, plan), selection)
        self._screen.say(result_line(f"{percent(found.share)} of the work in integers ({by})", selection))
        self.tried.append(found)
        return found

    def _logged(self, values: Mapping[str, Any]) -> Iterator[Any]:
        for event in self._folder.events():
            if event["event"] == "float_set" and {name: event.get(name) for name in values} == values:
                yield unpack_text(event, len(self._images))


def leave_in_float(
    job: TuneJob,
    folder: RunFolder,
    planner: Planner,
    images: StoredImages,
    winner: Candidate,
    of_winner: Evaluation,
    baseline: Evaluation,
    screen: Screen,
) -> tuple[FloatSet, list[FloatSet]]:
    """(what to take, all that was tried): for `int8_share`, or the first of `SHARES` within `target_drop` points of
    float; where none is, what comes closest.

    `of_winner` and `baseline` are on all selection images.
    """
    whole = FloatSet(winner, "all in integers", integer_share(products_of(job.model), winner.plan), of_winner)
    with torch_threads(available_cpus()):
        sets = FloatSets(job, folder, planner, images, whole, screen)
        if isinstance(share := job.options.int8_share, float):
            if share > whole.share:
                has, asked = percent(whole.share), percent(share)
                screen.warn(f"{asked} of the work in integers asked for; of the winner {has} is")
            return sets.best_at(share), sets.tried
        best, least = whole, _drop(baseline, whole)
        for share in SHARES:
            if least <= job.options.target_drop:
                break
            found = sets.best_at(share)
            if (drop := _drop(baseline, found)) < least:
                best, least = found, drop
        verdict = "met" if least <= job.options.target_drop else "not met by any share; this comes closest"
        screen.say(f"{percent(best.share)} in integers: {least:.2f} points below float, target {verdict}")
        return best, sets.tried


def _drop(baseline: Evaluation, found: FloatSet) -> float:
    """Points of top-1 below float."""
    return in_points(baseline.top1 - found.selection.top1)
