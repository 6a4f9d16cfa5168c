"""The student: where dropout sits, and the optimizer of its weights and learned scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitq_ray.qat.recipe import QatConfig
from vitq_ray.quant.fake_quant import integer_range
from vitq_ray.quant.vit import quant_blocks


class SeededDropout(nn.Module):
    """Dropout with a random generator of its own, which is seeded for every micro-batch."""

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        self.p, self._generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self._generator)
        return x * keep.div_(1 - self.p)


def add_dropout(model: nn.Module, p: float, generator: torch.Generator) -> None:
    """Dropout after the position embedding, GELU and fc2; attention has none."""
    model.pos_drop = SeededDropout(p, generator)
    for block in quant_blocks(model):
        for name in ("drop1", "drop2"):
            setattr(block.mlp, name, SeededDropout(p, generator))
        block.attn.attn_drop = nn.Dropout(0.0)
        block.attn.proj_drop = nn.Dropout(0.0)


def seed_of(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def make_optimizer(config: QatConfig, model: nn.Module, learned: Sequence[tuple[nn.Parameter, int]]) -> Any:
    """SGD or AdamW; every group knows its `factor` of the learning rate.

    LSQ learns the step s = amax / qmax, here amax is learned: its SGD update is qmax² times, AdamW's qmax times what
    the same rate gives s, so that s moves as in LSQ.
    """
    scales = {id(parameter) for parameter, _ in learned}
    groups = [{"params": [p for p in model.parameters() if id(p) not in scales], "factor": 1.0}]
    for bits in sorted({bits for _, bits in learned}):
        factor = integer_range(bits)[1] ** (2 if config.optimizer == "sgd" else 1)
        params = [p for p, b in learned if b == bits]
        groups.append({"params": params, "factor": float(factor), "weight_decay": 0.0})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay)


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
