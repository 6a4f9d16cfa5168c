"""Matrix products of quantized operands, exact, compiled at run time by numba for the CPU they run on.

    C[m, n] = Σ_k A[m, k] · B[n, k]

A lies in memory row by row. B is packed once, in panels of `PANEL` columns whose elements are in the order in which the
inner loop reads them. The inner loop keeps a tile of C in registers; it is written in LLVM's own language, since no
compiler finds it from a loop. Which arithmetic it uses follows from the types of A and B:

| A       | B            | instruction          | exact because                                                        |
|---------|--------------|----------------------|----------------------------------------------------------------------|
| int16   | int8, int16  | vpmaddwd (AVX2)      | products of 16 bits are added in 32                                  |
| uint8   | int8         | vpdpbusd (VNNI)      | four products are added in 32 bits, without the step through 16      |
| uint8   | int8         | tdpbusd (AMX)        | the same, 16 rows, 16 columns and 64 steps of k at a time            |
| float32 | float32      | fused multiply-add   | for integers: as long as no sum passes 2²⁴; rounded like any sgemm   |

Products of uint8 and int8 by vpmaddubsw, which libraries use on CPUs without VNNI, are not here: their sums of two
saturate at 16 bits (255 · 127 · 2 > 2¹⁵).

AMX multiplies registers that are small matrices, `tiles`. Each thread says how large they are before it uses them
(`begin_products`) and gives them back (`end_products`); the operating system has to allow them once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
import numpy.typing as npt
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vitq_ray.base.instructions import HAS_AMX, HAS_AVX2, HAS_AVX512, HAS_AVX512_VNNI, HAS_VNNI
from vitq_ray.base.kernels import compiled, compiled_with

FLOAT = "float32"
_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


INTEGERS = {  # operands, fastest first
    "uint8": f"uint8 × int8, {'tdpbusd' if HAS_AMX else 'vpdpbusd'}",
    "int16": "int16 × int8, vpmaddwd",
}
_LANES = {"int16": 16 if HAS_AVX512 else 8, "float32": 16 if HAS_AVX512 else 8, "uint8": 16 if HAS_AVX512_VNNI else 8}
PANEL = {kind: 2 * lanes for kind, lanes in _LANES.items()}  # columns, by the type of A
_GROUP = {"int16": 2, "float32": 1, "uint8": 4}  # neighbours along k that one lane of a vector holds
_UNROLL = 2
_TILE = 16  # rows and columns of one tile of AMX, and its steps of k of four bytes
_STEPS = {"int16": _UNROLL, "float32": _UNROLL, "uint8": _TILE if HAS_AMX else _UNROLL}  # that a loop makes at once
_ROWS = 6  # of a block of sums; 6 rows of two vectors are twelve sums, three quarters of the registers of AVX2
_ROWS_512 = 12  # twice as many registers
_HEIGHT = tuple(_ROWS_512 if _LANES.get(kind) == 16 else _ROWS for kind in ("", "uint8", "int16", "", "float32"))
# Rows that are multiplied at once, by the bytes of an element of A; fewer cost as much.
ROWS_AT_ONCE = tuple(_TILE if HAS_AMX and size == 1 else height for size, height in enumerate(_HEIGHT))
COLUMN_BLOCK = 512  # columns of B that all rows of A are multiplied with before the next: they stay in the cache
ROW_BLOCK = 48  # rows of A, at most, that are multiplied with those columns before the next rows


class _Arithmetic:
    """One row of the table above as LLVM instructions: reading B, spreading A, multiplying both."""

    def __init__(self, a: str, b: str) -> None:
        self.a, self.b = a, b
        self.lanes = _LANES[a]
        self.vectors = PANEL[a] // self.lanes
        self.sums = ir.VectorType(_F32 if a == "float32" else _I32, self.lanes)
        self.vector_bytes = {"int8": 1, "int16": 2, "float32": 4}[b] * self.lanes * _GROUP[a]

    def load(self, builder: Any, address: Any) -> Any:
        """One vector of B: (lanes, group) elements."""
        elements = self.lanes * _GROUP[self.a]
        kind = ir.VectorType({"int8": _I8, "int16": _I16, "float32": _F32}[self.b], elements)
        vector = _load(builder, address, kind, 16)
        if self.a == "int16" and self.b == "int8":
            return builder.sext(vector, ir.VectorType(_I16, elements))
        return vector

    def spread(self, builder: Any, address: Any) -> Any:
        """The same `group` elements of A in every lane."""
        scalar = _load(builder, address, _F32 if self.a == "float32" else _I32, 4 if self.a == "float32" else 1)
        empty = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        one = builder.insert_element(empty, scalar, ir.Constant(_I32, 0))
        return builder.shuffle_vector(one, empty, ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes))

    def multiply_add(self, builder: Any, sums: Any, a: Any, b: Any) -> Any:
        """sums + the products of each lane's group."""
        if self.a == "float32":
            return _call(builder, f"llvm.fma.v{self.lanes}f32", self.sums, [a, b, sums])
        if self.a == "uint8" and HAS_VNNI:
            b = builder.bitcast(b, self.sums)
            return _call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", self.sums, [sums, a, b])
        if self.a == "int16" and HAS_AVX2:
            a = builder.bitcast(a, b.type)
            name = "llvm.x86.avx512.pmaddw.d.512" if self.lanes == 16 else "llvm.x86.avx2.pmadd.wd"
            return builder.add(sums, _call(builder, name, self.sums, [a, b]))
        return self._spelled_out(builder, sums, builder.bitcast(a, b.type), b)

    def _spelled_out(self, builder: Any, sums: Any, a: Any, b: Any) -> Any:
        """For CPUs without the instruction: widen, multiply, add neighbours."""
        group = _GROUP[self.a]
        wide = ir.VectorType(_I32, self.lanes * group)
        products = builder.mul((builder.zext if self.a == "uint8" else builder.sext)(a, wide), builder.sext(b, wide))
        for place in range(group):
            chosen = ir.Constant(ir.VectorType(_I32, self.lanes), [lane * group + place for lane in range(self.lanes)])
            sums = builder.add(sums, builder.shuffle_vector(products, products, chosen))
        return sums


def _load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _tile_code(arithmetic: _Arithmetic, rows: int) -> Any:
    """Code generator of one tile: C[rows, PANEL] = A[rows, :] · one panel of B, over `steps` groups of k."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, a, a_stride, b, c, c_stride, steps = arguments

        def plus(address: Any, bytes_: int) -> Any:
            return builder.add(address, ir.Constant(_I64, bytes_))

        tile = [(row, vector) for row in range(rows) for vector in range(arithmetic.vectors)]
        begin, loop, end = builder.block, builder.append_basic_block("k"), builder.append_basic_block("store")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_I64)
        step.add_incoming(ir.Constant(_I64, 0), begin)
        sums = {}
        for place in tile:
            sums[place] = builder.phi(arithmetic.sums)
            sums[place].add_incoming(ir.Constant(arithmetic.sums, None), begin)
        step_bytes = arithmetic.vector_bytes * arithmetic.vectors
        a_bytes = _GROUP[arithmetic.a] * {"int16": 2, "uint8": 1, "float32": 4}[arithmetic.a]
        b_here = builder.add(b, builder.mul(step, ir.Constant(_I64, step_bytes)))
        a_here = builder.add(a, builder.mul(step, ir.Constant(_I64, a_bytes)))
        of_row = [builder.add(a_here, builder.mul(a_stride, ir.Constant(_I64, row))) for row in range(rows)]
        new = dict(sums)
        for ahead in range(_UNROLL):
            columns = [
                arithmetic.load(builder, plus(b_here, ahead * step_bytes + vector * arithmetic.vector_bytes))
                for vector in range(arithmetic.vectors)
            ]
            for row in range(rows):
                value = arithmetic.spread(builder, plus(of_row[row], ahead * a_bytes))
                for vector in range(arithmetic.vectors):
                    new[row, vector] = arithmetic.multiply_add(builder, new[row, vector], value, columns[vector])
        following = builder.add(step, ir.Constant(_I64, _UNROLL))
        step.add_incoming(following, loop)
        for place in tile:
            sums[place].add_incoming(new[place], loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, end)
        builder.position_at_end(end)
        for row, vector in tile:
            address = builder.add(c, builder.mul(c_stride, ir.Constant(_I64, row)))
            pointer = builder.inttoptr(plus(address, vector * 4 * arithmetic.lanes), arithmetic.sums.as_pointer())
            builder.store(new[row, vector], pointer).align = 4
        return context.get_dummy_value()

    return generate


def _tile(rows: int, rows_512: int) -> Any:
    @intrinsic
    def tile(typing: Any, a: Any, b: Any, a0: Any, a_stride: Any, b0: Any, c0: Any, c_stride: Any, steps: Any) -> Any:
        arithmetic = _Arithmetic(a.dtype.name, b.dtype.name)
        height = rows_512 if arithmetic.lanes == 16 else rows
        return types.void(a, b, *[types.int64] * 6), _tile_code(arithmetic, height)

    return tile


_tall, _flat = _tile(_ROWS, _ROWS_512), _tile(1, 1)


# Tiles of AMX: 0 to 3 are sums of 16 rows and 16 columns, 4 and 5 rows of A, 6 and 7 columns of B ---------------------


def _tiles(high: int) -> Any:
    """C[16 · high, 32] = A[16 · high, :] · one panel of B, by tiles."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, a_stride, b, c, c_stride, steps = arguments
        i8, i64, pointer, nothing = _I8, _I64, _I8.as_pointer(), ir.VoidType()

        def at(address: Any, bytes_: Any) -> Any:
            return builder.inttoptr(builder.add(address, bytes_), pointer)

        def load(tile: int, address: Any, stride: Any) -> None:
            _call(builder, "llvm.x86.tileloadd64", nothing, [ir.Constant(i8, tile), address, stride])

        places = [(row, column) for row in range(high) for column in range(2)]
        for row, column in places:
            _call(builder, "llvm.x86.tilezero", nothing, [ir.Constant(i8, 2 * row + column)])
        begin, loop, end = builder.block, builder.append_basic_block("k"), builder.append_basic_block("store")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(i64)
        step.add_incoming(ir.Constant(i64, 0), begin)
        for row in range(high):
            rows_before = builder.mul(a_stride, ir.Constant(i64, _TILE * row))
            load(4 + row, at(a, builder.add(builder.mul(step, ir.Constant(i64, 4)), rows_before)), a_stride)
        for column in range(2):
            here = builder.add(builder.mul(step, ir.Constant(i64, 8 * _TILE)), ir.Constant(i64, 4 * _TILE * column))
            load(6 + column, at(b, here), ir.Constant(i64, 8 * _TILE))
        for row, column in places:
            tiles = [ir.Constant(i8, tile) for tile in (2 * row + column, 4 + row, 6 + column)]
            _call(builder, "llvm.x86.tdpbusd", nothing, tiles)
        following = builder.add(step, ir.Constant(i64, _TILE))
        step.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, end)
        builder.position_at_end(end)
        for row, column in places:
            there = builder.add(
                builder.mul(c_stride, ir.Constant(i64, _TILE * row)), ir.Constant(i64, 4 * _TILE * column)
            )
            arguments = [ir.Constant(i8, 2 * row + column), at(c, there), c_stride]
            _call(builder, "llvm.x86.tilestored64", nothing, arguments)
        return context.get_dummy_value()

    @intrinsic
    def tiles(typing: Any, a0: Any, a_stride: Any, b0: Any, c0: Any, c_stride: Any, steps: Any) -> Any:
        return types.void(*[types.int64] * 6), generate

    return tiles


_two_tiles, _one_tile = _tiles(2), _tiles(1)


@intrinsic
def _begin_tiles(typing: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        palette = [1] + 15 * [0] + 8 * [4 * _TILE, 0] + 16 * [0] + 8 * [_TILE] + 8 * [0]  # bytes of rows, then rows
        kind = ir.ArrayType(_I8, 64)
        sizes = cgutils.global_constant(builder.module, "sizes_of_tiles", ir.Constant(kind, palette))
        _call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [builder.bitcast(sizes, _I8.as_pointer())])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _end_tiles(typing: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "llvm.x86.tilerelease", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), generate


@compiled_with(inline="always")
def begin_products() -> None:
    """Call this before the first `multiply` of a kernel."""
    if HAS_AMX:
        _begin_tiles()


@compiled_with(inline="always")
def end_products() -> None:
    """Call this after the last `multiply` of a kernel."""
    if HAS_AMX:
        _end_tiles()


@compiled
def multiply(a: Any, first: int, rows: int, column: int, b: Any, c: Any) -> None:
    """c[:rows] = a[first : first + rows, column:] · B.

    Args:
        a: (M, ≥ K) int16, uint8 or float32, made by `aligned`: up to 63 bytes behind K are read, behind the last row,
            too, and multiplied with B's zeros.
        b: what `pack_rows` or `pack_columns` made, (panels, steps, PANEL, group).
        c: (≥ rows, ≥ panels · PANEL), int32, or float32 where A is.

    Between `begin_products` and `end_products`.
    """
    panels, steps, width, group = b.shape
    a_stride, c_stride = a.shape[1] * a.itemsize, c.shape[1] * 4
    a0 = a.ctypes.data + first * a_stride + column * a.itemsize
    b0, c0 = b.ctypes.data, c.ctypes.data
    panel_bytes = steps * width * group * b.itemsize
    height = _HEIGHT[a.itemsize]
    for panel in range(panels):
        here, there = b0 + panel * panel_bytes, c0 + panel * width * 4
        if HAS_AMX and a.itemsize == 1 and rows >= _TILE:
            row = 0
            while row < rows:
                if rows - row >= 2 * _TILE:
                    _two_tiles(a0 + row * a_stride, a_stride, here, there + row * c_stride, c_stride, steps)
                    row += 2 * _TILE
                else:
                    row = min(row, rows - _TILE)  # the last tile overlaps the one before it: the same sums again
                    _one_tile(a0 + row * a_stride, a_stride, here, there + row * c_stride, c_stride, steps)
                    row += _TILE
        elif rows < height:
            for row in range(rows):
                _flat(a, b, a0 + row * a_stride, a_stride, here, there + row * c_stride, c_stride, steps)
        else:
            for row in range(0, rows, height):
                row = min(row, rows - height)  # the last tile overlaps the one before it: the same sums again
                _tall(a, b, a0 + row * a_stride, a_stride, here, there + row * c_stride, c_stride, steps)


@compiled
def multiply_block(a: Any, origin: int, first: int, rows: int, column: int, b: Any, c: Any) -> Any:
    """c[before : before + rows] = a[origin + first : origin + first + rows, column:] · B; returns `before`.

    A few rows cost as much as a whole block of sums: of them, so many rows before them are multiplied, too, but none
    before `origin`.
    """
    before = min(first, max(0, ROWS_AT_ONCE[a.itemsize] - rows))
    multiply(a, origin + first - before, rows + before, column, b, c)
    return before


@compiled
def multiply_row(a: Any, b: Any, c: Any) -> None:
    """c = a · B of one row: a (≥ K,), c (≥ panels · PANEL,)."""
    panels, steps, width, group = b.shape
    for panel in range(panels):
        here = b.ctypes.data + panel * steps * width * group * b.itemsize
        _flat(a, b, a.ctypes.data, 0, here, c.ctypes.data + panel * width * 4, 0, steps)


@compiled
def multiply_alone(a: Any, first: int, rows: int, column: int, b: Any, c: Any) -> None:
    """`multiply`, by itself."""
    begin_products()
    multiply(a, first, rows, column, b, c)
    end_products()


def _copy(bytes_: int) -> Any:
    """(to, from): addresses of `bytes_` bytes."""

    @intrinsic
    def copy(typing: Any, there: Any, here: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.IntType(8 * bytes_)
            value = _load(builder, arguments[1], kind, 1)
            builder.store(value, builder.inttoptr(arguments[0], kind.as_pointer())).align = 1
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return copy


def _interleave(group: int, width: int) -> Any:
    """(B, to, from, stride): `group` rows of `width` elements become `width` lanes of `group` neighbours."""

    @intrinsic
    def interleave(typing: Any, b: Any, there: Any, here: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, there, here, stride = arguments
            kind = ir.VectorType({"int8": _I8, "int16": _I16, "float32": _F32}[b.dtype.name], width)
            rows = []
            for row in range(group):
                rows.append(_load(builder, builder.add(here, builder.mul(stride, ir.Constant(_I64, row))), kind, 1))
            while len(rows) > 1:
                half = len(rows) // 2
                rows = [_alternating(builder, rows[i], rows[i + half]) for i in range(half)]
            builder.store(rows[0], builder.inttoptr(there, rows[0].type.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(b, types.int64, types.int64, types.int64), generate

    return interleave


def _alternating(builder: Any, a: Any, b: Any) -> Any:
    """a0, b0, a1, b1, …"""
    count = a.type.count
    order = [place + count * side for place in range(count) for side in range(2)]
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, 2 * count), order))


_copy_2, _copy_4 = _copy(2), _copy(4)
_interleave_1, _interleave_2, _interleave_4 = (
    _interleave(group, PANEL[kind]) for group, kind in ((1, "float32"), (2, "int16"), (4, "uint8"))
)


@compiled
def pack_rows(rows: Any, first: int, count: int, column: int, depth: int, b: Any) -> None:
    """B[n, k] = rows[first + n, column + k] for n < `count`, k < `depth`; what lies behind them stays as it is."""
    _, steps, width, group = b.shape
    whole, size = depth // group, group * b.itemsize
    for n in range(count):
        panel, place = n // width, n % width
        here = rows.ctypes.data + ((first + n) * rows.shape[1] + column) * rows.itemsize
        there = b.ctypes.data + (panel * steps * width + place) * size
        for step in range(whole):
            if size == 4:
                _copy_4(there + step * width * size, here + step * size)
            else:
                _copy_2(there + step * width * size, here + step * size)
        for g in range(depth - whole * group):
            b[panel, whole, place, g] = rows[first + n, column + whole * group + g]


@compiled
def pack_columns(rows: Any, first: int, depth: int, column: int, count: int, b: Any) -> None:
    """B[n, k] = rows[first + k, column + n] for n < `count`, k < `depth`; what lies behind them stays as it is."""
    panels, steps, width, group = b.shape
    stride = rows.shape[1] * rows.itemsize
    for panel in range(panels):
        columns = min(width, count - panel * width)
        for step in range(-(-depth // group)):
            row, there = first + step * group, b.ctypes.data + (panel * steps + step) * width * group * b.itemsize
            here = rows.ctypes.data + row * stride + (column + panel * width) * rows.itemsize
            if columns < width or depth - step * group < group:
                for g in range(min(group, depth - step * group)):
                    for place in range(columns):
                        b[panel, step, place, g] = rows[row + g, column + panel * width + place]
            elif group == 4:
                _interleave_4(b, there, here, stride)
            elif group == 2:
                _interleave_2(b, there, here, stride)
            else:
                _interleave_1(b, there, here, stride)


def packed(columns: int, depth: int, a: str, b: str) -> npt.NDArray[Any]:
    """Zeros for B of `columns` (N) and `depth` (K), to be filled; `a`, `b`: names of the types."""
    steps = -(-depth // (_GROUP[a] * _STEPS[a])) * _STEPS[a]
    return aligned((-(-columns // PANEL[a]), steps, PANEL[a], _GROUP[a]), b)


def sums(rows: int, columns: int, a: str) -> npt.NDArray[Any]:
    """Memory for `rows` of C."""
    return aligned((rows, -(-columns // PANEL[a]) * PANEL[a]), "float32" if a == "float32" else "int32")


def aligned(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Zeros that begin at a cache line, with room behind them: the inner loop may read past the last row."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    memory = np.zeros(size + 64 + 256, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(kind).reshape(shape)


# Which integers are exact here ---------------------------------------------------------------------------------------


SHAPES = ((50, 1536, 64), (257, 64, 257), (13, 77, 33), (16, 77, 33), (31, 100, 40), (47, 197, 64))  # rows, K, columns


@cache
def integers() -> str | None:
    """Type of the integer operands on this CPU: the fastest whose products are exact and made by instructions for
    them; None where there are none."""
    native = {"uint8": HAS_VNNI, "int16": HAS_AVX2}
    return next((kind for kind in INTEGERS if native[kind] and is_exact(kind)), None)


def is_exact(kind: str, shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> bool:
    """Whether products of operands of a type equal those in int64, at values that break what is not exact.

    Args:
        shapes: (rows of A, K, columns) each.
    """
    low, high = {"uint8": (0, 255), "int16": (-255, 255)}[kind]
    random = np.random.default_rng(0)
    for rows, depth, columns in shapes:
        for extreme in ((high, 127), (high, -128), (low, -128), (low, 127), None):
            if extreme is None:
                a, b = random.integers(low, high + 1, (rows, depth)), random.integers(-128, 128, (columns, depth))
            else:
                a, b = np.full((rows, depth), extreme[0]), np.full((columns, depth), extreme[1])
            if not np.array_equal(product(a, b, kind), a @ b.T):
                return False
    return True


def product(a: Any, b: Any, kind: str) -> Any:
    """A · Bᵀ of integer arrays (M, K) and (N, K), computed as an engine computes it: (M, N)."""
    rows, depth = a.shape
    left = aligned((rows, -(-depth // 16) * 16), kind)
    left[:, :depth] = a
    right = packed(len(b), depth, kind, FLOAT if kind == FLOAT else "int8")
    pack_rows(np.ascontiguousarray(b.astype(right.dtype)), 0, len(b), 0, depth, right)
    out = aligned((rows, right.shape[0] * right.shape[2]), FLOAT if kind == FLOAT else "int32")
    multiply_alone(left, 0, rows, 0, right, out)
    return out[:, : len(b)]
