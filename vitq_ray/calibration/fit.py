"""The correction `fit`: what attention and the MLP's activation hand on is fitted to what it was in float.

    float model, plan ──► float forward and backward pass ──► sums of every image ──► least squares ──► changed weights

Of a head let a be the probabilities, â as the plan quantizes them, and m = 1 - Σâ the mass that rounding lost in a
row. The error a·v - â·v is fitted by γ·(â·v) + m·c + o, tokens weighted by |g|, g the gradient there (weights g² would
follow the few images with large gradients). The gain 1 + γ goes into the head's columns of the output projection, the
centre c out of v and into the projection's bias, as does the offset o: all of it is plain weights afterwards. Which of
the three terms a head gets, and how much ridge, is decided by images that were left out of the fit: few images would be
fitted by chance, and a head's centre and offset are hard to tell apart.

With a fit another scale of the probabilities serves than without one: a smaller one has finer levels, and what it cuts
off can be made up for. So all of it is done at several scales, and a block takes that which leaves the least error.

Of the input of fc2 the mean error of every channel goes into fc2's bias: values of GELU just below zero are many, and
are rounded to one side. Nagel et al. (arXiv 1906.04721) correct biases like this.

Legend: B images, N tokens, H heads, D head width, P = 1 + 2·D unknowns of a head: gain, centre, offset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from vitq_ray.calibration.sensitivity import gradient_pass
from vitq_ray.quant.fake_quant import fake_quantize
from vitq_ray.quant.plan import Plan, SitePlan
from vitq_ray.quant.sites import ATTENTION_PROBABILITIES, FC2_INPUT, site_key
from vitq_ray.quant.vit import quant_blocks

_FOLDS = 6  # groups of images, each left out once
_RIDGES = (0.01, 0.1, 1.0)  # relative to the diagonal
_GAINS = (-0.5, 1.0)  # least and largest γ
_FACTORS = (1.0, 0.8, 0.64, 0.5, 0.4, 1.25, 1.6)  # of the probabilities' amax

Sums = dict[str, Tensor]  # {name: (B, H, 1 or D)}


@dataclass(frozen=True)
class Fit:
    """What a fit changes.

    Attributes:
        moved: {timm name: bias}, v's and the projection's, for the centres alone, which leave the float function as it
            is; empty where no head is served by one.
        changes: {timm name: weight or bias}: all of it, the centres included.
        factors: {full name of a site: what its amax is to be multiplied with} of probabilities that are on.
    """

    moved: dict[str, Tensor]
    changes: dict[str, Tensor]
    factors: dict[str, float]


def fitted(
    model: nn.Module,
    plan: Plan,
    images: Tensor,
    move_v: bool,
    asked: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Fit:
    """The fit of a plan.

    Args:
        model: the float model with the plan's weights; it stays as it is.
        images: as it takes them, (B, 3, S, S).
        move_v: centres are allowed; scales of v, and of what is behind it, are to be chosen again.
        asked: {site of probabilities whose scale may be changed: what a rule has multiplied it with already}; what
            serves is found without that, so that the rule has its effect.
        seed: of the gradients' random signs.
    """
    asked = asked if asked and len(images) > 1 else {}  # one image cannot be left out
    seen = _Seen(model, plan, asked)
    gradient_pass(model, images, seen.take, seed)
    moved: dict[str, Tensor] = {}
    factors: dict[str, float] = {}
    changes: dict[str, Tensor] = {}
    for index, block in enumerate(quant_blocks(model)):
        qkv, out, fc2 = block.attn.qkv, block.attn.proj, cast(nn.Linear, block.mlp.fc2)
        name = f"blocks.{index}."
        if index in seen.heads:
            key = site_key(index, ATTENTION_PROBABILITIES)
            by_rule = asked.get(key, 1.0)
            tried = {
                factor: _of_heads(_joined(parts), move_v and qkv.bias is not None)
                for factor, parts in seen.heads[index].items()
            }
            factors[key] = min(_factors(key, asked), key=lambda f: tried[f / by_rule].left)
            gain, centre, offset, _ = tried[factors[key]]
            weight, bias = out.weight.detach().double(), out.bias.detach().double()
            if bool(centre.any()):
                from_v, shifted = (centre / gain).flatten(), qkv.bias.detach().double().clone()
                shifted[-len(from_v) :] -= from_v
                moved[name + "attn.qkv.bias"] = shifted.to(qkv.bias.dtype)
                moved[name + "attn.proj.bias"] = (bias + weight @ from_v).to(out.bias.dtype)
            scaled = weight * gain.repeat_interleave(centre.shape[1])
            changes[name + "attn.proj.weight"] = scaled.to(out.weight.dtype)
            changes[name + "attn.proj.bias"] = (bias + weight @ (centre + offset).flatten()).to(out.bias.dtype)
        if index in seen.means:
            mean = torch.cat(seen.means[index]).mean(dim=0)
            bias = fc2.bias.detach().double() + fc2.weight.detach().double() @ mean
            changes[name + "mlp.fc2.bias"] = bias.to(fc2.bias.dtype)
    return Fit(moved, {**moved, **changes}, factors)


class _Seen:
    """Sums over the tokens of every image.

    Attributes:
        heads: {block: {factor: sums of its attention}}, a part for each pass.
        means: {block: mean error of every channel of fc2's input, (B, C)}.
    """

    def __init__(self, model: nn.Module, plan: Plan, asked: Mapping[str, float]) -> None:
        self.heads: dict[int, dict[float, list[Sums]]] = {}
        self._asked = asked
        self.means: dict[int, list[Tensor]] = {}
        self._plan, self._kept = plan, dict[str, Tensor]()
        self._heads = [block.attn.num_heads for block in quant_blocks(model)]
        names = {"out": "attn.out._input_quantizer", "v": "attn.matmul_v_input_quantizer", "a": ATTENTION_PROBABILITIES}
        names["fc2"] = FC2_INPUT
        self._names = {
            site_key(index, name): (index, short) for index in range(len(self._heads)) for short, name in names.items()
        }

    def take(self, key: str, x: Tensor, g: Tensor) -> None:
        """As `gradient_pass` shows them: of a block fc2, out, then v and a in any order."""
        if key not in self._names:
            return
        index, name = self._names[key]
        if name == "fc2":
            if self._plan.sites[key].rule.on:
                self.means.setdefault(index, []).append(_error(x, self._plan.sites[key]).mean(dim=1).double())
        elif name == "out":
            self._kept["weight"] = g.unflatten(2, (self._heads[index], -1)).transpose(1, 2).norm(dim=3, keepdim=True)
        else:
            self._kept[name] = x
            if {"v", "a"} <= self._kept.keys():
                weight, a, v = (self._kept.pop(each) for each in ("weight", "a", "v"))
                own = site_key(index, ATTENTION_PROBABILITIES)
                site, by_rule = self._plan.sites[own], self._asked.get(own, 1.0)
                at = {scale: None for factor in _factors(own, self._asked) for scale in (factor, factor / by_rule)}
                for factor in at if site.rule.on else ():
                    lost = _error(a, replace(site, amax=site.amax * factor))
                    self.heads.setdefault(index, {}).setdefault(factor, []).append(_sums(weight, a, v, lost))


def _factors(key: str, asked: Mapping[str, float]) -> Sequence[float]:
    return _FACTORS if key in asked else (1.0,)


def _error(x: Tensor, site: SitePlan) -> Tensor:
    """What quantization takes from a tensor."""
    rule = site.rule
    return x - fake_quantize(x, site.amax.to(x.device), levels=rule.levels)


def _sums(weight: Tensor, a: Tensor, v: Tensor, lost: Tensor) -> Sums:
    """Of (B, H, N, 1), (B, H, N, N), (B, H, N, D) and the error of a."""
    error, mass = lost @ v, 1 - (a - lost).sum(dim=3, keepdim=True)
    found = a @ v - error
    terms = {
        "gg": (found * found).sum(dim=3, keepdim=True),
        "gc": mass * found,
        "go": found,
        "cc": mass * mass,
        "co": mass,
        "oo": torch.ones_like(mass),
        "g": (error * found).sum(dim=3, keepdim=True),
        "c": mass * error,
        "o": error,
        "ee": (error * error).sum(dim=3, keepdim=True),
    }
    return {name: (weight * term).sum(dim=2).double() for name, term in terms.items()}


def _joined(parts: list[Sums]) -> Sums:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class _OfHeads(NamedTuple):
    """Gain (H, 1), centre (H, D) and offset (H, D) of every head; the error that is left of images left out."""

    gain: Tensor
    centre: Tensor
    offset: Tensor
    left: float


def _of_heads(sums: Sums, move_v: bool) -> _OfHeads:
    width = sums["o"].shape[2]
    found, won = _fit(*_normal_equations({name: _folded(column) for name, column in sums.items()}), move_v)
    left = float(sums["ee"].sum() + won.sum())
    return _OfHeads(1 + found[:, :1], found[:, 1 : 1 + width], found[:, 1 + width :], left)


def _folded(column: Tensor) -> Tensor:
    """Summed over groups of images: (B, …) -> (folds, …)."""
    folds = min(_FOLDS, len(column))
    return torch.stack([column[fold::folds].sum(dim=0) for fold in range(folds)])


def _normal_equations(sums: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Their matrix (folds, H, P, P) and right side (folds, H, P)."""
    folds, heads, width = sums["o"].shape
    size = 1 + 2 * width
    matrix = sums["o"].new_zeros(folds, heads, size, size)
    places = {"g": slice(0, 1), "c": slice(1, 1 + width), "o": slice(1 + width, size)}
    one = torch.eye(width).to(matrix)
    for pair in ("cc", "co", "oo"):
        block = sums[pair][..., None] * one
        matrix[..., places[pair[0]], places[pair[1]]] = block
        matrix[..., places[pair[1]], places[pair[0]]] = block
    for name in "co":
        matrix[..., 0, places[name]] = matrix[..., places[name], 0] = sums[f"g{name}"]
    matrix[..., 0, 0] = sums["gg"][..., 0]
    return matrix, torch.cat([sums[name] for name in "gco"], dim=2)


def _fit(matrix: Tensor, right: Tensor, move_v: bool) -> tuple[Tensor, Tensor]:
    """What serves images best that were left out, (H, P), and by how much their error changes, (H,), at most 0; zeros
    for a head that nothing serves, and for one image.

    Of (folds, H, P, P) and (folds, H, P).
    """
    folds, heads, size = right.shape
    best, result = right.new_zeros(heads), right.new_zeros(heads, size)
    if folds < 2:
        return result, best
    whole, wanted = matrix.sum(dim=0), right.sum(dim=0)
    gain, offset = [0], list(range(1 + size // 2, size))
    for terms in (gain, gain + offset, *([list(range(size))] if move_v else [])):
        own = torch.tensor(terms, device=right.device)
        part, aim = matrix[..., own[:, None], own], right[..., own]
        all_of_it, all_wanted = whole[:, own[:, None], own], wanted[:, own]
        for ridge in _RIDGES:
            tried = _solved(all_of_it - part, all_wanted - aim, ridge)  # (folds, H, terms)
            left = ((tried[..., None, :] @ part)[..., 0, :] * tried - 2 * aim * tried).sum(dim=(0, 2))
            better = left < best
            final = result.new_zeros(heads, size)
            final[:, own] = _solved(all_of_it, all_wanted, ridge)
            result = torch.where(better[:, None], final, result)
            best = torch.where(better, left, best)
    return result, best


def _solved(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(M + ridge · its diagonal)⁻¹ · r, γ within its limits; zero for what says nothing, as centres of no mass."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    least = 1e-12 * diagonal.amax(dim=-1, keepdim=True) + 1e-30
    found = cast(Tensor, torch.linalg.solve(matrix + torch.diag_embed(ridge * diagonal + least), right))
    found[..., 0].clamp_(*_GAINS)
    return found
