"""Loops over a row that compute in vectors, written in LLVM's own language, for kernels that numba compiles.

    @row_loop
    def add(row: Row, x: Any, y: Any, out: Any, n: Any) -> None:
        row.each(n, lambda at: out.store(at, x.load(at) + y.load(at)))

What a compiler makes of such a loop differs from compiler to compiler: a maximum is found one by one, what is left of a
row at its end is computed one by one, AVX-512 is used by half. Here a row is computed in vectors as wide as the CPU has
them, its rest in vectors of 4, then of 1. Nothing is reordered or fused that is not written so: a row has the same
values whichever kernel computed it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from vitq_ray.base.instructions import HAS_AVX512

WIDTHS = (16, 4, 1) if HAS_AVX512 else (8, 4, 1)
_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_KINDS = {"float32": _F32, "int32": _I32, "int16": _I16, "int8": _I8, "uint8": _I8}
_ROUNDING = 1.5 * 2.0**23  # a float32 of that size has steps of one: to add it is to round


class Lanes:
    """A vector of float32. A number beside it, or a vector of one lane, is taken for every lane."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    @property
    def count(self) -> int:
        return int(self.value.type.count)

    def _with(self, value: Any) -> Lanes:
        return Lanes(self.builder, value)

    def spread(self, other: Any) -> Any:
        """A number or the only lane of a vector, in every lane of a vector as wide as this."""
        if not isinstance(other, Lanes):
            return ir.Constant(ir.VectorType(_F32, self.count), [float(other)] * self.count)
        if other.count == self.count:
            return other.value
        return spread(self.builder, self.builder.extract_element(other.value, ir.Constant(_I32, 0)), self.count)

    def __add__(self, other: Any) -> Lanes:
        return self._with(self.builder.fadd(self.value, self.spread(other)))

    def __sub__(self, other: Any) -> Lanes:
        return self._with(self.builder.fsub(self.value, self.spread(other)))

    def __mul__(self, other: Any) -> Lanes:
        return self._with(self.builder.fmul(self.value, self.spread(other)))

    def __truediv__(self, other: Any) -> Lanes:
        return self._with(self.builder.fdiv(self.value, self.spread(other)))

    def times_plus(self, factor: Any, summand: Any) -> Lanes:
        """self · factor + summand, rounded once."""
        return self._with(self._call("llvm.fma", self.value, self.spread(factor), self.spread(summand)))

    def rounded(self) -> Lanes:
        return self._with(self._call("llvm.rint", self.value))

    def root(self) -> Lanes:
        return self._with(self._call("llvm.sqrt", self.value))

    def inverse(self) -> Lanes:
        """1 / self; in 16 lanes from 14 bits and one step of Newton's, which is faster than a division."""
        if self.count < 16:
            return self._with(self.builder.fdiv(self.spread(1.0), self.value))
        kind = ir.FunctionType(self.value.type, [self.value.type, self.value.type, _I16])
        estimate = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.x86.avx512.rcp14.ps.512")
        close = self._with(self.builder.call(estimate, [self.value, self.spread(0.0), ir.Constant(_I16, -1)]))
        missed = (self * -1.0).times_plus(close, 1.0)
        return close.times_plus(missed, close)

    def at_least(self, bound: Any) -> Lanes:
        """NaN stays NaN."""
        bound = self.spread(bound)
        return self._with(self.builder.select(self.builder.fcmp_ordered(">", bound, self.value), bound, self.value))

    def at_most(self, bound: Any) -> Lanes:
        """NaN stays NaN."""
        bound = self.spread(bound)
        return self._with(self.builder.select(self.builder.fcmp_ordered("<", bound, self.value), bound, self.value))

    def where(self, condition: Any, other: Lanes) -> Lanes:
        """self where the scalar condition holds, else other."""
        mask = spread(self.builder, condition, self.count)
        return self._with(self.builder.select(mask, self.value, other.value))

    def power_of_two(self) -> Lanes:
        """2^self of integers in [-126, 127]."""
        whole = ir.VectorType(_I32, self.count)
        biased = self.builder.add(self.builder.fptosi(self.value, whole), ir.Constant(whole, [127] * self.count))
        return self._with(
            self.builder.bitcast(self.builder.shl(biased, ir.Constant(whole, [23] * self.count)), self.value.type)
        )

    def integers(self, shift: Lanes | float, kind: Any) -> Any:
        """Rounded, + shift, a whole number: as integers of 8 or 16 bits."""
        whole = ir.VectorType(_I32, self.count)
        bits = self.builder.bitcast((self + _ROUNDING).value, whole)  # of which the last are those of the integer
        shifted = self.builder.add(bits, self.builder.fptosi(self.spread(shift), whole))
        return self.builder.trunc(shifted, ir.VectorType(kind, self.count))

    def total(self) -> Lanes:
        """The sum of all lanes, halves first."""
        return self._folded(lambda a, b: a + b)

    def largest(self) -> Lanes:
        return self._folded(lambda a, b: a.at_least(b))

    def _folded(self, both: Callable[[Lanes, Lanes], Lanes]) -> Lanes:
        lanes = self
        while lanes.count > 1:
            half = lanes.count // 2
            parts = [
                lanes._with(
                    self.builder.shuffle_vector(
                        lanes.value,
                        ir.Constant(lanes.value.type, ir.Undefined),
                        ir.Constant(ir.VectorType(_I32, half), list(range(start, start + half))),
                    )
                )
                for start in (0, half)
            ]
            lanes = both(*parts)
        return lanes

    def _call(self, name: str, *arguments: Any) -> Any:
        kind = ir.FunctionType(self.value.type, [argument.type for argument in arguments])
        found = cgutils.get_or_insert_function(self.builder.module, kind, f"{name}.v{self.count}f32")
        return self.builder.call(found, arguments)


def spread(builder: Any, scalar: Any, count: int) -> Any:
    """A scalar in every lane."""
    empty = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
    one = builder.insert_element(empty, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, empty, ir.Constant(ir.VectorType(_I32, count), [0] * count))


class At:
    """A place in a row, and the number of its elements that are computed there at once."""

    def __init__(self, builder: Any, index: Any, count: int) -> None:
        self.builder, self.index, self.count = builder, index, count


class Memory:
    """The elements of an array, from its first on."""

    def __init__(self, builder: Any, data: Any, dtype: str) -> None:
        self._builder, self._address, self.kind = builder, builder.ptrtoint(data, _I64), _KINDS[dtype]

    @property
    def is_float(self) -> bool:
        return bool(self.kind == _F32)

    def load(self, at: At, plus: Memory | None = None) -> Lanes:
        """float32 or int32, as float32; `plus` is added before integers become float32."""
        if self.kind not in (_F32, _I32):
            raise TypingError(f"a row of {self.kind} is only written to")
        value = self._raw(at)
        if plus is not None:
            value = (self._builder.fadd if self.is_float else self._builder.add)(value, plus._raw(at))
        if not self.is_float:
            value = self._builder.sitofp(value, ir.VectorType(_F32, at.count))
        return Lanes(self._builder, value)

    def load_one(self, place: int) -> Lanes:
        return self.load(At(self._builder, ir.Constant(_I64, place), 1))

    def store(self, at: At, lanes: Lanes, shift: Lanes | float = 0.0) -> None:
        """float32 as they are, or rounded, + shift, as the integers of the memory."""
        value = lanes.value if self.is_float else lanes.integers(shift, self.kind)
        self._builder.store(value, self._pointer(at.index, value.type)).align = self._size

    @property
    def _size(self) -> int:
        return 4 if self.is_float else int(self.kind.width) // 8

    def _raw(self, at: At) -> Any:
        value = self._builder.load(self._pointer(at.index, ir.VectorType(self.kind, at.count)))
        value.align = self._size
        return value

    def _pointer(self, index: Any, kind: Any) -> Any:
        offset = self._builder.mul(index, ir.Constant(_I64, self._size))
        return self._builder.inttoptr(self._builder.add(self._address, offset), kind.as_pointer())


class Row:
    """Writes the loops of a kernel."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def each(self, n: Any, work: Callable[[At], None]) -> None:
        """`work` at every place of a row of `n`."""
        self._loops(n, lambda at, _: work(at), None, None)

    def total(self, n: Any, work: Callable[[At], Lanes]) -> Lanes:
        """The sum of what `work` gives at every place."""
        first, *others = self._loops(n, lambda at, sums: sums + work(at), 0.0, Lanes.total)
        return sum(others, first)

    def largest(self, n: Any, work: Callable[[At], Lanes]) -> Lanes:
        """The largest of what `work` gives at every place."""
        found = self._loops(n, lambda at, so_far: so_far.at_least(work(at)), -math.inf, Lanes.largest)
        return reduce(Lanes.at_least, found[1:], found[0])

    def number(self, n: Any) -> Lanes:
        """A length as float32."""
        return Lanes(self._builder, spread(self._builder, self._builder.sitofp(n, _F32), 1))

    def holds(self, flag: Lanes) -> Any:
        """Whether a number is not 0, as a scalar."""
        scalar = self._builder.extract_element(flag.value, ir.Constant(_I32, 0))
        return self._builder.fcmp_ordered("!=", scalar, ir.Constant(_F32, 0.0))

    def _loops(self, n: Any, work: Callable[[At, Any], Any], first: float | None, fold: Any) -> list[Lanes]:
        """`work` at every place, in vectors of each width in turn. Where `first` is given, `work` also takes what it
        gave before, lane by lane, at first `first`; returns what `fold` makes of the last, width by width."""
        builder, place, folded = self._builder, ir.Constant(_I64, 0), []
        for count in WIDTHS:
            end_of = builder.and_(n, ir.Constant(_I64, -count))
            before = builder.block
            head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
            builder.branch(head)
            builder.position_at_end(head)
            index = builder.phi(_I64)
            index.add_incoming(place, before)
            kind = ir.VectorType(_F32, count)
            if first is not None:
                so_far = builder.phi(kind)
                so_far.add_incoming(ir.Constant(kind, [first] * count), before)
            builder.cbranch(builder.icmp_signed("<", index, end_of), body, after)
            builder.position_at_end(body)
            made = work(At(builder, index, count), Lanes(builder, so_far) if first is not None else None)
            index.add_incoming(builder.add(index, ir.Constant(_I64, count)), builder.block)
            if first is not None:
                so_far.add_incoming(made.value, builder.block)
            builder.branch(head)
            builder.position_at_end(after)
            place = index
            if first is not None:
                folded.append(fold(Lanes(builder, so_far)))
        return folded


def row_loop(write: Callable[..., None]) -> Any:
    """A function for numba's kernels, written by one that is given a `Row` and its arguments: arrays as `Memory`,
    numbers as `Lanes` of one, lengths as LLVM's values."""

    def typed(typing: Any, *arguments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            given: list[Any] = []
            for kind, value in zip(signature.args, values, strict=True):
                if isinstance(kind, types.Array):
                    if (kind.layout, kind.ndim) != ("C", 1):
                        raise TypingError(f"expected a row whose elements lie side by side, got {kind}")
                    array = context.make_array(kind)(context, builder, value)
                    given.append(Memory(builder, array.data, kind.dtype.name))
                else:
                    given.append(Lanes(builder, spread(builder, value, 1)) if kind == types.float32 else value)
            write(Row(builder), *given)
            return context.get_dummy_value()

        return types.void(*map(_as_computed_with, arguments)), generate

    typed.__signature__ = inspect.signature(write)  # type: ignore[attr-defined] # numba counts the arguments by it
    return intrinsic(typed)


def _as_computed_with(kind: Any) -> Any:
    """Lengths as int64, numbers as float32, arrays as they are."""
    if isinstance(kind, types.Integer):
        return types.int64
    return types.float32 if isinstance(kind, types.Float) else kind
