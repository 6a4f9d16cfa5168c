"""A plan: what every site does, as a value. Whatever runs, saves or compares a model reads this and nothing else.

    setting + statistics + weights  ->  Plan  ->  quantized model, checkpoint, trials, noise forecast

What a setting asks for is in `calibration.setting`; how it becomes a plan is in `calibration.scales`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitq_ray.base.config import Config, InputError, require_int
from vitq_ray.quant.fake_quant import step_of
from vitq_ray.quant.sites import SIGNED, WEIGHT, Mode, Site, sites_of_blocks

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class SiteRule(Config):
    """What a site does, apart from its scale: the part of a plan that a JSON file can hold.

    Attributes:
        bits: 2 to 8.
        axis: 0 for one scale per row of a weight, None for one scale.
        on: quantizes; a site that is off is calibrated and saved all the same.
        signed: the integers are [-2^(bits-1), 2^(bits-1) - 1], else [0, 2^bits - 1].
        zero_point: the integer that 0 becomes; 0 where the grid is symmetric.
    """

    bits: int = 8
    axis: int | None = None
    on: bool = True
    signed: bool = True
    zero_point: int = 0

    def __post_init__(self) -> None:
        require_int("bits", self.bits, MIN_BITS, MAX_BITS)
        low = -(2 ** (self.bits - 1)) if self.signed else 0
        require_int("zero point", self.zero_point, low, low + 2**self.bits - 2)
        if self.axis not in (None, 0):
            raise InputError(f"axis: {self.axis!r} is not one of None, 0")

    @property
    def levels(self) -> tuple[int, int]:
        """Smallest and largest integer, less the zero point: (-128, 127) at 8 bits, (0, 255) unsigned."""
        low = -(2 ** (self.bits - 1)) if self.signed else 0
        return low - self.zero_point, low + 2**self.bits - 1 - self.zero_point


@dataclass(frozen=True, eq=False)
class SitePlan:
    """One site: its rule, and amax in tensor units, float32: () or with axis 0 (rows, 1).

    amax is what the largest integer stands for: the scale is amax / 127 for symmetric 8 bits, amax / 255 unsigned.
    """

    amax: Tensor
    rule: SiteRule = SiteRule()

    @property
    def scale(self) -> Tensor:
        """Step between two integers, same shape as amax."""
        return step_of(self.amax, self.rule.levels[1])


@dataclass(frozen=True, eq=False)
class Plan:
    """What every site of a model does.

    Attributes:
        mode: name of the mode it was made for, which says which scales are fused.
        sites: {full FasterTransformer name: its plan}, all sites, in the order of `sites.sites_of_blocks`.
        weights: {timm name: tensor} of the weights and biases that a technique has changed; none where it is empty.
    """

    mode: str
    sites: Mapping[str, SitePlan]
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for plans that compute the same model: rule and amax of every site that is on, and changed weights."""
        digest = hashlib.sha256()
        for name, site in self.sites.items():
            if site.rule.on:
                digest.update(f"{name} {dataclasses.astuple(site.rule)} ".encode())
                digest.update(_array(site.amax).tobytes())
        for name, tensor in sorted(self.weights.items()):
            digest.update(f"{name} {tuple(tensor.shape)} ".encode())
            digest.update(_array(tensor).tobytes())
        return digest.hexdigest()

    @property
    def amax(self) -> dict[str, Tensor]:
        """{site: amax}, sites that are off included."""
        return {name: site.amax for name, site in self.sites.items()}

    @property
    def rules(self) -> dict[str, SiteRule]:
        """{site: what it does apart from its scale}."""
        return {name: site.rule for name, site in self.sites.items()}

    def only(self, keys: Collection[str]) -> Plan:
        """All sites but these are off; those of these that are off stay so."""
        return self._on({name: site.rule.on and name in keys for name, site in self.sites.items()})

    def without(self, keys: Collection[str]) -> Plan:
        """These sites are off, too."""
        return self._on({name: site.rule.on and name not in keys for name, site in self.sites.items()})

    def _on(self, on: Mapping[str, bool]) -> Plan:
        sites = {k: SitePlan(site.amax, dataclasses.replace(site.rule, on=on[k])) for k, site in self.sites.items()}
        return Plan(self.mode, sites, self.weights)

    def after_training(self, amax: Mapping[str, Tensor]) -> Plan:
        """The plan of a trained model: its scales, which may be learned; all of its weights are its own. Every site
        must be there."""
        sites = {name: SitePlan(amax[name].detach().cpu().clone(), site.rule) for name, site in self.sites.items()}
        return Plan(self.mode, sites)

    def degenerate_sites(self) -> list[str]:
        """Sites with an amax of 0 (in any channel): they quantize to zeros."""
        return [name for name, site in self.sites.items() if bool((site.amax == 0).any())]

    def __getstate__(self) -> dict[str, Any]:
        """Tensors as arrays, which travel between processes many times faster."""
        return {**self.__dict__, **_mapped(self, _array)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update(_mapped(self, lambda array: torch.from_numpy(np.array(array))))


def _mapped(plan: Plan, change: Callable[[Any], Any]) -> dict[str, Any]:
    sites = {name: SitePlan(change(site.amax), site.rule) for name, site in plan.sites.items()}
    return {"sites": sites, "weights": {name: change(tensor) for name, tensor in plan.weights.items()}}


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()


@lru_cache(1024)
def rules_of_mode(mode: Mode, weight_bits: int, act_bits: int, depth: int) -> Mapping[str, SiteRule]:
    """{site: what the mode does there} of a model of `depth` blocks, at these bits."""
    return {key: rule_of(mode, site, weight_bits, act_bits) for key, site in sites_of_blocks(depth).items()}


def rule_of(mode: Mode, site: Site, weight_bits: int, act_bits: int) -> SiteRule:
    """What a mode does at a site, at these bits; a zero point is known with the scale only, and 0 here."""
    is_weight = site.family == WEIGHT
    bits = weight_bits if is_weight else act_bits
    axis, is_signed = mode.weight_axis if is_weight else None, mode.grid(site) == SIGNED
    return SiteRule(bits, axis, mode.quantizes(site), is_signed)
