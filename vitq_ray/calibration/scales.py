"""From settings to plans: statistics and weights × Setting -> Plan, in milliseconds; and what a plan promises.

    calibrator, mode and bits of every site -> rules, in order -> amax of every tensor -> fused where the mode fuses

What settings share is computed once: amax of a tensor for one calibrator, batch count and number of bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.calibration.calibrators import Calibration, max_amax, noise_to_signal
from vitq_ray.calibration.histogram import WOKEN, Histogram
from vitq_ray.calibration.setting import Rule, Setting, require_sites
from vitq_ray.calibration.statistics import HISTOGRAM, RANGE, CalibrationStatistics
from vitq_ray.quant.fake_quant import fake_quantize
from vitq_ray.quant.plan import Plan, SitePlan, SiteRule, rules_of_mode
from vitq_ray.quant.sites import FUSED_GROUPS, MODES, SHARED_SITES, WEIGHT, Site, site_key, sites_of_blocks
from vitq_ray.quant.vit import apply_plan, quant_blocks, site_weights

NOISE_NEEDS = HISTOGRAM  # what `noise_per_site` must have seen


@dataclass(frozen=True)
class _Wanted:
    """What a setting asks of one site."""

    calibration: Calibration
    rule: SiteRule
    factor: float = 1.0


def require_possible(setting: Setting, depth: int) -> None:
    """InputError where a model of `depth` blocks cannot do what the rules ask for; as `Scales.plan`, but at once."""
    _wanted(setting, depth)


def require_all_possible(settings: Iterable[Setting], depth: int) -> None:
    """As `require_possible`, of many settings; the error names the first that is not.

    Mode, bits and rules decide it: settings that agree in these are looked at once.
    """
    known = set()
    for setting in settings:
        asked = (setting.mode, setting.weight_bits, setting.act_bits, setting.rules)
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
        key: _Wanted(setting.weights if site.family == WEIGHT else setting.calibrator, plain[key])
        for key, site in sites.items()
    }
    for rule in setting.rules:
        changed = {key: _changed(wanted[key], rule) for key in _matched(rule, depth)}
        if not changed:
            raise InputError(f"rule {str(rule)!r}: {rule.calibrator} cannot calibrate the weights it matches")
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
    return tuple(key for key in sites if key in matched and _can_calibrate(rule, sites[key]))


def _groups(groups: Iterable[Iterable[str]], depth: int) -> Iterator[list[str]]:
    """Groups of sites, in every block, by their full names."""
    return ([site_key(index, name) for name in group] for index in range(depth) for group in groups)


def _require_fused_alike(wanted: Mapping[str, _Wanted], depth: int) -> None:
    for keys in _groups(FUSED_GROUPS, depth):
        if len({wanted[key].rule for key in keys}) > 1:
            raise InputError(
                f"rules: {keys[0]} and the two sites whose scale it shares in this mode differ in bits or in "
                "being off; expected a pattern that matches all three"
            )


def kinds_needed(settings: Iterable[Setting]) -> tuple[str, ...]:
    """What statistics must keep for these settings: keys of `statistics.STATISTICS`."""
    return kinds_of(calibration for setting in settings for calibration in setting.calibrations)


def kinds_of(calibrations: Iterable[Calibration], *others: str) -> tuple[str, ...]:
    """What statistics must keep for these calibrators, and for who else needs some."""
    kinds = {calibration.row.statistic for calibration in calibrations} | set(others)
    return tuple(sorted(kinds - ({RANGE} if HISTOGRAM in kinds else set())))  # a histogram knows its range


class Scales:
    """The plans of any settings, from one set of statistics and the weights of a model."""

    def __init__(self, model: nn.Module, statistics: CalibrationStatistics) -> None:
        self._statistics = statistics
        self._depth = len(quant_blocks(model))
        self._sites = sites_of_blocks(self._depth)
        self._weights = site_weights(model)
        self._of_tensors: dict[tuple[Calibration, int, int], dict[str, Tensor]] = {}
        self._of_weights: dict[tuple[Calibration, int | None, int, str], Tensor] = {}
        self._woken: set[tuple[int, str]] = set()  # (batches, tensor) of histograms that say nothing

    def plan(self, setting: Setting) -> Plan:
        """What every site does with this setting, those that are off included.

        Raises:
            InputError: for a rule that matches no site or changes none, for one that parts fused sites, and for a site
                that is on and whose first batch alone was all zeros, unless its calibrator asks for the range only.
        """
        wanted = _wanted(setting, self._depth)
        amax = self._amax_of_tensors(wanted, setting.num_batches) | self._amax_of_weights(wanted)
        amax = {key: value if wanted[key].factor == 1 else value * wanted[key].factor for key, value in amax.items()}
        if MODES[setting.mode].fuse_qkv:
            amax |= self._fused(amax)
        return Plan(setting.mode, {key: SitePlan(amax[key], wanted[key].rule) for key in self._sites})

    def _amax_of_tensors(self, wanted: Mapping[str, _Wanted], num_batches: int) -> dict[str, Tensor]:
        """{activation site: amax, shape ()}, float32."""
        groups: dict[tuple[Calibration, int], dict[str, str]] = {}  # {site: tensor} that are calibrated together
        for key, site in self._sites.items():
            if site.family != WEIGHT:
                index = key.removesuffix(site.name)
                group = groups.setdefault((wanted[key].calibration, wanted[key].rule.bits), {})
                group[key] = index + site.tensor
        amax: dict[str, Tensor] = {}
        for (calibration, bits), tensors in groups.items():
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
        """{weight site: amax, () or (rows, 1)}."""
        return {key: self._weigh(wanted[key].calibration, wanted[key].rule, key) for key in self._weights}

    def _weigh(self, calibration: Calibration, rule: SiteRule, key: str) -> Tensor:
        place = (calibration, rule.axis, rule.bits, key)
        if place not in self._of_weights:
            scale = calibration.row.weight
            assert scale is not None  # Setting and _can_calibrate have checked it
            self._of_weights[place] = scale(self._weights[key], calibration.values, rule.axis, rule.bits).cpu()
        return self._of_weights[place]

    def _fused(self, amax: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Query, key and value with the maximum of their three scales, in every block."""
        fused: dict[str, Tensor] = {}
        for keys in _groups(FUSED_GROUPS, self._depth):
            fused |= dict.fromkeys(keys, torch.stack([amax[key] for key in keys]).amax(dim=0))
        return fused


def _can_calibrate(rule: Rule, site: Site) -> bool:
    return rule.calibrator is None or site.family != WEIGHT or rule.calibrator.row.weight is not None


def _changed(wanted: _Wanted, rule: Rule) -> _Wanted:
    if rule.calibrator is not None:
        return dataclasses.replace(wanted, calibration=rule.calibrator)
    if rule.factor is not None:
        return dataclasses.replace(wanted, factor=rule.factor)
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
        if site.rule.zero_point or not site.rule.signed:
            raise ValueError(f"noise: {key} has {site.rule}; the forecast is for symmetric grids")
        if key in weights:
            noise[key] = _noise_of_weight(weights[key].detach(), site)
        else:
            tensor = key.removesuffix(sites[key].name) + sites[key].tensor
            noise[key] = float(noise_to_signal([seen[tensor]], np.array([float(site.amax)]), site.rule.bits)[0])
    return noise


def _noise_of_weight(weight: Tensor, site: SitePlan) -> float:
    rule = site.rule
    error = fake_quantize(weight, site.amax.to(weight.device), axis=rule.axis, levels=rule.levels) - weight
    signal = float(weight.square().sum())
    return float(error.square().sum()) / signal if signal > 0 else 0.0


def total_noise(noise: Mapping[str, float]) -> float:
    """The sum over all sites, which puts candidates in order; it decides nothing."""
    return math.fsum(noise.values())
