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
Where many keys share a row, most round to nothing: their probabilities are about half a step. So all of it is done with
the scores of a head as they are, and multiplied with a sharpness below 1: it lifts small probabilities over the half
step, and takes from large ones, which gain and centre give back. A head's sharpness goes into its rows of q.

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
_FACTORS = (1.0, 0.8, 0.64, 0.5, 1.25, 1.6)  # of the probabilities' amax
_SHARPNESS = (1.0, 0.95, 0.9)

_NAMES = {  # tensors that are seen
    "fc2": FC2_INPUT,
    "out": "attn.out._input_quantizer",
    "v": "attn.matmul_v_input_quantizer",
    "a": ATTENTION_PROBABILITIES,
    "scores": "attn.softmax_input_quantizer",
}

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
    several = len(images) > 1  # one cannot be left out
    asked = asked if asked and several else {}
    seen = _Seen(model, plan, asked, several)
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
                factor: _of_heads(parts, move_v and qkv.bias is not None) for factor, parts in seen.heads[index].items()
            }
            factors[key] = min(_factors(key, asked), key=lambda f: float(tried[f / by_rule].left.sum()))
            gain, centre, offset, sharpness, _ = tried[factors[key]]
            weight, bias = out.weight.detach().double(), out.bias.detach().double()
            if bool(centre.any()):
                from_v, shifted = (centre / gain).flatten(), qkv.bias.detach().double().clone()
                shifted[-len(from_v) :] -= from_v
                moved[name + "attn.qkv.bias"] = shifted.to(qkv.bias.dtype)
                moved[name + "attn.proj.bias"] = (bias + weight @ from_v).to(out.bias.dtype)
            if bool((sharpness != 1).any()):
                of_qkv = {"weight": qkv.weight, **({} if qkv.bias is None else {"bias": qkv.bias})}
                for part, own in of_qkv.items():
                    layer = f"{name}attn.qkv.{part}"
                    changes[layer] = _sharpened(moved.get(layer, own.detach()), sharpness)
            scaled = weight * gain.repeat_interleave(centre.shape[1])
            changes[name + "attn.proj.weight"] = scaled.to(out.weight.dtype)
            changes[name + "attn.proj.bias"] = (bias + weight @ (centre + offset).flatten()).to(out.bias.dtype)
        if index in seen.means:
            mean = torch.cat(seen.means[index]).mean(dim=0)
            bias = fc2.bias.detach().double() + fc2.weight.detach().double() @ mean
            changes[name + "mlp.fc2.bias"] = bias.to(fc2.bias.dtype)
    return Fit(moved, {**moved, **changes}, factors)


def _sharpened(qkv: Tensor, sharpness: Tensor) -> Tensor:
    """Weight or bias (3·H·D, …) of q, k and v with the rows of q multiplied by what each of the H heads takes."""
    changed = qkv.clone()
    q = changed[: len(qkv) // 3].unflatten(0, (len(sharpness), -1))
    q *= sharpness.to(q).reshape(-1, *[1] * (q.ndim - 1))
    return changed


class _Seen:
    """Sums over the tokens of every image.

    Attributes:
        heads: {block: {factor: {sharpness: sums of its attention}}}, a part for each pass.
        means: {block: mean error of every channel of fc2's input, (B, C)}.
    """

    def __init__(self, model: nn.Module, plan: Plan, asked: Mapping[str, float], sharpen: bool) -> None:
        self.heads: dict[int, dict[float, dict[float, list[Sums]]]] = {}
        self._asked, self._sharpen = asked, sharpen
        self.means: dict[int, list[Tensor]] = {}
        self._plan, self._kept = plan, dict[str, Tensor]()
        self._attention = [block.attn for block in quant_blocks(model)]
        self._names = {
            site_key(index, name): (index, short)
            for index in range(len(self._attention))
            for short, name in _NAMES.items()
        }

    def take(self, key: str, x: Tensor, g: Tensor) -> None:
        """As `gradient_pass` shows them: of a block fc2, out, then v, a and scores in any order."""
        if key not in self._names:
            return
        index, name = self._names[key]
        if name == "fc2":
            if self._plan.sites[key].rule.on:
                self.means.setdefault(index, []).append((x - _quantized(x, self._plan.sites[key])).mean(dim=1).double())
        elif name == "out":
            heads = self._attention[index].num_heads
            self._kept["weight"] = g.unflatten(2, (heads, -1)).transpose(1, 2).norm(dim=3, keepdim=True)
        else:
            self._kept[name] = x
            if {"v", "a", "scores"} <= self._kept.keys():
                self._take_attention(index, *(self._kept.pop(each) for each in ("weight", "a", "v", "scores")))

    def _take_attention(self, index: int, weight: Tensor, a: Tensor, v: Tensor, scores: Tensor) -> None:
        """Of (B, H, N, 1), (B, H, N, N), (B, H, N, D) and (B, H, N, N), not yet divided by √D."""
        key, attention = site_key(index, ATTENTION_PROBABILITIES), self._attention[index]
        site, by_rule = self._plan.sites[key], self._asked.get(key, 1.0)
        if not site.rule.on:
            return
        factors = dict.fromkeys(scale for factor in _factors(key, self._asked) for scale in (factor, factor / by_rule))
        wanted, found = a @ v, self.heads.setdefault(index, {})
        can = self._sharpen and isinstance(attention.q_norm, nn.Identity)  # a norm would take the factor away again
        for sharpness in _SHARPNESS if can else (1.0,):
            given = a if sharpness == 1 else (scores * (sharpness * attention.scale)).softmax(dim=-1)
            for factor in factors:
                quantized = _quantized(given, replace(site, amax=site.amax * factor))
                parts = found.setdefault(factor, {}).setdefault(sharpness, [])
                parts.append(_sums(weight, wanted, quantized @ v, 1 - quantized.sum(dim=3, keepdim=True)))


def _factors(key: str, asked: Mapping[str, float]) -> Sequence[float]:
    return _FACTORS if key in asked else (1.0,)


def _quantized(x: Tensor, site: SitePlan) -> Tensor:
    return fake_quantize(x, site.amax.to(x.device), levels=site.rule.levels)


def _sums(weight: Tensor, wanted: Tensor, found: Tensor, mass: Tensor) -> Sums:
    """Of (B, H, N, 1), a·v and â·v (B, H, N, D), and the mass that is lost (B, H, N, 1)."""
    error = wanted - found
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
    """Gain (H, 1), centre (H, D), offset (H, D) and sharpness (H,) of every head; the error that is left of images left
    out (H,)."""

    gain: Tensor
    centre: Tensor
    offset: Tensor
    sharpness: Tensor
    left: Tensor


def _of_heads(parts: Mapping[float, list[Sums]], move_v: bool) -> _OfHeads:
    best: _OfHeads | None = None
    for sharpness, sums in ((sharpness, _joined(each)) for sharpness, each in parts.items()):
        width = sums["o"].shape[2]
        found, won = _fit(*_normal_equations({name: _folded(column) for name, column in sums.items()}), move_v)
        left = sums["ee"].sum(dim=(0, 2)) + won
        gain, centre, offset = found.split((1, width, width), dim=1)
        own = _OfHeads(1 + gain, centre, offset, torch.full_like(left, sharpness), left)
        best = own if best is None else _better(own, best)
    assert best is not None
    return best


def _better(one: _OfHeads, other: _OfHeads) -> _OfHeads:
    """Of every head that which leaves less."""
    serves = one.left < other.left
    gain, centre, offset = (torch.where(serves[:, None], a, b) for a, b in zip(one[:3], other[:3], strict=True))
    sharpness, left = (torch.where(serves, a, b) for a, b in zip(one[3:], other[3:], strict=True))
    return _OfHeads(gain, centre, offset, sharpness, left)


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
