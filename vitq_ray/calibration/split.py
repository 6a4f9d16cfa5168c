"""The correction `split`: what the scale of fc2's input would clip is carried by neurons that do next to nothing.

    float model ──► range of every neuron ──► gradients: what clipping, and the absence of neurons, cost at every scale
               ──► a scale, neurons that are split, spares that take a part of them ──► changed weights

The input of fc2 has one scale for all neurons, few of which have values far above the others'. A neuron with the value
x = act(z) hands on min(x, A) where the scale clips at A. A spare neuron that has its weights, its column of fc2 and its
bias less A hands on act(z - A), about x - A above A and about nothing below: both together are x again, with levels as
fine as A allows. A neuron above 2·A takes a second spare, and so on. Spares are neurons whose absence costs least once
their means are in fc2's bias: next to nothing for dozens of the 1,536 of a ViT-S. Zhao et al. (arXiv 1901.09504) split
channels likewise, into added ones of half the size.

Scale and splits are chosen by the same prediction as scales by gradients (`sensitivity.py`): errors times gradients,
added up over the neurons of a token, squared. What is not rounding, a spare's own absence or the bend of act around A,
is much the same for all tokens of an image, so that its sum over an image, squared, comes on top. Only those neurons
are looked at that have the largest values, as ones to split, and that vary least, as spares.

The weights that come out compute what the float model does only together with a quantizer that clips:
`quant.vit.clipped`. Unsigned grids stay as they are.

Legend: B images, N tokens, C neurons, K that may be split, P that may be spares, S scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from vitq_ray.calibration.sensitivity import gradient_pass
from vitq_ray.quant.fake_quant import fake_quantize
from vitq_ray.quant.plan import Plan, SitePlan
from vitq_ray.quant.sites import FC2_INPUT, site_key
from vitq_ray.quant.vit import observing, quant_blocks, tensor_keys

_MOST = 128  # neurons of a block that may be split, and that may be spares; at most a quarter, and an eighth, of all
_STEPS = tuple(2.0 ** (-k / 4) for k in range(14))  # A over the largest value: 1, 0.84, … 0.1
_PATIENCE = 5  # smaller scales that are tried behind the best one
_FC1_OUTPUT, _FC1_WEIGHT = "ffn.fc1._aftergemm_quantizer", "ffn.fc1._weight_quantizer"
_AT_ONCE = 8  # images in one forward pass


@dataclass(frozen=True)
class Split:
    """What a split changes.

    Attributes:
        amax: {full name of the site of fc2's input: A} where neurons are split.
        changes: {timm name: weight or bias}.
        copies: {full name of the site of fc1's weight: (spares, the neuron that each has become a copy of)}.
    """

    amax: dict[str, float]
    changes: dict[str, Tensor]
    copies: dict[str, tuple[Tensor, Tensor]]


def split(model: nn.Module, plan: Plan, images: Tensor, factors: Mapping[str, float], seed: int = 0) -> Split:
    """The split of a plan, in every block whose input of fc2 is on a signed grid, and that gains by it.

    Args:
        model: the float model with the plan's weights; it stays as it is.
        images: as it takes them, (B, 3, S, S).
        factors: {full name of a site: what a rule multiplies its scale with}; what serves is found without that.
        seed: of the gradients' random signs.
    """
    sites = {site_key(index, FC2_INPUT): index for index in range(len(quant_blocks(model)))}
    sites = {key: index for key, index in sites.items() if _can_split(plan.sites[key])}
    found = Split({}, {}, {})
    if not sites:
        return found
    mlps = {key: quant_blocks(model)[index].mlp for key, index in sites.items()}
    seen = {
        key: _Seen(mlps[key], ranges, plan.sites[key], factors.get(key, 1.0))
        for key, ranges in _ranges_of(model, images, sites).items()
    }
    gradient_pass(model, images, _Shown(seen, sites).take, seed)
    for key, index in sites.items():
        choice = seen[key].choice()
        if choice is not None:
            found.amax[key] = choice.amax
            found.changes.update(_changes(mlps[key], f"blocks.{index}.mlp.", seen[key].ranges.mean, choice))
            found.copies[site_key(index, _FC1_WEIGHT)] = choice.spares, choice.sources
    return found


def _can_split(site: SitePlan) -> bool:
    return site.rule.on and site.rule.signed and float(site.amax) > 0


@dataclass(frozen=True)
class _Choice:
    """Of one block.

    Attributes:
        amax: A.
        spares: neurons that take a part of another one's values.
        sources: the neuron that each is for.
        turns: 1 for a neuron's first spare, 2 for its second, …
        lost: what every neuron that stays loses on average, (C,).
    """

    amax: float
    spares: Tensor
    sources: Tensor
    turns: Tensor
    lost: Tensor


def _changes(mlp: nn.Module, name: str, means: Tensor, choice: _Choice) -> dict[str, Tensor]:
    fc1, fc2 = (cast(nn.Linear, getattr(mlp, layer)) for layer in ("fc1", "fc2"))
    rows, bias, columns = (t.detach().clone() for t in (fc1.weight, fc1.bias, fc2.weight))
    lost = choice.lost.clone()
    lost[choice.spares] = means[choice.spares]
    rows[choice.spares] = fc1.weight.detach()[choice.sources]
    bias[choice.spares] = fc1.bias.detach()[choice.sources] - choice.turns * choice.amax
    columns[:, choice.spares] = fc2.weight.detach()[:, choice.sources]
    moved = fc2.bias.detach().double() + fc2.weight.detach().double() @ lost.double()
    changed = {"fc1.weight": rows, "fc1.bias": bias, "fc2.weight": columns, "fc2.bias": moved.to(fc2.bias.dtype)}
    return {name + layer: value for layer, value in changed.items()}


# What is seen of a block ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ranges:
    """Largest value, mean and mean square of every neuron, (C,) each."""

    largest: Tensor
    mean: Tensor
    square: Tensor

    def merge(self, later: _Ranges) -> _Ranges:
        """With a part of the images whose means are shares of those of all."""
        largest = torch.maximum(self.largest, later.largest)
        return _Ranges(largest, self.mean + later.mean, self.square + later.square)


def _ranges_of(model: nn.Module, images: Tensor, keys: Iterable[str]) -> dict[str, _Ranges]:
    """{site of fc2's input: ranges of what fc2 reads}."""
    wanted, found = set(keys), dict[str, _Ranges]()

    def look(key: str, x: Tensor) -> None:
        if key in wanted:
            mean, square = (values.mean(dim=1).sum(dim=0) / len(images) for values in (x, x.square()))
            part = _Ranges(x.amax(dim=(0, 1)), mean, square)
            found[key] = found[key].merge(part) if key in found else part

    with torch.inference_mode(), observing(model, {key: partial(look, key) for key in tensor_keys(model)}):
        for part in images.split(_AT_ONCE):
            model(part)
    return found


class _Shown:
    """Hands tensors of a backward pass to the blocks they are of: fc2's input, then fc1's output."""

    def __init__(self, seen: Mapping[str, _Seen], indices: Mapping[str, int]) -> None:
        self._seen = seen
        self._outputs = {site_key(index, _FC1_OUTPUT): key for key, index in indices.items()}
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def take(self, key: str, x: Tensor, g: Tensor) -> None:
        if key in self._seen:
            self._kept[key] = x, g
        elif key in self._outputs:
            of = self._outputs[key]
            self._seen[of].add(*self._kept.pop(of), x)


class _Seen:
    """What is kept of the MLP of one block; sums of g·δ are over neurons.

    Attributes:
        ranges: of what fc2 reads.
        split, spares: neurons that may be split (K,), and that may be spares (P,).
        amax: scales (S,): the plan's, smaller ones; behind them, where a rule has a factor, all of them times that.
    """

    def __init__(self, mlp: nn.Module, ranges: _Ranges, site: SitePlan, factor: float) -> None:
        self.ranges = ranges
        self._mlp, self._levels, self._factor = mlp, site.rule.levels, factor
        count = len(ranges.largest)
        self.split = ranges.largest.argsort(descending=True)[: min(_MOST, count // 4)]
        columns = cast(nn.Linear, mlp.fc2).weight.detach().square().sum(dim=0)
        varies = (ranges.square - ranges.mean.square()) * columns  # of fc2's output, by a neuron
        varies[self.split] = torch.inf
        self.spares = varies.argsort()[: min(2 * _MOST, count // 4)]
        base = float(site.amax) / factor
        self.amax = [base, *(a for a in (float(ranges.largest.max()) * step for step in _STEPS) if a < base)]
        self.amax += [a * factor for a in self.amax] if factor != 1 else []
        self._totals: list[Tensor] = []  # of every token at every scale, parts of (S, B, N)
        self._clipped = torch.zeros(())  # what every scale takes from a neuron, summed over tokens (S, C)
        self._of_spares: list[tuple[Tensor, Tensor]] = []  # x and g, parts of (B, N, P)
        self._of_split: list[tuple[Tensor, Tensor]] = []  # fc1's output and g, parts of (B, N, K)

    def add(self, x: Tensor, g: Tensor, output: Tensor) -> None:
        """Of a few images: what fc2 reads, its gradient, and fc1's output without its bias, (B, N, C) each."""
        self._totals.append(torch.stack([((self._rounded(x, amax) - x) * g).sum(dim=2) for amax in self.amax]))
        self._clipped = self._clipped + torch.stack([(x - amax).relu_().sum(dim=(0, 1)) for amax in self.amax])
        self._of_spares.append((x[..., self.spares], g[..., self.spares]))
        self._of_split.append((output[..., self.split], g[..., self.split]))

    def _rounded(self, x: Tensor, amax: float) -> Tensor:
        return fake_quantize(x, torch.tensor(amax, device=x.device), levels=self._levels)

    def choice(self) -> _Choice | None:
        """What gains most; None where nothing does."""
        totals = torch.cat(self._totals, dim=1)
        count, best, found = len(self.amax) // (1 if self._factor == 1 else 2), 0, None
        least = _loss(totals[0])
        for place in range(count):
            parts = self._divided(place, totals[place])
            if parts.taken and parts.loss < least:
                best, found, least = place, parts, parts.loss
            if place - best >= _PATIENCE:
                break
        if found is None or self._factor == 1:
            return None if found is None else self._choice(best, found)
        asked = best + count
        parts = self._divided(asked, totals[asked])
        return self._choice(asked, parts) if parts.loss < _loss(totals[count]) else None

    def _divided(self, place: int, totals: Tensor) -> _Parts:
        """Neurons split with one scale, one after the other, as long as that gains."""
        amax = self.amax[place]
        needed = (self.ranges.largest[self.split] / amax).ceil().long() - 1
        errors = self._errors_of_split(amax, needed)
        spares, rounding, absence = self._costs_of_spares(amax)
        offs, found = torch.zeros_like(totals), _Parts(_loss(totals), [], needed, errors.mean, spares)
        number, order = 0, (errors.gain / needed.clamp(min=1)).argsort(descending=True)
        for neuron in order[(errors.gain > 0)[order]].tolist():
            wanted = number + int(needed[neuron])
            if wanted > len(spares):
                continue
            tried, tried_offs = totals + errors.change[..., neuron], offs + errors.systematic[..., neuron]
            loss = _loss(tried + rounding[..., wanted - 1])
            loss += _loss((tried_offs + absence[..., wanted - 1]).sum(dim=1))
            if loss < found.loss:
                totals, offs, number, found.loss = tried, tried_offs, wanted, loss
                found.taken.append(neuron)
        return found

    def _errors_of_split(self, amax: float, needed: Tensor) -> _Errors:
        """Of every neuron that may be split, were it alone."""
        output, g = (torch.cat(parts) for parts in zip(*self._of_split, strict=True))
        act = cast(nn.Module, self._mlp.act)
        z = output + cast(nn.Linear, self._mlp.fc1).bias.detach()[self.split]
        x = act(z)
        clipped = self._rounded(x, amax)
        rounded, handed_on = clipped.clone(), x.clamp(max=amax)
        for turn in range(1, int(needed.max()) + 1):
            part = act(z - turn * amax)
            rounded += torch.where(needed >= turn, self._rounded(part, amax), 0)
            handed_on += torch.where(needed >= turn, part.clamp(max=amax), 0)
        mean = (handed_on - x).mean(dim=(0, 1))  # goes into fc2's bias
        before, after = (clipped - x) * g, (rounded - x - mean) * g
        gain = (before.square() - after.square()).sum(dim=(0, 1)) * (needed > 0)
        return _Errors(gain, after - before, (handed_on - x - mean) * g, mean)

    def _costs_of_spares(self, amax: float) -> tuple[Tensor, Tensor, Tensor]:
        """Spares, those whose absence costs least first (P / 2,); what the totals of tokens change by where the first,
        the first two, … of them are missing (B, N, P / 2); and what of that is not rounding."""
        x, g = (torch.cat(parts) for parts in zip(*self._of_spares, strict=True))
        mean = self.ranges.mean[self.spares]
        absence = (mean - x) * g
        alone = torch.maximum(absence.square().sum(dim=(0, 1)), absence.sum(dim=1).square().sum(dim=0))
        order = alone.argsort()[: (len(alone) + 1) // 2]
        own_rounding = ((mean - self._rounded(x, amax)) * g)[..., order]
        return self.spares[order], own_rounding.cumsum(dim=2), absence[..., order].cumsum(dim=2)

    def _choice(self, place: int, parts: _Parts) -> _Choice:
        counts = parts.needed[parts.taken]
        sources = self.split[parts.taken].repeat_interleave(counts)
        turns = torch.cat([torch.arange(1, int(count) + 1) for count in counts] or [torch.arange(0)])
        lost = self._clipped[place] / sum(len(x) * x.shape[1] for x, _ in self._of_split)
        lost[self.split[parts.taken]] = -parts.mean[parts.taken]
        return _Choice(self.amax[place], parts.spares[: len(sources)], sources, turns.to(lost.device), lost)


@dataclass(frozen=True)
class _Errors:
    """Of neurons that may be split (K,): by how much Σ (g·δ)² falls; by how much g·δ changes; what of that is not
    rounding, (B, N, K) each; and the mean error that goes into fc2's bias."""

    gain: Tensor
    change: Tensor
    systematic: Tensor
    mean: Tensor


@dataclass
class _Parts:
    """Neurons split with one scale: predicted KL; which of those that may be split; spares and mean error of each."""

    loss: float
    taken: list[int]
    needed: Tensor
    mean: Tensor
    spares: Tensor


def _loss(totals: Tensor) -> float:
    """Predicted KL of sums of g·δ: of tokens (B, N), or of images (B,)."""
    return float(totals.square().sum()) / (2 * len(totals))
