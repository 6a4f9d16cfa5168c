"""Quantized blocks on a GPU: every block is one function of tensors, compiled once for all of them.

    levels, int8 ──► _int_mm ──► int32 ──► · scale ──► aftergemm quantizer, + bias ──► GELU, residual ──► levels, int8
    levels, float16 ──► bmm ──► float32 ──► · scale ──► softmax_input quantizer, softmax ──► levels, float16

What stands between two products is one or a few kernels, written by `torch.compile`; where it cannot compile, the same
function runs as it stands. A plan changes numbers in tensors that stay where they are, so nothing is compiled again
but for another number of images, another choice of products, or other shapes. The arithmetic is that of the CPU's
engine (`passes`); sums of floats are in the GPU's order, and a product and a sum may be rounded once or twice.

Products are exact: int8 · int8 is added up in int32, and levels are integers of at most 9 bits, which float16 holds,
and whose sums float32 holds up to 2²⁴. Both are compared with integers before they are used (`exact_products`).
Products with an operand in float are float32. It runs on a CPU, too, slowly, which is how it is tested.

Legend: B images, N tokens, C width, H heads, D head width; K and M, input and output width of a linear layer.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq_ray.measure.evaluation import NonFiniteLogitsError
from vitq_ray.quant.fake_quant import finite_scale, step_of
from vitq_ray.quant.quantizer import State, TensorQuantizer
from vitq_ray.quant.vit import GemmQuantizers, QuantBlock, quant_blocks

_log = logging.getLogger(__name__)

_LEAST_ROWS = 17  # _int_mm takes more than 16
_MULTIPLE = 8  # of the depth and the number of columns, and of tokens in attention
_MOST_CODES = 64  # compilations of a block that PyTorch keeps: modes times numbers of images

# A quantizer is a row of six float32; the last is taken from the levels of an input, so that they fit int8.
INVERSE, STEP, LOW, HIGH, ON, SHIFT = range(6)
_OFF = (1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
_SITES = (
    "layernorm_input1_quantizer",
    "attn.query._input_quantizer",
    "attn.matmul_q_input_quantizer",
    "attn.matmul_k_input_quantizer",
    "attn.softmax_input_quantizer",
    "attn.matmul_a_input_quantizer",
    "attn.matmul_v_input_quantizer",
    "attn.out._input_quantizer",
    "add1_local_input_quantizer",
    "add1_residual_input_quantizer",
    "layernorm_input2_quantizer",
    "ffn.fc1._input_quantizer",
    "ffn.fc2._input_quantizer",
    "add2_local_input_quantizer",
    "add2_residual_input_quantizer",
)
NORM1, QKV, Q, K, SCORES, P, V, OUT, LOCAL1, RESIDUAL1, NORM2, FC1, FC2, LOCAL2, RESIDUAL2 = range(len(_SITES))
EPS1, EPS2, EPS_Q, EPS_K, ROOT, SCALE_SCORES, SCALE_MIXED = range(7)


class Norm(NamedTuple):
    """A LayerNorm: (C,) each."""

    gain: Tensor
    bias: Tensor


class Linear(NamedTuple):
    """A linear layer: weight (K, M) int8 or float32, what shifts left out of the sums (M,) in the type of those, the
    scale of the sums (M,), bias (M,), and the aftergemm quantizer of every column (6, M)."""

    weight: Tensor
    offset: Tensor
    scale: Tensor
    bias: Tensor
    after: Tensor


class BlockTensors(NamedTuple):
    """All numbers of a block: quantizers (15, 6), the numbers named `EPS1` to `SCALE_MIXED` (7,), LayerScales (C,)."""

    rows: Tensor
    numbers: Tensor
    norm1: Norm
    norm2: Norm
    q_norm: Norm | None
    k_norm: Norm | None
    qkv: Linear
    out: Linear
    fc1: Linear
    fc2: Linear
    gamma1: Tensor
    gamma2: Tensor


class Form(NamedTuple):
    """What decides which code runs, apart from types and shapes.

    Attributes:
        heads: H.
        tanh: GELU is the approximation by tanh.
        scores, mixed: q·kᵀ, and probabilities · v, are products of levels in float16.
    """

    heads: int
    tanh: bool
    scores: bool
    mixed: bool


Run = Callable[[Tensor, BlockTensors, Form], Tensor]


# The function of a block ---------------------------------------------------------------------------------------------


def run_block(x: Tensor, t: BlockTensors, form: Form) -> Tensor:  # (B, N, C) -> (B, N, C)
    seen = _normalize(_quantize(x, t.rows[NORM1]), t.norm1, t.numbers[EPS1])
    mixed = _attend(_linear(seen, t.rows[QKV], t.qkv), t, form)
    local = _linear(mixed, t.rows[OUT], t.out) * t.gamma1
    x = _quantize(x, t.rows[RESIDUAL1]) + _quantize(local, t.rows[LOCAL1])
    seen = _normalize(_quantize(x, t.rows[NORM2]), t.norm2, t.numbers[EPS2])
    hidden = F.gelu(_linear(seen, t.rows[FC1], t.fc1), approximate="tanh" if form.tanh else "none")
    local = _linear(hidden, t.rows[FC2], t.fc2) * t.gamma2
    return _quantize(x, t.rows[RESIDUAL2]) + _quantize(local, t.rows[LOCAL2])


def _quantize(x: Tensor, row: Tensor) -> Tensor:
    """To the grid and back."""
    levels = (x * row[INVERSE]).round().clamp(row[LOW], row[HIGH])
    return torch.where(row[ON] != 0, levels * row[STEP], x)


def _levels(x: Tensor, row: Tensor) -> Tensor:
    """What a product takes, as float32: levels less the shift, or the values where the quantizer is off."""
    levels = (x * row[INVERSE]).round().clamp(row[LOW], row[HIGH]) - row[SHIFT]
    return torch.where(row[ON] != 0, levels, x)


def _normalize(x: Tensor, norm: Norm, eps: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)
    return centered * (variance + eps).rsqrt() * norm.gain + norm.bias


def _linear(x: Tensor, row: Tensor, layer: Linear) -> Tensor:
    """(B, N, K) -> (B, N, M): with the quantizer of the input and the aftergemm quantizer."""
    levels = _levels(x, row).flatten(0, 1)
    if layer.weight.dtype == torch.int8:
        sums = int8_product(levels.to(torch.int8), layer.weight)
    else:
        sums = levels @ layer.weight
    y: Tensor = (sums + layer.offset).float() * layer.scale
    return (_quantize(y, layer.after) + layer.bias).reshape(*x.shape[:2], -1)


# Products are operators of their own: what a compiler makes of the code around them, they are those that were checked.


@torch.library.custom_op("vitq_ray::int8_product", mutates_args=(), schema="(Tensor a, Tensor b) -> Tensor")
def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """(rows, K) · (K, M) of int8 -> (rows, M) int32"""
    rows = len(a)
    if rows >= _LEAST_ROWS:
        return torch._int_mm(a, b)
    return torch._int_mm(F.pad(a, (0, 0, 0, _LEAST_ROWS - rows)), b)[:rows]


@int8_product.register_fake
def _int8_product_shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((len(a), b.shape[1]), dtype=torch.int32)


def _attend(y: Tensor, t: BlockTensors, form: Form) -> Tensor:
    """softmax(q·kᵀ · root)·v of every image and head, with the quantizers around it: (B, N, 3C) -> (B, N, C).

    Keys are filled up to a multiple of 8, where half precision is fastest; what is filled up weighs nothing.
    """
    batch, tokens, _ = y.shape
    q, k, v = y.unflatten(-1, (3, form.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
    if t.q_norm is not None:
        q = _normalize(q, t.q_norm, t.numbers[EPS_Q])
    if t.k_norm is not None:
        k = _normalize(k, t.k_norm, t.numbers[EPS_K])
    filled = (0, 0, 0, -tokens % _MULTIPLE)
    left = _levels(q, t.rows[Q]).flatten(0, 1)
    right = F.pad(_levels(k, t.rows[K]), filled).flatten(0, 1).transpose(1, 2)
    scores = _product(left, right, form.scores) * t.numbers[SCALE_SCORES]
    scores = _quantize(scores, t.rows[SCORES]) * t.numbers[ROOT]
    is_token = torch.arange(scores.shape[-1], device=y.device) < tokens
    probabilities = torch.where(is_token, scores, float("-inf")).softmax(-1)
    values = F.pad(_levels(v, t.rows[V]), filled).flatten(0, 1)
    mixed = _product(_levels(probabilities, t.rows[P]), values, form.mixed) * t.numbers[SCALE_MIXED]
    return mixed.reshape(batch, form.heads, tokens, -1).transpose(1, 2).flatten(2)


def _product(a: Tensor, b: Tensor, halves: bool) -> Tensor:
    """Of float32 (S, rows, depth) and (S, depth, columns)."""
    return half_product(a.half(), b.half()) if halves else torch.bmm(a, b)


@torch.library.custom_op("vitq_ray::half_product", mutates_args=(), schema="(Tensor a, Tensor b) -> Tensor")
def half_product(a: Tensor, b: Tensor) -> Tensor:
    """(S, rows, depth) · (S, depth, columns) of float16, added up in float32; on GPUs, from PyTorch 2.8 on."""
    return torch.bmm(a, b, out_dtype=torch.float32)


@half_product.register_fake
def _half_product_shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:2], b.shape[2]), dtype=torch.float32)


@cache
def compiled_block() -> Run:
    """`run_block`, compiled when it is first called with such types, shapes and form; for all models of a process."""
    from torch._dynamo import config  # a second, which nobody else has to wait

    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before PyTorch 2.7
    setattr(config, limit, max(getattr(config, limit), _MOST_CODES))
    # PyTorch's advice to compute float32 products in TF32, where they would not be those of a CPU.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    return torch.compile(run_block, dynamic=False, fullgraph=True)


# Which products are exact here ---------------------------------------------------------------------------------------


class Products(NamedTuple):
    """Which products are exact on a device: int8 by `_int_mm`, float16 by `bmm`."""

    int8: bool
    half: bool

    def __str__(self) -> str:
        attention = "float16 × float16 in float32" if self.half else "float32 × float32"
        return f"int8 × int8, _int_mm; attention {attention}" if self.int8 else f"float32; attention {attention}"


def products_of(model: nn.Module, device: torch.device) -> Products:
    """What is exact on a device and used there, found out at the shapes of a quantized model, once per process."""
    block = quant_blocks(model)[0]
    weights = (block.attn.qkv.weight, block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight)
    tokens = model.patch_embed.num_patches + getattr(model, "num_prefix_tokens", 0)  # type: ignore[union-attr, operator]
    shapes = tuple(dict.fromkeys((w.shape[1], w.shape[0]) for w in weights))
    found = exact_products(device, int(tokens), shapes, block.attn.head_dim)
    return found if can_compile(model) else found._replace(half=False)  # PyTorch's blocks: attention in float32


@cache
def exact_products(device: torch.device, tokens: int, widths: tuple[tuple[int, int], ...], dim: int) -> Products:
    """Compare products of a device with integers, at extreme and at random values.

    Args:
        tokens: N.
        widths: (K, M) of linear layers.
        dim: D.
    """
    filled = tokens + -tokens % _MULTIPLE
    linear = [
        (1, rows, *width) for width in widths if not any(n % _MULTIPLE for n in width) for rows in (1, 8 * tokens)
    ]
    heads = [(12, tokens, dim, filled), (12, tokens, filled, dim)]
    half = device.type == "cuda" and all(_is_exact(_half, *shape, 255, torch.float16, device) for shape in heads)
    int8 = bool(linear) and all(_is_exact(_int8, *shape, 127, torch.int8, device) for shape in linear)
    return Products(int8, half)


def _int8(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = int8_product(a[0], b[0].t().contiguous().t())
    return product[None]


def _half(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = half_product(a, b)
    return product


def _is_exact(
    product: Callable[[Tensor, Tensor], Tensor],
    count: int,
    rows: int,
    depth: int,
    columns: int,
    high: int,
    kind: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether products of (count, rows, depth) and (count, depth, columns) are those of integers; A's levels go from
    -128 to `high`, B's from -128 to 127."""
    random = torch.Generator().manual_seed(0)
    a = torch.randint(-128, high + 1, (count, rows, depth), generator=random)
    b = torch.randint(-128, 128, (count, depth, columns), generator=random)
    expected = a.double() @ b.double()  # exact: integers below 2⁵³
    sides = [(a, b, expected)]
    for left, right in ((high, 127), (high, -128), (-128, -128), (-128, 127)):
        total = torch.tensor(float(depth * left * right), dtype=torch.float64).expand_as(expected)
        sides.append((torch.full_like(a, left), torch.full_like(b, right), total))
    try:
        return all(
            torch.equal(product(a.to(device, kind), b.to(device, kind)).cpu().double(), expected)
            for a, b, expected in sides
        )
    except (RuntimeError, TypeError, NotImplementedError) as error:  # not there in this version, or on this GPU
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        _warn_once(f"products of {kind} are not used on {device}: {type(error).__name__}: {error}")
        return False


# From a quantized model to tensors -----------------------------------------------------------------------------------


def can_compile(model: nn.Module) -> bool:
    """Whether all blocks are what `run_block` computes: LayerNorm and GELU."""
    return all(_is_common(block) for block in quant_blocks(model))


def _is_common(block: QuantBlock) -> bool:
    norms = (block.norm1, block.norm2)
    inner = (block.attn.q_norm, block.attn.k_norm)
    return (
        isinstance(block.mlp.act, nn.GELU)
        and all(isinstance(norm, nn.LayerNorm) for norm in norms)
        and all(isinstance(norm, nn.LayerNorm | nn.Identity) for norm in inner)
    )


def _is_on(quantizer: TensorQuantizer) -> bool:
    return quantizer.state is State.QUANTIZE


def _fits_int8(quantizer: TensorQuantizer) -> bool:
    low, high = quantizer.rule.levels
    return low >= -128 and high <= 127


class _Amax:
    """amax of all quantizers of a model, fetched from its device in one transfer."""

    def __init__(self, quantizers: Sequence[TensorQuantizer]) -> None:
        all_of = [quantizer.amax.detach().float().reshape(-1) for quantizer in quantizers]
        parts = torch.cat(all_of).cpu().split([len(part) for part in all_of])
        self._of = dict(zip(map(id, quantizers), parts, strict=True))

    def row(self, quantizer: TensorQuantizer, shifted: bool = False) -> Tensor:
        """(6, 1), or (6, rows) of a weight with a scale per row; `shifted`: its levels have to fit int8."""
        if not _is_on(quantizer):
            return torch.tensor(_OFF)[:, None]
        amax = self._of[id(quantizer)]
        if not torch.isfinite(amax).all():
            raise NonFiniteLogitsError("an amax has NaN or infinite values")
        low, high = quantizer.rule.levels
        step = step_of(amax, high)
        shift = low + 128 if shifted and not _fits_int8(quantizer) else 0
        return torch.stack([step.reciprocal(), step, *(torch.full_like(step, v) for v in (low, high, 1, shift))])


class _LinearPart:
    """A linear layer, or query, key and value as one: which product it is, and its weight, quantized once."""

    def __init__(self, gemms: Sequence[GemmQuantizers], layer: nn.Linear) -> None:
        self._gemms, self._layer = gemms, layer
        self._made: tuple[Any, ...] = ()
        self._made_by = self._of_weight = torch.empty(0)
        self._sums = torch.empty(0)

    def decide(self, products: Products) -> None:
        """In integers where all quantizers are on and the levels of weights fit int8."""
        pairs = [(gemm._input_quantizer, gemm._weight_quantizer) for gemm in self._gemms]
        on = all(_is_on(q) and _is_on(w) and _fits_int8(w) for q, w in pairs)
        self.integer = products.int8 and on and not any(side % _MULTIPLE for side in self._layer.weight.shape)

    def numbers(self, amax: _Amax, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the device has to be sent: quantizers of the weight's rows and of the sums (6, M), scale (M,); `row`
        (6,) is the input's."""
        each = self._layer.out_features // len(self._gemms)
        weights = torch.cat([amax.row(gemm._weight_quantizer).expand(6, each) for gemm in self._gemms], 1)
        after = torch.cat([amax.row(gemm._aftergemm_quantizer).expand(6, each) for gemm in self._gemms], 1)
        self._of_weight = weights
        return weights, after, finite_scale(row[STEP]) * finite_scale(weights[STEP])

    @property
    def _state(self) -> tuple[Any, ...]:
        weight = self._layer.weight
        return self.integer, weight.device, weight._version, weight.data_ptr()

    @property
    def _is_new(self) -> bool:
        """Whether the weight has to be quantized: it, its quantizer or the kind of the product has changed."""
        return self._made != self._state or not torch.equal(self._made_by, self._of_weight)

    def tensors(self, old: Linear | None, of_weight: Tensor, after: Tensor, scale: Tensor, shift: Tensor) -> Linear:
        """All of them on the device; the weight is `old`'s where nothing about it has changed."""
        if old is None or self._is_new:
            self._made = ()  # until it is there: what is needed for it may not fit the device's memory
            levels = _levels(self._layer.weight.detach().float(), of_weight[..., None])
            kind = torch.int8 if self.integer else torch.float32
            weight = levels.to(kind).contiguous().t()
            self._sums = levels.sum(1)
        else:
            weight = old.weight
        offset = (self._sums * shift).to(torch.int32 if self.integer else torch.float32)
        bias = torch.zeros_like(scale) if self._layer.bias is None else self._layer.bias.detach().float()
        return Linear(weight, offset, scale, bias, after)

    def taken(self) -> None:
        """The tensors are in their place."""
        self._made, self._made_by = self._state, self._of_weight

    @property
    def parameters(self) -> list[Tensor]:
        """What has to be finite."""
        bias: list[Tensor] = [] if self._layer.bias is None else [self._layer.bias]
        return [self._layer.weight, *bias] if self._is_new else bias


class _BlockPart:
    """One block: its tensors, and which code runs them."""

    def __init__(self, block: QuantBlock) -> None:
        attention, mlp, ffn = block.attn, block.mlp, block.ffn
        self._block = block
        self._activations = [block.quantizer(name) for name in _SITES]
        self._linears = {
            QKV: _LinearPart((attention.query, attention.key, attention.value), attention.qkv),
            OUT: _LinearPart((attention.out,), attention.proj),
            FC1: _LinearPart((ffn.fc1,), cast(nn.Linear, mlp.fc1)),
            FC2: _LinearPart((ffn.fc2,), cast(nn.Linear, mlp.fc2)),
        }
        self.tensors: Any = None  # BlockTensors, from the first plan on

    @property
    def quantizers(self) -> list[TensorQuantizer]:
        gemms = [gemm for gemm, _ in self._block.gemms()]
        return [*self._activations, *(q for g in gemms for q in (g._weight_quantizer, g._aftergemm_quantizer))]

    def numbers(self, amax: _Amax, products: Products) -> list[Tensor]:
        """What the device has to be sent, on the CPU, in the order in which `take` reads it."""
        block = self._block
        for linear in self._linears.values():
            linear.decide(products)
        shifted = {site for site, linear in self._linears.items() if linear.integer}
        rows = torch.cat([amax.row(q, site in shifted) for site, q in enumerate(self._activations)], 1).t().contiguous()
        step = finite_scale(rows[:, STEP])
        norms = (block.norm1, block.norm2, block.attn.q_norm, block.attn.k_norm)
        eps = [float(getattr(norm, "eps", 0)) for norm in norms]
        numbers = torch.tensor([*eps, block.attn.scale, step[Q] * step[K], step[P] * step[V]])
        of_linears = [linear.numbers(amax, rows[site]) for site, linear in self._linears.items()]
        on = [_is_on(quantizer) for quantizer in self._activations]
        scores, mixed = products.half and on[Q] and on[K], products.half and on[P] and on[V]
        self.form = Form(block.attn.num_heads, block.mlp.act.approximate == "tanh", scores, mixed)
        return [rows, numbers, *(tensor for linear in of_linears for tensor in linear)]

    @property
    def parameters(self) -> list[Tensor]:
        """What has to be finite."""
        block = self._block
        parts = (block.norm1, block.norm2, block.attn.q_norm, block.attn.k_norm, block.ls1, block.ls2)
        return [
            *(p for part in parts for p in part.parameters()),
            *(p for linear in self._linears.values() for p in linear.parameters),
        ]

    def take(self, sent: Iterator[Tensor]) -> None:
        """Take over numbers that are on the device now, weights and biases, in the memory that is there already."""
        block, old = self._block, self.tensors
        rows, numbers = next(sent), next(sent)
        before = [None] * 4 if old is None else [old.qkv, old.out, old.fc1, old.fc2]
        qkv, out, fc1, fc2 = (
            part.tensors(there, next(sent), next(sent), next(sent), rows[site, SHIFT])
            for there, (site, part) in zip(before, self._linears.items(), strict=True)
        )
        width = block.attn.proj.out_features
        device = rows.device
        q_norm, k_norm = (
            _norm(norm, device) if isinstance(norm, nn.LayerNorm) else None
            for norm in (block.attn.q_norm, block.attn.k_norm)
        )
        norms = _norm(block.norm1, device), _norm(block.norm2, device)
        gammas = _gamma(block.ls1, width, device), _gamma(block.ls2, width, device)
        new = BlockTensors(rows, numbers, *norms, q_norm, k_norm, qkv, out, fc1, fc2, *gammas)
        self.tensors = _in_place(old, new)
        for part in self._linears.values():
            part.taken()


def _norm(norm: Any, device: torch.device) -> Norm:
    gain = torch.ones(norm.normalized_shape, device=device) if norm.weight is None else norm.weight.detach().float()
    return Norm(gain, torch.zeros_like(gain) if norm.bias is None else norm.bias.detach().float())


def _gamma(scale: nn.Module, width: int, device: torch.device) -> Tensor:
    """LayerScale's factors, ones where there is none."""
    gamma = getattr(scale, "gamma", None)
    return torch.ones(width, device=device) if gamma is None else gamma.detach().float()


def _in_place(old: Any, new: Any) -> Any:
    """`new`, tensor by tensor, in the memory of `old` where that has the type and shape; else in memory of its own."""
    if new is None or new is old:
        return new
    if isinstance(new, tuple):
        return type(new)(*map(_in_place, old or [None] * len(new), new))
    if old is None or (old.shape, old.dtype, old.stride()) != (new.shape, new.dtype, new.stride()):
        return new.clone()
    return old.copy_(new)


class CompiledBlocks(nn.Module):
    """All blocks of a model in place of `model.blocks`; follows the plan that the model followed when made."""

    def __init__(self, model: nn.Module, products: Products, run: Run | None = None) -> None:
        """`run`: what runs a block; `compiled_block()` where it is None."""
        super().__init__()
        self._blocks = [_BlockPart(block) for block in quant_blocks(model)]
        self._products = products
        self._run = run or compiled_block()
        self._sizes: list[int] = []
        self.follow()

    @property
    def is_compiled(self) -> bool:
        return self._run is not run_block

    @torch.no_grad()
    def follow(self) -> None:
        """Take over scales, rules and weights as the model has them now, waiting for the device a few times.

        Raises NonFiniteLogitsError where one of them is NaN or infinite: as a level it would be a number.
        """
        with torch.inference_mode(False):  # ordinary tensors, whoever asks
            amax = _Amax([quantizer for block in self._blocks for quantizer in block.quantizers])
            numbers = [tensor for block in self._blocks for tensor in block.numbers(amax, self._products)]
            parameters = [p.detach() for block in self._blocks for p in block.parameters]
            if not torch.stack([torch.isfinite(p).all() for p in parameters]).all():
                raise NonFiniteLogitsError("a weight or a bias has NaN or infinite values")
            flat = torch.cat([tensor.reshape(-1) for tensor in numbers]).to(parameters[0].device)
            parts = zip(flat.split([tensor.numel() for tensor in numbers]), numbers, strict=True)
            sent = (part.reshape(tensor.shape) for part, tensor in parts)
            for block in self._blocks:
                block.take(sent)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, N, C)
        """An image whose input is not finite has no finite output: as levels, NaN would be numbers."""
        with torch.inference_mode(False), torch.no_grad():
            count = len(x)
            finite = torch.isfinite(x).flatten(1).all(1)[:, None, None]
            x = F.pad(x.float(), (0, 0, 0, 0, 0, self._filled(count) - count)).contiguous()
            for block in self._blocks:
                x = self._call(x, block.tensors, block.form)
            return torch.where(finite, x[:count], float("nan"))

    def _filled(self, count: int) -> int:
        """How many images are run for `count`: as many as were run before, if that is at most twice as many."""
        found = min((size for size in self._sizes if count <= size <= 2 * count), default=count)
        if found not in self._sizes:
            self._sizes.append(found)
        return found

    def _call(self, x: Tensor, tensors: BlockTensors, form: Form) -> Tensor:
        if self._run is run_block:
            return run_block(x, tensors, form)
        try:
            return self._run(x, tensors, form)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, no Triton, or what else may be missing
            _warn_once(f"blocks are not compiled on this machine and run slower: {type(error).__name__}: {error}")
            self._run = run_block
            return run_block(x, tensors, form)


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def with_compiled_blocks(model: nn.Module, blocks: nn.Module) -> nn.Module:
    """A model that shares all parts of `model` but its blocks."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, "blocks": blocks}
    return twin


# Blocks that `run_block` does not know -------------------------------------------------------------------------------


class IntegerProduct:
    """x·Wᵀ of a linear layer whose input and weight are quantized; exact but for the last multiplication."""

    def __init__(self, weight: Tensor, of_input: TensorQuantizer, of_weight: TensorQuantizer) -> None:
        if not (torch.isfinite(weight).all() and torch.isfinite(of_input.amax).all()):
            raise NonFiniteLogitsError("a weight or an amax has NaN or infinite values")
        low, high = of_weight.rule.levels
        step = step_of(of_weight.amax.detach(), high).reshape(-1, 1)
        levels = (weight.detach() * step.reciprocal()).round_().clamp_(low, high)
        self._weight = levels.to(torch.int8).contiguous().t()  # (in, out)
        of_x = step_of(of_input.amax.detach(), of_input.rule.levels[1])
        self._inverse, self._scale = of_x.reciprocal(), (finite_scale(of_x) * finite_scale(step)).flatten()

    def __call__(self, x: Tensor) -> Tensor:  # (…, in) -> (…, out)
        levels = (x * self._inverse).round_().to(torch.int8).flatten(0, -2)
        sums: Tensor = int8_product(levels, self._weight)
        return (sums.float() * self._scale).reshape(*x.shape[:-1], -1)


def _can(gemm: GemmQuantizers, weight: Tensor) -> bool:
    """Both sides are on and their levels fit int8, and the shape is one that `_int_mm` takes."""
    both = (gemm._input_quantizer, gemm._weight_quantizer)
    return all(_is_on(q) and _fits_int8(q) for q in both) and not any(side % _MULTIPLE for side in weight.shape)


@contextmanager
def integer_products(model: nn.Module) -> Iterator[None]:
    """The linear layers of a quantized model compute in integers, where they can, for as long as the context lasts."""
    gemms = [pair for block in quant_blocks(model) for pair in block.gemms()]
    try:
        for gemm, weight in gemms:
            if _can(gemm, weight):
                gemm.product = IntegerProduct(weight, gemm._input_quantizer, gemm._weight_quantizer)
        yield
    finally:
        for gemm, _ in gemms:
            gemm.product = None
