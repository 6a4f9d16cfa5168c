"""Contests: candidates, order, log and replay, without Ray."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from tests.conftest import RUN_DESCRIPTION, make_setting
from vitq_ray.base.config import InputError
from vitq_ray.calibration.planner import Look, Planner
from vitq_ray.calibration.scales import require_possible
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import CalibrationStatistics, collect_statistics
from vitq_ray.measure.metrics import METRICS, Metric
from vitq_ray.measure.racing import OBJECTIVES, Race, RaceRules
from vitq_ray.run.folder import RunFolder
from vitq_ray.run.results import SEARCH
from vitq_ray.search.contest import Contest, Listeners, race_rules
from vitq_ray.search.proposals import ListProposals, OptunaProposals, Proposals, Round, proposals
from vitq_ray.search.space import SearchSpace

SETTINGS = [
    make_setting("ft1", "max", 2),
    make_setting("ft1", "percentile 100", 2),  # the same scales
    make_setting("ft2", "percentile 99", 2, 4),
    make_setting("ft2", "percentile 99", 1, 4),
]
RULES = RaceRules(60, 20, tie_margin=0.05)


@pytest.fixture
def statistics(quant_vit: VisionTransformer, images: torch.Tensor) -> CalibrationStatistics:
    return collect_statistics(quant_vit, enumerate(images.split(12)), [1, 2])


def make(
    model: VisionTransformer,
    statistics: CalibrationStatistics,
    folder: RunFolder,
    source: Proposals | None = None,
    objective: str = "top1",
) -> Contest:
    race = Race(replace(RULES, objective=objective))
    planner = Planner(model, {(): Look({}, statistics, None)})
    return Contest(planner, source or ListProposals(SETTINGS), race, folder, Listeners())


def results_of(contest: Contest, name: str) -> np.ndarray:
    """What a trial of this candidate would report: a function of its setting, better with less noise."""
    candidate = contest.candidates[name]
    rng = np.random.default_rng(zlib.crc32(candidate.setting.label.encode()))
    return rng.random(RULES.images) < 0.95 - min(candidate.noise, 0.9) / 3


def chunk_of(correct: np.ndarray) -> dict[str, np.ndarray]:
    """A chunk's results: every metric of the table."""
    kl = np.where(correct, np.float32(0.1), np.float32(0.7))
    made = {"correct": correct, "correct5": np.ones(len(correct), bool), "margin": correct.astype(np.float32) - 0.25}
    made |= {"kl": kl, "agree": correct}
    return {name: made[name] for name in METRICS}


def run(contest: Contest, chunks: int | None = None) -> int:
    """Take trials one after the other, `chunks` in all; how many were taken."""
    taken = 0
    while (name := contest.next()) is not None:
        correct = results_of(contest, name)
        while contest.race.decision(name) is None:
            if taken == chunks:
                return taken
            start = contest.seen(name)
            contest.take(name, start, chunk_of(correct[start : start + 20]), 0.1)
            taken += 1
    assert contest.over
    return taken


def test_candidates_are_in_order_of_predicted_noise_and_equal_ones_run_once(
    quant_vit: VisionTransformer, statistics: CalibrationStatistics, tmp_path: Path
) -> None:
    contest = make(quant_vit, statistics, RunFolder(tmp_path))
    noise = [c.noise for c in contest.candidates.values()]
    assert noise == sorted(noise)
    assert [c.setting.mode for c in contest.candidates.values()] == ["ft1", "ft1", "ft2", "ft2"]
    assert [c.same_as for c in contest.candidates.values()] == [None, "c000", None, None]
    assert contest.race.names == ("c000", "c002", "c003")


def test_sites_that_a_mode_leaves_out_do_not_make_a_candidate(
    quant_vit: VisionTransformer, statistics: CalibrationStatistics, tmp_path: Path
) -> None:
    """Bits and modes do; a calibrator of tensors that stay in float does not."""
    base = make_setting("ft1", "max", 2)
    settings = [
        base,
        replace(base, rules=("gemm_outputs -> mse",)),
        replace(base, act_bits=6),
        replace(base, mode="trt"),
    ]
    contest = make(quant_vit, statistics, RunFolder(tmp_path), ListProposals(settings))
    same = {c.setting: c.same_as for c in contest.candidates.values()}
    assert same[settings[1]] == "c000"
    assert [same[s] for s in (settings[0], settings[2], settings[3])] == [None] * 3


def test_a_model_with_dead_sites_is_raced_as_any_other(
    quant_vit: VisionTransformer, images: torch.Tensor, tmp_path: Path
) -> None:
    """A pruned attention branch: its noise is 0, so that it does not decide the order, and amax is 0 in every plan."""
    for parameter in quant_vit.blocks[1].attn.proj.parameters():
        parameter.data.zero_()
    statistics = collect_statistics(quant_vit, enumerate(images.split(12)), [1, 2])
    calibrators = ("max", "mse", "entropy", "percentile 99")
    settings = [make_setting(mode, c, 2) for mode in ("ft1", "ft2", "ft3", "trt") for c in calibrators]
    contest = make(quant_vit, statistics, RunFolder(tmp_path), ListProposals(settings))
    run(contest)
    noise = [c.noise for c in contest.candidates.values()]
    assert noise == sorted(noise)
    assert np.isfinite(noise).all()
    assert {len(c.plan.degenerate_sites()) for c in contest.candidates.values()} == {3}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_everything_is_logged(quant_vit: VisionTransformer, statistics: CalibrationStatistics, tmp_path: Path) -> None:
    contest = make(quant_vit, statistics, RunFolder(tmp_path))
    taken = run(contest)
    kinds = [event["event"] for event in lines(tmp_path)]
    assert kinds.count("candidate") == 4
    assert kinds.count("chunk") == taken
    assert kinds.count("decision") == 3
    assert set(contest.outcome()) == {"c000", "c001", "c002", "c003"}
    assert contest.outcome()["c001"] == contest.outcome()["c000"]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("stop_after", range(7))
def test_a_contest_made_from_its_log_goes_on(
    stop_after: int, objective: str, quant_vit: VisionTransformer, statistics: CalibrationStatistics, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    whole = make(quant_vit, statistics, RunFolder(tmp_path / "whole"), objective=objective)
    total = run(whole)

    (tmp_path / "cut").mkdir()
    first = run(make(quant_vit, statistics, RunFolder(tmp_path / "cut"), objective=objective), stop_after)
    with open(tmp_path / "cut" / "trials.jsonl", "ab") as stream:
        stream.write(b'{"event": "chunk", "na')  # a kill in the middle of a line
    (tmp_path / "cut" / "run.json").write_text(json.dumps(RUN_DESCRIPTION))
    again = make(quant_vit, statistics, RunFolder.resume(tmp_path / "cut", SEARCH), objective=objective)
    assert run(again) == total - first, "nothing is repeated"
    assert again.race.leader() == whole.race.leader()
    assert [again.race.decision(n) for n in again.race.names] == [whole.race.decision(n) for n in whole.race.names]
    for name in whole.race.names:
        assert list(whole.race.results(name)) == list(METRICS)
        for metric, values in whole.race.results(name).items():
            assert np.array_equal(again.race.results(name)[metric], values)

    def bare(folder: str) -> list[str]:
        events = [{k: v for k, v in e.items() if k not in ("time", "check", "run")} for e in lines(tmp_path / folder)]
        return sorted(json.dumps(e) for e in events)

    assert bare("cut") == bare("whole"), "the log of a resumed run has each event once"


def test_a_log_of_other_settings_is_refused(
    quant_vit: VisionTransformer, statistics: CalibrationStatistics, tmp_path: Path
) -> None:
    run(make(quant_vit, statistics, RunFolder(tmp_path)))
    other = ListProposals([replace(s, mode="trt") for s in SETTINGS])
    with pytest.raises(InputError, match=r"candidate c000 is 'ft1 max n=2 w8a8', but 'trt .*' is proposed now"):
        make(quant_vit, statistics, RunFolder(tmp_path), other)


# message: the first event of this kind says something else; the last digits of a forecast follow the CPU
UNFIT: dict[str, tuple[str, dict[str, object]]] = {
    "candidate c000: forecast noise 0.5, same as None there, 0.0020": ("candidate", {"predicted_noise": 0.5}),
    r"candidate c000: forecast noise 0.00200\d+, same as c009 there, 0.00200": ("candidate", {"same_as": "c009"}),
    "candidate c000: Setting: missing key 'act_bits'": ("candidate", {"setting": {}}),
    "chunk of 'c0', which is no candidate before it": ("chunk", {"name": "c0"}),
    "decision of 'c0', which is no candidate before it": ("decision", {"name": "c0"}),
    "results of c000: candidate 'c000': results 20 to 40, 0 seen": ("chunk", {"start": 20}),
    "results of c000: candidate 'c000': results -20 to 0": ("chunk", {"start": -20}),
    "results of c000: candidate 'c000': results without 'correct'": ("chunk", {"correct": None}),
    "results of c000: correct: not base64": ("chunk", {"correct": "?"}),
    "results of c000: correct: not the results of 20 images": ("chunk", {"correct": "AAAAAA=="}),
    "results of c000: correct: not the results of 19 images": ("chunk", {"images": 19, "correct": "////"}),
}


@pytest.mark.parametrize("message", UNFIT)
def test_a_log_that_does_not_fit_is_refused(
    message: str, quant_vit: VisionTransformer, statistics: CalibrationStatistics, tmp_path: Path
) -> None:
    """Also where every line is sealed."""
    folder = RunFolder(tmp_path)
    run(make(quant_vit, statistics, folder))
    events = folder.events()
    folder.log.path.unlink()
    kind, changes = UNFIT[message]
    first = next(event for event in events if event["event"] == kind)
    again = RunFolder(tmp_path)
    for event in events:
        changed = {**event, **(changes if event is first else {})}
        again.append(**{k: v for k, v in changed.items() if k != "time" and (v is not None or k == "same_as")})
    with pytest.raises(InputError) as caught:
        make(quant_vit, statistics, again)
    assert re.match(f"{re.escape(str(folder.log.path))}: {message}", str(caught.value))
    assert str(caught.value).endswith("this run cannot be resumed, begin a new one")


SPACE = SearchSpace(
    "wide",
    {
        "mode": ("ft1", "ft2"),
        "calibrator": ("max", "percentile", "mse"),
        "percentile": (90.0, 99.0, 99.9),
        "num_batches": (1, 2),
        "act_bits": (4, 6, 8),
        "gelu_output": (None, "max", "percentile 99"),
    },
)


def test_optuna_proposes_in_rounds_and_again_the_same(
    quant_vit: VisionTransformer, statistics: CalibrationStatistics, tmp_path: Path
) -> None:
    def contest(name: str) -> Contest:
        (tmp_path / name).mkdir(exist_ok=True)
        source = OptunaProposals(SPACE, make_setting(), 20, seed=3)
        return make(quant_vit, statistics, RunFolder(tmp_path / name), source)

    whole = contest("a")
    total = run(whole)
    assert len(whole.candidates) == 20
    assert len({c.setting for c in whole.candidates.values()}) == 20

    cut = contest("b")
    first = run(cut, total // 2)
    assert len(cut.candidates) < 20
    again = contest("b")
    assert run(again) == total - first
    assert again.candidates == whole.candidates
    assert again.race.leader() == whole.race.leader()


def told(scores: dict[Setting, float]) -> Round:
    best = max(scores, key=lambda setting: scores[setting])
    return Round(scores, best, lambda setting, other: scores[setting] - scores[other])


def test_optuna_learns() -> None:
    """Told that few bits are bad, it soon asks for many."""
    source = OptunaProposals(SPACE, make_setting(), 64, seed=0)
    rounds = []
    while settings := source.next_round():
        rounds.append([s.act_bits for s in settings])
        source.tell(told({s: s.act_bits / 10 - (s.mode == "ft2") for s in settings}))
    assert np.mean(rounds[-1] + rounds[-2]) > np.mean(rounds[0] + rounds[1]) + 0.8


PARTED = "*.attn.matmul_q_input_quantizer"


def test_optuna_goes_round_settings_that_are_not_possible(
    quant_vit: VisionTransformer, statistics: CalibrationStatistics, tmp_path: Path
) -> None:
    """ft2 fuses query, key and value, which a rule for one of them parts; ft1 does not."""
    space = SearchSpace("parted", {**SPACE.choices, PARTED: (None, "5 bits", "off")})
    require = partial(require_possible, depth=len(quant_vit.blocks))
    contest = make(
        quant_vit, statistics, RunFolder(tmp_path), OptunaProposals(space, make_setting(), 32, 3, require=require)
    )
    run(contest)
    assert len(contest.candidates) == 32
    parted = [c.setting for c in contest.candidates.values() if any(rule.sites == PARTED for rule in c.setting.rules)]
    assert {setting.mode for setting in parted} == {"ft1"}


def test_optuna_goes_round_settings_that_have_too_few_images_to_learn_from() -> None:
    space = SearchSpace("learns", {**SPACE.choices, "num_batches": (2, 4), "corrections": (("learn",), ())})
    source = OptunaProposals(space, make_setting(), 32, 3, require=partial(require_possible, depth=2))
    found = []
    while settings := source.next_round():
        found += settings
        source.tell(told(dict.fromkeys(settings, 0.0)))
    assert {s.num_batches for s in found if s.corrections} == {4}
    assert {s.num_batches for s in found if not s.corrections} == {2, 4}


def test_a_space_where_nothing_is_possible_is_refused() -> None:
    space = SearchSpace("parted", {"mode": ("ft2", "trt"), PARTED: ("5 bits", "off")})
    source = proposals("optuna", space, make_setting(), 8, 0, partial(require_possible, depth=2))
    with pytest.raises(InputError, match=r"no possible setting found, e\.g\. '.*differ in bits or in being off"):
        source.next_round()


def test_proposals() -> None:
    defaults = make_setting()
    grid = proposals("grid", SPACE, defaults, None, 0)
    settings = grid.next_round()
    assert len(settings) == 2 * (1 + 3 + 1) * 2 * 3 * 3 == len(set(settings))
    assert grid.next_round() == []
    some = proposals("random", SPACE, defaults, 17, 0).next_round()
    assert len(set(some)) == 17
    assert some == proposals("random", SPACE, defaults, 17, 0).next_round()
    assert some != proposals("random", SPACE, defaults, 17, 1).next_round()
    assert set(some) <= set(settings)
    with pytest.raises(InputError, match="number of samples: 5 given, but a grid tries every setting"):
        proposals("grid", SPACE, defaults, 5, 0)


def test_a_space_smaller_than_the_samples_asked_for() -> None:
    tiny = SearchSpace("tiny", {"mode": ("ft1", "ft2"), "num_batches": (1, 2)})
    assert len(proposals("random", tiny, make_setting(), 50, 0).next_round()) == 4
    source, found = proposals("optuna", tiny, make_setting(), 50, 0), []
    while settings := source.next_round():
        found += settings
        source.tell(told(dict.fromkeys(settings, 0.5)))
    assert len(found) == len(set(found)) == 4


@pytest.mark.parametrize(
    ("images", "chunk", "batch", "expected"), [(5000, None, 100, 200), (90, None, 100, 90), (5000, 300, 100, 300)]
)
def test_chunks_are_whole_batches(images: int, chunk: int | None, batch: int, expected: int) -> None:
    assert race_rules(images, chunk, batch, 0.05, 0.0, "top1").chunk == expected


def test_first_looks_are_closer_together_by_fidelity() -> None:
    assert race_rules(5000, None, 100, 0.05, 0.0, "fidelity").looks[:4] == (50, 100, 200, 400)
    assert race_rules(170, None, 8, 0.05, 0.0, "fidelity").looks[:3] == (8, 16, 24)
    for rules in (
        race_rules(5000, None, 100, 0.05, 0.0, "top1"),
        race_rules(5000, 200, 100, 0.05, 0.0, "fidelity"),
        race_rules(5000, None, 100, 0.05, 0.0, "fidelity", grows=False),
    ):
        assert rules.looks[:3] == (200, 400, 600)


def test_one_that_has_seen_everything_and_waits_is_not_handed_out_again(
    quant_vit: VisionTransformer, statistics: CalibrationStatistics, tmp_path: Path
) -> None:
    """The second had finished before the first; then the driver was killed."""
    first = make(quant_vit, statistics, RunFolder(tmp_path))
    right = np.ones(20, bool)
    for start in (0, 20, 40):
        first.take("c002", start, chunk_of(right), 0.1)
    assert first.race.decision("c002") is None
    again = make(quant_vit, statistics, RunFolder(tmp_path))
    handed_out = [again.next(), again.next()]
    assert handed_out == ["c000", "c003"]
    for start in (0, 20, 40):
        again.take("c000", start, chunk_of(right), 0.1)
    assert again.race.decision("c002") is not None


def test_a_further_metric_is_logged_and_replayed_and_logs_without_it_go_on(
    quant_vit: VisionTransformer, statistics: CalibrationStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`old` begins without the metric and goes on with it: its decisions are those of `new`."""
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    run(make(quant_vit, statistics, RunFolder(tmp_path / "old")), 2)
    monkeypatch.setitem(METRICS, "margin", Metric(lambda y, labels: y[:, 0], np.float32, "margin_sum", "margin"))
    contests = {}
    for name in ("old", "new"):
        run(make(quant_vit, statistics, RunFolder(tmp_path / name)))
        contests[name] = make(quant_vit, statistics, RunFolder(tmp_path / name))  # from the log alone
    assert contests["old"].outcome() == contests["new"].outcome()
    labels = np.zeros(RULES.images, np.int64)
    new = contests["new"].evaluations(labels, labels)["c000"]
    assert np.array_equal(new.results["margin"], new.correct.astype(np.float32) - 0.25)
    old = contests["old"].evaluations(labels, labels)
    assert list(old["c000"].results) == ["correct", "correct5", "kl", "agree"], "not known for all of its images"
    assert "margin" in old["c003"].results
    assert np.array_equal(old["c000"].correct, new.correct)


def test_all_listeners_are_told_in_order(
    quant_vit: VisionTransformer, statistics: CalibrationStatistics, tmp_path: Path
) -> None:
    heard: list[tuple[str, ...]] = []

    def listener(who: str) -> Listeners:
        return Listeners(
            on_plan=lambda done, total: heard.append((who, f"plan {done} of {total}")),
            on_candidate=lambda candidate: heard.append((who, candidate.name)),
            on_chunk=lambda name, images: heard.append((who, f"{name} {images}")),
            on_decision=lambda decision: heard.append((who, decision.verdict.value)),
        )

    contest = Contest(
        Planner(quant_vit, {(): Look({}, statistics, None)}),
        ListProposals(SETTINGS[:1]),
        Race(RULES),
        RunFolder(tmp_path),
        Listeners.all((listener("a"), Listeners(), listener("b"))),
    )
    run(contest)
    events = ["plan 0 of 1", "c000", *["c000 20"] * 3, "finished"]
    assert heard == [(who, event) for event in events for who in "ab"]
