"""What a colleague would want to hear: three sentences, and the numbers behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitq_ray.measure.evaluation import Counts, in_points, wilson_interval
from vitq_ray.measure.paired import Interval
from vitq_ray.page.compared import FAMILIES, family_of
from vitq_ray.page.texts import counted, duration, nats, percent, percent_interval, signed_points
from vitq_ray.quant.sites import local_name
from vitq_ray.run.report_parts import SiteMap
from vitq_ray.run.report_search import SearchRun
from vitq_ray.run.report_training import TrainingRun


@dataclass(frozen=True)
class Fact:
    """A number at the top of the page, and a line below it."""

    name: str
    value: str
    note: str = ""


def accuracy_text(counts: Mapping[str, Any]) -> str:
    """Top-1 of a summary of result.json with its 95 % interval, or without labels agreement and KL."""
    if "top1_correct" not in counts:
        agreement, kl = (counts[name] / counts["images"] for name in ("agreed", "kl_total"))
        return f"agreement {percent(agreement)}, KL {nats(kl)}"
    right, images = counts["top1_correct"], counts["images"]
    return percent_interval(Interval(right / images, *wilson_interval(right, images)))


# Searches -----------------------------------------------------------------------------------------------------------


def search_sentences(search: SearchRun, drop: Interval | None, site_map: SiteMap | None) -> list[str]:
    """What won, how surely, and where the loss is."""
    if search.result is None:
        return [*_unfinished(search), *_where(site_map)]
    return [_winner(search, search.result, drop), _surety(search, search.result), *_where(site_map)]


def _winner(search: SearchRun, result: Mapping[str, Any], drop: Interval | None) -> str:
    begin = f"Of {counted(len(search.entries), 'setting')}, {search.winner_label} is the best: "
    images = f"{result['images']:,} report images, which no decision has seen"
    if "top1_correct" not in result:
        return f"{begin}{accuracy_text(result)} nats to the float model on {images}."
    floats = percent(result["float"]["top1_correct"] / result["float"]["images"])
    beside = f"{points_from_float(drop)} the float model's {floats}" if drop else f"float has {floats}"
    return f"{begin}top-1 {accuracy_text(result)} on {images}; {beside}."


def points_from_float(drop: Interval) -> str:
    """E.g. `1.54 points (0.99 to 2.09) below`."""
    if drop.value == 0:
        return f"0 points ({100 * drop.low:+.2f} to {100 * drop.high:+.2f}) from".replace("-", "−")
    down = drop.value < 0
    value, *ends = (100 * (-x if down else x) for x in (drop.value, drop.low, drop.high))
    low, high = sorted(ends)
    return f"{value:.2f} points ({low:.2f} to {high:.2f}) {'below' if down else 'above'}".replace("-", "−")


def _surety(search: SearchRun, result: Mapping[str, Any]) -> str:
    outcomes = [entry.outcome for entry in search.entries]
    tied, behind, beaten = (outcomes.count(name) for name in ("tied", "behind", "beaten"))
    race = result["race"]
    share = race["images_evaluated"] / max(1, race["images_of_full_evaluation"])
    seconds = sum(result["seconds"].values())
    others = (
        f"{tied} tied with it, {behind} behind, {beaten} beaten" if behind else f"{tied} tied with it, {beaten} beaten"
    )
    return (
        f"Of the others, {others}: the chance that the race lost the best one is at most {100 * race['alpha']:.3g} %; "
        f"it took {100 * share:.0f} % of the images of a full evaluation, and {duration(seconds)} in all."
    )


def _where(site_map: SiteMap | None) -> list[str]:
    """Where the loss comes from by the forecast; nothing where there is none."""
    if site_map is None or site_map.loss is None or not site_map.loss.sum() > 0:
        return []
    total, families = float(site_map.loss.sum()), dict[str, float]()
    for site, value in zip(site_map.sites, site_map.loss.tolist(), strict=True):
        families[family_of(site)] = families.get(family_of(site), 0.0) + value
    most = sorted(families.items(), key=lambda row: -row[1])[:2]
    parts = " and ".join(f"{100 * value / total:.0f} % from {FAMILIES[name]}" for name, value in most if value > 0)
    worst = int(site_map.loss.argmax())
    share = 100 * float(site_map.loss[worst]) / total
    what = "predicted KL" if site_map.forecasts == "predicted_kl" else "predicted noise"
    site = local_name(site_map.sites[worst])
    return [f"Its {what} comes to {parts}; the site with the most is {site} ({share:.0f} %)."]


def _unfinished(search: SearchRun) -> list[str]:
    decided = sum(entry.decision is not None for entry in search.entries)
    begin = "This search has not come to its end: "
    if search.leader is None:
        return [f"{begin}no candidate was evaluated yet."]
    leader = search.leader
    kl, top1 = leader.mean("kl"), leader.mean("correct")
    told = [f"top-1 {percent(top1)}"] if top1 is not None else []
    told += [f"KL {nats(kl)} nats"] if kl is not None else []
    return [
        f"{begin}{decided} of {counted(len(search.entries), 'candidate')} are decided, "
        f"{duration(search.ended - search.began)} after it began.",
        f"{leader.setting.label} leads, with {', '.join(told)} on {counted(leader.images, 'selection image')}; "
        "nothing is reported before the end.",
    ]


def search_facts(search: SearchRun, drop: Interval | None) -> list[Fact]:
    """Float, winner, drop, QAT, ties, images, time."""
    result = search.result
    if result is None:
        images = sum(entry.images for entry in search.measured)
        return [
            Fact("candidates", str(len(search.entries)), f"{len(search.measured)} with results"),
            Fact("images evaluated", f"{images:,}", f"of {len(search.entries) * search.images:,}"),
        ]
    facts = [_accuracy("winner, on report", result)] if "top1_correct" in result else []
    facts += [_accuracy("float, on report", result["float"])] if "top1_correct" in result["float"] else []
    if drop:
        value, _, limits = signed_points(drop).partition(" ")
        facts.append(Fact("points from float", value, f"{limits[1:-1]}, paired"))
    facts += [_accuracy("after training", result["qat"])] if "qat" in result else []
    if "kl" in Counts.from_dict({"top1_correct": 0, **result}).means:
        kl, agreed = result["kl_total"] / result["images"], result["agreed"] / result["images"]
        facts.append(Fact("KL to float, nats", nats(kl), f"agreement {percent(agreed)}"))
    tied = sum(entry.outcome == "tied" for entry in search.entries)
    race = result["race"]
    facts.append(Fact("tied with the winner", str(tied), f"of {len(search.entries)} settings"))
    evaluated, full = race["images_evaluated"], race["images_of_full_evaluation"]
    facts.append(
        Fact("images evaluated", f"{evaluated:,}", f"{100 * evaluated / max(1, full):.0f} % of a full evaluation")
    )
    return [*facts, Fact("time", duration(sum(result["seconds"].values())))]


def _accuracy(name: str, counts: Mapping[str, Any]) -> Fact:
    value, _, limits = accuracy_text(counts).partition(" (")
    return Fact(name, value, f"{limits[:-1]} (95 %)" if limits else "")


def next_step(search: SearchRun, drop: Interval | None) -> str:
    """What to do with the outcome, in half a sentence; the commands say how."""
    if search.result is None:
        return "Go on with it: what was done is kept."
    target = search.run["options"].get("target_drop", 0.5)
    if "qat" in search.result or drop is None or -in_points(drop.value) <= target:
        return "Export it, and verify the file."
    settings = [entry.setting for entry in search.entries]
    if any(s.transforms or s.calibrator.row.by_curves for s in settings):
        return f"It lost more than the target of {target:g} points: train it."
    return f"It lost more than the target of {target:g} points: try transforms and scales by gradients, then train."


# Trainings ----------------------------------------------------------------------------------------------------------


def training_sentences(training: TrainingRun, learned: bool) -> list[str]:
    """What training came to."""
    result, epochs = training.result, training.curve.epochs
    if result is None:
        done = max((epoch for epoch, *_ in epochs), default=0)
        begin = f"This training has not come to its end: {done} of {training.run['config']['epochs']} epochs are done."
        if not epochs:
            return [begin]
        epoch, _, right, images = max(epochs, key=lambda row: row[2] / row[3])
        return [begin, f"The best so far is epoch {epoch}: {percent(right / images)} of the selection images."]
    top1 = {name: result[name]["report"] for name in ("float", "ptq", "qat")}
    means = {name: counts["top1_correct"] / counts["images"] for name, counts in top1.items()}
    lost = means["float"] - means["ptq"]
    won = (
        f": {100 * (means['qat'] - means['ptq']) / lost:.0f} % of the {100 * lost:.2f} points lost were won back"
        if lost > 0
        else ""
    )
    best = result["best_epoch"]
    chosen = (
        f"Epoch {best} of {training.run['config']['epochs']} did best on the selection images."
        if best
        else ("No epoch did better on the selection images than the start, which is what was written.")
    )
    scales = (
        "The scales were learned, too." if learned else "The scales are those of calibration; weights were trained."
    )
    return [
        f"After training top-1 is {accuracy_text(top1['qat'])} on {top1['qat']['images']:,} report images; before it "
        f"was {percent(means['ptq'])}, and the float model has {percent(means['float'])}{won}.",
        chosen,
        scales,
    ]


def training_facts(training: TrainingRun) -> list[Fact]:
    """Float, before, after, on the report images."""
    result = training.result
    if result is None:
        return []
    names = {"float": "float, on report", "ptq": "before training", "qat": "after training"}
    facts = [_accuracy(text, result[name]["report"]) for name, text in names.items()]
    return [*facts, Fact("time", duration(sum(result["seconds"].values())))]


def single_facts(result: Mapping[str, Any], rows: Sequence[tuple[str, str]]) -> list[Fact]:
    """Of one evaluation: what came of it, and how long it took."""
    return [Fact(name, value) for name, value in rows] + [Fact("time", duration(sum(result["seconds"].values())))]
