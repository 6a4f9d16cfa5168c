"""A QAT step (student quantized, float teacher) against a float training step of the same model.

    python benchmarks/qat_step.py                                    # the geometry of the bundled sample
    python benchmarks/qat_step.py --model vit_base_patch16_224 --batch-size 8 --steps 3

Random weights and images: the time does not depend on their values. Both steps go through the same loop (SGD,
gradient clipping, dropout), and alternate so that a drifting machine slows both; images are decoded beforehand.
`float` is cross entropy on the float model; `float + teacher` adds the teacher's forward pass and the distillation
loss; `qat` is the recipe; `qat + learned amax` also learns the scales.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.resources import files

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitq_ray.calibration.calibrators import Calibration
from vitq_ray.calibration.scales import apply_setting
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import collect_statistics
from vitq_ray.models.load import load_model
from vitq_ray.qat.loss import image_losses
from vitq_ray.qat.recipe import QatConfig
from vitq_ray.qat.student import add_dropout, make_optimizer
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import float_copy, learn_amax, quantize_vit


def build(name: str | None) -> VisionTransformer:
    """A timm model by name, or the sample's."""
    if name is None:
        return load_model("auto", str(files("vitq_ray") / "sample" / "vit.npz")).model
    return timm.create_model(name, num_classes=1000)


def step_of(
    student: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor, learned_plan: Plan | None = None
) -> Callable[[], None]:
    """A training step of `student`, as a function without arguments."""
    config = QatConfig()
    learned = [] if learned_plan is None else learn_amax(student, learned_plan)
    add_dropout(student, config.dropout, torch.Generator())
    optimizer = make_optimizer(config, student, learned)

    def step() -> None:
        student.train()
        optimizer.zero_grad(set_to_none=True)
        targets = None
        if teacher is not None:
            with torch.no_grad():
                targets = teacher(images)
        image_losses(student(images), labels, targets).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        optimizer.step()

    return step


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name of a timm ViT; default: the bundled sample")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    quantized = quantize_vit(build(args.model))
    size, classes = quantized.patch_embed.img_size[0], quantized.num_classes
    images = torch.randn(args.batch_size, 3, size, size)
    labels = torch.randint(0, classes, (args.batch_size,))
    statistics_of_images = collect_statistics(quantized, [(0, images)], [1])
    setting = Setting("ft2", Calibration("max"), 1, weight_bits=args.bits, act_bits=args.bits)
    plan = apply_setting(quantized, statistics_of_images, setting)
    plain = float_copy(quantized)
    steps = {
        "float": step_of(copy.deepcopy(plain), None, images, labels),
        "float + teacher": step_of(copy.deepcopy(plain), plain.eval(), images, labels),
        "qat": step_of(copy.deepcopy(quantized), plain, images, labels),
        "qat + learned amax": step_of(copy.deepcopy(quantized), plain, images, labels, plan),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(args.steps):
        for name, step in steps.items():
            times[name].append(seconds(step))
    print(f"{args.model or 'sample'}, batch {args.batch_size} at {size}x{size}, {args.threads} threads")
    for name, taken in times.items():
        ratio = statistics.median(t / f for t, f in zip(taken, times["float"], strict=True))
        print(
            f"{name:<20} {args.batch_size / statistics.median(taken):8.1f} images/s   {ratio:.2f} x the time of float"
        )


if __name__ == "__main__":
    main()
