"""TensorQuantizer: one site of the model, with one state and one amax buffer."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitq_ray.quant.fake_quant import fake_quantize
from vitq_ray.quant.plan import SiteRule

# Sees a tensor as it passes. It must not keep it: the model may go on to write into its memory.
Observer = Callable[[Tensor], None]


class State(enum.Enum):
    """What a quantizer does with the tensor that passes through it."""

    OFF = "off"  # nothing
    OBSERVE = "observe"  # hand it to the observer, pass it on unchanged
    QUANTIZE = "quantize"  # fake-quantize it


class TensorQuantizer(nn.Module):
    """Passes a tensor on, shows it to an observer, or fake-quantizes it.

    Scales are numbers in the `_amax` buffer: () for a tensor, (rows, 1) for weight rows. A new setting changes the
    numbers and leaves the module tree alone. `learn` turns the buffer into a parameter of the same name.
    """

    _amax: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.state = State.OFF
        self.rule = SiteRule()
        self._observer: Observer | None = None
        self._frozen: Tensor | None = None
        self._batched = True
        self.register_buffer("_amax", torch.zeros(()))

    @property
    def amax(self) -> Tensor:
        return self._amax

    @property
    def bits(self) -> int:
        return self.rule.bits

    @property
    def axis(self) -> int | None:
        return self.rule.axis

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...  # a module's own returns Any

    def forward(self, x: Tensor) -> Tensor:
        if self.state is State.OFF:
            return x
        if self.state is State.QUANTIZE:
            return self._quantize(x) if self._frozen is None else self._frozen
        assert self._observer is not None
        self._observer(x)
        return x

    def _quantize(self, x: Tensor) -> Tensor:
        # In float32 also under autocast: in bfloat16 the levels past 64 of 8 bits would be rounded twice.
        return fake_quantize(
            x.float(), self._amax, axis=self.axis, learned_over=self._learned_over(x), levels=self.rule.levels
        )

    def _learned_over(self, x: Tensor) -> int | None:
        """Elements per scale for LSQ, of one image: the batch size must not change the gradient's scale."""
        if not isinstance(self._amax, nn.Parameter):
            return None
        return x.numel() // (len(x) if self._batched else self._amax.numel())

    def learn(self, amax: nn.Parameter, batched: bool) -> None:
        """From now on `amax` is a parameter, which quantizers may share. `batched`: axis 0 of the tensor is B."""
        del self._amax
        self._amax = amax
        self._batched = batched

    def take(self, amax: Tensor, rule: SiteRule) -> None:
        """Do what a plan says of this site; scales are taken over in place where the shape allows it, so that compiled
        code sees them."""
        no_waiting = self._amax.is_cuda  # site by site
        if self._amax.shape == amax.shape:
            with torch.no_grad():
                self._amax.copy_(amax, non_blocking=no_waiting)
        else:
            self._amax = amax.detach().clone().to(self._amax.device, torch.float32, non_blocking=no_waiting)
        self.rule = rule
        self.state = State.QUANTIZE if rule.on else State.OFF
        self._frozen = None

    def freeze(self, x: Tensor) -> None:
        """Quantize `x` now and return that from every call: for weights, which do not change in evaluation."""
        self._frozen = fake_quantize(x, self._amax, axis=self.axis, levels=self.rule.levels).detach()

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._frozen = None

    def observe(self, observer: Observer) -> None:
        self.state, self._observer = State.OBSERVE, observer

    def restore(self, state: State) -> None:
        """Back to an earlier state, without an observer."""
        self.state, self._observer = state, None

    def extra_repr(self) -> str:
        axis = "per tensor" if self.axis is None else f"axis {self.axis}"
        return f"{self.state.value}, {self.bits} bits, {axis}"
