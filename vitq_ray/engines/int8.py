"""Quantized blocks executed as a plan says, in integers or in integer-valued float32, in few passes.

    levels of x ──► product ──► sums ──► · scale, quantize, + bias ──► GELU, residual, softmax ──► levels of what reads it

One dataflow for both arithmetics: an operand whose quantizers are on is int16 (or uint8 where the CPU has VNNI), else
float32. A plan changes numbers only, so nothing is compiled again; weights are quantized and packed when they, or their
scales, have changed. Rows are computed one by one, so a result does not depend on the images beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vitq_ray.engines import passes
from vitq_ray.engines.gemm import ROW_BLOCK, aligned, pack_rows, packed, sums
from vitq_ray.quant.fake_quant import step_of
from vitq_ray.quant.quantizer import State, TensorQuantizer
from vitq_ray.quant.vit import GemmQuantizers, QuantBlock, quant_blocks

Array = npt.NDArray[Any]
FLOAT = "float32"
_OFF = np.array([1, 1, 0, 0, 0], np.float32)


def quantizer_row(quantizer: TensorQuantizer) -> Array:
    """What `passes` reads of an activation quantizer."""
    if quantizer.state is not State.QUANTIZE:
        return _OFF
    low, high = quantizer.rule.levels
    step = step_of(quantizer.amax.detach().cpu(), high)
    return np.array([step.reciprocal(), step, low, high, 1], np.float32)


def _is_on(quantizer: TensorQuantizer) -> bool:
    return quantizer.state is State.QUANTIZE


@dataclass
class _Operand:
    """What a product takes on its left: the type, the quantizer that makes it, and what is added to its levels."""

    kind: str
    row: Array

    @property
    def shift(self) -> np.float32:
        return np.float32(-self.row[passes.LOW] if self.kind == "uint8" else 0)

    @property
    def low(self) -> Any:
        """What the shift took away, in the type of the sums."""
        return np.float32(0) if self.kind == FLOAT else np.int32(-self.shift)

    @property
    def step(self) -> np.float32:
        return np.float32(self.row[passes.STEP])


class _Linear:
    """A linear layer made ready: packed weight, scale, offset and bias, for an operand on its left."""

    def __init__(self, weight: Tensor, bias: Tensor | None, quantizers: GemmQuantizers) -> None:
        self._weight, self._quantizers = weight, quantizers
        self.rows, self.depth = weight.shape
        self._bias = bias
        self._made: Any = None
        self.operand = _Operand(FLOAT, _OFF)

    def follow(self, integers: str) -> None:
        """Take over the quantizers as they are now."""
        quantizers = self._quantizers
        on = _is_on(quantizers._input_quantizer) and _is_on(quantizers._weight_quantizer)
        self.operand = _Operand(integers if on else FLOAT, quantizer_row(quantizers._input_quantizer))
        self.after = quantizer_row(quantizers._aftergemm_quantizer)
        step = self._pack()
        self.scale = np.ascontiguousarray(self.operand.step * step)
        self.bias = np.zeros(self.rows, np.float32) if self._bias is None else self._bias.detach().float().cpu().numpy()
        self.offset = np.zeros(self.b.shape[0] * self.b.shape[2], FLOAT if self.operand.kind == FLOAT else np.int32)
        passes.column_sums(self.b, self.operand.low, self.offset)

    def _pack(self) -> Array:
        """Quantize and pack the weight unless that is done already; returns its steps, (rows,)."""
        quantizer, weight = self._quantizers._weight_quantizer, self._weight.detach()
        on, rule = _is_on(quantizer), quantizer.rule
        step = step_of(quantizer.amax.detach(), rule.levels[1]).reshape(-1) if on else torch.ones(1)
        made = (self.operand.kind, on, rule, step.tolist(), self._weight._version, self._weight.data_ptr())
        if made != self._made:
            levels = (weight * step.reciprocal().reshape(-1, 1)).round_().clamp_(*rule.levels) if on else weight
            kind = FLOAT if self.operand.kind == FLOAT else "int8"
            self.b = packed(self.rows, self.depth, self.operand.kind, kind)
            source = levels.to(torch.float32 if kind == FLOAT else torch.int8).contiguous().numpy()
            pack_rows(source, 0, self.rows, 0, self.depth, self.b)
            self._made = made
        return np.broadcast_to(step.numpy(), (self.rows,))


class _Memory:
    """Arrays that one thread computes in, made when first asked for."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, int], Array] = {}

    def _get(self, name: str, make: Callable[[], Array], *shape: int | str) -> Array:
        key = (name, hash(shape))
        if key not in self._arrays:
            self._arrays[key] = make()
        return self._arrays[key]

    def operand(self, name: str, rows: int, depth: int, kind: str) -> Array:
        """(rows, ≥ depth)"""
        wide = -(-depth // 16) * 16
        return self._get(name, lambda: aligned((rows, wide), kind), rows, wide, kind)

    def sums(self, columns: int, kind: str) -> Array:
        return self._get("sums", lambda: sums(ROW_BLOCK, columns, kind), columns, kind)

    def packed(self, name: str, columns: int, depth: int, a: str, b: str) -> Array:
        return self._get(name, lambda: packed(columns, depth, a, b), columns, depth, a, b)

    def values(self, name: str, rows: int, columns: int) -> Array:
        return self._get(name, lambda: aligned((rows, columns), FLOAT), rows, columns)


class _Norm:
    """LayerNorm with the quantizer before it; any other norm runs as the module that it is."""

    def __init__(self, norm: nn.Module, before: TensorQuantizer) -> None:
        self._norm, self._before = norm, before

    def follow(self) -> None:
        self.before = quantizer_row(self._before)
        self.fused = isinstance(self._norm, nn.LayerNorm)
        if self.fused:
            (width,) = self._norm.normalized_shape
            gain, bias = self._norm.weight, self._norm.bias
            self.gain = np.ones(width, np.float32) if gain is None else gain.detach().float().numpy()
            self.bias = np.zeros(width, np.float32) if bias is None else bias.detach().float().numpy()
            self.eps = np.float32(self._norm.eps)

    def __call__(self, x: Array, to: _Operand, row: Array, out: Array) -> None:
        """x (M, C) -> out (M, ≥ C) levels"""
        if self.fused:
            passes.normalize(x, self.before, self.eps, self.gain, self.bias, to.row, to.shift, row, out)
            return
        seen = x.copy()
        passes.quantize(seen, self.before)
        passes.to_levels(self._norm(torch.from_numpy(seen)).contiguous().numpy(), to.row, to.shift, out)


def _gamma(scale: nn.Module, width: int) -> Array:
    """LayerScale's factors, ones where there is none."""
    gamma = getattr(scale, "gamma", None)
    return np.ones(width, np.float32) if gamma is None else gamma.detach().float().cpu().numpy()


class FusedBlock:
    """One block."""

    def __init__(self, block: QuantBlock) -> None:
        attention, mlp = block.attn, block.mlp
        self._block = block
        weights = attention.qkv.weight.chunk(3)
        biases = (None, None, None) if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
        gemms = (attention.query, attention.key, attention.value)
        self._qkv = [_Linear(w, b, g) for w, b, g in zip(weights, biases, gemms, strict=True)]
        self._out = _Linear(attention.proj.weight, attention.proj.bias, attention.out)
        self._fc1 = _Linear(mlp.fc1.weight, mlp.fc1.bias, block.ffn.fc1)
        self._fc2 = _Linear(mlp.fc2.weight, mlp.fc2.bias, block.ffn.fc2)
        self._norm1 = _Norm(block.norm1, block.layernorm_input1_quantizer)
        self._norm2 = _Norm(block.norm2, block.layernorm_input2_quantizer)
        self._gelu = isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none"
        self._heads, self._dim, self._root = attention.num_heads, attention.head_dim, np.float32(attention.scale)

    def follow(self, integers: str) -> None:
        """Take over quantizers and weights as they are now; `integers` is the type of operands that are levels."""
        block, attention = self._block, self._block.attn
        for part in (*self._qkv, self._out, self._fc1, self._fc2):
            part.follow(integers)
        self._norm1.follow()
        self._norm2.follow()
        of_q, of_k, of_v, of_p = (
            getattr(attention, f"matmul_{name}_input_quantizer") for name in ("q", "k", "v", "a")
        )
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
        low, high = right.rule.levels
        narrow = low >= -128 and high <= 127
        if integers == FLOAT:
            kinds = (FLOAT, FLOAT)
        else:
            kinds = (integers, "int8") if narrow else ("int16", "int16")
        return _Operand(kinds[0], quantizer_row(left)), _Operand(kinds[1], quantizer_row(right))

    def run(self, x: Array, tokens: int, memory: _Memory) -> None:
        """x: (images · tokens, C) float32, in place."""
        row = memory.values("row", 1, max(self._fc1.rows, tokens, x.shape[1]))[0]
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
            self._project(layer, a_here, norm, to, memory, row, out)
            parts.append(out)
        to = self._out.operand
        mixed = memory.operand("mixed", count, width, to.kind)
        passes.attention(
            *parts,
            tokens,
            self._heads,
            self._dim,
            memory.packed("k", tokens, self._dim, self._q.kind, self._k.kind),
            memory.packed("v", self._dim, tokens, self._p.kind, self._v.kind),
            memory.sums(tokens, self._q.kind),
            memory.operand("p", ROW_BLOCK, tokens, self._p.kind),
            memory.sums(self._dim, self._p.kind),
            self._offset(memory, "k", tokens, self._q),
            self._offset(memory, "v", self._dim, self._p),
            self._q.low,
            self._p.low,
            self._q.step * self._k.step,
            self._scores,
            self._root,
            self._p.row,
            self._p.shift,
            self._p.step * self._v.step,
            to.row,
            to.shift,
            row,
            mixed,
        )
        self._add(self._out, mixed, 0, memory, row, x)

    @staticmethod
    def _offset(memory: _Memory, name: str, columns: int, operand: _Operand) -> Array:
        kind = FLOAT if operand.kind == FLOAT else "int32"
        return memory.operand(f"offset of {name}", 1, columns + 32, kind)[0]

    def _project(
        self, layer: _Linear, a: Array, norm: nn.Module | None, to: _Operand, memory: _Memory, row: Array, out: Array
    ) -> None:
        """q, k or v: -> out (M, C) levels."""
        buffer = memory.sums(layer.rows, layer.operand.kind)
        if norm is None or isinstance(norm, nn.Identity):
            passes.linear_to_levels(
                a, layer.b, buffer, layer.offset, layer.scale, layer.after, layer.bias, False, to.row, to.shift, row, out
            )
            return
        y = memory.values("projected", len(a), layer.rows)
        passes.linear(a, layer.b, buffer, layer.offset, layer.scale, layer.after, layer.bias, y)
        heads = norm(torch.from_numpy(y).unflatten(1, (self._heads, self._dim)))
        passes.to_levels(heads.flatten(1).contiguous().numpy(), to.row, to.shift, out)

    def _feed_forward(self, x: Array, memory: _Memory, row: Array) -> None:
        fc1, to = self._fc1, self._fc2.operand
        a = memory.operand("input", len(x), x.shape[1], fc1.operand.kind)
        self._norm2(x, fc1.operand, row, a)
        hidden = memory.operand("hidden", len(x), fc1.rows, to.kind)
        buffer = memory.sums(fc1.rows, fc1.operand.kind)
        if self._gelu:
            passes.linear_to_levels(
                a, fc1.b, buffer, fc1.offset, fc1.scale, fc1.after, fc1.bias, True, to.row, to.shift, row, hidden
            )
        else:
            y = memory.values("hidden values", len(x), fc1.rows)
            passes.linear(a, fc1.b, buffer, fc1.offset, fc1.scale, fc1.after, fc1.bias, y)
            active = self._block.mlp.act(torch.from_numpy(y))
            passes.to_levels(active.contiguous().numpy(), to.row, to.shift, hidden)
        self._add(self._fc2, hidden, 1, memory, row, x)

    def _add(self, layer: _Linear, a: Array, branch: int, memory: _Memory, row: Array, x: Array) -> None:
        """The last layer of a branch, added to x."""
        passes.linear_to_residual(
            a,
            layer.b,
            memory.sums(layer.rows, layer.operand.kind),
            layer.offset,
            layer.scale,
            layer.after,
            layer.bias,
            self._scales[branch],
            self._local[branch],
            self._residual[branch],
            row,
            x,
        )


class FusedBlocks(nn.Module):
    """All blocks of a model in place of `model.blocks`; follows the plan that the model followed when made."""

    def __init__(self, model: nn.Module, integers: str) -> None:
        super().__init__()
        self._blocks = [FusedBlock(block) for block in quant_blocks(model)]
        self._integers = integers
        self._memories: list[_Memory] = []
        self._pool: ThreadPoolExecutor | None = None
        self.follow()

    def follow(self) -> None:
        """Take over scales, rules and weights as the model has them now."""
        for block in self._blocks:
            block.follow(self._integers)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, N, C)
        count, tokens, width = x.shape
        values = x.detach().float().contiguous().clone().numpy()
        threads = min(torch.get_num_threads(), count)
        bounds = np.linspace(0, count, threads + 1).astype(int)
        while len(self._memories) < threads:
            self._memories.append(_Memory())

        def run(part: int) -> None:
            rows = values[bounds[part] : bounds[part + 1]].reshape(-1, width)
            for block in self._blocks:
                block.run(rows, tokens, self._memories[part])

        if threads == 1:
            run(0)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(run, range(threads)))
        return torch.from_numpy(values)


def with_blocks(model: nn.Module, blocks: nn.Module) -> nn.Module:
    """A model that shares all parts of `model` but its blocks."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, "blocks": blocks}
    return twin
