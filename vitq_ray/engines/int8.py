"""Quantized blocks executed as a plan says, in integers or in integer-valued float32, in few passes.

    levels of x ──► product ──► sums ──► · scale, quantize, + bias ──► GELU, residual, softmax ──► levels of the next

One dataflow for both arithmetics: an operand whose quantizers are on is int16 (or uint8 where the CPU has VNNI), else
float32. A plan changes numbers only, so nothing is compiled again; weights are quantized and packed when they, or their
scales, have changed. Rows are computed one by one, so a result does not depend on the images beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vitq_ray.engines import passes
from vitq_ray.engines.gemm import COLUMN_BLOCK, FLOAT, PANEL, ROW_BLOCK, aligned, pack_rows, packed, sums
from vitq_ray.measure.evaluation import NonFiniteLogitsError
from vitq_ray.quant.fake_quant import finite_scale, step_of
from vitq_ray.quant.quantizer import State, TensorQuantizer
from vitq_ray.quant.vit import GemmQuantizers, QuantBlock, quant_blocks

Array = npt.NDArray[Any]
_OFF = np.array([1, 1, 0, 0, 0], np.float32)
_ROWS_AT_ONCE = (
    1024  # tokens that go through a block together: few enough for the caches, many enough for calls to be free
)


def _floats(tensor: Tensor, what: str) -> Array:
    """A copy of a parameter as float32 numbers; NonFiniteLogitsError where one is none."""
    if not torch.isfinite(tensor).all():
        raise NonFiniteLogitsError(f"{what} has NaN or infinite values")
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="engine")


def _in_threads(work: Callable[..., None], *arguments: Sequence[Any]) -> None:
    """work(*those) for those in zip(*arguments): the first here, each other in a thread of its own."""
    first, *others = zip(*arguments, strict=True)
    waiting = [_pool(torch.get_num_threads()).submit(work, *those) for those in others]
    try:
        work(*first)
    finally:
        wait(waiting)
    for future in waiting:
        future.result()


def quantizer_row(quantizer: TensorQuantizer) -> Array:
    """What `passes` reads of an activation quantizer."""
    if quantizer.state is not State.QUANTIZE:
        return _OFF
    low, high = quantizer.rule.levels
    _floats(quantizer.amax, "an amax")
    step = step_of(quantizer.amax.detach().cpu(), high)
    return np.array([step.reciprocal(), step, low, high, 1], np.float32)


def _kinds(right: TensorQuantizer, integers: str) -> tuple[str, str]:
    """Types of both sides of a product whose quantizers are on: int8 on the right where its levels fit."""
    if integers == FLOAT:
        return FLOAT, FLOAT
    low, high = right.rule.levels
    return (integers, "int8") if low >= -128 and high <= 127 else ("int16", "int16")


def _is_on(quantizer: TensorQuantizer) -> bool:
    return quantizer.state is State.QUANTIZE


@dataclass(frozen=True)
class _Operand:
    """One side of a product: the type of its elements, and the quantizer that makes them, as `passes` reads it."""

    kind: str
    quantizer: Array

    @cached_property  # in a small model, calls cost as much as arithmetic
    def target(self) -> passes.Target:
        low = self.quantizer[passes.LOW]
        return passes.Target(self.quantizer, np.float32(-low if self.kind == "uint8" else 0))

    @cached_property
    def low(self) -> Any:
        """What a shift took away, in the type of the sums."""
        return np.float32(0) if self.kind == FLOAT else np.int32(-self.target.shift)

    @property
    def sums_kind(self) -> str:
        return FLOAT if self.kind == FLOAT else "int32"

    @cached_property
    def scale(self) -> Any:
        """What a level stands for; 0 where all levels are 0."""
        return np.float32(finite_scale(torch.tensor(self.quantizer[passes.STEP])))


def _ones(b: Array, left: _Operand) -> Array:
    """A row of ones, as long as what is packed in `b` is deep."""
    return _row_of_ones(b.shape[1] * b.shape[3], left.kind)


@cache
def _row_of_ones(depth: int, kind: str) -> Array:
    return np.ones(depth, kind)


class _Linear:
    """A linear layer made ready: packed weight, scale, offset and bias, for an operand on its left."""

    def __init__(self, quantizers: GemmQuantizers) -> None:
        self._quantizers = quantizers
        self._made: Any = None
        self.operand = _Operand(FLOAT, _OFF)

    def follow(self, weight: Tensor, bias: Tensor | None, integers: str) -> None:
        """Take over weight, bias and quantizers as they are now."""
        quantizers = self._quantizers
        self.rows, self.depth = weight.shape
        on = _is_on(quantizers._input_quantizer) and _is_on(quantizers._weight_quantizer)
        kinds = _kinds(quantizers._weight_quantizer, integers) if on else (FLOAT, FLOAT)
        self.operand, self._kind = _Operand(kinds[0], quantizer_row(quantizers._input_quantizer)), kinds[1]
        self.after = quantizer_row(quantizers._aftergemm_quantizer)
        step = self._pack(weight.detach())
        self.scale = np.ascontiguousarray(self.operand.scale * step)
        self.bias = np.zeros(self.rows, np.float32) if bias is None else _floats(bias, "a bias")
        self.offset = np.zeros(self.b.shape[0] * self.b.shape[2], self.operand.sums_kind)
        passes.column_sums(_ones(self.b, self.operand), self.b, self.operand.low, self.offset)

    def layer(self, memory: _Memory) -> passes.Layer:
        """What `passes` reads."""
        buffer = memory.sums(min(self.rows, COLUMN_BLOCK), self.operand.kind)
        return passes.Layer(self.b, buffer, self.offset, self.scale, self.after, self.bias)

    def _pack(self, weight: Tensor) -> Array:
        """Quantize and pack the weight unless that is done already; returns its steps, (rows,)."""
        quantizer = self._quantizers._weight_quantizer
        on, rule = _is_on(quantizer), quantizer.rule
        if on:
            _floats(quantizer.amax, "an amax")
        step = step_of(quantizer.amax.detach(), rule.levels[1]).reshape(-1) if on else torch.ones(1)
        made = (self.operand.kind, self._kind, on, rule, step.tolist(), weight._version, weight.data_ptr())
        if made != self._made:
            _floats(weight, "a weight")
            levels = (weight * step.reciprocal().reshape(-1, 1)).round_().clamp_(*rule.levels) if on else weight
            self.b = packed(self.rows, self.depth, self.operand.kind, self._kind)
            source = levels.to(getattr(torch, self._kind)).contiguous().numpy()
            pack_rows(source, 0, self.rows, 0, self.depth, self.b)
            self._made = made
        return np.broadcast_to(finite_scale(step).numpy(), (self.rows,))


class _Memory:
    """Arrays that one thread computes in, made when first asked for, or when more rows are."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[Any, ...], Array] = {}

    def _get(self, key: tuple[Any, ...], make: Callable[[], Array]) -> Array:
        if key not in self._arrays:
            self._arrays[key] = make()
        return self._arrays[key]

    def operand(self, name: str, rows: int, depth: int, kind: str) -> Array:
        """(rows, ≥ depth)"""
        key, wide = (name, depth, kind), -(-depth // 16) * 16
        if key not in self._arrays or len(self._arrays[key]) < rows:
            self._arrays[key] = aligned((rows, wide), kind)
        return self._arrays[key][:rows]

    def sums(self, columns: int, kind: str) -> Array:
        return self._get(("sums", columns, kind), lambda: sums(ROW_BLOCK, columns, kind))

    def packed(self, name: str, columns: int, depth: int, a: str, b: str) -> Array:
        return self._get((name, columns, depth, a, b), lambda: packed(columns, depth, a, b))

    def values(self, name: str, rows: int, columns: int) -> Array:
        """(rows, columns)"""
        return self._get((name, rows, columns), lambda: aligned((rows, columns), FLOAT))


class _Norm:
    """LayerNorm with the quantizer before it; any other norm runs as the module that it is."""

    def __init__(self, norm: nn.Module, before: TensorQuantizer) -> None:
        self._norm, self._before = norm, before

    def follow(self) -> None:
        self.before = quantizer_row(self._before)
        self.fused = isinstance(self._norm, nn.LayerNorm)
        if isinstance(self._norm, nn.LayerNorm):
            (width,) = self._norm.normalized_shape
            gain, bias = self._norm.weight, self._norm.bias
            self.gain = np.ones(width, np.float32) if gain is None else _floats(gain, "a gain")
            self.bias = np.zeros(width, np.float32) if bias is None else _floats(bias, "a bias")
            self.eps = np.float32(self._norm.eps)

    def __call__(self, x: Array, to: _Operand, row: Array, out: Array) -> None:
        """x (M, C) -> out (M, ≥ C) levels"""
        if self.fused:
            passes.normalize(x, self.before, self.eps, self.gain, self.bias, to.target, row, out)
            return
        seen = x.copy()
        passes.quantize(seen, self.before)
        passes.to_levels(self._norm(torch.from_numpy(seen)).contiguous().numpy(), to.target, out)


def _gamma(scale: nn.Module, width: int) -> Array:
    """LayerScale's factors, ones where there is none."""
    gamma = getattr(scale, "gamma", None)
    return np.ones(width, np.float32) if gamma is None else _floats(gamma, "a LayerScale")


class FusedBlock:
    """One block."""

    def __init__(self, block: QuantBlock) -> None:
        attention, mlp = block.attn, block.mlp
        self._block = block
        self._qkv = [_Linear(gemm) for gemm in (attention.query, attention.key, attention.value)]
        self._out, self._fc1, self._fc2 = (_Linear(gemm) for gemm in (attention.out, block.ffn.fc1, block.ffn.fc2))
        self._norm1 = _Norm(block.norm1, block.layernorm_input1_quantizer)
        self._norm2 = _Norm(block.norm2, block.layernorm_input2_quantizer)
        self._gelu = isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none"
        self._heads, self._dim, self._root = attention.num_heads, attention.head_dim, np.float32(attention.scale)

    def follow(self, integers: str) -> None:
        """Take over quantizers and weights as they are now; `integers` is the type of operands that are levels."""
        block, attention, mlp = self._block, self._block.attn, self._block.mlp
        weights = attention.qkv.weight.chunk(3)
        biases = (None, None, None) if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
        for part, weight, bias in zip(self._qkv, weights, biases, strict=True):
            part.follow(weight, bias, integers)
        for part, layer in ((self._out, attention.proj), (self._fc1, mlp.fc1), (self._fc2, mlp.fc2)):
            part.follow(layer.weight, layer.bias, integers)
        self._norm1.follow()
        self._norm2.follow()
        of_q, of_k, of_v, of_p = (getattr(attention, f"matmul_{name}_input_quantizer") for name in ("q", "k", "v", "a"))
        self._q, self._k = self._pair(of_q, of_k, integers)
        self._p, self._v = self._pair(of_p, of_v, integers)
        self._scores = quantizer_row(attention.softmax_input_quantizer)
        self._residual = [
            quantizer_row(q) for q in (block.add1_residual_input_quantizer, block.add2_residual_input_quantizer)
        ]
        self._local = [quantizer_row(q) for q in (block.add1_local_input_quantizer, block.add2_local_input_quantizer)]
        width = self._out.rows
        self._scales = [_gamma(block.ls1, width), _gamma(block.ls2, width)]

    @staticmethod
    def _pair(left: TensorQuantizer, right: TensorQuantizer, integers: str) -> tuple[_Operand, _Operand]:
        """Both operands of a product of activations; int8 on the right where its levels fit."""
        if not (_is_on(left) and _is_on(right)):
            return _Operand(FLOAT, quantizer_row(left)), _Operand(FLOAT, quantizer_row(right))
        kinds = _kinds(right, integers)
        return _Operand(kinds[0], quantizer_row(left)), _Operand(kinds[1], quantizer_row(right))

    def run(self, x: Array, tokens: int, memory: _Memory) -> None:
        """x: (images · tokens, C) float32, in place."""
        row = memory.values("row", 1, max(tokens, x.shape[1]))[0]
        self._attend(x, tokens, memory, row)
        self._feed_forward(x, memory, row)

    def _attend(self, x: Array, tokens: int, memory: _Memory, row: Array) -> None:
        count, width = x.shape[0], self._out.depth
        read = self._qkv[0].operand
        a = memory.operand("input", count, x.shape[1], read.kind)
        self._norm1(x, read, row, a)
        parts = []
        norms = (self._block.attn.q_norm, self._block.attn.k_norm, None)
        for name, layer, norm, to in zip("qkv", self._qkv, norms, (self._q, self._k, self._v), strict=True):
            out = memory.operand(name, count, width, to.kind)
            if layer.operand.kind != read.kind:  # its weight is in float
                a_here = memory.operand("input of " + name, count, x.shape[1], layer.operand.kind)
                self._norm1(x, layer.operand, row, a_here)
            else:
                a_here = a
            self._project(layer, a_here, norm, to, memory, out)
            parts.append(out)
        mixed = memory.operand("mixed", count, width, self._out.operand.kind)
        q, k, v = parts
        passes.attention(
            q,
            k,
            v,
            tokens,
            self._heads,
            self._dim,
            self._product("k", tokens, self._dim, self._q, self._k, memory),
            self._scores,
            self._root,
            memory.operand("p", ROW_BLOCK, tokens, self._p.kind),
            self._p.target,
            self._product("v", self._dim, tokens, self._p, self._v, memory),
            self._out.operand.target,
            row,
            mixed,
        )
        self._add(self._out, mixed, 0, memory, x)

    @staticmethod
    def _product(
        name: str, columns: int, depth: int, left: _Operand, right: _Operand, memory: _Memory
    ) -> passes.Product:
        """A product of activations, whose right side is packed head by head."""
        b = memory.packed(name, columns, depth, left.kind, right.kind)
        offset = memory.operand(f"offset of {name}", 1, b.shape[0] * b.shape[2], left.sums_kind)[0]
        scale = np.float32(left.scale * right.scale)
        return passes.Product(b, memory.sums(columns, left.kind), offset, left.low, _ones(b, left), scale)

    def _project(
        self, layer: _Linear, a: Array, norm: nn.Module | None, to: _Operand, memory: _Memory, out: Array
    ) -> None:
        """q, k or v: -> out (M, C) levels."""
        if norm is None or isinstance(norm, nn.Identity):
            passes.linear_to_levels(a, layer.layer(memory), False, to.target, out)
            return
        y = np.empty((len(a), layer.rows), np.float32)
        passes.linear(a, layer.layer(memory), y)
        heads = norm(torch.from_numpy(y).unflatten(1, (self._heads, self._dim)))
        passes.to_levels(heads.flatten(1).contiguous().numpy(), to.target, out)

    def _feed_forward(self, x: Array, memory: _Memory, row: Array) -> None:
        fc1, to = self._fc1, self._fc2.operand
        a = memory.operand("input", len(x), x.shape[1], fc1.operand.kind)
        self._norm2(x, fc1.operand, row, a)
        hidden = memory.operand("hidden", len(x), fc1.rows, to.kind)
        if self._gelu:
            passes.linear_to_levels(a, fc1.layer(memory), True, to.target, hidden)
        else:
            y = np.empty((len(x), fc1.rows), np.float32)
            passes.linear(a, fc1.layer(memory), y)
            passes.to_levels(self._block.mlp.act(torch.from_numpy(y)).contiguous().numpy(), to.target, hidden)
        self._add(self._fc2, hidden, 1, memory, x)

    def _add(self, layer: _Linear, a: Array, branch: int, memory: _Memory, x: Array) -> None:
        """The last layer of a branch, added to x."""
        local, residual = self._local[branch], self._residual[branch]
        passes.linear_to_residual(a, layer.layer(memory), self._scales[branch], local, residual, x)


class FusedBlocks(nn.Module):
    """All blocks of a model in place of `model.blocks`; follows the plan that the model followed when made."""

    def __init__(self, model: nn.Module, integers: str) -> None:
        """`integers`: type of operands that are levels, `uint8` or `int16`; `float32` for none."""
        super().__init__()
        self._blocks = [FusedBlock(block) for block in quant_blocks(model)]
        self._integers = integers
        self._memories: list[_Memory] = []
        self.follow()

    def follow(self) -> None:
        """Take over scales, rules and weights as the model has them now.

        Raises NonFiniteLogitsError where one of them is NaN or infinite: as a level it would be a number.
        """
        for block in self._blocks:
            block.follow(self._integers)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, N, C)
        """With as many threads as PyTorch has, each with images of its own."""
        if not torch.isfinite(x).all():
            raise NonFiniteLogitsError("what the blocks are given has NaN or infinite values")
        count, tokens, width = x.shape
        values = x.detach().float().contiguous().clone().numpy()
        images = max(1, _ROWS_AT_ONCE // tokens)
        threads = min(torch.get_num_threads(), count)
        self._memories += [_Memory() for _ in range(threads - len(self._memories))]

        @torch.no_grad()  # each thread has a mode of its own
        def run(part: Array, memory: _Memory) -> None:
            for start in range(0, len(part), images):
                rows = part[start : start + images].reshape(-1, width)
                for block in self._blocks:
                    block.run(rows, tokens, memory)

        _in_threads(run, np.array_split(values, threads), self._memories[:threads])
        return torch.from_numpy(values)


class RowLinear(nn.Module):
    """A linear layer in float32, or a convolution of patches, whose rows do not depend on the rows beside them.

    A library's product may sum up in another order for another number of rows; a rounding that then falls to the other
    side is a step of a quantizer, and changes an image for good.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self._layer = [layer]  # not a submodule: it is the caller's
        self._packed_of: Any = None
        self._memories: list[_Memory] = []

    def forward(self, x: Tensor) -> Tensor:  # (…, K) -> (…, N), or (B, C, H, W) -> (B, N, H / patch, W / patch)
        layer = self._layer[0]
        if isinstance(layer, nn.Linear):
            y = torch.from_numpy(self._rows(x.flatten(0, -2).float().numpy()))
            return y.reshape(*x.shape[:-1], -1)
        high, wide = layer.kernel_size
        x = x[..., : x.shape[2] // high * high, : x.shape[3] // wide * wide]
        patches = x.float().unflatten(3, (-1, wide)).unflatten(2, (-1, high)).permute(0, 2, 4, 1, 3, 5)
        y = torch.from_numpy(self._rows(patches.flatten(3).flatten(0, 2).numpy()))
        return y.reshape(*patches.shape[:3], -1).permute(0, 3, 1, 2)

    def _rows(self, rows: Array) -> Array:
        """(M, K) -> (M, N), with as many threads as PyTorch has."""
        self._follow()
        out = np.empty((len(rows), len(self._bias)), np.float32)

        def run(rows: Array, out: Array, memory: _Memory) -> None:
            a = memory.operand("rows", len(rows), rows.shape[1], FLOAT)
            a[:, : rows.shape[1]] = rows
            buffer = memory.sums(min(len(self._bias), COLUMN_BLOCK), FLOAT)
            passes.linear(a, passes.Layer(self._b, buffer, self._zeros, self._ones, _OFF, self._bias), out)

        threads = max(1, min(torch.get_num_threads(), len(rows) // ROW_BLOCK))
        self._memories += [_Memory() for _ in range(threads - len(self._memories))]
        _in_threads(run, np.array_split(rows, threads), np.array_split(out, threads), self._memories[:threads])
        return out

    def _follow(self) -> None:
        """Take over weight and bias as they are now."""
        weight, bias = self._layer[0].weight, self._layer[0].bias
        now = (weight._version, weight.data_ptr())
        if now != self._packed_of:
            values = weight.detach().float().flatten(1).contiguous().numpy()
            count, depth = values.shape
            self._b = packed(count, depth, FLOAT, FLOAT)
            pack_rows(values, 0, count, 0, depth, self._b)
            self._zeros, self._ones = np.zeros(self._b.shape[0] * PANEL[FLOAT], np.float32), np.ones(count, np.float32)
            self._packed_of = now
        self._bias = self._zeros[: len(self._ones)] if bias is None else bias.detach().float().numpy()


def with_blocks(model: nn.Module, blocks: nn.Module) -> nn.Module:
    """A model that shares all parts of `model` but its blocks, and computes row by row before and after them, too."""
    parts: dict[str, Any] = {"blocks": blocks}
    if type(model.head) is nn.Linear:
        parts["head"] = RowLinear(model.head)
    embed = model.patch_embed
    if type(embed) is PatchEmbed and embed.proj.kernel_size == embed.proj.stride and embed.proj.groups == 1:
        parts["patch_embed"] = _with(embed, proj=RowLinear(embed.proj))
    return _with(model, **parts)


def _with(module: nn.Module, **parts: nn.Module) -> nn.Module:
    """The module with other submodules; all else is shared."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **parts}
    return twin
