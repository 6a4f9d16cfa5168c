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
_GAINS = (0.5, 2.0)  # least and largest

Sums = dict[str, Tensor]  # {name: (B, H, 1 or D)}


def fitted(model: nn.Module, plan: Plan, images: Tensor, centre: bool) -> dict[str, Tensor]:
    """{timm name: weight or bias} that the fit changes.

    Args:
        model: the float model with the plan's weights; it stays as it is.
        images: as it takes them, (B, 3, S, S).
        centre: v may be moved, after which its scales are to be chosen again.
    """
    seen = _Seen(model, plan)
    gradient_pass(model, images, seen.take)
    changed: dict[str, Tensor] = {}
    for index, block in enumerate(quant_blocks(model)):
        out, fc2 = block.attn.proj, cast(nn.Linear, block.mlp.fc2)
        if index in seen.heads:
            gain, middle, offset = _of_heads(_joined(seen.heads[index]), centre)  # (H, 1), (H, D), (H, D)
            weight = out.weight.detach().double()
            bias = out.bias.detach().double() + weight @ (middle + offset).flatten()
            _set(changed, f"blocks.{index}.attn.proj.bias", out.bias, bias)
            scaled = weight * gain.repeat_interleave(middle.shape[1])
            _set(changed, f"blocks.{index}.attn.proj.weight", out.weight, scaled)
            if centre:
                bias = block.attn.qkv.bias.detach().double().clone()
                bias[-middle.numel() :] -= (middle / gain).flatten()
                _set(changed, f"blocks.{index}.attn.qkv.bias", block.attn.qkv.bias, bias)
        if index in seen.means:
            mean = torch.cat(seen.means[index]).mean(dim=0)
            bias = fc2.bias.detach().double() + fc2.weight.detach().double() @ mean
            _set(changed, f"blocks.{index}.mlp.fc2.bias", fc2.bias, bias)
    return changed


def _set(changed: dict[str, Tensor], name: str, before: Tensor, value: Tensor) -> None:
    changed[name] = value.to(before.dtype)


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
        index, name = self._names.get(key, (0, ""))
        if name == "fc2" and self._plan.sites[key].rule.on:
            self.means.setdefault(index, []).append(_error(x, self._plan.sites[key]).mean(dim=1).double())
        elif name == "out":
            self._kept["g"] = g.unflatten(2, (self._heads[index], -1)).transpose(1, 2).norm(dim=3, keepdim=True)
        elif name in ("v", "a"):
            self._kept[name] = x
            if {"v", "a"} <= self._kept.keys():
                weight, a, v = (self._kept.pop(name) for name in "gav")
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


def _of_heads(sums: Sums, centre: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(gain (H, 1), centre (H, D), offset (H, D)) of every head."""
    width = sums["o"].shape[2]
    matrix, right = _folded(*_normal_equations(sums))
    found = _fit(matrix, right, centre)
    gain = (1 + found[:, :1]).clamp(*_GAINS)
    return gain, found[:, 1 : 1 + width], found[:, 1 + width :]


def _normal_equations(sums: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Their matrix (B, H, P, P) and right side (B, H, P)."""
    images, heads, width = sums["o"].shape
    size = 1 + 2 * width
    matrix = sums["o"].new_zeros(images, heads, size, size)
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


def _folded(*columns: Tensor) -> list[Tensor]:
    """Summed over groups of images: (B, …) -> (folds, …)."""
    folds = min(_FOLDS, len(columns[0]))
    return [torch.stack([column[fold::folds].sum(dim=0) for fold in range(folds)]) for column in columns]


def _fit(matrix: Tensor, right: Tensor, centre: bool) -> Tensor:
    """What serves images best that were left out, (H, P); zeros for a head that nothing serves, and for one image.

    Of (folds, H, P, P) and (folds, H, P).
    """
    folds, heads, size = right.shape
    width = size // 2
    best, result = right.new_zeros(heads), right.new_zeros(heads, size)
    if folds < 2:
        return result
    whole, wanted = matrix.sum(dim=0), right.sum(dim=0)
    gain, offset = [0], list(range(1 + width, size))
    for terms in (gain, gain + offset, *([list(range(size))] if centre else [])):
        own = torch.tensor(terms)
        part, aim = matrix[..., own[:, None], own], right[..., own]
        for ridge in _RIDGES:
            tried = _solved(whole[:, own[:, None], own] - part, wanted[:, own] - aim, ridge)  # (folds, H, terms)
            left = ((tried[..., None, :] @ part)[..., 0, :] * tried - 2 * aim * tried).sum(dim=(0, 2))
            better = left < best
            final = result.new_zeros(heads, size)
            final[:, own] = _solved(whole[:, own[:, None], own], wanted[:, own], ridge)
            result = torch.where(better[:, None], final, result)
            best = torch.where(better, left, best)
    return result


def _solved(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(M + ridge · its diagonal)⁻¹ · r; what says nothing, as centres where no mass is lost, comes to zero."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    least = 1e-12 * diagonal.amax(dim=-1, keepdim=True) + 1e-30
    return cast(Tensor, torch.linalg.solve(matrix + torch.diag_embed(ridge * diagonal + least), right))
