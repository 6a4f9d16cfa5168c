"""Images per second: the Ray Data source against a torch DataLoader and against threads; same files, same cores.

    python benchmarks/source.py                                       # ../shared/data/clothing-zip, or the sample
    python benchmarks/source.py --data-path /data/imagenet --repeats 1 --size 224

A pass takes every image of both splits `--repeats` times, in one fixed random order per split, one split after the
other. All three read members out of the zips, decode and resize with the same `EvalTransform`, and hand over uint8
batches in that order. There is a DataLoader for each split, which keeps its workers between passes. Passes alternate
within a round, each round beginning with another one, and ratios are taken round by round, so that a drifting machine
slows all of them. The first round (processes start, imports) is shown apart. Wanted: source / DataLoader at least 1,
warm.
"""

from __future__ import annotations

import argparse
import statistics
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitq_ray.cluster.start import cluster
from vitq_ray.cluster.stream import share, stream_batches
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.data.samples import Ids, SampleIndex, has_split, open_split
from vitq_ray.data.transforms import EvalTransform

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "clothing-zip"
LOADER, SOURCE, THREADS = "torch DataLoader", "Ray Data source", "threads, no Ray"


class ZipImages(Dataset):
    """What one would write with `zipfile`; every worker opens the archive for itself."""

    def __init__(self, index: SampleIndex, ids: Ids, transform: EvalTransform) -> None:
        self.path, self.transform = index.source, transform
        self.rows = [(index.name(i), int(index.labels[i])) for i in ids.tolist()]
        self.archive: zipfile.ZipFile | None = None
        self.members: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if self.archive is None:
            self.archive = zipfile.ZipFile(self.path)
            names = self.archive.namelist()
            self.members = {n.partition("/")[2]: n for n in names} | {n: n for n in names}  # one extra top folder
        name, label = self.rows[i]
        data = self.archive.read(self.members[name])
        return torch.from_numpy(self.transform.decode(data, name).copy()), label


def measure(passes: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """{what: images/s in every round, the cold one first}."""
    speeds: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            images = passes[name]()
            speeds[name].append(images / (time.perf_counter() - start))
            print(f"{'round ' + str(i) if i else 'cold':<8} {name:<18} {speeds[name][-1]:7.1f} images/s", flush=True)
    return speeds


def check_same(theirs: Iterable[list[torch.Tensor]], ours: Iterator[Batch]) -> None:
    """Both must hand over the same images, pixel for pixel, in the same order."""
    left = ((x, int(y)) for images, labels in theirs for x, y in zip(images, labels, strict=True))
    right = ((x, int(y)) for batch in ours for x, y in zip(batch.images, batch.labels, strict=True))
    for i, ((x, label), (y, other)) in enumerate(zip(left, right, strict=True)):
        if label != other or not torch.equal(x, y):
            raise SystemExit(f"image {i} of a pass is not the same from both: their speeds cannot be compared")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", default=str(PHOTOS if PHOTOS.is_dir() else ROOT / "vitq_ray" / "sample"))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes, or threads, that decode")
    parser.add_argument("--repeats", type=int, default=4, help="times each image is read in a pass")
    parser.add_argument("--rounds", type=int, default=4, help="warm passes of each")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    transform, rng = EvalTransform(args.size), np.random.default_rng(0)
    indexes = [open_split(args.data_path, s) for s in ("train", "val") if has_split(args.data_path, s)]
    work = [(i, np.concatenate([rng.permutation(len(i)) for _ in range(args.repeats)])) for i in indexes]
    total = sum(len(ids) for _, ids in work)
    print(
        f"{args.data_path}: {total} images a pass ({sum(map(len, indexes))} x {args.repeats}) to "
        f"{args.size}x{args.size}, {args.workers} workers, batches of {args.batch_size}",
        flush=True,
    )
    loaders = [
        DataLoader(ZipImages(index, ids, transform), args.batch_size, num_workers=args.workers, persistent_workers=True)
        for index, ids in work
    ]

    with cluster(num_cpus=args.workers, object_store_bytes=1_000_000_000, dashboard=False):
        shared = {index.source: share(index) for index in indexes}

        def stream() -> Iterator[Batch]:
            streams = (
                stream_batches(index, ids, transform, args.batch_size, shared=shared[index.source])
                for index, ids in work
            )
            return chain.from_iterable(streams)

        def threads() -> Iterator[Batch]:
            return chain.from_iterable(
                iter_batches(index, ids, transform, args.batch_size, args.workers) for index, ids in work
            )

        passes: dict[str, Callable[[], int]] = {
            LOADER: lambda: sum(len(labels) for loader in loaders for _, labels in loader),
            SOURCE: lambda: sum(len(batch.labels) for batch in stream()),
            THREADS: lambda: sum(len(batch.labels) for batch in threads()),
        }
        speeds = measure(passes, args.rounds)
        check_same(chain.from_iterable(loaders), stream())
    for name, (cold, *warm) in speeds.items():
        print(
            f"{name:<18} cold {cold:7.1f} images/s, warm median {statistics.median(warm):7.1f} "
            f"(from {min(warm):.1f} to {max(warm):.1f})"
        )
    for other in (LOADER, THREADS):
        ratios = [a / b for a, b in zip(speeds[SOURCE][1:], speeds[other][1:], strict=True)]
        print(f"source / {other}, warm: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
