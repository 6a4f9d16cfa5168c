"""What a trial costs under Ray Tune beside its evaluation, and the memory a search takes.

    python benchmarks/trial_cost.py
    python benchmarks/trial_cost.py --trials 40 --chunks 5

Trials of the bundled sample on a handful of images, on as many warm workers as there are cores. Fixed cost: the time
from the first result to the last, times the workers, less the seconds spent evaluating, per trial (or per chunk, with
several chunks a trial). What comes before the first result (processes, imports, model) is shown apart. Memory is the
resident set of this process and of each worker (`RssAnon` + `RssFile`), and of the object store (`RssShmem` of the
driver's raylet).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from vitq_ray.base.cpus import available_cpus
from vitq_ray.calibration.calibrators import Calibration
from vitq_ray.calibration.scales import Scales
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import collect_statistics
from vitq_ray.cluster.images import ImageStore
from vitq_ray.cluster.start import cluster
from vitq_ray.cluster.trials import Resources, run_trials, share
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.samples import open_split
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.measure.metrics import Results
from vitq_ray.measure.racing import RaceRules
from vitq_ray.models.load import load_model
from vitq_ray.quant.vit import quantize_vit


class Stopwatch:
    """A referee that only looks at the clock."""

    def __init__(self, names: Sequence[str]) -> None:
        self.waiting = list(names)
        self.times: list[float] = []
        self.busy = 0.0
        self.memory: dict[str, int] = {}

    def next(self) -> str | None:
        return self.waiting.pop(0) if self.waiting else None

    @property
    def over(self) -> bool:
        return not self.waiting

    def seen(self, name: str) -> int:
        return 0

    def take(self, name: str, start: int, results: Results, seconds: float) -> bool:
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            self.busy += seconds
        if len(self.times) == 10:
            self.memory = memory()
        return False


def memory() -> dict[str, int]:
    """{process: bytes} of this process, the workers of trials, and the object store."""
    result = {"driver": _resident(os.getpid(), ("RssAnon", "RssFile"))}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title, pid = (folder / "cmdline").read_bytes().decode(errors="replace"), int(folder.name)
            if title.startswith(("ray::CandidateTrial", "ray::ResourceTrainable")):
                result[f"worker {pid}"] = _resident(pid, ("RssAnon", "RssFile"))
            elif "raylet/raylet" in title:
                result["object store in use"] = _resident(pid, ("RssShmem",))
        except OSError:  # gone meanwhile
            continue
    return result


def _resident(pid: int, kinds: Sequence[str]) -> int:
    rows = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(1024 * int(row[1]) for row in rows if row and row[0].rstrip(":") in kinds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--chunks", type=int, default=1, help="chunks (looks) of a trial")
    parser.add_argument("--images", type=int, default=10, help="images of a chunk")
    args = parser.parse_args(argv)
    sample = files("vitq_ray") / "sample"
    loaded = load_model("auto", str(sample / "vit.npz"), None)
    index, transform = open_split(str(sample), "val"), EvalTransform(loaded.geometry.img_size)
    batches = list(iter_batches(index, range(args.images * args.chunks), transform, args.images))
    model, setting = quantize_vit(loaded.model).eval(), Setting("ft2", Calibration("max"), 1)
    first = transform.normalize(batches[0].images)
    plan = Scales(model, collect_statistics(model, [(0, first)], [1])).plan(setting)
    names, workers = [f"c{i}" for i in range(args.trials)], available_cpus()
    watch = Stopwatch(names)
    with (
        cluster(num_cpus=workers, object_store_bytes=300_000_000, dashboard=False),
        tempfile.TemporaryDirectory() as folder,
    ):
        store = ImageStore()
        for batch in batches:
            store.add(batch)
        images = store.stored()
        rules = RaceRules(len(images), args.images)
        with share(model, images, rules, transform, args.images, Resources()) as shared:
            for name in names:
                shared.add(name, plan)
            start = time.perf_counter()
            run_trials(shared, watch, Resources(), Path(folder) / "tune")
            end = time.perf_counter()
    steps = len(watch.times) - 1
    cost = ((watch.times[-1] - watch.times[0]) * workers - watch.busy) / steps
    print(f"{args.trials} trials of {args.chunks} chunks of {args.images} images on {workers} workers")
    print(f"until the first result  {watch.times[0] - start:6.2f} s")
    print(f"fixed cost              {cost:6.3f} s a {'trial' if args.chunks == 1 else 'chunk'} on its worker")
    print(f"after the last result   {end - watch.times[-1]:6.2f} s")
    for name, size in sorted(watch.memory.items()):
        print(f"{name:<23} {size / 1e6:6.0f} MB")


if __name__ == "__main__":
    main()
