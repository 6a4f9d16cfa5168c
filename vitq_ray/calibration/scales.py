"""From settings to plans: statistics and weights × Setting -> Plan, in milliseconds; and what a plan promises.

    calibrator, mode and bits of every site -> rules, in order -> amax of every tensor -> fused where the mode fuses
                                                               -> zero points of asymmetric grids

What settings share is computed once: amax of a tensor for one calibrator, batch count and number of bits.

Calibrators say where |x| is clipped. A signed grid of b bits has 2^(b-1) - 1 levels up to there; an unsigned one has
2^b - 1, so calibrators that count levels (mse, entropy) are asked as for b + 1 bits. An asymmetric grid covers
[low, high]: the smallest and the largest value seen, each clipped at the calibrator's amax. With them

    step = (high - low) / (2^b - 1)     zero point z = round(-low / step)     amax = step · (2^b - 1 - z)

The factor of a rule is one on amax, so on step, low and high alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.calibration.calibrators import SENSITIVITY, Calibration, max_amax, noise_to_signal
from vitq_ray.calibration.histogram import WOKEN, Histogram, Range, range_of
from vitq_ray.calibration.sensitivity import Curve, Grid, Sensitivity
from vitq_ray.calibration.setting import Rule, Setting, require_sites
from vitq_ray.calibration.statistics import HISTOGRAM, RANGE, CalibrationStatistics
from vitq_ray.quant.fake_quant import fake_quantize
from vitq_ray.quant.plan import Plan, SitePlan, SiteRule, rules_of_mode
from vitq_ray.quant.sites import (
    ASYMMETRIC,
    FUSED_GROUPS,
    MODES,
    PROBABILITIES,
    SHARED_SITES,
    SIGNED,
    UNSIGNED,
    WEIGHT,
    Site,
    site_key,
    sites_of_blocks,
)
from vitq_ray.quant.vit import apply_plan, quant_blocks, site_weights

NOISE_NEEDS = HISTOGRAM  # what `noise_per_site` must have seen


@dataclass(frozen=True)
class _Wanted:
    """What a setting asks of one site."""

    calibration: Calibration
    rule: SiteRule
    grid: str
    factor: float = 1.0

    @property
    def searched_bits(self) -> int:
        """Bits of the signed grid that has as many levels from 0 to amax."""
        return self.rule.bits + (self.grid == UNSIGNED)


def require_possible(setting: Setting, depth: int) -> None:
    """InputError where a model of `depth` blocks cannot do what the rules ask for, or where the setting has too few
    images for its corrections; as `Scales.plan` and `Planner.plan`, but at once."""
    setting.require_images()
    _wanted(setting, depth)


def all_by_curves(setting: Setting, plan: Plan, keys: Iterable[str], depth: int, signed: bool = True) -> bool:
    """Whether those of the sites that are on have scales by loss curves: symmetric ones, or without a zero point."""
    wanted, on = _wanted(setting, depth), [key for key in keys if plan.sites[key].rule.on]
    rules = [plan.sites[key].rule for key in on]
    fine = all(rule.signed if signed else not rule.zero_point for rule in rules)
    return fine and all(wanted[key].calibration.row.by_curves for key in on)


def factors_of(setting: Setting, keys: Iterable[str], depth: int) -> dict[str, float]:
    """{site: what the setting's rules multiply its scale with}."""
    wanted = _wanted(setting, depth)
    return {key: wanted[key].factor for key in keys}


def grids_of_setting(setting: Setting, depth: int) -> dict[str, tuple[Grid, ...]]:
    """{site: grids whose loss curves say how a setting does there}. InputError as `Scales.plan`."""
    return {key: _grids(wanted.rule, wanted.grid) for key, wanted in _wanted(setting, depth).items()}


def grids_of_plan(plan: Plan, depth: int) -> dict[str, tuple[Grid, ...]]:
    """{tensor, or weight's site: grids whose loss curves say what the plan loses there}, of all sites that are on."""
    found: dict[str, dict[Grid, None]] = {}
    for key, site in sites_of_blocks(depth).items():
        rule = plan.sites[key].rule
        if rule.on:
            tensor = key if site.family == WEIGHT else key.removesuffix(site.name) + site.tensor
            grid = _grids(rule, ASYMMETRIC if rule.zero_point else UNSIGNED)
            found.setdefault(tensor, {}).update(dict.fromkeys(grid))
    return {tensor: tuple(grids) for tensor, grids in found.items()}


def _grids(rule: SiteRule, grid: str) -> tuple[Grid, ...]:
    return ((ASYMMETRIC, (0, 2**rule.bits - 1)),) if grid == ASYMMETRIC else ((rule.axis, rule.levels),)


def require_all_possible(settings: Iterable[Setting], depth: int) -> None:
    """As `require_possible`, of many settings; the error names the first that is not.

    Settings that agree in what decides it are looked at once.
    """
    known = set()
    for setting in settings:
        images = (setting.num_batches, setting.corrections)
        asked = (setting.mode, setting.weight_bits, setting.act_bits, setting.rules, images)
        if asked not in known:
            known.add(asked)
            try:
                require_possible(setting, depth)
            except InputError as error:
                raise InputError(f"setting {setting.label!r}: {error}") from None


def _wanted(setting: Setting, depth: int) -> dict[str, _Wanted]:
    """{site: what the setting asks of it}. InputError for rules that match no site, change none, or part fused ones."""
    require_sites(setting.rules, depth)
    mode, sites = MODES[setting.mode], sites_of_blocks(depth)
    plain = rules_of_mode(mode, setting.weight_bits, setting.act_bits, depth)
    wanted = {
        key: _Wanted(setting.weights if site.family == WEIGHT else setting.calibrator, plain[key], mode.grid(site))
        for key, site in sites.items()
    }
    for rule in setting.rules:
        changed = {key: _changed(wanted[key], rule) for key in _matched(rule, depth)}
        if not changed:
            raise InputError(f"rule {str(rule)!r}: {rule.action} cannot {_of_weights(rule)} the weights it matches")
        wanted |= changed
    if mode.fuse_qkv:
        _require_fused_alike(wanted, depth)
    return wanted


@lru_cache(1024)
def _matched(rule: Rule, depth: int) -> tuple[str, ...]:
    """Sites that a rule changes: those that it matches and can calibrate, and what is one quantizer with them."""
    sites = sites_of_blocks(depth)
    matched = {key for key in sites if rule.matches(key)}
    for keys in _groups(SHARED_SITES, depth):
        matched |= set(keys) if matched & set(keys) else set()
    return tuple(key for key in sites if key in matched and _can_change(rule, sites[key]))


def _groups(groups: Iterable[Iterable[str]], depth: int) -> Iterator[list[str]]:
    """Groups of sites, in every block, by their full names."""
    return ([site_key(index, name) for name in group] for index in range(depth) for group in groups)


def _require_fused_alike(wanted: Mapping[str, _Wanted], depth: int) -> None:
    for keys in _groups(FUSED_GROUPS, depth):
        for what, values in (
            ("bits or in being off", {(wanted[key].rule.bits, wanted[key].rule.on) for key in keys}),
            ("their grids", {wanted[key].grid for key in keys}),
        ):
            if len(values) > 1:
                raise InputError(
                    f"rules: {keys[0]} and the two sites whose scale it shares in this mode differ in {what}; "
                    "expected a pattern that matches all three"
                )


def kinds_needed(settings: Iterable[Setting], *others: str) -> tuple[str, ...]:
    """What statistics must keep for these settings, and for who else needs some: keys of `statistics.STATISTICS`."""
    settings = list(settings)
    signs = any(MODES[s.mode].asymmetric or any(rule.grid is not None for rule in s.rules) for s in settings)
    return kinds_of((c for s in settings for c in s.calibrations), *([RANGE] if signs else []), *others)


def kinds_of(calibrations: Iterable[Calibration], *others: str) -> tuple[str, ...]:
    """What statistics must keep for these calibrators, and for who else needs some."""
    kinds = ({calibration.row.statistic for calibration in calibrations} | set(others)) - {SENSITIVITY}
    return tuple(sorted(kinds - ({RANGE} if HISTOGRAM in kinds else set())))  # a histogram knows its range


class Scales:
    """The plans of any settings, from what was seen of a model, and its weights."""

    def __init__(
        self, model: nn.Module, statistics: CalibrationStatistics | None, sensitivity: Sensitivity | None = None
    ) -> None:
        self._statistics, self._sensitivity = statistics, sensitivity
        self._depth = len(quant_blocks(model))
        self._sites = sites_of_blocks(self._depth)
        self._weights = site_weights(model)
        self._of_tensors: dict[tuple[Calibration, int, int], dict[str, Tensor]] = {}
        self._of_weights: dict[tuple[Calibration, int | None, int, str], Tensor] = {}
        self._woken: set[tuple[int, str]] = set()  # (batches, tensor) of histograms that say nothing
        self._ranges: dict[int, dict[str, Range]] = {}  # {batches: {tensor: its range}}

    def plan(self, setting: Setting) -> Plan:
        """What every site does with this setting, those that are off included.

        Raises:
            InputError: for a rule that matches no site or changes none, for one that parts fused sites, for a site
                that is on and whose first batch alone was all zeros, unless its calibrator asks for the range only, and
                for one that is on and has no place for the negative values that were seen.
        """
        wanted = _wanted(setting, self._depth)
        amax = self._amax_of_tensors(wanted, setting.num_batches) | self._amax_of_weights(wanted)
        amax = {key: value if wanted[key].factor == 1 else value * wanted[key].factor for key, value in amax.items()}
        if MODES[setting.mode].fuse_qkv:
            amax |= self._fused(amax, wanted)
        sites = {key: SitePlan(amax[key], wanted[key].rule) for key in self._sites}
        return Plan(setting.mode, sites | self._asymmetric(setting, wanted, amax))

    def _asymmetric(
        self, setting: Setting, wanted: Mapping[str, _Wanted], amax: Mapping[str, Tensor]
    ) -> dict[str, SitePlan]:
        """{asymmetric site: its plan}; fused sites have the range of all three."""
        ends = {}
        for key, site in wanted.items():
            if site.grid == ASYMMETRIC:
                seen, limit = self._range(key, setting.num_batches), float(amax[key])
                ends[key] = Range(max(seen.low * site.factor, -limit), min(seen.high * site.factor, limit))
            elif site.grid == UNSIGNED and site.rule.on and self._has_negative(key, setting.num_batches):
                low = self._range(key, setting.num_batches).low
                raise InputError(f"{key}: has values down to {low:.4g}, and an unsigned grid; expected asymmetric")
        for keys in _groups(FUSED_GROUPS, self._depth) if MODES[setting.mode].fuse_qkv else ():
            if keys[0] in ends:
                ends |= dict.fromkeys(keys, reduce(Range.merge, (ends[key] for key in keys)))
        return {key: _site_between(seen, wanted[key].rule) for key, seen in ends.items()}

    def _has_negative(self, key: str, num_batches: int) -> bool:
        return self._sites[key].family != PROBABILITIES and self._range(key, num_batches).low < 0

    def _range(self, key: str, num_batches: int) -> Range:
        """The smallest and the largest value seen at an activation site. StatisticsError where signs were not kept."""
        if num_batches not in self._ranges:
            assert self._statistics is not None
            seen = self._statistics.after(num_batches, RANGE)
            self._ranges[num_batches] = dict(zip(self._statistics.keys, map(range_of, seen), strict=True))
        return self._ranges[num_batches][key.removesuffix(self._sites[key].name) + self._sites[key].tensor]

    def _amax_of_tensors(self, wanted: Mapping[str, _Wanted], num_batches: int) -> dict[str, Tensor]:
        """{activation site: amax, shape ()}, float32."""
        groups: dict[tuple[Calibration, int], dict[str, str]] = {}  # {site: tensor} that are calibrated together
        for key, site in self._sites.items():
            if site.family != WEIGHT:
                index = key.removesuffix(site.name)
                group = groups.setdefault((wanted[key].calibration, wanted[key].searched_bits), {})
                group[key] = index + site.tensor
        amax: dict[str, Tensor] = {}
        for (calibration, bits), tensors in groups.items():
            if calibration.row.by_curves:
                amax |= {key: _amax(self._curve_of(key, wanted[key]).best()) for key in tensors}
                continue
            known = self._calibrate(calibration, num_batches, bits, list(dict.fromkeys(tensors.values())))
            on = [key for key in tensors if wanted[key].rule.on]
            self._require_distribution(calibration, num_batches, {key: tensors[key] for key in on})
            amax |= {key: known[tensor] for key, tensor in tensors.items()}
        return amax

    def _calibrate(
        self, calibration: Calibration, num_batches: int, bits: int, tensors: Sequence[str]
    ) -> dict[str, Tensor]:
        known = self._of_tensors.setdefault((calibration, num_batches, bits), {})
        missing = [tensor for tensor in tensors if tensor not in known]
        if missing:
            row = calibration.row
            assert row.activation is not None  # the others have curves
            assert self._statistics is not None
            seen = dict(zip(self._statistics.keys, self._statistics.after(num_batches, row.statistic), strict=True))
            values_seen = [seen[tensor] for tensor in missing]
            woken = [isinstance(value, Histogram) and value.woken for value in values_seen]
            values = np.where(woken, max_amax(values_seen), row.activation(values_seen, calibration.values, bits))
            self._woken |= {(num_batches, tensor) for tensor, is_woken in zip(missing, woken, strict=True) if is_woken}
            known |= zip(missing, torch.from_numpy(values).float().unbind(), strict=True)
        return known

    def _require_distribution(self, calibration: Calibration, num_batches: int, tensors: Mapping[str, str]) -> None:
        """InputError for a site of `tensors` that is to be calibrated by a histogram which is not there."""
        for key, tensor in tensors.items():
            if calibration.row.statistic == HISTOGRAM and (num_batches, tensor) in self._woken:
                raise InputError(f"{key}: {WOKEN}; expected other calibration images, or the calibrator max")

    def _amax_of_weights(self, wanted: Mapping[str, _Wanted]) -> dict[str, Tensor]:
        """{weight site: amax, () or (rows, 1)}; their grids are signed."""
        return {key: self._weigh(wanted[key].calibration, wanted[key].rule, key) for key in self._weights}

    def _weigh(self, calibration: Calibration, rule: SiteRule, key: str) -> Tensor:
        place = (calibration, rule.axis, rule.bits, key)
        if calibration.row.by_curves:
            return _amax(self._curve(key, rule.axis, rule.levels).best())
        if place not in self._of_weights:
            scale = calibration.row.weight
            assert scale is not None  # Setting and _can_calibrate have checked it
            self._of_weights[place] = scale(self._weights[key], calibration.values, rule.axis, rule.bits).cpu()
        return self._of_weights[place]

    def _fused(self, amax: Mapping[str, Tensor], wanted: Mapping[str, _Wanted]) -> dict[str, Tensor]:
        """Query, key and value with one scale, in every block: the maximum of theirs, or, where curves say how much
        each would lose, that of the least loss together."""
        fused: dict[str, Tensor] = {}
        for keys in _groups(FUSED_GROUPS, self._depth):
            if all(wanted[key].calibration.row.by_curves for key in keys):
                together = Curve.together([self._curve_of(key, wanted[key]) for key in keys])
                shared = _amax(together.best()) * max(wanted[key].factor for key in keys)
            else:
                shared = torch.stack([amax[key] for key in keys]).amax(dim=0)
            fused |= dict.fromkeys(keys, shared)
        return fused

    # What a plan promises -----------------------------------------------------------------------------------------

    def predicted_kl(self, plan: Plan) -> dict[str, float]:
        """{site that is on: predicted KL to the float model, in nats}; tensors of several sites count once.

        Raises ValueError where the model's sensitivity was not looked at.
        """
        if self._sensitivity is None:
            raise ValueError("scales: the sensitivity of this model was not looked at")
        losses: dict[str, float] = {}
        counted = set()
        for key, site in plan.sites.items():
            if not site.rule.on:
                continue
            tensor = self._tensor_of(key)
            if tensor in counted and self._sites[key].family != WEIGHT:
                losses[key] = 0.0
                continue
            counted.add(tensor)
            losses[key] = self._loss(key, site)
        return losses

    def _loss(self, key: str, site: SitePlan) -> float:
        rule, amax = site.rule, np.atleast_1d(site.amax.numpy())
        grid = _grids(rule, ASYMMETRIC)[0]
        assert self._sensitivity is not None
        if not rule.signed and (self._tensor_of(key), grid) in self._sensitivity.curves:
            clips_at = np.maximum(amax, rule.zero_point * site.scale.numpy())
            return float(self._curve(key, *grid).at(clips_at)[0])
        return float(self._curve(key, rule.axis, rule.levels).at(amax).sum())

    def _curve_of(self, key: str, wanted: _Wanted) -> Curve:
        """By which the scale of a site is chosen."""
        return self._curve(key, *_grids(wanted.rule, wanted.grid)[0])

    def _curve(self, key: str, axis: int | str | None, levels: tuple[int, int]) -> Curve:
        """Predicted KL of a site at values of amax."""
        if self._sensitivity is None:
            raise ValueError("scales: the sensitivity of this model was not looked at")
        return self._sensitivity.curve(key if key in self._weights else self._tensor_of(key), axis, levels)

    def _tensor_of(self, key: str) -> str:
        """Full name of the tensor that a site sees."""
        site = self._sites[key]
        return key.removesuffix(site.name) + site.tensor


def _amax(values: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.asarray(values)).float()


def _site_between(ends: Range, rule: SiteRule) -> SitePlan:
    """An unsigned grid over [low, high], which 0 belongs to; one level at least is positive."""
    count = 2**rule.bits - 1
    step = (ends.high - ends.low) / count
    zero_point = min(round(-ends.low / step), count - 1) if step > 0 else 0
    amax = torch.tensor(step * (count - zero_point), dtype=torch.float32)
    return SitePlan(amax, dataclasses.replace(rule, zero_point=zero_point))


def _can_change(rule: Rule, site: Site) -> bool:
    if site.family != WEIGHT:
        return True
    return rule.grid is None and (rule.calibrator is None or rule.calibrator.row.of_weights)


def _of_weights(rule: Rule) -> str:
    return "calibrate" if rule.grid is None else "be the grid of"


def _changed(wanted: _Wanted, rule: Rule) -> _Wanted:
    if rule.calibrator is not None:
        return dataclasses.replace(wanted, calibration=rule.calibrator)
    if rule.factor is not None:
        return dataclasses.replace(wanted, factor=rule.factor)
    if rule.grid is not None:
        grid_rule = dataclasses.replace(wanted.rule, signed=rule.grid == SIGNED)
        return dataclasses.replace(wanted, rule=grid_rule, grid=rule.grid)
    changes = {"on": False} if rule.off else {"bits": rule.bits}
    return dataclasses.replace(wanted, rule=dataclasses.replace(wanted.rule, **changes))


def plan_of(model: nn.Module, statistics: CalibrationStatistics, setting: Setting) -> Plan:
    """The plan of one setting; as `Scales.plan`."""
    return Scales(model, statistics).plan(setting)


def apply_setting(model: nn.Module, statistics: CalibrationStatistics, setting: Setting) -> Plan:
    """Quantize the model with one setting; returns the plan that it then follows."""
    plan = plan_of(model, statistics, setting)
    apply_plan(model, plan)
    return plan


def noise_per_site(
    model: nn.Module, statistics: CalibrationStatistics, num_batches: int, plan: Plan
) -> dict[str, float]:
    """Noise over signal power of every site that is on: small where a plan promises to do well.

    A forecast from histograms and weights, without an image. Histograms are those of the first `num_batches` batches.
    """
    sites = sites_of_blocks(len(quant_blocks(model)))
    seen = dict(zip(statistics.keys, statistics.after(num_batches, NOISE_NEEDS), strict=True))
    weights = site_weights(model)
    noise = {}
    for key, site in plan.sites.items():
        if not site.rule.on:
            continue
        if key in weights:
            noise[key] = _noise_of_weight(weights[key].detach(), site)
        else:
            tensor = key.removesuffix(sites[key].name) + sites[key].tensor
            noise[key] = noise_to_signal(seen[tensor], float(site.amax), site.rule.levels)
    return noise


def _noise_of_weight(weight: Tensor, site: SitePlan) -> float:
    rule = site.rule
    error = fake_quantize(weight, site.amax.to(weight.device), axis=rule.axis, levels=rule.levels) - weight
    signal = float(weight.square().sum())
    return float(error.square().sum()) / signal if signal > 0 else 0.0
