"""The correction `learn`: scales of activations, biases and norms follow the gradient of the KL to the float model.

    float model ──► its probabilities for the calibration images ─┐
    plan ──► quantized model ──► KL ──► gradients ──► Adam ───────┴──► scales, biases, norms that lose less

No labels are used, and no weight of a matrix product changes: they keep the levels that `round` may have chosen. What
closed forms cannot see, errors that add up over tokens and sites, the gradient does. Gradients pass a quantizer
straight through (Bengio et al., arXiv 1308.3432), those of scales are LSQ's (Esser et al., arXiv 1902.08153).

The KL that gradients are of is that at twice the temperature (Hinton et al., arXiv 1503.02531), which says more of the
classes that the float model takes for unlikely. On a ViT-S/14 KL came to the same, and top-1 lost less of what float's
probabilities promise (`docs/accuracy.md`).

Every eighth image is left out, of few images more often. Behind every pass over the others, those left out say what the
model loses, by KL as it is; the best state stays, the one from before if nothing gained: a few images are easily
learned by heart. Work is bounded: a ViT-S/14 learns from the first 120 images, a ViT-B/16 from 35. Two passes over 24
images are the least, however large the model.

What learns is in the blocks: their biases and norms, not LayerScale, the last norm or the head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.calibration.corrections import FEWEST_TO_LEARN
from vitq_ray.calibration.sensitivity import tokens_of
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import apply_plan, frozen_weights, learn_amax, scales_of, site_weights

_MOST_BYTES = 2**30  # of images
_LEFT_OUT = 8  # every so many images; and of few images so many at least
_TOKENS = 1100  # in one forward and backward pass: four images of a ViT-S/14
_BATCH = (8, 16)  # images between steps, at least and at most
_BATCHES = 28  # per pass, within these limits
_WORK = 1.3e12  # multiplications of weights in forward passes over images learned from: 240 of a ViT-S/14
_PASSES = (2, 10)  # least, of as many images as that allows, and most
_STEPS = 900  # about, where two passes have fewer: of more images, fewer passes generalize better
_TEMPERATURE = 2  # of the KL that gradients are of: what the float model takes for unlikely counts more
_RATE = 1.3e-3  # of biases and norms, over the largest level of a signed grid with an activation's bits
_RATE_OF_SCALES = 0.0225  # relative to a scale, over the root of that
_FLOOR = 0.1  # of a scale as it was, below which it does not go


@dataclass(frozen=True)
class Learned:
    """What was learned.

    Attributes:
        changes: {timm name: bias, or weight of a norm}; empty where nothing gained.
        amax: {full name of a site: its new scale}.
        before, after: mean KL of the images left out, in nats; they have chosen the state, so `after` flatters.
    """

    changes: dict[str, Tensor]
    amax: dict[str, Tensor]
    before: float
    after: float

    def of(self, plan: Plan) -> Plan:
        """The plan with it."""
        sites = {key: replace(site, amax=self.amax.get(key, site.amax)) for key, site in plan.sites.items()}
        return Plan(plan.mode, sites, {**plan.weights, **self.changes})


def learned(model: nn.Module, plan: Plan, images: Tensor, seed: int = 0) -> Learned:
    """What gradient descent gains beyond a plan.

    Args:
        model: the float model, before any plan; it stays as it is.
        images: as it takes them, (B, 3, S, S).
        seed: of the order of the images.

    Raises:
        InputError: for fewer images than `FEWEST_TO_LEARN`.
    """
    if len(images) < FEWEST_TO_LEARN:
        raise InputError(f"correction learn: {len(images)} calibration images; expected at least {FEWEST_TO_LEARN}")
    images, passes = _bounded(model, images)
    at_once = max(1, _TOKENS // tokens_of(model))
    logits = _logits(model, images, at_once)
    wanted, warm = logits.softmax(dim=1), (logits / _TEMPERATURE).softmax(dim=1)
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    apply_plan(twin, plan)
    state = _State(twin, plan)
    own, held = _parted(len(images))
    size = _batch(len(own))
    optimizer = torch.optim.Adam(state.groups(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, passes * -(-len(own) // size))
    order = torch.Generator().manual_seed(seed)
    with frozen_weights(twin):
        before = least = _kl(twin, images, wanted, held, at_once)
        best = state.now()
        for _ in range(passes):
            for batch in own[torch.randperm(len(own), generator=order)].split(size):
                optimizer.zero_grad()
                for part in batch.split(at_once):
                    with torch.enable_grad():
                        loss = _loss(twin(images[part]) / _TEMPERATURE, warm[part]).sum() / len(batch)
                    loss.backward()
                optimizer.step()
                schedule.step()
                state.limit()
            left = _kl(twin, images, wanted, held, at_once)
            if left < least:
                least, best = left, state.now()
    changes, amax = best if least < before else ({}, {})
    return Learned(changes, amax, before, least)


class _State:
    """What a quantized model may learn: biases, norms, and scales of activations that are on."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._model = model
        self._names = [name for name, _ in model.named_parameters() if name.startswith("blocks.") and _may_learn(name)]
        weights = set(site_weights(model))
        self._keys = [key for key, site in plan.sites.items() if site.rule.on and key not in weights]
        self._levels = {key: 2 ** (plan.sites[key].rule.bits - 1) - 1 for key in self._keys}
        learn_amax(model, plan)
        parameters = dict(model.named_parameters())
        self._tensors = [parameters[name].requires_grad_(True) for name in self._names]
        scales = scales_of(model)
        mine = {id(scales[key]): key for key in self._keys if isinstance(scales[key], nn.Parameter)}
        self._leaders = list(mine.values())  # one site for each scale
        self._scales = [scales[key] for key in self._leaders]
        self._floors = [_FLOOR * scale.detach() for scale in self._scales]

    def groups(self) -> Sequence[dict[str, object]]:
        """Parameters and learning rates, as an optimizer takes them."""
        of_scales = [
            {"params": [scale], "lr": _RATE_OF_SCALES / self._levels[key] ** 0.5 * float(scale.detach())}
            for key, scale in zip(self._leaders, self._scales, strict=True)
        ]
        levels = median(self._levels.values()) if self._levels else 127
        return [{"params": self._tensors, "lr": _RATE / levels}, *of_scales]

    def limit(self) -> None:
        """Scales stay above their floors."""
        with torch.no_grad():
            for scale, floor in zip(self._scales, self._floors, strict=True):
                scale.clamp_(min=floor)

    def now(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of what has been learned: {timm name: tensor}, {site: amax}."""
        scales = scales_of(self._model)
        changes = {n: t.detach().clone() for n, t in zip(self._names, self._tensors, strict=True)}
        return changes, {key: scales[key].detach().cpu().clone() for key in self._keys}


def _may_learn(name: str) -> bool:
    return name.endswith(".bias") or "norm" in name.split(".")[-2]


def most_images(model: Any) -> int:
    """How many images it learns from at most, with those left out: as memory and `_WORK` allow."""
    size = model.patch_embed.img_size
    by_work = round(_shown(model) / _PASSES[0])
    return max(FEWEST_TO_LEARN, min(by_work, int(_MOST_BYTES // (12 * size[0] * size[1]))))


def _bounded(model: Any, images: Tensor) -> tuple[Tensor, int]:
    """Images that are learned from, with those left out, and passes over them."""
    images, (low, high) = images[: most_images(model)], _PASSES
    own = len(_parted(len(images))[0])
    passes = min(_shown(model) / len(images), _STEPS * _batch(own) / own)
    return images, min(high, max(low, round(passes)))


def _parted(count: int) -> tuple[Tensor, Tensor]:
    """Indices of images that are learned from, and of those left out."""
    every = min(_LEFT_OUT, count // _LEFT_OUT)
    is_held = torch.arange(count) % every == 0
    return (~is_held).nonzero()[:, 0], is_held.nonzero()[:, 0]


def _batch(own: int) -> int:
    """Images between steps, of so many that are learned from."""
    return min(max(own // _BATCHES, _BATCH[0]), _BATCH[1])


def _shown(model: Any) -> float:
    """Images that `_WORK` allows to go through the model to learn from, those left out counted along."""
    per_image = tokens_of(model) * sum(weight.numel() for weight in site_weights(model).values())
    return _WORK / per_image / (1 - 1 / _LEFT_OUT)


def _logits(model: nn.Module, images: Tensor, at_once: int) -> Tensor:
    with torch.inference_mode():
        parts = [model(part) for part in images.split(at_once)]
    return torch.cat(parts).clone()


def _loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(float ‖ quantized) of every image, (B,), of (B, K) each."""
    logs = wanted.clamp(min=1e-30).log()
    return (wanted * (logs - logits.log_softmax(dim=1))).sum(dim=1)


def _kl(model: nn.Module, images: Tensor, wanted: Tensor, which: Tensor, at_once: int) -> float:
    with torch.inference_mode():
        parts = [_loss(model(images[part]), wanted[part]) for part in which.split(at_once)]
    return float(torch.cat(parts).double().mean())
