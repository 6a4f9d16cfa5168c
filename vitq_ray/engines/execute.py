"""How a quantized model is run: which engine, found out once, and a model in its hands.

    "auto" ──► engines that are exact here ──► the faster one on a few images ──► Engine
    model that follows a plan + Engine ──► Execution: images -> logits

On a CPU both engines are the fused blocks of `int8`: the engine `int8` multiplies integers, `fake` integer-valued
float32. Their numbers are the same, bit for bit, as long as no sum of products passes 2²⁴. On a GPU `int8` is compiled
blocks with exact products (`gpu`), and `fake` PyTorch's eager fake quantization.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.engines.gemm import FLOAT, INTEGERS, integers
from vitq_ray.engines.gpu import (
    CompiledBlocks,
    can_compile,
    integer_products,
    products_of,
    with_compiled_blocks,
)
from vitq_ray.engines.int8 import FusedBlocks, with_blocks
from vitq_ray.quant.plan import Plan, SitePlan, rules_of_mode
from vitq_ray.quant.sites import MODES
from vitq_ray.quant.vit import frozen_weights, quant_blocks, site_weights

AUTO, INT8, FAKE = "auto", "int8", "fake"
ENGINES = (AUTO, INT8, FAKE)
_CACHE_BYTES = 12 * 2**20  # of activations that one forward pass may move through: what caches of servers hold
_MOST_IMAGES = 100
_PROBE_SECONDS = 0.3


@dataclass(frozen=True)
class Engine:
    """What runs quantized models.

    Attributes:
        name: `int8` or `fake`.
        images_per_second: {engine: its speed} where it was measured to choose.
        device: type of the device it was chosen for.
        products: on a GPU, which exact products `int8` uses there.
    """

    name: str
    images_per_second: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"
    products: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For result files: name, arithmetic on this machine, measured speeds."""
        return {"name": self.name, "arithmetic": self.arithmetic, "images_per_second": self.images_per_second}

    @property
    def arithmetic(self) -> str:
        if self.name == FAKE:
            return FLOAT
        if self.device != "cpu":
            return self.products or "int8 × int8, _int_mm"
        kind = integers()
        return FLOAT if kind is None else INTEGERS[kind]

    def __str__(self) -> str:
        speeds = ", ".join(f"{name} {speed:.3g}" for name, speed in self.images_per_second.items())
        return f"{self.name} ({self.arithmetic})" + (f"; images/s: {speeds}" if speeds else "")


def default_engine(device: torch.device) -> Engine:
    """The engine without a measurement: on a CPU integers, where it has exact instructions for them."""
    return Engine(INT8 if device.type == "cpu" and integers() is not None else FAKE, device=device.type)


def find_engine(name: str, model: nn.Module, img_size: int, device: torch.device) -> Engine:
    """The engine of a name; `auto` is the faster one, measured with the plan that the model follows.

    Raises InputError where `int8` is asked for and not exact or not there.
    """
    if name not in ENGINES:
        raise InputError(f"engine: {name!r} is not one of {', '.join(ENGINES)}")
    if name == FAKE:
        return Engine(FAKE, device=device.type)
    products = _exact_products(model, device)
    if name == INT8 and products is None:
        place = "CPU" if device.type == "cpu" else "GPU"
        raise InputError(f"engine: int8 has no exact integer products on this {place}; use fake")
    if products is None:
        return Engine(FAKE, device=device.type)
    if name == INT8:
        return Engine(INT8, device=device.type, products=products)
    images = torch.randn(evaluation_batch(model, device), 3, img_size, img_size, device=device)
    speeds = {name: _speed(model, Engine(name), images) for name in (INT8, FAKE)}
    fastest = max(speeds, key=lambda name: speeds[name])
    return Engine(fastest, {n: float(f"{s:.4g}") for n, s in speeds.items()}, device.type, products)


def _exact_products(model: nn.Module, device: torch.device) -> str | None:
    """Which products are exact on a device, in words where it is a GPU; None where none of integers are."""
    if device.type == "cpu":
        return None if integers() is None else ""
    products = products_of(model, device)
    return str(products) if products.int8 else None


def unit_plan(model: nn.Module, mode: str) -> Plan:
    """A plan of a mode at 8 bits whose scales stand for nothing: to measure speed with."""
    weights = site_weights(model)
    rules = rules_of_mode(MODES[mode], 8, 8, len(quant_blocks(model)))
    ones = {key: torch.ones(len(weights[key]), 1) if rule.axis == 0 else torch.ones(()) for key, rule in rules.items()}
    return Plan(mode, {key: SitePlan(ones[key], rule) for key, rule in rules.items()})


def _speed(model: nn.Module, engine: Engine, images: Tensor) -> float:
    """Images per second, the best of several passes."""
    with executed(model, engine) as run, torch.inference_mode():
        run(images)
        best, begin = float("inf"), time.perf_counter()
        while time.perf_counter() - begin < _PROBE_SECONDS or best == float("inf"):
            start = time.perf_counter()
            run(images).cpu()  # waits for a GPU
            best = min(best, time.perf_counter() - start)
    return len(images) / best


class Execution(nn.Module):
    """A quantized model, run by an engine. After another plan was applied to the model: `follow`."""

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        super().__init__()
        self._of = [model]  # not a submodule: it is the caller's
        self._blocks: FusedBlocks | CompiledBlocks | None = None
        self._frozen, self._run = ExitStack(), [model]
        device, is_int8 = next(model.parameters()).device, engine.name == INT8
        if device.type == "cpu":
            kind = integers() if is_int8 else FLOAT
            self._blocks = FusedBlocks(model, kind or FLOAT)
            self._run = [with_blocks(model, self._blocks)]
            return
        products = products_of(model, device) if is_int8 else None
        if products is not None and can_compile(model):
            self._blocks = CompiledBlocks(model, products)
            self._run = [with_compiled_blocks(model, self._blocks)]
            return
        self._quantized_once = integer_products if products is not None and products.int8 else frozen_weights
        self.follow()

    def follow(self) -> None:
        """Take over scales, rules and weights as the model has them now."""
        if self._blocks is not None:
            self._blocks.follow()
        else:
            self._frozen.close()
            self._frozen.enter_context(self._quantized_once(self._of[0]))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, classes)
        logits: Tensor = self._run[0](images)
        return logits

    def close(self) -> None:
        """The model is its caller's again."""
        self._frozen.close()


@contextmanager
def executed(model: nn.Module, engine: Engine) -> Iterator[Execution]:
    """The model in an engine's hands, in evaluation mode."""
    model.eval()
    run = Execution(model, engine)
    try:
        yield run
    finally:
        run.close()


class Split(nn.Module):
    """A float model that takes its images a few at a time, so that its activations stay in the caches."""

    def __init__(self, model: nn.Module, images: int) -> None:
        super().__init__()
        self._model, self._images = model, images

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, classes)
        return torch.cat([self._model(part) for part in images.split(self._images)])


def evaluation_batch(model: nn.Module, device: torch.device) -> int:
    """Images per forward pass: on a CPU as many as keep the widest activation of a block in a cache.

    It is a function of the model, not of the machine: a search looks at its images batch by batch, and looks the same
    everywhere. ViT-B/16 at 224: 5 images; the bundled sample: 100.
    """
    if device.type != "cpu":
        return _MOST_IMAGES
    widest = max(block.mlp.fc1.out_features for block in model.blocks)  # type: ignore[union-attr]
    tokens = model.patch_embed.num_patches + getattr(model, "num_prefix_tokens", 0)  # type: ignore[union-attr, operator]
    return int(min(_MOST_IMAGES, max(1, _CACHE_BYTES // (4 * widest * tokens))))
