"""How much the output suffers from the error of one tensor: predicted KL to the float model, at every scale of a grid.

    a few calibration images ──► float model, forward and backward ──► gradients g of every activation tensor
    g, and the error δ of a tensor at every scale ──► loss curve: ½ · mean over images of Σ over tokens of (Σ_c g·δ)²

g is the gradient of Σ_c ε_c √p_c · log p_c for random signs ε, with √p_c held fixed: the mean of g·gᵀ over ε is the
Fisher information of the model's own predictions, so no labels are needed, and ½·δᵀ·E[g·gᵀ]·δ is the KL to second
order. Errors are added up over the channels of a token before they are squared, and tokens are taken as independent.
(Over nothing, each value on its own, or over a whole image: `FORMS`, to compare; `benchmarks/ablation.py` does.)

A weight's error δ (out, in) changes output channel o of a token x by δ_o·x. Its loss is Σ_o G_o · δ_o·M·δ_oᵀ with
G_o = the share of channel o in Σ g² over the layer's outputs, and M = Σ over tokens of (Σ_o g²) · x·xᵀ.

Predictions of several sites add up: the predicted KL of a plan. So do losses of several images: they are looked at in
four parts, in this process or on workers, whose sums are merged in order: the same result with as many threads.

Sources: Martens, arXiv 1412.1193 (Fisher information as a metric of outputs); Yuan et al., PTQ4ViT (2111.12293) and Li
et al., BRECQ (2102.05426) (gradients to choose scales).

Legend: B images, N tokens, C channels, S scales of the grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vitq_ray.base.config import require_choice
from vitq_ray.base.kernels import compiled_with
from vitq_ray.quant.fake_quant import fake_quantize
from vitq_ray.quant.sites import ASYMMETRIC, GEMMS
from vitq_ray.quant.vit import observing, site_weights, tensor_keys

Levels = tuple[int, int]  # smallest and largest integer of a grid: (-128, 127)
Floats = npt.NDArray[np.float64]
Track = Callable[[Sequence[int]], Iterable[int]]  # the same numbers, with progress shown
# (function, model, arguments behind the model) -> its results, in order; where they are computed is the caller's choice
Spread = Callable[[Callable[..., Any], nn.Module, Iterable[tuple[Any, ...]]], Iterator[Any]]

_FEWEST_IMAGES, _MOST_IMAGES, _TOKENS = 24, 256, 6144  # that gradients are taken of
_AT_ONCE = 4  # images in one forward pass
PARTS = 4  # of the images, at most: what was seen in one may be as large as the weights several times over
TOKEN = "token"
FORMS = ("channel", TOKEN, "image")  # over what g·δ is added up before it is squared
_FEW = 1 << 16  # elements of a tensor that one thread takes
_ALPHAS = 2.0 ** (-np.arange(-1, 18) / 4)  # amax over the largest magnitude: 1.19, 1, 0.84, … 0.05
_WEIGHT_ALPHAS = 2.0 ** (-np.arange(0, 15) / 8)  # 1, 0.92, … 0.30


@dataclass(frozen=True)
class Curve:
    """Predicted KL, in nats, at values of amax.

    Attributes:
        amax: (S,) descending; of a weight with one scale a row, (rows, S).
        loss: of the same shape.
    """

    amax: Floats
    loss: Floats

    def at(self, amax: npt.ArrayLike) -> Floats:
        """The loss at other values of amax: (P,) -> (P,), or one a row, (rows, 1) -> (rows,).

        Interpolated between logarithms; as amax² above the grid, where nothing is clipped; as 1 / amax below it, down
        to a millionth.
        """
        wanted = np.asarray(amax, np.float64)
        if self.amax.ndim == 1:
            return _interpolated(self.amax, self.loss, wanted)
        rows = zip(self.amax, self.loss, wanted.reshape(-1, 1), strict=True)
        return np.array([_interpolated(*row)[0] for row in rows])

    def best(self) -> Floats:
        """amax with the least loss: (), or (rows, 1)."""
        index = self.loss.argmin(axis=-1)
        if self.amax.ndim == 1:
            return np.asarray(self.amax[index])
        return np.take_along_axis(self.amax, index[:, None], 1)

    @staticmethod
    def together(curves: Sequence[Curve]) -> Curve:
        """Of tensors that share a scale: the sum of their losses."""
        curves = [curve for curve in curves if curve.amax[0] > 0]
        if len(curves) < 2:
            return curves[0] if curves else Curve(np.zeros(1), np.zeros(1))
        amax = np.unique(np.concatenate([curve.amax for curve in curves]))[::-1]
        return Curve(amax, np.sum([curve.at(amax) for curve in curves], axis=0))


def _interpolated(grid: Floats, loss: Floats, wanted: Floats) -> Floats:
    if grid[0] == 0:
        return np.zeros(wanted.shape)
    x, y = grid[::-1], np.maximum(loss[::-1], 1e-300)
    found: Floats = np.exp(np.interp(np.log(np.maximum(wanted, 1e-300)), np.log(x), np.log(y)))
    found = np.where(wanted > x[-1], found * np.square(wanted / x[-1]), found)
    return np.where(wanted < x[0], found * (x[0] / np.maximum(wanted, 1e-6 * x[0])), found)


# Axis of a weight's scales, and the integers; of an asymmetric grid its name, and the integers before the zero point.
Grid = tuple[int | str | None, Levels]


@dataclass(frozen=True)
class Moments:
    """What corrections need, besides curves.

    Attributes:
        channels: {GEMM's site prefix, e.g. `…layer.0.attn.query`: share of each output channel (out,)}.
        inputs: {full name of a GEMM's input tensor: M / (2 · images) (in, in) float32}.
        tokens: {GEMM: Σ g² over its output channels, (images, N)}.
    """

    channels: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    tokens: Mapping[str, Tensor]

    def of_weight(self, key: str) -> tuple[Tensor, Tensor]:
        """(share of each output channel (out,), M / (2 · images) (in, in)) of a weight's site."""
        gemm = key.removesuffix("._weight_quantizer")
        return self.channels[gemm], self.inputs[_input_of(gemm)]

    def curve(self, key: str, weight: Tensor, axis: int | None, levels: Levels) -> Curve:
        """Predicted KL of quantizing a weight (out, in); `key` is the full name of its site."""
        weight = weight.detach().float()
        share, moment = self.of_weight(key)
        largest = weight.abs().amax(dim=1, keepdim=True) if axis == 0 else weight.abs().amax()
        losses = []
        for alpha in _WEIGHT_ALPHAS:
            error = fake_quantize(weight, largest * float(alpha), axis=axis, levels=levels) - weight
            rows = share * ((error @ moment) * error).sum(dim=1)
            losses.append(rows if axis == 0 else rows.sum())
        loss = torch.stack(losses, dim=-1).double().cpu().numpy()
        return Curve((largest.double().cpu().numpy() * _WEIGHT_ALPHAS).reshape(loss.shape), loss)


def moment_bytes(model: nn.Module) -> int:
    """Bytes of the second moments of what a model's layers read."""
    widths = {_input_of(key.removesuffix("._weight_quantizer")): w.shape[1] for key, w in site_weights(model).items()}
    return sum(4 * width**2 for width in widths.values())


@dataclass(frozen=True)
class Sensitivity:
    """What a few images tell of every tensor of a float model.

    Attributes:
        images: how many were looked at.
        curves: {(full name of an activation tensor, or of a weight's site; its grid): curve}.
        moments: what corrections need; it is not saved.
    """

    images: int
    curves: Mapping[tuple[str, Grid], Curve]
    moments: Moments | None = None

    def curve(self, key: str, axis: int | str | None, levels: Levels) -> Curve:
        """Of a tensor or weight; ValueError where this grid was not looked at."""
        if (key, (axis, levels)) not in self.curves:
            raise ValueError(f"sensitivity: {key} was not looked at on the grid {levels}, axis {axis}")
        return self.curves[key, (axis, levels)]


def _input_of(gemm: str) -> str:
    """Full name of the tensor that a GEMM reads; that of query, key and value is one."""
    prefix, _, name = gemm.rpartition(".attn.")
    joint = f"{prefix}.attn.query" if name in ("key", "value") else gemm
    return f"{joint}._input_quantizer"


def images_to_look_at(model: Any) -> int:
    """How many images gradients are taken of: 24, or more where they are small."""
    return int(min(_MOST_IMAGES, max(_FEWEST_IMAGES, _TOKENS // tokens_of(model))))


def tokens_of(model: Any) -> int:
    """Tokens of an image."""
    return int(model.patch_embed.num_patches + getattr(model, "num_prefix_tokens", 0))


def _gemms_of(key: str) -> list[str]:
    """The GEMMs that read an input tensor; none for another kind of tensor."""
    gemm = key.removesuffix("._input_quantizer")
    if gemm.endswith(".attn.query"):
        return [gemm.removesuffix("query") + name for name in ("query", "key", "value")]
    return [gemm] if any(gemm.endswith(f".{name}") for name in GEMMS) else []


def here(function: Callable[..., Any], model: nn.Module, items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """One after the other, in this process."""
    return (function(model, *item) for item in items)


def collect_sensitivity(
    model: nn.Module,
    images: Tensor,
    grids: Mapping[str, Iterable[Grid]],
    seed: int = 0,
    track: Track = iter,
    spread: Spread = here,
    form: str = TOKEN,
) -> Sensitivity:
    """Two forward passes and one backward pass of the float model for every image: the first finds the ranges.

    Args:
        model: from `quantize_vit`; its quantizers are off meanwhile.
        images: as the model takes them, (B, 3, S, S).
        grids: {full name of an activation tensor, or of a weight's site: grids that it may be quantized to}.
        seed: of the random signs.
        track: goes through the parts of the images, at most four, with progress shown.
        spread: where the parts are looked at.
        form: one of `FORMS`.

    Deterministic: signs depend on the seed and the place of the image, and parts on the number of images alone.
    """
    require_choice("form of the loss", form, FORMS)
    device = images.device
    weights = {key: weight for key, weight in site_weights(model).items() if key in grids}
    signs = torch.from_numpy(_signs(len(images), _classes(model, images), seed))
    size = -(-len(images) // PARTS)
    parts = [part.cpu() for part in images.split(size)]
    ranges = reduce(_wider, spread(ranges_of, model, [(part,) for part in parts]))
    points = {
        key: {grid: _Points.of(grid, *ranges[key]) for grid in wanted}
        for key, wanted in grids.items()
        if key not in weights
    }
    seen = Seen()
    args = zip(parts, signs.split(size), itertools.repeat(points), itertools.repeat(form))
    looked_at = spread(look_at_part, model, args)
    for _, part in zip(track(range(len(parts))), looked_at, strict=True):
        seen = seen.merge(part)
    moments, curves = seen.moments(len(images), device), seen.curves(len(images), points)
    for key, weight in weights.items():
        for axis, levels in grids[key]:
            assert not isinstance(axis, str)  # weights are symmetric
            curves[key, (axis, levels)] = moments.curve(key, weight, axis, levels)
    return Sensitivity(len(images), curves, moments)


def look_at_part(
    model: nn.Module,
    images: Tensor,
    signs: Tensor,
    points: Mapping[str, Mapping[Grid, _Points]],
    form: str = TOKEN,
) -> Seen:
    """What one part of the images (B, 3, S, S), with its signs (B, classes), adds; on the CPU."""
    seen = Seen()
    _gradients(model, images.to(next(model.parameters()).device), signs, partial(seen.take, points, form))
    return seen.on_cpu()


# (full name of an activation tensor, the tensor, its gradient), in the order of the backward pass: outputs first
Take = Callable[[str, Tensor, Tensor], None]


def gradient_pass(
    model: nn.Module,
    images: Tensor,
    take: Take,
    seed: int = 0,
) -> None:
    """Show every activation tensor of the float model with its gradient, a few images at a time, in order.

    `seed` is of the random signs, as in `collect_sensitivity`.
    """
    signs = torch.from_numpy(_signs(len(images), _classes(model, images), seed))
    _gradients(model, images, signs, take)


def _signs(images: int, classes: int, seed: int) -> Floats:
    signs: Floats = np.random.default_rng(seed).choice((-1.0, 1.0), (images, classes))
    return signs


def _gradients(model: nn.Module, images: Tensor, signs: Tensor, take: Take) -> None:
    def observer(key: str) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            value = x.detach()
            x.register_hook(lambda g: take(key, value, g))

        return observe

    observers = {key: observer(key) for key in tensor_keys(model)}
    with _frozen_parameters(model), torch.enable_grad():
        for start in range(0, len(images), _AT_ONCE):
            part = images[start : start + _AT_ONCE].clone().requires_grad_()
            epsilon = signs[start : start + len(part)].to(part)
            with observing(model, observers):
                logs = model(part).log_softmax(dim=1)
                roots = (logs / 2).exp().detach()
                torch.autograd.backward((epsilon * roots * logs).sum())


def _classes(model: nn.Module, images: Tensor) -> int:
    with torch.inference_mode():
        return int(model(images[:1]).shape[1])


@contextmanager
def _frozen_parameters(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters, and evaluation mode, for as long as the context lasts."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    model.eval()
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        model.train(training)


def ranges_of(model: nn.Module, images: Tensor) -> dict[str, tuple[float, float]]:
    """{activation tensor: its smallest and largest value, 0 included} of the float model."""
    ranges: dict[str, tuple[float, float]] = {}

    def observer(key: str) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            low, high = ranges.get(key, (0.0, 0.0))
            ranges[key] = min(low, float(x.min())), max(high, float(x.max()))

        return observe

    with torch.inference_mode(), observing(model, {key: observer(key) for key in tensor_keys(model)}):
        for part in images.to(next(model.parameters()).device).split(_AT_ONCE):
            model(part)
    return ranges


Ranges = dict[str, tuple[float, float]]


def _wider(one: Ranges, other: Ranges) -> Ranges:
    return {key: (min(low, other[key][0]), max(high, other[key][1])) for key, (low, high) in one.items()}


@dataclass(frozen=True)
class _Points:
    """A grid of scales: amax, and at each the step and the integers between which it clips; (S,) each."""

    amax: Floats
    steps: Floats
    lows: Floats
    highs: Floats

    @staticmethod
    def of(grid: Grid, low: float, high: float) -> _Points:
        """For a tensor with values in [low, high]. amax of an asymmetric grid is where it clips: as `scales` says."""
        axis, (first, last) = grid
        amax = max(-low, high) * _ALPHAS
        if axis != ASYMMETRIC:
            return _Points(amax, amax / last, np.full(len(amax), first), np.full(len(amax), last))
        lowest, highest = np.maximum(low, -amax), np.minimum(high, amax)
        steps = (highest - lowest) / last
        zero_points = np.minimum(np.rint(-lowest / np.maximum(steps, 1e-300)), last - 1)
        return _Points(amax, steps, -zero_points, last - zero_points)


@dataclass
class Seen:
    """What a part of the images has added up to: sums, so that those of parts can be merged.

    Attributes:
        losses: {(activation tensor, grid): loss at every point (S,)}, not yet divided by images.
        channels: {GEMM: Σ g² of each output channel (out,)}.
        inputs: {GEMM's input tensor: Σ over tokens of (Σ_o g²) · x·xᵀ (in, in)}.
        tokens: {GEMM: Σ_o g² of the images (n, N), in parts}.
    """

    losses: dict[tuple[str, Grid], Floats] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)

    def merge(self, later: Seen) -> Seen:
        """With the images that come behind these."""
        return Seen(
            _sum(self.losses, later.losses),
            _sum(self.channels, later.channels),
            _sum(self.inputs, later.inputs),
            {**self.tokens, **{key: [*self.tokens.get(key, ()), *parts] for key, parts in later.tokens.items()}},
        )

    def on_cpu(self) -> Seen:
        channels, inputs = ({key: x.cpu() for key, x in sums.items()} for sums in (self.channels, self.inputs))
        return Seen(self.losses, channels, inputs, {key: [x.cpu() for x in xs] for key, xs in self.tokens.items()})

    def take(self, points: Mapping[str, Mapping[Grid, _Points]], form: str, key: str, x: Tensor, g: Tensor) -> None:
        """One tensor of a few images and its gradient, in the order of a backward pass."""
        self._take_moments(key, x, g)
        if key not in points:
            return
        values, gradients = (_grouped(t.float().cpu(), form) for t in (x, g))
        for grid, at in points[key].items():
            _add(self.losses, (key, grid), _losses(values, gradients, at))

    def _take_moments(self, key: str, x: Tensor, g: Tensor) -> None:
        if key.endswith("._aftergemm_quantizer"):  # (B, N, out); before its input, since it goes backwards
            gemm = key.removesuffix("._aftergemm_quantizer")
            squares = g.square()
            _add(self.channels, gemm, squares.sum(dim=(0, 1)))
            self.tokens.setdefault(gemm, []).append(squares.sum(dim=2))
        elif key.endswith("._input_quantizer") and (gemms := _gemms_of(key)):
            weights = torch.stack([self.tokens[gemm][-1] for gemm in gemms]).sum(dim=0)
            rows = x.flatten(0, 1)
            _add(self.inputs, key, (rows * weights.reshape(-1, 1)).T @ rows)

    def curves(self, images: int, points: Mapping[str, Mapping[Grid, _Points]]) -> dict[tuple[str, Grid], Curve]:
        return {
            (key, grid): Curve(points[key][grid].amax, loss / (2 * images)) for (key, grid), loss in self.losses.items()
        }

    def moments(self, images: int, device: torch.device) -> Moments:
        total: dict[str, Tensor] = {}
        for gemm, squares in self.channels.items():
            _add(total, _input_of(gemm), squares.sum())
        shares = {
            gemm: (squares / total[_input_of(gemm)].clamp(min=1e-38)).to(device)
            for gemm, squares in self.channels.items()
        }
        inputs = {key: (moment / (2 * images)).to(device) for key, moment in self.inputs.items()}
        return Moments(shares, inputs, {gemm: torch.cat(parts).to(device) for gemm, parts in self.tokens.items()})


Key = TypeVar("Key")
Value = TypeVar("Value", Tensor, Floats)


def _add(sums: dict[Key, Value], key: Key, value: Value) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _sum(one: Mapping[Key, Value], other: Mapping[Key, Value]) -> dict[Key, Value]:
    return {**one, **{key: one[key] + value if key in one else value for key, value in other.items()}}


def _grouped(values: Tensor, form: str) -> npt.NDArray[np.float32]:
    """(B, …, C) -> (groups, rows, columns): what is added up before it is squared is one group."""
    if form == "channel":
        values = values.reshape(-1, 1, 1)
    elif form == TOKEN:
        values = values.reshape(-1, 1, values.shape[-1])
    else:
        values = values.reshape(len(values), -1, values.shape[-1])
    grouped: npt.NDArray[np.float32] = values.contiguous().numpy()
    return grouped


def _losses(x: npt.NDArray[np.float32], g: npt.NDArray[np.float32], points: _Points) -> Floats:
    """Σ over groups of (Σ over a group of g·δ)² at every point, (S,); x and g are (groups, rows, columns)."""
    if points.amax[0] == 0:
        return np.zeros(len(points.amax))
    steps, lows, highs = (values.astype(np.float32) for values in (points.steps, points.lows, points.highs))
    threads = torch.get_num_threads()

    def of_part(x: npt.NDArray[np.float32], g: npt.NDArray[np.float32]) -> Floats:
        return np.asarray(_loss_kernel(x, g, steps, lows, highs))

    if threads == 1 or x.size < _FEW:
        return of_part(x, g)
    with ThreadPoolExecutor(threads) as pool:  # the kernel releases the GIL
        parts = pool.map(of_part, np.array_split(x, threads), np.array_split(g, threads))
        return np.asarray(np.sum(list(parts), axis=0))


@compiled_with(fastmath=True)
def _loss_kernel(
    x: npt.NDArray[np.float32],
    g: npt.NDArray[np.float32],
    steps: npt.NDArray[np.float32],
    lows: npt.NDArray[np.float32],
    highs: npt.NDArray[np.float32],
) -> Floats:
    sums = np.zeros(len(steps), np.float64)
    for group in range(x.shape[0]):
        for k in range(len(steps)):
            step, low, high = steps[k], lows[k], highs[k]
            inverse = np.float32(1) / step
            whole = np.float64(0)
            for r in range(x.shape[1]):
                row, gradient = x[group, r], g[group, r]
                total = np.float32(0)
                for c in range(row.shape[0]):
                    level = min(max(np.rint(row[c] * inverse), low), high)
                    total += gradient[c] * (level * step - row[c])
                whole += np.float64(total)
            sums[k] += whole * whole
    return sums
