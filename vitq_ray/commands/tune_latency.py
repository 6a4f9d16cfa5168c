"""Milliseconds per image of what a search came to, on this machine."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from vitq_ray.base.cpus import available_cpus
from vitq_ray.cluster.workers import torch_threads
from vitq_ray.commands.screen import Screen
from vitq_ray.commands.tune_job import TuneJob
from vitq_ray.engines.execute import executed
from vitq_ray.measure.latency import milliseconds
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import apply_plan, float_copy


def latencies(job: TuneJob, plans: Mapping[str, Plan], screen: Screen) -> list[dict[str, Any]]:
    """Rows {candidate, batch, threads, ms_per_image} of the float model and of plans, run by the search's engine with
    all CPUs, at the batch sizes that were asked for."""
    rows = []
    with ExitStack() as stack:
        stack.enter_context(torch_threads(available_cpus()))
        variants: dict[str, nn.Module] = {"float": float_copy(job.model).eval()}
        for name, plan in plans.items():
            model = copy.deepcopy(job.model)
            apply_plan(model, plan)
            variants[name] = stack.enter_context(executed(model, job.engine))
        for size in job.options.latency or ():
            images = torch.randn(size, 3, job.transform.size, job.transform.size, device=job.device)
            found = milliseconds(variants, images)
            rows += [
                {"candidate": name, "batch": size, "threads": torch.get_num_threads(), "ms_per_image": ms}
                for name, ms in found.items()
            ]
            text = ", ".join(f"{name} {ms:.2f}" for name, ms in found.items())
            screen.say(f"ms per image, batch {size}, {torch.get_num_threads()} threads: {text}")
    return rows
