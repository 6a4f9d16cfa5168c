"""Exact transforms: other weights for the same float function, whose tensors are easier to quantize.

    model ──► each transform that is asked for, in the order of `TRANSFORMS` ──► {timm name: changed weight or bias}

A LayerNorm ignores the mean of what it reads and commutes with rotations that keep the mean; softmax ignores what is
added to a whole row; a head's product q·kᵀ is the same for q·A and k·A⁻ᵀ. These freedoms are spent on even tensors:
outlier channels are spread, means that waste a symmetric grid are moved into biases, tensors that share a scale are
brought to one level. All of it lands in plain weights and biases under the names and shapes that were there.

Sources: LayerNorm and residual rotations: Ashkboos et al., SliceGPT (arXiv 2401.15024) and QuaRot (2404.00456);
moving means into biases: Li et al., RepQ-ViT (2212.08254); moving channel scales through LayerNorm: Xiao et al.,
SmoothQuant (2211.10438); whitening of heads: the geometric mean of two positive matrices (Bhatia, Positive Definite
Matrices, 2007).

Legend: B images, N tokens, C width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.quant.sites import site_key
from vitq_ray.quant.vit import float_copy, observing, quant_blocks, tensor_keys

_SEED = 0  # of the random signs and orders of rotations
_SHRINK = 0.1  # of the mean second moment, added to a head's matrices before they are inverted


@dataclass(frozen=True)
class Transform:
    """One row of the table.

    Attributes:
        help: half a sentence.
        apply: (model that is changed in place, calibration images as it takes them (B, 3, S, S), strength).
        obstacle: why a model's parts do not allow it, or None.
        takes_strength: a number behind its name means something.
    """

    help: str
    apply: Callable[[nn.Module, Tensor, float], None]
    obstacle: Callable[[nn.Module], str | None]
    takes_strength: bool = False


def transformed(model: nn.Module, names: Iterable[tuple[str, float]], images: Tensor) -> dict[str, Tensor]:
    """{timm name: what it becomes} of the weights and biases that the transforms change.

    Args:
        model: from `quantize_vit`; it stays as it is.
        names: (name of `TRANSFORMS`, strength); they are applied in the order of the table.
        images: calibration images as the model takes them, (B, 3, S, S).

    Raises:
        InputError: naming the transform and the part, where the model does not allow one.
    """
    strengths = dict(names)
    for name in strengths:
        require_transformable(model, name)
    twin = float_copy(model).eval()
    with torch.no_grad():
        for name, transform in TRANSFORMS.items():
            if name in strengths:
                transform.apply(twin, images, strengths[name])
    before = dict(float_copy(model).named_parameters())
    after = {name: parameter.detach() for name, parameter in twin.named_parameters()}
    return {name: value for name, value in after.items() if not torch.equal(value, before[name])}


def require_transformable(model: nn.Module, name: str) -> None:
    """InputError where the model's parts do not allow the transform."""
    problem = TRANSFORMS[name].obstacle(model)
    if problem is not None:
        raise InputError(f"transform {name}: {problem}")


# Parts of a model ---------------------------------------------------------------------------------------------------


def _readers(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Linear]]]:
    """(name, LayerNorm, linear layers that read it and that nothing else reads) of the whole residual stream."""
    for index, block in enumerate(quant_blocks(model)):
        yield f"blocks.{index}.norm1", block.norm1, [block.attn.qkv]
        yield f"blocks.{index}.norm2", block.norm2, [cast(nn.Linear, block.mlp.fc1)]
    name, norm = _last_norm(model)
    yield name, norm, _last_readers(model)


def _last_norm(model: Any) -> tuple[str, nn.Module]:
    return ("norm", model.norm) if isinstance(model.norm, nn.LayerNorm) else ("fc_norm", model.fc_norm)


def _last_readers(model: Any) -> list[nn.Linear]:
    """The linear layers behind the last norm: that of pre-logits, else the heads."""
    pre_logits = getattr(model.fc_norm, "pre_logits", None)
    heads: list[Any] = [pre_logits] if pre_logits is not None else [model.head, getattr(model, "head_dist", None)]
    return [head for head in heads if isinstance(head, nn.Linear)]


def _writers(model: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers that write to the residual stream."""
    for block in quant_blocks(model):
        yield from (block.attn.proj, cast(nn.Linear, block.mlp.fc2))


def _embeddings(model: Any) -> list[nn.Parameter]:
    """What else is added up in the first residual stream, (…, C) each; the patches are the convolution's."""
    names = ("pos_embed", "cls_token", "reg_token", "dist_token")
    found = (getattr(model, name, None) for name in names)
    return [parameter for parameter in found if isinstance(parameter, nn.Parameter)]


def _fold_obstacle(model: Any) -> str | None:
    if getattr(model, "attn_pool", None) is not None:
        return "the model pools by attention"
    if model.global_pool not in ("", "token", "avg"):
        return f"the model pools by {model.global_pool}, which is not linear"
    for name, norm, readers in _readers(model):
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            return f"{name} is a {type(norm).__name__}; expected a LayerNorm with a gain and a bias"
        if not readers:
            return f"what reads {name} is not a linear layer"
        if any(reader.bias is None for reader in readers):
            return f"a layer that reads {name} has no bias that could take up what is moved"
    return None


def _stream_obstacle(model: Any) -> str | None:
    if not isinstance(model.norm_pre, nn.Identity):
        return "a norm in front of the blocks (norm_pre) writes to the residual stream"
    if not isinstance(getattr(model.patch_embed, "norm", nn.Identity()), nn.Identity):
        return "the patch embedding ends with a norm"
    if not isinstance(getattr(model.patch_embed, "proj", None), nn.Conv2d):
        return "the patch embedding is not a convolution"
    if any(layer.bias is None for layer in _writers(model)):
        return "a layer that writes to the residual stream has no bias"
    return _fold_obstacle(model)


def _bias_obstacle(model: nn.Module) -> str | None:
    blocks = quant_blocks(model)
    if any(block.attn.qkv.bias is None or block.attn.proj.bias is None for block in blocks):
        return "a layer of the attention has no bias that could take up what is moved"
    return None


def _shift_obstacle(model: nn.Module) -> str | None:
    if any(not isinstance(block.attn.k_norm, nn.Identity) for block in quant_blocks(model)):
        return "the model normalises keys (qk-norm), so that their bias counts"
    return _fold_obstacle(model) or _bias_obstacle(model)


def _heads_obstacle(model: nn.Module) -> str | None:
    attentions = [block.attn for block in quant_blocks(model)]
    if any(not isinstance(norm, nn.Identity) for a in attentions for norm in (a.q_norm, a.k_norm)):
        return "the model normalises queries and keys (qk-norm)"
    return None


def _migrate_obstacle(model: nn.Module) -> str | None:
    for index, block in enumerate(quant_blocks(model)):
        for norm in (block.norm1, block.norm2):
            if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
                return f"a norm of block {index} is a {type(norm).__name__} without a gain and a bias"
    return None


# The transforms -----------------------------------------------------------------------------------------------------


def _fold(model: nn.Module, images: Tensor, strength: float) -> None:
    """LayerNorms have gain 1 and bias 0 afterwards, LayerScale 1: their readers, and writers, have taken them up."""
    for block in quant_blocks(model):
        for scale, layer in ((block.ls1, block.attn.proj), (block.ls2, cast(nn.Linear, block.mlp.fc2))):
            gamma = getattr(scale, "gamma", None)
            if gamma is not None:
                _set(layer.weight, gamma.double()[:, None] * layer.weight.double())
                if layer.bias is not None:
                    _set(layer.bias, gamma.double() * layer.bias.double())
                gamma.fill_(1)
    for _, norm, readers in _readers(model):
        norm = cast(nn.LayerNorm, norm)
        gain, bias = norm.weight.double(), norm.bias.double()
        for reader in readers:
            _set(reader.bias, reader.bias.double() + reader.weight.double() @ bias)
            _set(reader.weight, reader.weight.double() * gain)
        norm.weight.fill_(1)
        norm.bias.fill_(0)


def _rotate(model: nn.Module, images: Tensor, strength: float) -> None:
    """x -> R·x everywhere in the residual stream, which is centred first: its mean is ignored by every reader."""
    _fold(model, images, strength)
    width = cast(Any, model).embed_dim
    turn = mean_keeping_rotation(width, _SEED).to(next(model.parameters()).device)
    write = turn - turn.mean(dim=0, keepdim=True)  # R, and the mean over channels taken away
    for layer in (*_writers(model), cast(Any, model).patch_embed.proj):
        _set(layer.weight, torch.tensordot(write, layer.weight.double(), dims=1))
        if layer.bias is not None:
            _set(layer.bias, write @ layer.bias.double())
    for embedding in _embeddings(model):
        _set(embedding, embedding.double() @ write.T)
    for _, _, readers in _readers(model):
        for reader in readers:
            _set(reader.weight, reader.weight.double() @ turn.T)


def _shift(model: nn.Module, images: Tensor, strength: float) -> None:
    """The mean of every LayerNorm's output moves into the biases of its readers; k loses its bias, v hands its on."""
    means = _means_of_norms(model, images)
    for index, block in enumerate(quant_blocks(model)):
        for norm, reader, site in (
            (block.norm1, block.attn.qkv, "attn.query._input_quantizer"),
            (block.norm2, cast(nn.Linear, block.mlp.fc1), "ffn.fc1._input_quantizer"),
        ):
            mean = means[site_key(index, site)]
            _set(reader.bias, reader.bias.double() + reader.weight.double() @ mean)
            _set(cast(nn.Parameter, norm.bias), cast(Tensor, norm.bias).double() - mean)
        _, key, value = block.attn.qkv.bias.double().chunk(3)
        _set(block.attn.proj.bias, block.attn.proj.bias.double() + block.attn.proj.weight.double() @ value)
        # softmax ignores q·b, which is the same for every key; the rows of probabilities add up to one.
        block.attn.qkv.bias[len(key) :].fill_(0)


def _heads(model: nn.Module, images: Tensor, strength: float) -> None:
    """Per head: q -> q·A and k -> k·A⁻ᵀ, after which both have one second moment with an even diagonal; v -> v·B with
    B orthogonal."""
    moments = _moments_of_heads(model, images)
    for index, block in enumerate(quant_blocks(model)):
        attention = block.attn
        dim = attention.head_dim
        spread = hadamard(dim, np.random.default_rng(_SEED)).to(attention.qkv.weight.device)
        query, key, value = _rows_of_heads(attention)
        for head in range(attention.num_heads):
            both = (moments[site_key(index, f"attn.matmul_{name}_input_quantizer")][head] for name in "qk")
            a = balancing(*both) @ spread
            _multiply_rows(attention.qkv, query[head], a.T)
            _multiply_rows(attention.qkv, key[head], torch.linalg.inv(a))
            _multiply_rows(attention.qkv, value[head], spread.T)
            columns = slice(head * dim, (head + 1) * dim)
            _set(attention.proj.weight[:, columns], attention.proj.weight[:, columns].double() @ spread)


def _balance(model: nn.Module, images: Tensor, strength: float) -> None:
    """v to the level of q and k, and back in the output projection: for modes in which the three share a scale."""
    largest = _largest_of_heads(model, images)
    for index, block in enumerate(quant_blocks(model)):
        q, k, v = (largest[site_key(index, f"attn.matmul_{name}_input_quantizer")] for name in "qkv")
        if v == 0 or max(q, k) == 0:
            continue
        factor = (max(q, k) / v) ** strength
        attention = block.attn
        rows = slice(2 * len(attention.qkv.weight) // 3, None)
        _set(attention.qkv.weight[rows], attention.qkv.weight[rows].double() * factor)
        if attention.qkv.bias is not None:
            _set(attention.qkv.bias[rows], attention.qkv.bias[rows].double() * factor)
        _set(attention.proj.weight, attention.proj.weight.double() / factor)


def _migrate(model: nn.Module, images: Tensor, strength: float) -> None:
    """Channel c of a LayerNorm is divided by (its root mean square, relative to all channels') to the power of
    `strength`, its readers' column is multiplied; a negative strength moves the other way."""
    spread = _spread_of_norms(model, images)
    for index, block in enumerate(quant_blocks(model)):
        for norm, reader, site in (
            (block.norm1, block.attn.qkv, "attn.query._input_quantizer"),
            (block.norm2, cast(nn.Linear, block.mlp.fc1), "ffn.fc1._input_quantizer"),
        ):
            square = spread[site_key(index, site)].clamp(min=1e-12)
            factor = (square / square.log().mean().exp()).sqrt() ** strength
            for parameter in (norm.weight, norm.bias):
                _set(cast(nn.Parameter, parameter), cast(Tensor, parameter).double() / factor)
            _set(reader.weight, reader.weight.double() * factor)


TRANSFORMS: dict[str, Transform] = {
    "fold": Transform("LayerNorm's gain and bias into the layers that read it", _fold, _fold_obstacle),
    "rotate": Transform("residual stream centred and turned, after `fold`", _rotate, _stream_obstacle),
    "shift": Transform("means of LayerNorms and biases of k and v moved on", _shift, _shift_obstacle),
    "heads": Transform("q and k of each head balanced, all three spread", _heads, _heads_obstacle),
    "balance": Transform("v brought to the level of q and k", _balance, lambda model: None, True),
    "migrate": Transform("channel scales of LayerNorms moved by a strength", _migrate, _migrate_obstacle, True),
}

ALL_TRANSFORMS = ("rotate", "shift", "heads", "balance")  # what serves best together


# Their mathematics --------------------------------------------------------------------------------------------------


def hadamard(size: int, rng: np.random.Generator) -> Tensor:
    """An orthogonal (size, size) float64 matrix with entries of about one size: random signs and order of rows.

    The power of two in `size` is Sylvester's Hadamard matrix, the odd rest a discrete cosine transform.
    """
    power = size & -size
    odd = size // power
    k, n = np.arange(odd)[:, None], np.arange(odd)[None, :]
    cosine = np.sqrt(2 / odd) * np.cos(np.pi * (n + 0.5) * k / odd)
    cosine[0] /= np.sqrt(2)
    matrix = np.ones((1, 1))
    while len(matrix) < power:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    matrix = np.kron(matrix, cosine)
    signs = rng.choice((-1.0, 1.0), size)
    return torch.from_numpy(np.ascontiguousarray(matrix[rng.permutation(size)] * signs))


def mean_keeping_rotation(size: int, seed: int) -> Tensor:
    """An orthogonal (size, size) float64 matrix R with R·1 = 1: `hadamard`, then the reflection that brings its image
    of the ones vector back."""
    turn = hadamard(size, np.random.default_rng(seed))
    ones = torch.ones(size, dtype=torch.float64)
    off = turn @ ones - ones
    if float(off @ off) > 1e-12:
        turn = turn - 2 * torch.outer(off, off @ turn) / (off @ off)
    return turn


def balancing(query: Tensor, key: Tensor) -> Tensor:
    """A (D, D) with Aᵀ·Q·A = A⁻¹·K·A⁻ᵀ diagonal, for second moments Q and K (D, D), float64, slightly shrunk.

    A·Aᵀ is the geometric mean of Q⁻¹ and K.
    """
    dim = len(query)
    query, key = (
        m + _SHRINK * m.diagonal().mean() * torch.eye(dim, dtype=m.dtype, device=m.device) for m in (query, key)
    )
    root = _power(query, 0.5)
    back = _power(query, -0.5)
    half = _power(back @ _power(root @ key @ root, 0.5) @ back, 0.5)
    directions: Tensor = torch.linalg.eigh(half @ query @ half)[1]
    return half @ directions


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    powered: Tensor = vectors * values.clamp(min=1e-30) ** exponent @ vectors.T
    return powered


def _set(target: Tensor, value: Tensor) -> None:
    target.copy_(value.to(target.dtype))


def _rows_of_heads(attention: Any) -> list[list[slice]]:
    """[q, k, v][head] -> rows of the joint weight."""
    heads, dim = attention.num_heads, attention.head_dim
    return [[slice((part * heads + h) * dim, (part * heads + h + 1) * dim) for h in range(heads)] for part in range(3)]


def _multiply_rows(layer: nn.Linear, rows: slice, matrix: Tensor) -> None:
    _set(layer.weight[rows], matrix @ layer.weight[rows].double())
    if layer.bias is not None:
        _set(layer.bias[rows], matrix @ layer.bias[rows].double())


# What they look at --------------------------------------------------------------------------------------------------


def _seen(model: nn.Module, images: Tensor, observers: dict[str, Callable[[Tensor], None]]) -> None:
    """Show tensors of the model, by their sites, to observers, a few images at a time."""
    all_observers = {key: observers.get(key, lambda x: None) for key in tensor_keys(model)}
    with observing(model, all_observers):
        for part in images.split(8):
            model(part)


def _sums(
    model: nn.Module, images: Tensor, sites: Sequence[str], term: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """{full name: sum of `term` of a tensor over all batches} of sites within a block, in every block."""
    sums: dict[str, Tensor] = {}

    def observer(key: str) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            sums[key] = sums[key] + term(x) if key in sums else term(x)

        return add

    keys = [site_key(index, site) for index in range(len(quant_blocks(model))) for site in sites]
    _seen(model, images, {key: observer(key) for key in keys})
    return sums


_NORM_OUTPUTS = ("attn.query._input_quantizer", "ffn.fc1._input_quantizer")
_HEAD_INPUTS = tuple(f"attn.matmul_{name}_input_quantizer" for name in "qkv")


def _means_of_norms(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """{site: mean over images and tokens (C,)} of what LayerNorms put out."""
    sums = _sums(model, images, _NORM_OUTPUTS, lambda x: x.double().mean(dim=1).sum(dim=0))
    return {key: value / len(images) for key, value in sums.items()}


def _spread_of_norms(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """{site: mean square over images and tokens (C,)}."""
    sums = _sums(model, images, _NORM_OUTPUTS, lambda x: x.double().square().mean(dim=1).sum(dim=0))
    return {key: value / len(images) for key, value in sums.items()}


def _moments_of_heads(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """{site: second moments (H, D, D)} of q and k."""

    def moments(x: Tensor) -> Tensor:  # (B, H, N, D)
        rows = x.double().transpose(0, 1).flatten(1, 2)
        return rows.transpose(1, 2) @ rows / x.shape[2]

    sums = _sums(model, images, _HEAD_INPUTS[:2], moments)
    return {key: value / len(images) for key, value in sums.items()}


def _largest_of_heads(model: nn.Module, images: Tensor) -> dict[str, float]:
    """{site: largest magnitude} of q, k and v."""
    largest: dict[str, float] = {}

    def observer(key: str) -> Callable[[Tensor], None]:
        def look(x: Tensor) -> None:
            largest[key] = max(largest.get(key, 0.0), float(x.abs().max()))

        return look

    keys = [site_key(index, site) for index in range(len(quant_blocks(model))) for site in _HEAD_INPUTS]
    _seen(model, images, {key: observer(key) for key in keys})
    return largest
