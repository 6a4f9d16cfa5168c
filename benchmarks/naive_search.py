"""The search done the naive way: every setting calibrated and evaluated on its own, against a run of tune_calib.py.

    python scripts/tune_calib.py --search-space calib --output runs/w4 --wprec 4 --aprec 4
    python benchmarks/naive_search.py --run runs/w4
    python benchmarks/naive_search.py --run runs/w4 --processes --calibrators max,percentile

Uses nvidia-modelopt (`pip install -e '.[bench]'`): its calibrators collect at the sites of each setting's mode in a
float pass of its own, its fake quantization runs eagerly at the same sites, with all cores, on the same calibration
and selection images, decoded for every setting as a script would. All settings in one process is the most that a
careful user would write; with `--processes` each is a command of its own, as the old toolkit's were, its start
included. Settings of `mse` are left out: the peer's is wrong on CPUs;
so are those with rules for single sites. The peer's `entropy` takes seconds a site: `--entropy-sites` of every entropy
setting are computed, their mean time stands for the others, and what was extrapolated is said. The times of the run are
those of its result.json: all stages, the start of Ray included; a run that was resumed is refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from modelopt.torch.quantization.calib import HistogramCalibrator, MaxCalibrator
from modelopt.torch.quantization.tensor_quant import fake_tensor_quant
from torch import Tensor, nn

from vitq_ray.base.formats import require_format
from vitq_ray.calibration.setting import Setting, read_setting
from vitq_ray.commands.screen import Terminal
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.data.samples import open_split
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.measure.evaluation import evaluate
from vitq_ray.models.load import load_model
from vitq_ray.quant.plan import Plan, SitePlan, rules_of_mode
from vitq_ray.quant.quantizer import State, TensorQuantizer
from vitq_ray.quant.sites import FUSED_GROUPS, MODES, WEIGHT, site_key
from vitq_ray.quant.vit import apply_plan, quant_blocks, quantize_vit, site_weights, sites_of


class PeerQuantizer(TensorQuantizer):
    """Our place in the model, the peer's calibrator and fake quantization in it."""

    calibrator: HistogramCalibrator | MaxCalibrator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.state is State.OFF:
            return x
        if self.state is State.OBSERVE:
            self.calibrator.collect(x.detach())
            return x
        return fake_tensor_quant(x, self._amax, None, self.bits, False, False)


def with_peer(model: nn.Module) -> nn.Module:
    """Put the peer's quantizers in place of ours."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is TensorQuantizer:
                child.__class__ = PeerQuantizer
                setattr(module, name, child)
    return model


@dataclass(frozen=True)
class Cost:
    """Seconds of one setting, and what it got right."""

    setting: Setting
    calibrate: float
    evaluate: float
    correct: int | None  # None where most scales were not computed, but taken from `max`
    extrapolated: float = 0.0  # of `calibrate`
    start: float = 0.0  # of a process of its own: imports, the checkpoint, the index

    @property
    def total(self) -> float:
        return self.start + self.calibrate + self.evaluate


class Naive:
    """What a hand-run script does, setting by setting."""

    def __init__(self, run: dict, entropy_sites: int) -> None:
        options, splits = run["options"], run["splits"]
        loaded = load_model(options["model_type"], options["pretrained_dir"], options["img_size"])
        classes = loaded.geometry.num_classes
        self.model = with_peer(quantize_vit(loaded.model).eval())
        self.transform = EvalTransform(loaded.geometry.img_size, loaded.mean, loaded.std, loaded.interpolation)
        self.calib = open_split(options["data_path"], splits["calibration"]["split"], classes)
        self.val = open_split(options["data_path"], "val", classes)
        self.calib_ids, self.select_ids = splits["calibration"]["sample_ids"], splits["selection"]
        self.calib_size, self.batch_size = options["calib_batchsz"], options["batch_size"]
        self.entropy_sites = entropy_sites

    def cost(self, setting: Setting) -> Cost:
        clock = time.perf_counter()
        self._collect(setting)
        extrapolated = self._load(setting)
        calibrated = time.perf_counter()
        with torch.inference_mode():
            evaluation = evaluate(self.model, self._selection(), self.transform.normalize)
        evaluated = time.perf_counter() - calibrated
        whole = setting.calibrator.name != "entropy"
        seconds = calibrated - clock + extrapolated
        return Cost(setting, seconds, evaluated, evaluation.top1_correct if whole else None, extrapolated)

    def _selection(self) -> Iterator[Batch]:
        return iter_batches(self.val, self.select_ids, self.transform, self.batch_size, 2)

    def _activations(self, setting: Setting) -> Iterator[tuple[list[str], PeerQuantizer]]:
        """(sites, their quantizer) of the activations that the mode quantizes: query, key and value share an input."""
        found: dict[int, tuple[list[str], PeerQuantizer]] = {}
        for key, site, quantizer in sites_of(self.model):
            if site.family != WEIGHT and MODES[setting.mode].quantizes(site):
                found.setdefault(id(quantizer), ([], quantizer))[0].append(key)
        yield from found.values()

    def _collect(self, setting: Setting) -> None:
        for _, _, quantizer in sites_of(self.model):
            quantizer.state = State.OFF
        for _, quantizer in self._activations(setting):
            quantizer.state = State.OBSERVE
            quantizer.calibrator = (
                MaxCalibrator(setting.act_bits, None, False)
                if setting.calibrator.name == "max"
                else HistogramCalibrator(setting.act_bits, None, False)
            )
        ids = self.calib_ids[: setting.num_batches * self.calib_size]
        with torch.inference_mode():
            for batch in iter_batches(self.calib, ids, self.transform, self.calib_size, 2):
                self.model(self.transform.normalize(batch.images))

    def _load(self, setting: Setting) -> float:
        """Compute and load every amax; seconds that entropy would have taken at the sites left out."""
        extrapolated = 0.0
        spent: list[float] = []
        amax = {key: torch.zeros(()) for key, _, _ in sites_of(self.model)}  # of sites that the mode leaves out
        for i, (keys, quantizer) in enumerate(self._activations(setting)):
            clock = time.perf_counter()
            if setting.calibrator.name == "max":
                value = quantizer.calibrator.compute_amax()
            elif setting.calibrator.name == "percentile":
                value = quantizer.calibrator.compute_amax("percentile", percentile=setting.calibrator.values[0])
            elif i < self.entropy_sites:
                value = quantizer.calibrator.compute_amax("entropy")
                spent.append(time.perf_counter() - clock)
            else:
                value = quantizer.calibrator._calib_bin_edges[-1]
                extrapolated += float(np.mean(spent))
            amax |= dict.fromkeys(keys, torch.as_tensor(value).float().reshape(()))
        apply_plan(self.model, self._plan(setting, amax | self._amax_of_weights(setting)))
        return extrapolated

    def _amax_of_weights(self, setting: Setting) -> dict[str, Tensor]:
        amax = {}
        for key, weight in site_weights(self.model).items():
            calibrator = MaxCalibrator(setting.weight_bits, MODES[setting.mode].weight_axis, False)
            calibrator.collect(weight.detach())
            amax[key] = calibrator.compute_amax().float()
        return amax

    def _plan(self, setting: Setting, amax: dict[str, Tensor]) -> Plan:
        depth = len(quant_blocks(self.model))
        groups = FUSED_GROUPS if MODES[setting.mode].fuse_qkv else ()
        for keys in ([site_key(i, name) for name in group] for i in range(depth) for group in groups):
            amax |= dict.fromkeys(keys, torch.stack([amax[key] for key in keys]).amax(0))
        rules = rules_of_mode(MODES[setting.mode], setting.weight_bits, setting.act_bits, depth)
        return Plan(setting.mode, {key: SitePlan(amax[key], rule) for key, rule in rules.items()})


def cost_of_process(argv: Sequence[str], name: str, setting: Setting) -> Cost:
    """The setting as a command of its own, timed from outside."""
    clock = time.perf_counter()
    command = [sys.executable, __file__, *argv, "--only", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    elapsed = time.perf_counter() - clock
    inside = json.loads(done.stdout.splitlines()[-1])
    computed = inside["calibrate"] - inside["extrapolated"] + inside["evaluate"]
    return Cost(setting, **inside, start=elapsed - computed)


def settings_of(result: dict) -> list[tuple[str, Setting]]:
    """(candidate, setting) of a run, in its order, without those of `mse`."""
    found = require_format("result", "result.json", result)
    settings = ((name, read_setting(c["setting"], found)) for name, c in result["candidates"].items())
    return [(name, s) for name, s in settings if s.calibrator.name != "mse" and not s.rules]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a search by tune_calib.py")
    parser.add_argument("--calibrators", default="max,percentile,entropy")
    parser.add_argument("--entropy-sites", type=int, default=2)
    parser.add_argument("--first", type=int, help="only so many settings, spread over the list")
    parser.add_argument("--processes", action="store_true", help="each setting as a command of its own")
    parser.add_argument("--only", help="one candidate, its cost as JSON: what --processes starts")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    run, result = (json.loads((args.run / name).read_text()) for name in ("run.json", "result.json"))
    if '"resumed"' in (args.run / "trials.jsonl").read_text():
        raise SystemExit(f"{args.run}: was resumed, so its times are not those of a whole search")
    if args.only is not None:
        cost = Naive(run, args.entropy_sites).cost(dict(settings_of(result))[args.only])
        fields = ("calibrate", "evaluate", "correct", "extrapolated")
        print(json.dumps({name: getattr(cost, name) for name in fields}))
        return
    chosen = [(n, s) for n, s in settings_of(result) if s.calibrator.name in args.calibrators.split(",")]
    if args.first is not None:
        chosen = chosen[:: -(-len(chosen) // args.first)]
    naive = None if args.processes else Naive(run, args.entropy_sites)
    own = ("--run", str(args.run), "--entropy-sites", str(args.entropy_sites))
    costs: list[tuple[str, Cost]] = []
    for name, setting in Terminal("naive_search.py").track(chosen, len(chosen), "naive"):
        cost = naive.cost(setting) if naive else cost_of_process(own, name, setting)
        costs.append((name, cost))
        ours = result["selection"].get(result["candidates"][name]["same_as"] or name)
        full = ours is not None and cost.correct is not None and ours["images"] == len(run["splits"]["selection"])
        note = f", {cost.correct} correct" if cost.correct is not None else ""
        note += f" (here {ours['top1_correct']})" if full else ""
        note += f", {cost.extrapolated:.0f} s of it extrapolated" if cost.extrapolated else ""
        print(
            f"{name} {setting.label}: start {cost.start:.1f} s, calibrate {cost.calibrate:.1f} s, "
            f"evaluate {cost.evaluate:.1f} s{note}",
            flush=True,
        )
    summarize(costs, len(settings_of(result)), result["seconds"])


def summarize(costs: list[tuple[str, Cost]], wanted: int, seconds: dict[str, float]) -> None:
    """Totals by calibrator, and the ratio to the run's own time."""
    ours = sum(seconds.values())
    print(f"\n{len(costs)} of {wanted} settings without mse; the search itself, mse included: {ours:.1f} s {seconds}")
    ordered = sorted(costs, key=lambda c: c[1].setting.calibrator.name)
    for calibrator, group in itertools.groupby(ordered, key=lambda c: c[1].setting.calibrator.name):
        rows = list(group)
        total, made_up = sum(c.total for _, c in rows), sum(c.extrapolated for _, c in rows)
        print(f"{calibrator:<12} {len(rows):>3} settings {total:>9.1f} s, {made_up:.1f} s of it extrapolated")
    total = sum(c.total for _, c in costs)
    cheap = sum(c.total for _, c in costs if c.setting.calibrator.name != "entropy")
    print(f"naive over all: {total:.1f} s, {total / ours:.1f} x the search")
    print(f"naive, max and percentile only: {cheap:.1f} s, {cheap / ours:.1f} x the search (of all settings)")


if __name__ == "__main__":
    main()
