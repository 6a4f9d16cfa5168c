"""From settings to plans where settings change weights, too: transforms before the scales, corrections behind them.

    transforms ──► weights that compute the same ──► Look: statistics and sensitivity of the model that has them
    setting, its look ──► scales ──► corrections ──► Plan: what every site does, and every weight that is another one

A look is shared by all settings with the same transforms. It is a value: looked at once, saved, and read again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.calibration.corrections import (
    BIAS,
    FIT,
    LEARN,
    ROUND,
    SPLIT,
    debiased,
    require_correctable,
    rounded,
    with_weights,
)
from vitq_ray.calibration.fit import fitted
from vitq_ray.calibration.learn import learned, most_images
from vitq_ray.calibration.scales import (
    NOISE_NEEDS,
    Scales,
    all_by_curves,
    factors_of,
    grids_of_plan,
    grids_of_setting,
    kinds_needed,
    noise_per_site,
)
from vitq_ray.calibration.sensitivity import (
    Grid,
    Moments,
    Sensitivity,
    Spread,
    Track,
    collect_sensitivity,
    here,
    images_to_look_at,
)
from vitq_ray.calibration.setting import Setting, Technique
from vitq_ray.calibration.split import split
from vitq_ray.calibration.statistics import CalibrationStatistics
from vitq_ray.calibration.transforms import require_transformable, transformed
from vitq_ray.quant.plan import Plan, SitePlan
from vitq_ray.quant.sites import ATTENTION_PROBABILITIES, FC2_INPUT, MODES, WEIGHT, site_key, sites_of_blocks
from vitq_ray.quant.vit import clipped, float_copy, quant_blocks, site_weights

_BEHIND_V = ("attn.matmul_v_input_quantizer", "attn.out._input_quantizer", "attn.out._aftergemm_quantizer")
_PRODUCT = tuple(f"attn.matmul_{name}_input_quantizer" for name in "qk")  # share v's scale in some modes
_OUT_WEIGHT, _QUERY_WEIGHT = (f".attn.{name}._weight_quantizer" for name in ("out", "query"))
Transforms = tuple[Technique, ...]
# model that has the transforms' weights, kinds of statistics -> what a pass over all calibration images sees of it
CollectStatistics = Callable[[nn.Module, tuple[str, ...]], CalibrationStatistics]


@dataclass(frozen=True)
class Look:
    """What was seen of a float model under one set of transforms.

    Attributes:
        weights: {timm name: what the transforms made of it}.
        statistics: of the calibration images; None where no setting needs them.
        sensitivity: None where no setting needs it.
    """

    weights: Mapping[str, Tensor]
    statistics: CalibrationStatistics | None
    sensitivity: Sensitivity | None


@dataclass(frozen=True)
class Needs:
    """What a look must have for some settings.

    Attributes:
        kinds: of statistics; none where no calibrator needs any.
        grids: {tensor or weight: grids} whose sensitivity is needed; empty where none is.
    """

    kinds: tuple[str, ...]
    grids: Mapping[str, tuple[Grid, ...]]


def needs_sensitivity(setting: Setting) -> bool:
    """Whether a setting needs gradients of the float model."""
    curves = any(calibration.row.by_curves for calibration in (*setting.calibrations, *setting.calibrations_of_weights))
    return curves or bool(setting.corrections)


def images_needed(model: nn.Module, settings: Iterable[Setting], calibrated_on: int) -> int:
    """The first of so many calibration images that a planner must hand out: those of looks, or what `learn` takes."""
    learns = any(correction.name == LEARN for setting in settings for correction in setting.corrections)
    return min(most_images(model) if learns else images_to_look_at(model), calibrated_on)


def needs_of(settings: Iterable[Setting], depth: int) -> dict[Transforms, Needs]:
    """{transforms: what their look must have}, in the order in which the settings name them.

    Where one setting needs sensitivities, all are forecast by them.
    """
    settings = list(settings)
    sensitive = any(needs_sensitivity(setting) or setting.transforms for setting in settings)
    groups: dict[Transforms, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.transforms, []).append(setting)
    return {transforms: _needs(group, depth, sensitive) for transforms, group in groups.items()}


def _needs(settings: Sequence[Setting], depth: int, sensitive: bool) -> Needs:
    kinds = kinds_needed(settings, *(() if sensitive else (NOISE_NEEDS,)))
    grids: dict[str, dict[Grid, None]] = {}
    sites = sites_of_blocks(depth)
    asked = {(s.mode, s.weight_bits, s.act_bits, s.rules): s for s in settings} if sensitive else {}
    for setting in asked.values():
        try:
            found = grids_of_setting(setting, depth)
        except InputError:  # of a space, in which it is not proposed
            continue
        for key, wanted in found.items():
            tensor = key if sites[key].family == WEIGHT else key.removesuffix(sites[key].name) + sites[key].tensor
            grids.setdefault(tensor, {}).update(dict.fromkeys(wanted))
    return Needs(kinds, {key: tuple(wanted) for key, wanted in grids.items()})


def look_at(
    model: nn.Module,
    transforms: Transforms,
    needs: Needs,
    images: Tensor | None,
    collect: CollectStatistics,
    seed: int = 0,
    track: Track = iter,
    spread: Spread = here,
) -> Look:
    """See what settings with these transforms need.

    Args:
        model: from `quantize_vit`; it stays as it is.
        images: the first calibration images as the model takes them, (B, 3, S, S), `sensitivity.images_to_look_at` of
            them; None where no sensitivity is needed.
        collect: the pass over all calibration images.
        track: goes through the parts of the images of which gradients are taken, with progress shown.
        spread: where gradients are taken.

    Raises:
        InputError: where the model does not allow a transform.
    """
    if images is None:
        return Look({}, collect(model, needs.kinds), None)
    weights = transformed(model, [(t.name, t.strength) for t in transforms], images)
    twin = with_changed(model, weights)
    statistics = collect(twin, needs.kinds) if needs.kinds else None
    sensitivity = collect_sensitivity(twin, images, needs.grids, seed, track, spread) if needs.grids else None
    return Look(weights, statistics, sensitivity)


def with_changed(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A float copy of the model with other weights for good."""
    twin = float_copy(model).eval()
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    return twin


class Planner:
    """The plans of any settings whose looks are there."""

    def __init__(
        self,
        model: nn.Module,
        looks: Mapping[Transforms, Look],
        images: Callable[[], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        """`images` hands out `images_needed`, those of `look_at` first, for corrections; `model` stays as it is."""
        self._model, self._looks, self._images, self._seed = model, looks, images, seed
        self._scales: dict[Transforms, tuple[nn.Module, Scales]] = {}

    def plan(self, setting: Setting) -> Plan:
        """What every site does with this setting, and every weight it changes. InputError as `Scales.plan`."""
        self._complete(setting)
        look = self._looks[setting.transforms]
        model, scales = self._of(setting.transforms)
        plan = scales.plan(setting)
        plan = replace(plan, weights=look.weights)
        names = {correction.name for correction in setting.corrections}
        if not names:
            return plan
        if self._images is None or look.sensitivity is None:
            raise ValueError(f"setting {setting.label!r}: corrections need images, and the model's sensitivity")
        images, clips, moments = self._looked_at(), dict[str, float](), None
        if SPLIT in names:
            plan, clips = self._split(setting, plan, images)
        weights = plan.weights  # of a float model, which those that a fit changes are not
        if FIT in names:
            plan, moments = self._fitted(setting, plan, images, clips)
        if (names & {ROUND, BIAS}) and moments is None:
            moments = self._moments(setting.transforms, weights, images, clips)
        if ROUND in names:
            assert moments is not None
            plan = with_weights(plan, rounded(with_changed(self._model, plan.weights), plan, moments))
        if BIAS in names:
            assert moments is not None
            plan = with_weights(plan, debiased(model, plan, images, moments))
        if LEARN in names:
            own = self._images()[: setting.num_batches * setting.batch_size]
            plan = learned(with_changed(self._model, {}), plan, own, self._seed).of(plan)
        return plan

    def _looked_at(self) -> Tensor:
        assert self._images is not None
        return self._images()[: images_to_look_at(self._model)]

    def _split(self, setting: Setting, plan: Plan, images: Tensor) -> tuple[Plan, dict[str, float]]:
        """Corrected by `split`, and where the model then clips: {site of fc2's input: amax}."""
        model, _ = self._of(setting.transforms)
        depth = len(quant_blocks(model))
        factors = factors_of(setting, [site_key(index, FC2_INPUT) for index in range(depth)], depth)
        found = split(model, plan, images, factors, self._seed)
        sites = dict(plan.sites)
        for key, amax in found.amax.items():
            sites[key] = replace(sites[key], amax=torch.full_like(sites[key].amax, amax))
        for key, (spares, sources) in found.copies.items():
            if sites[key].rule.axis == 0:  # a copy has its own scale there
                scales = sites[key].amax.clone()
                scales[spares.cpu()] = scales[sources.cpu()]
                sites[key] = replace(sites[key], amax=scales)
        return with_weights(replace(plan, sites=sites), found.changes), found.amax

    def _fitted(
        self, setting: Setting, plan: Plan, images: Tensor, clips: Mapping[str, float]
    ) -> tuple[Plan, Moments | None]:
        """Corrected by `fit`, and what layers read then, where that is another thing than before.

        v is moved only where it, and what is behind it, have symmetric scales by gradients: they are chosen again. So
        are scales of probabilities.
        """
        look, (model, _) = self._looks[setting.transforms], self._of(setting.transforms)
        assert look.sensitivity is not None
        names = (*_BEHIND_V, *(_PRODUCT if MODES[setting.mode].fuse_qkv else ()))
        depth = len(quant_blocks(model))
        keys = [site_key(index, name) for index in range(depth) for name in names]
        move_v = all_by_curves(setting, plan, keys, depth)
        p = [site_key(index, ATTENTION_PROBABILITIES) for index in range(depth)]
        asked = factors_of(setting, p, depth) if all_by_curves(setting, plan, p, depth, signed=False) else {}
        fit = fitted(self._float(plan.weights, clips), plan, images, move_v, asked, self._seed)
        factors = {key: replace(plan.sites[key], amax=plan.sites[key].amax * by) for key, by in fit.factors.items()}
        sites, moments = {**plan.sites, **factors}, None
        if fit.moved:
            twin = self._float({**plan.weights, **fit.moved}, clips)
            grids = {key: grids for key, grids in grids_of_plan(plan, depth).items() if key in keys}
            seen = collect_sensitivity(twin, images, grids, self._seed)
            sensitivity = replace(look.sensitivity, curves={**look.sensitivity.curves, **seen.curves})
            again = Scales(twin, look.statistics, sensitivity).plan(setting)
            sites |= {key: again.sites[key] for key in keys}
            moments = seen.moments
        plan = with_weights(replace(plan, sites=sites), fit.changes)
        before, after = site_weights(model), site_weights(with_changed(self._model, plan.weights))
        # A gain takes the scale of its weight along, a sharpness where q has a scale of its own.
        scaled = (_OUT_WEIGHT,) if MODES[setting.mode].fuse_qkv else (_OUT_WEIGHT, _QUERY_WEIGHT)
        grown = {key: _grown(sites[key], before[key], after[key]) for key in sites if key.endswith(scaled)}
        return replace(plan, sites=sites | grown), moments

    def _float(self, weights: Mapping[str, Tensor], clips: Mapping[str, float]) -> nn.Module:
        """The float model with these weights, whose activations clip where those of a split do."""
        return clipped(with_changed(self._model, weights), clips)

    def _moments(
        self, transforms: Transforms, weights: Mapping[str, Tensor], images: Tensor, clips: Mapping[str, float]
    ) -> Moments:
        """What layers read; where neurons are split, that is another thing than what was looked at."""
        if clips:
            moments = collect_sensitivity(self._float(weights, clips), images, {}, self._seed).moments
            assert moments is not None
            return moments
        look, (model, _) = self._looks[transforms], self._of(transforms)
        assert look.sensitivity is not None
        moments = look.sensitivity.moments
        if moments is None:  # the look was read from a file
            moments = collect_sensitivity(model, images, {}, self._seed).moments
            assert moments is not None
            known = replace(look, sensitivity=replace(look.sensitivity, moments=moments))
            self._looks = {**self._looks, transforms: known}
        return moments

    @property
    def forecasts(self) -> str:
        """What `forecast` gives: `predicted_kl`, or `predicted_noise`."""
        sensitive = any(look.sensitivity is not None for look in self._looks.values())
        return "predicted_kl" if sensitive else "predicted_noise"

    def forecast(self, setting: Setting, plan: Plan) -> float:
        """What a plan promises, less is better: the sum of `losses`."""
        return math.fsum(self.losses(setting, plan).values())

    def losses(self, setting: Setting, plan: Plan) -> dict[str, float]:
        """{site that is on: what it is forecast to lose}: predicted KL in nats, without corrections; where no
        sensitivity was looked at, noise to signal."""
        look, (model, scales) = self._looks[setting.transforms], self._of(setting.transforms)
        if look.sensitivity is not None:
            return scales.predicted_kl(scales.plan(setting) if setting.corrections else plan)
        assert look.statistics is not None
        return noise_per_site(model, look.statistics, setting.num_batches, plan)

    def _complete(self, setting: Setting) -> None:
        """Look again where a setting has grids that nobody named before, as rules that meet at one site may."""
        look = self._looks[setting.transforms]
        if look.sensitivity is None:
            return
        needs = _needs([setting], len(quant_blocks(self._model)), True).grids
        known = look.sensitivity.curves
        missing = {key: tuple(grid for grid in grids if (key, grid) not in known) for key, grids in needs.items()}
        missing = {key: grids for key, grids in missing.items() if grids}
        if missing:
            assert self._images is not None
            model, _ = self._of(setting.transforms)
            more = collect_sensitivity(model, self._looked_at(), missing, self._seed)
            sensitivity = replace(look.sensitivity, curves={**known, **more.curves})
            self._looks = {**self._looks, setting.transforms: replace(look, sensitivity=sensitivity)}
            del self._scales[setting.transforms]

    def _of(self, transforms: Transforms) -> tuple[nn.Module, Scales]:
        if transforms not in self._scales:
            look = self._looks[transforms]
            model = with_changed(self._model, look.weights)  # a float one, whatever plan the model follows
            self._scales[transforms] = model, Scales(model, look.statistics, look.sensitivity)
        return self._scales[transforms]


def _grown(site: SitePlan, before: Tensor, after: Tensor) -> SitePlan:
    """The scale of a weight (rows, columns) that has changed, larger or smaller as its largest value has become."""
    if site.rule.axis == 0:
        old, new = (weight.detach().abs().amax(dim=1) for weight in (before, after))
    else:
        old, new = (weight.detach().abs().amax() for weight in (before, after))
    growth = torch.where(old > 0, new / old, torch.ones_like(old)).to(site.amax)
    return SitePlan(site.amax * growth.reshape(site.amax.shape), site.rule)


def require_techniques(model: nn.Module, settings: Iterable[Setting]) -> None:
    """InputError where the model's parts do not allow a transform or a correction of one of the settings."""
    settings = list(settings)
    for name in dict.fromkeys(transform.name for setting in settings for transform in setting.transforms):
        require_transformable(model, name)
    for name in dict.fromkeys(correction.name for setting in settings for correction in setting.corrections):
        require_correctable(model, name)
