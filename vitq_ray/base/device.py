"""The device that a process computes on."""

from __future__ import annotations

import warnings

import torch


def device_for(use_gpu: bool) -> torch.device:
    """The first GPU, where float32 is float32 from now on, or the CPU."""
    if use_gpu:
        exact_float32()
    return torch.device("cuda" if use_gpu else "cpu")


def exact_float32() -> None:
    """For this process: PyTorch's convolutions on a GPU would be TF32, with 10 bits of each factor, and the embedding
    of patches is one. So would its matrix products be where a program has asked for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions announce another name for it
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
