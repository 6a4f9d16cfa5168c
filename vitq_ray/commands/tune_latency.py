"""Milliseconds per image of what a search came to, on this machine."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from vitq_ray.base.config import InputError
from vitq_ray.base.cpus import available_cpus
from vitq_ray.cluster.workers import torch_threads
from vitq_ray.commands.screen import Screen
from vitq_ray.commands.tune_job import TuneJob
from vitq_ray.engines.execute import executed
from vitq_ray.engines.onnx import Encoding, onnx_model
from vitq_ray.engines.runtimes import RUNTIMES, open_file
from vitq_ray.engines.targets import TARGETS, Shape
from vitq_ray.measure.latency import milliseconds
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import apply_plan, float_copy


def latencies(job: TuneJob, plans: Mapping[str, Plan], screen: Screen) -> list[dict[str, Any]]:
    """Rows {candidate, runtime, batch, threads, ms_per_image} of the float model and of plans, run with all CPUs, at
    the batch sizes that were asked for: by the search's engine (runtime None), and plans of a runtime's mode also as a
    file in that runtime."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        stack.enter_context(torch_threads(available_cpus()))
        folder = Path(stack.enter_context(TemporaryDirectory()))
        files: dict[str, tuple[str, str]] = {}  # {variant: (candidate, the runtime that it is a file for)}
        variants: dict[str, nn.Module] = {"float": float_copy(job.model).eval()}
        for name, plan in plans.items():
            model = copy.deepcopy(job.model)
            apply_plan(model, plan)
            if plan.mode in RUNTIMES:
                try:
                    file = f"{name}, {plan.mode}"
                    variants[file] = file_model(job, model, plan, folder / f"{len(variants)}.onnx")
                    files[file] = name, plan.mode
                except InputError as error:
                    screen.warn(f"latency: {name} in {plan.mode} is not measured: {error}")
            variants[name] = stack.enter_context(executed(model, job.engine))
        for size in job.options.latency or ():
            images = torch.randn(size, 3, job.transform.size, job.transform.size, device=job.device)
            found = milliseconds(variants, images)
            common = {"batch": size, "threads": torch.get_num_threads()}
            for variant, ms in found.items():
                name, runtime = files.get(variant, (variant, None))
                rows.append({"candidate": name, "runtime": runtime, **common, "ms_per_image": ms})
            text = ", ".join(f"{name} {ms:.2f}" for name, ms in found.items())
            screen.say(f"ms per image, batch {size}, {torch.get_num_threads()} threads: {text}")
    return rows


def file_model(job: TuneJob, model: Any, plan: Plan, path: Path) -> nn.Module:
    """A model that follows a plan, as a file in its runtime. InputError where there is no such file, or no runtime."""
    geometry = job.loaded.geometry
    problems = list(TARGETS[plan.mode].problems(plan, Shape.of(geometry), geometry.depth))
    if problems:
        raise InputError("; ".join(problems))
    made = onnx_model(copy.deepcopy(model).cpu(), plan, Encoding(TARGETS[plan.mode]), {})
    path.write_bytes(made.SerializeToString())
    return open_file(str(path), plan.mode)
