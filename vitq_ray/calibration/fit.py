"""The correction `fit`: what attention and the MLP's activation hand on is fitted to what it was in float.

    float model, plan ──► float forward and backward pass ──► sums of every image ──► least squares ──► changed weights

Of a head let a be the probabilities, â as the plan quantizes them, and m = 1 - Σâ the mass that rounding lost in a
row. The error a·v - â·v is fitted by γ·(â·v) + m·c + o, tokens weighted by |g|, g the gradient there (weights g² would
follow the few images with large gradients). The gain 1 + γ goes into the head's columns of the output projection, the
centre c out of v and into the projection's bias, as does the offset o: all of it is plain weights afterwards. Which of
the three terms a head gets, and how much ridge, is decided by images that were left out of the fit: few images would be
fitted by chance, and a head's centre and offset are hard to tell apart.

Of the input of fc2 the mean error of every channel goes into fc2's bias: values of GELU just below zero are many, and
are rounded to one side. Nagel et al. (arXiv 1906.04721) correct biases like this.

Legend: B images, N tokens, H heads, D head width, P = 1 + 2·D unknowns of a head: gain, centre, offset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vitq_ray.calibration.sensitivity import gradient_pass
from vitq_ray.quant.fake_quant import fake_quantize
from vitq_ray.quant.plan import Plan, SitePlan
from vitq_ray.quant.sites import site_key
from vitq_ray.quant.vit import quant_blocks

_FOLDS = 6  # groups of images, each left out once
_RIDGES = (0.01, 0.1, 1.0)  # relative to the diagonal
_GAINS = (-0.5, 1.0)  # least and largest γ

Sums = dict[str, Tensor]  # {name: (B, H, 1 or D)}


@dataclass(frozen=True)
class Fit:
    """What a fit changes, {timm name: weight or bias} each.

    Attributes:
        moved: v's bias and the projection's for the centres alone, which leave the float function as it is; empty where
            no head is served by one.
        changes: all of it, the centres included.
    """

    moved: dict[str, Tensor]
    changes: dict[str, Tensor]


def fitted(model: nn.Module, plan: Plan, images: Tensor, move_v: bool, seed: int = 0) -> Fit:
    """The fit of a plan.

    Args:
        model: the float model with the plan's weights; it stays as it is.
        images: as it takes them, (B, 3, S, S).
        move_v: centres are allowed; scales of v, and of what is behind it, are to be chosen again.
        seed: of the gradients' random signs.
    """
    seen = _Seen(model, plan)
    gradient_pass(model, images, seen.take, seed)
    moved: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for index, block in enumerate(quant_blocks(model)):
        qkv, out, fc2 = block.attn.qkv, block.attn.proj, cast(nn.Linear, block.mlp.fc2)
        name = f"blocks.{index}."
        if index in seen.heads:
            gain, centre, offset = _of_heads(_joined(seen.heads[index]), move_v and qkv.bias is not None)
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
    return Fit(moved, {**moved, **changes})


class _Seen:
    """Sums over the tokens of every image.

    Attributes:
        heads: {block: sums of its attention}, a part for each pass.
        means: {block: mean error of every channel of fc2's input, (B, C)}.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.heads: dict[int, list[Sums]] = {}
        self.means: dict[int, list[Tensor]] = {}
        self._plan, self._kept = plan, dict[str, Tensor]()
        self._heads = [block.attn.num_heads for block in quant_blocks(model)]
        names = {"out": "attn.out._input", "v": "attn.matmul_v_input", "a": "attn.matmul_a_input"}
        names["fc2"] = "ffn.fc2._input"
        self._names = {
            site_key(index, f"{name}_quantizer"): (index, short)
            for index in range(len(self._heads))
            for short, name in names.items()
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
                site = self._plan.sites[site_key(index, "attn.matmul_a_input_quantizer")]
                if site.rule.on:
                    self.heads.setdefault(index, []).append(_sums(weight, a, v, _error(a, site)))


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
    }
    return {name: (weight * term).sum(dim=2).double() for name, term in terms.items()}


def _joined(parts: list[Sums]) -> Sums:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _of_heads(sums: Sums, move_v: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(gain (H, 1), centre (H, D), offset (H, D)) of every head."""
    width = sums["o"].shape[2]
    found = _fit(*_normal_equations({name: _folded(column) for name, column in sums.items()}), move_v)
    return 1 + found[:, :1], found[:, 1 : 1 + width], found[:, 1 + width :]


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


def _fit(matrix: Tensor, right: Tensor, move_v: bool) -> Tensor:
    """What serves images best that were left out, (H, P); zeros for a head that nothing serves, and for one image.

    Of (folds, H, P, P) and (folds, H, P).
    """
    folds, heads, size = right.shape
    best, result = right.new_zeros(heads), right.new_zeros(heads, size)
    if folds < 2:
        return result
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
    return result


def _solved(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(M + ridge · its diagonal)⁻¹ · r, γ within its limits; zero for what says nothing, as centres of no mass."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    least = 1e-12 * diagonal.amax(dim=-1, keepdim=True) + 1e-30
    found = cast(Tensor, torch.linalg.solve(matrix + torch.diag_embed(ridge * diagonal + least), right))
    found[..., 0].clamp_(*_GAINS)
    return found
