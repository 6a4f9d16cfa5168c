"""Milliseconds per image of several models on this machine, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor, nn

ROUNDS = 7


def milliseconds(models: Mapping[str, nn.Module], images: Tensor, rounds: int = ROUNDS) -> dict[str, float]:
    """{model: milliseconds per image}, warm: the median of rounds, in each of which every model runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            model(images)
        for _ in range(rounds):
            for name, model in models.items():
                start = time.perf_counter()
                model(images).cpu()  # waits for a GPU
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * median(times) / len(images) for name, times in seconds.items()}
