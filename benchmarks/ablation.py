"""What each transform and correction brings, alone and left out of the whole: KL to float, classes, seconds.

    python benchmarks/ablation.py --pretrained_dir ../shared/data/vits14/vits14.npz \
        --data-path ../shared/data/clothing-zip --quant-mode ft2
    python benchmarks/ablation.py --quant-mode ft2 --wprec 4 --aprec 4 --select-images 10000      # the bundled sample

Every row is one setting with the calibrator `fisher` for activations and weights, unless it says otherwise, calibrated
on some images of train (`--seed` draws them) and evaluated on val (`--select-images` of it). `--other-images` adds
images of train that were not calibrated on; their KL has a column of its own. `±` is the standard error of the
difference to the row of all transforms, image by image; of that row, the standard error of its mean. Agreement, top-1
and "lost, won" are of all images: those that float gets right and the setting does not, and the other way round.
"look" is what was seen of the float model, shared by rows with the same transforms; "plan" is scales and corrections.
"predicted" is without corrections. Rows "loss by" add up gradient times error over other things than a token's channels
before squaring (`calibration/sensitivity.py`).

"expected" is the loss of top-1, in points, that the classes a setting says would cost on average by the float model's
own probabilities, brought to the temperature that fits the labels best. It depends on labels through that temperature
alone, so that it varies less from draw to draw than top-1 does: photos that float had right by luck count as luck.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitq_ray.calibration.corrections import CORRECTIONS, FEWEST_TO_LEARN, LEARN
from vitq_ray.calibration.planner import Look, Needs, Planner, look_at, needs_of, with_changed
from vitq_ray.calibration.sensitivity import FORMS, TOKEN, collect_sensitivity, images_to_look_at
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import CalibrationStatistics, collect_statistics
from vitq_ray.calibration.transforms import ALL_TRANSFORMS
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.samples import open_split
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.execute import default_engine, evaluation_batch, executed
from vitq_ray.measure.fidelity import agrees, kl_to_float
from vitq_ray.models.load import load_model
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.sites import MODES
from vitq_ray.quant.vit import apply_plan, quantize_vit, quantizers_off

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "vitq_ray" / "sample"
_NAMES = 48  # characters of the longest row's name


@dataclass(frozen=True)
class Images:
    """Calibration images as the model takes them; images of val, then others of train: uint8, labels, count of val."""

    calibration: Tensor
    pixels: Tensor
    labels: Tensor
    of_val: int

    @property
    def parts(self) -> list[slice]:
        """Val, and the others where there are any."""
        parts = [slice(0, self.of_val), slice(self.of_val, len(self.labels))]
        return parts[: 1 if self.of_val == len(self.labels) else 2]


class Bench:
    """A model, its images, and what was seen of it so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.loaded = load_model("auto", args.pretrained_dir, None)
        self.model = quantize_vit(self.loaded.model).eval()
        self.transform = EvalTransform(self.loaded.geometry.img_size)
        self.seed, self.args = args.seed, args
        self.images = self._read(args)
        self.batch = evaluation_batch(self.model, torch.device("cpu"))
        self.looks: dict[tuple, Look] = {}
        self.seconds: dict[tuple, float] = {}
        with quantizers_off(self.model):
            self.float_logits = self._logits(self.model)
        self.float_probabilities = at_best_temperature(self.float_logits, self.images.labels)

    def _read(self, args: argparse.Namespace) -> Images:
        classes = self.loaded.geometry.num_classes
        train, val = (open_split(args.data_path, split, classes) for split in ("train", "val"))
        count = args.calibration_images or images_to_look_at(self.model)
        drawn = np.random.default_rng(args.seed).permutation(len(train))
        calibration = [batch.images for batch in iter_batches(train, drawn[:count].tolist(), self.transform, 8, 2)]
        ids_val = np.random.default_rng(args.seed).permutation(len(val))[: args.select_images].tolist()
        batches = list(iter_batches(val, ids_val, self.transform, 64, 2))
        if args.other_images:
            ids = drawn[count:][: args.other_images].tolist()
            batches += list(iter_batches(train, ids, self.transform, 64, 2))
        pixels, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels"))
        return Images(self.transform.normalize(torch.cat(calibration)), pixels, labels, len(ids_val))

    def _logits(self, run) -> Tensor:
        with torch.inference_mode():
            return torch.cat([run(self.transform.normalize(part)) for part in self.images.pixels.split(self.batch)])

    def look(self, setting: Setting) -> float:
        """Seconds that looking took, also where it was done before."""
        if setting.transforms not in self.looks:
            began = time.perf_counter()
            needs = self._needs(setting)
            batches = list(enumerate(self.images.calibration.split(8)))

            def collect(model: torch.nn.Module, kinds: tuple[str, ...]) -> CalibrationStatistics:
                return collect_statistics(model, batches, (len(batches),), kinds=kinds)

            looked_at = self.images.calibration[: images_to_look_at(self.model)]
            args = (self.model, setting.transforms, needs, looked_at, collect, self.seed)
            self.looks[setting.transforms] = look_at(*args)
            self.seconds[setting.transforms] = time.perf_counter() - began
        return self.seconds[setting.transforms]

    def _needs(self, setting: Setting) -> Needs:
        bases = [replace(setting, calibrator=c, corrections=()) for c in ("fisher", "mse")]
        return needs_of(bases, self.loaded.geometry.depth)[setting.transforms]

    def _in_form(self, setting: Setting, form: str) -> dict[tuple, Look]:
        """What was seen, with loss curves of another form."""
        look, grids = self.looks[setting.transforms], self._needs(setting).grids
        twin = with_changed(self.model, look.weights)
        looked_at = self.images.calibration[: images_to_look_at(self.model)]
        sensitivity = collect_sensitivity(twin, looked_at, grids, self.seed, form=form)
        return {setting.transforms: replace(look, sensitivity=sensitivity)}

    def plan(self, setting: Setting, form: str) -> tuple[Plan, float, float]:
        """Its plan, what it forecasts, and the seconds that took."""
        self.look(setting)
        began = time.perf_counter()
        looks = self.looks if form == TOKEN else self._in_form(setting, form)
        planner = Planner(self.model, looks, lambda: self.images.calibration, self.seed)
        plan = planner.plan(setting)
        seconds = time.perf_counter() - began
        return plan, planner.forecast(setting, plan), seconds

    def kl(self, plan: Plan) -> tuple[Tensor, Tensor]:
        apply_plan(self.model, plan)
        with executed(self.model, default_engine(torch.device("cpu"))) as run:
            logits = self._logits(run)
        return kl_to_float(logits, self.float_logits), logits

    def row(self, name: str, setting: Setting, base: Tensor | None = None, form: str = TOKEN) -> Tensor:
        look = self.look(setting)
        plan, forecast, seconds = self.plan(setting, form)
        kl, logits = self.kl(plan)
        right, right_float = (x.argmax(1) == self.images.labels for x in (logits, self.float_logits))
        lost, won = int((right_float & ~right).sum()), int((right & ~right_float).sum())
        difference = kl if base is None else kl - base
        cells = [_mean(kl[part], difference[part]) for part in self.images.parts]
        agreement = float(agrees(logits, self.float_logits).double().mean())
        top1 = float(right.double().mean())
        p = self.float_probabilities
        expected = 100 * float((p.amax(dim=1) - p.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]).mean())
        print(
            f"{name:<{_NAMES}} {forecast:9.4f}  {'  '.join(cells)} {agreement:8.2%} {top1:8.2%} {lost:4} "
            f"{won:4} {expected:8.2f} {look:6.0f} {seconds:6.0f}",
            flush=True,
        )
        return kl


def at_best_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """Probabilities (B, K) at the temperature, to a tenth, that makes the labels most likely."""
    temperatures = 1.1 ** torch.arange(-25.0, 26.0)
    losses = [torch.nn.functional.cross_entropy(logits / t, labels) for t in temperatures]
    return (logits / temperatures[int(torch.stack(losses).argmin())]).softmax(dim=1)


def _mean(kl: Tensor, difference: Tensor) -> str:
    return f"{kl.mean():7.4f} ±{difference.std() / len(kl) ** 0.5:.4f}"


def rows(setting: Setting, all_transforms: tuple[str, ...], learns: bool) -> list[tuple[str, Setting]]:
    """(name, setting) of every row but that of all transforms; with those of `learn` where there are images for it."""
    whole = replace(setting, transforms=all_transforms)
    found = [(f"no transform, {c}, weights {w}", replace(setting, calibrator=c, weights=w)) for c, w in
             (("max", "max"), ("mse", "max"), ("fisher", "max"), ("fisher", "fisher"))]  # fmt: skip
    alone = (*all_transforms, "fold", "migrate 0.1", "migrate 0.25", "migrate -0.1", "migrate -0.25")
    without = {name: tuple(t for t in all_transforms if t != name) for name in all_transforms}
    best = ("split", "fit", "round")
    found += [(f"{name} alone", replace(setting, transforms=(name,))) for name in alone]
    found += [(f"all but {name}", replace(setting, transforms=others)) for name, others in without.items()]
    found += [
        (f"all but {name} + split, fit, round", replace(setting, transforms=others, corrections=best))
        for name, others in without.items()
    ]
    found += [
        (f"all, {strength}", replace(setting, transforms=(*all_transforms, strength)))
        for strength in ("migrate 0.1", "migrate -0.1")
    ]
    found.append(("no transform + split, fit, round", replace(setting, corrections=best)))
    found.append(("all, weights mse + split, fit, round", replace(whole, weights="mse", corrections=best)))
    found += [(f"all, {c}, weights {w}", replace(whole, calibrator=c, weights=w)) for c, w in
              (("max", "max"), ("mse", "mse"), ("fisher", "max"))]  # fmt: skip
    closed = tuple(name for name in CORRECTIONS if name != LEARN)
    combinations = [names for n in range(1, 1 + len(closed)) for names in itertools.combinations(closed, n)]
    learnt = [(*names, LEARN) for names in ((), ("round",), ("round", "bias"), best)]
    for names in (*combinations, *(learnt if learns else ())):
        found.append((f"all + {', '.join(names)}", replace(whole, corrections=names)))
    off, unsigned = (f"attention_probabilities -> {what}" for what in ("off", "unsigned"))
    found.append(("all, probabilities float", replace(whole, rules=(off,))))
    found.append(("all, probabilities unsigned", replace(whole, rules=(unsigned,))))
    for name, rule in (("float", off), ("unsigned", unsigned)):
        found.append(
            (f"all, probabilities {name} + {', '.join(best)}", replace(whole, rules=(rule,), corrections=best))
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_dir", default=str(SAMPLE / "vit.npz"))
    parser.add_argument("--data-path", default=str(SAMPLE))
    parser.add_argument("--quant-mode", default="ft2", choices=list(MODES))
    parser.add_argument("--wprec", type=int, default=8)
    parser.add_argument("--aprec", type=int, default=8)
    parser.add_argument(
        "--calibration-images",
        type=int,
        help="default: as many as gradients are taken of; of more, those are the first, and rows of `learn` take more",
    )
    parser.add_argument("--select-images", type=int, help="of val; default: all")
    parser.add_argument("--other-images", type=int, default=0, help="of train, not calibrated on, in addition")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    fused = MODES[args.quant_mode].fuse_qkv
    names = ALL_TRANSFORMS if fused else tuple(name for name in ALL_TRANSFORMS if name != "balance")
    batches = -(-len(bench.images.calibration) // 8)
    setting = Setting(args.quant_mode, "fisher", batches, 8, args.wprec, args.aprec, weights="fisher")
    right = float((bench.float_logits.argmax(1) == bench.images.labels).double().mean())
    print(f"{len(bench.images.labels)} images, float top-1 {right:.2%}; {len(bench.images.calibration)} calibrated on")
    sets = "  ".join(f"{name:>15}" for name, _ in zip(("KL of val", "KL of others"), bench.images.parts, strict=False))
    print(f"{'setting':<{_NAMES}} {'predicted':>9}  {sets} {'agrees':>8} {'top-1':>8} lost  won expected   look   plan")
    base = bench.row("all transforms", replace(setting, transforms=names))
    for name, each in rows(setting, names, len(bench.images.calibration) >= FEWEST_TO_LEARN):
        if args.only in name:
            bench.row(name, each, base)
    for form in FORMS:
        if form != TOKEN and args.only in (name := f"all, loss by {form}"):
            bench.row(name, replace(setting, transforms=names), base, form)


if __name__ == "__main__":
    main()
