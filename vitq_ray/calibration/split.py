"""The correction `split`: what the scale of fc2's input would clip is carried by neurons that do next to nothing.

    float model ──► ranges of every neuron ──► gradients: what clipping, and each neuron's absence, cost at every scale
               ──► a scale, neurons that are split, neurons that give their place ──► changed weights

The input of fc2 has one scale for all neurons, few of which have values far above the others'. A neuron with the value
x = act(z) hands on min(x, A) where the scale clips at A. A spare neuron that has its weights, its column of fc2 and its
bias less A hands on act(z - A), about x - A above A and about nothing below: both together are x again, with levels as
fine as A allows. A neuron above 2·A takes a second spare, and so on. Spares are those neurons whose absence, their
means put into fc2's bias, costs least; that is next to nothing for dozens of the 1,536 of a ViT-S. Zhao et al. (arXiv
1901.09504) split channels likewise, into added ones of half the size.

Scale, splits and spares are chosen by the same prediction as scales by gradients (`sensitivity.py`): errors times
gradients, added up over the neurons of a token, squared. The weights that come out compute what the float model does
only together with the quantizer that clips.

Legend: B images, N tokens, C neurons, T tokens of all images, K candidates, S scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from vitq_ray.calibration.sensitivity import gradient_pass
from vitq_ray.quant.plan import Plan, SitePlan
from vitq_ray.quant.sites import site_key
from vitq_ray.quant.vit import observing, quant_blocks, tensor_keys

_CANDIDATES = 128  # neurons of a block that may be split: those with the largest values
_MOST_SPARES = 0.25  # of a block's neurons
_STEPS = 2.0 ** (-torch.arange(0, 14, dtype=torch.float64) / 4)  # A over the largest value: 1, 0.84, … 0.1
_READ, _WRITTEN = "ffn.fc2._input_quantizer", "ffn.fc1._aftergemm_quantizer"
_AT_ONCE = 8  # images in one forward pass


@dataclass(frozen=True)
class Split:
    """What a split changes.

    Attributes:
        amax: {full name of the site of fc2's input: A} where neurons are split.
        changes: {timm name: weight or bias}.
    """

    amax: dict[str, float]
    changes: dict[str, Tensor]


def split(model: nn.Module, plan: Plan, images: Tensor, factors: Mapping[str, float], seed: int = 0) -> Split:
    """The split of a plan, in every block whose input of fc2 is on a signed grid, and that gains by it.

    Args:
        model: the float model with the plan's weights; it stays as it is.
        images: as it takes them, (B, 3, S, S).
        factors: {full name of a site: what a rule multiplies its scale with}; what serves is found without that.
        seed: of the gradients' random signs.
    """
    seen = {
        key: block
        for key, block in _ranges(model, images).items()
        if plan.sites[key].rule.on and plan.sites[key].rule.signed and float(block.largest.max()) > 0
    }
    for key, block in seen.items():
        block.prepare(plan.sites[key], factors.get(key, 1.0))
    gradient_pass(model, images, _Shown(seen).take, seed)
    found = Split({}, {})
    for key, block in seen.items():
        choice = block.chosen()
        if choice is not None:
            found.amax[key] = choice.amax
            found.changes.update(block.changed(choice))
    return found


def clipped(model: nn.Module, amax: Mapping[str, float]) -> nn.Module:
    """The model, changed in place, whose activations clip as the quantizers of {site of fc2's input: A} will do: so
    that a model with a split computes what the float one does."""
    for index, block in enumerate(quant_blocks(model)):
        key = site_key(index, _READ)
        if key in amax:
            block.mlp.act = nn.Sequential(block.mlp.act, _Ceiling(amax[key]))
    return model


class _Ceiling(nn.Module):
    def __init__(self, amax: float) -> None:
        super().__init__()
        self.amax = amax

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(max=self.amax)


@dataclass(frozen=True)
class _Choice:
    """Of one block.

    Attributes:
        amax: A.
        neurons: which are split, one entry for each of their spares.
        turns: 1 for a neuron's first spare, 2 for its second, …
        spares: who gives its place to each.
        lost: what every neuron that stays loses by it, on average, (C,).
    """

    amax: float
    neurons: Tensor
    turns: Tensor
    spares: Tensor
    lost: Tensor


@dataclass
class _Block:
    """What is seen of the MLP of one block.

    Attributes:
        largest, mean: of every neuron (C,).
        alone: Σ ((x - mean)·g)² of every neuron (C,).
        totals: Σ over neurons of g·δ at every scale, clipped, of every token: parts of (S, B, N).
        cut: Σ over tokens of what every scale clips (S, C).
        z, g: before the activation, and the gradient behind it, of the candidates: parts of (B, N, K).
    """

    index: int
    mlp: nn.Module
    largest: Tensor
    mean: Tensor
    alone: Tensor = field(default_factory=lambda: torch.zeros(()))
    totals: list[Tensor] = field(default_factory=list)
    cut: Tensor = field(default_factory=lambda: torch.zeros(()))
    z: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)

    def prepare(self, site: SitePlan, factor: float) -> None:
        """For the grid of a site; what serves is found for scales that a rule has not multiplied yet."""
        self._levels, self._factor = site.rule.levels, factor
        base = float(site.amax) / factor
        grid = (float(self.largest.max()) * _STEPS).tolist()
        self._grid = [base, *(amax for amax in grid if amax < base)]
        self._grid += [amax * factor for amax in self._grid] if factor != 1 else []
        self.candidates = self.largest.argsort(descending=True)[:_CANDIDATES]

    def add(self, x: Tensor, g: Tensor, z: Tensor) -> None:
        """Of a few images: what fc2 reads, its gradient, and what it was before the activation, (B, N, C) each."""
        lost = (x - self.mean) * g
        of_tokens, of_images = lost.square().sum(dim=(0, 1)), lost.sum(dim=1).square().sum(dim=0)
        self.alone = self.alone + torch.maximum(of_tokens, of_images).double()
        self.totals.append(torch.stack([((self._rounded(x, amax) - x) * g).sum(dim=2) for amax in self._grid]))
        self.cut = self.cut + torch.stack([(x - amax).relu_().sum(dim=(0, 1)) for amax in self._grid])
        self.z.append(z[..., self.candidates])
        self.g.append(g[..., self.candidates])

    def _rounded(self, x: Tensor, amax: float) -> Tensor:
        step = amax / self._levels[1]
        return (x / step).round_().clamp_(*self._levels).mul_(step)

    def chosen(self) -> _Choice | None:
        """What gains most; None where nothing does."""
        totals, z, g = torch.cat(self.totals, dim=1), torch.cat(self.z), torch.cat(self.g)
        cut = self.cut / totals[0].numel()
        found = [self._at(*of_scale, z, g) for of_scale in zip(self._grid, totals, cut, strict=True)]
        count = len(self._grid) // (1 if self._factor == 1 else 2)
        best = min(range(count), key=lambda k: found[k][0])
        plain = float(totals[0].square().sum()) / (2 * len(z))
        loss, choice = found[best]
        if choice is None or loss >= plain:
            return None
        return choice if self._factor == 1 else found[best + count][1]

    def _at(self, amax: float, totals: Tensor, cut: Tensor, z: Tensor, g: Tensor) -> tuple[float, _Choice | None]:
        """(predicted KL, choice) with one scale: neurons are split one after the other, as long as that gains."""
        images = len(z)
        needed = (self.largest[self.candidates] / amax).ceil().long() - 1  # spares of each candidate
        over = (needed > 0).nonzero()[:, 0]
        loss = float(totals.square().sum()) / (2 * images)
        if not len(over):
            return loss, None
        z, g, needed = z[..., over], g[..., over], needed[over]
        x = cast(nn.Module, self.mlp.act)(z)
        clip, handed, exact = self._rounded(x, amax), self._rounded(x, amax), x.clamp(max=amax)
        for turn in range(1, int(needed.max()) + 1):
            more = cast(nn.Module, self.mlp.act)(z - turn * amax)
            handed += torch.where(needed >= turn, self._rounded(more, amax), 0)
            exact += torch.where(needed >= turn, more.clamp(max=amax), 0)
        before, after = (clip - x) * g, (handed - x) * g
        error = (exact - x).mean(dim=(0, 1))
        shared = ((exact - x - error) * g).sum(dim=1).square().sum(dim=0) / (2 * images)
        gains = (before.square().sum(dim=(0, 1)) - after.square().sum(dim=(0, 1))) / (2 * images) - shared
        costs, places = self._spares(over, images)
        taken: list[int] = []
        spares = 0
        for place in (gains / needed).argsort(descending=True).tolist():
            number = spares + int(needed[place])
            if float(gains[place]) <= 0 or number > len(places):
                break
            tried = totals - before[..., place] + after[..., place]
            systematic = float(shared[[*taken, place]].sum()) + float(costs[number - 1])
            with_it = float(tried.square().sum()) / (2 * images) + systematic
            if with_it < loss:
                totals, loss, spares = tried, with_it, number
                taken.append(place)
        if not taken:
            return loss, None
        turns = [torch.arange(1, int(needed[place]) + 1, device=over.device) for place in taken]
        neurons = torch.cat(
            [self.candidates[over[place]].repeat(len(turn)) for place, turn in zip(taken, turns, strict=True)]
        )
        lost = cut.clone()
        lost[self.candidates[over[taken]]] = -error[taken]
        return loss, _Choice(amax, neurons, torch.cat(turns), places[:spares], lost)

    def _spares(self, over: Tensor, images: int) -> tuple[Tensor, Tensor]:
        """What the first, the first two, … spares cost together, and which they are."""
        alone = self.alone.clone()
        alone[self.candidates[over]] = torch.inf
        places = alone.argsort()[: int(_MOST_SPARES * len(alone))]
        places = places[: int(alone[places].isfinite().sum())]
        return alone[places].cumsum(0) / (2 * images), places

    def changed(self, choice: _Choice) -> dict[str, Tensor]:
        fc1, fc2 = (cast(nn.Linear, getattr(self.mlp, name)) for name in ("fc1", "fc2"))
        rows, columns, bias = (t.detach().clone() for t in (fc1.weight, fc2.weight, fc1.bias))
        lost = choice.lost.clone()
        lost[choice.spares] = self.mean[choice.spares]
        bias2 = fc2.bias.detach().double() + fc2.weight.detach().double() @ lost.double()
        rows[choice.spares] = fc1.weight.detach()[choice.neurons]
        bias[choice.spares] = fc1.bias.detach()[choice.neurons] - choice.turns * choice.amax
        columns[:, choice.spares] = fc2.weight.detach()[:, choice.neurons]
        name = f"blocks.{self.index}.mlp."
        return {
            name + "fc1.weight": rows,
            name + "fc1.bias": bias,
            name + "fc2.weight": columns,
            name + "fc2.bias": bias2.to(fc2.bias.dtype),
        }


class _Shown:
    """Hands tensors of a backward pass to the blocks they are of: fc2's input, then fc1's output."""

    def __init__(self, blocks: Mapping[str, _Block]) -> None:
        self._read = blocks
        self._written = {site_key(block.index, _WRITTEN): key for key, block in blocks.items()}
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def take(self, key: str, x: Tensor, g: Tensor) -> None:
        if key in self._read:
            self._kept[key] = x, g
        elif key in self._written:
            block = self._read[self._written[key]]
            z = x + cast(nn.Linear, block.mlp.fc1).bias.detach()
            block.add(*self._kept.pop(self._written[key]), z)


def _ranges(model: nn.Module, images: Tensor) -> dict[str, _Block]:
    """{site of fc2's input: its block, with the range and the mean of every neuron}."""
    found: dict[str, _Block] = {}
    blocks = {site_key(index, _READ): (index, block.mlp) for index, block in enumerate(quant_blocks(model))}

    def look(key: str, x: Tensor) -> None:
        if key not in blocks:
            return
        index, mlp = blocks[key]
        largest, total = x.amax(dim=(0, 1)), x.mean(dim=1).sum(dim=0) / len(images)
        if key in found:
            largest, total = torch.maximum(largest, found[key].largest), total + found[key].mean
        found[key] = _Block(index, mlp, largest, total)

    observers = {key: partial(look, key) for key in tensor_keys(model)}
    with torch.inference_mode(), observing(model, observers):
        for part in images.split(_AT_ONCE):
            model(part)
    return found
