"""Images per second: the Ray Data source against a torch DataLoader, same files, same decoding, same cores.

    python benchmarks/source.py                                  # ../shared/data/clothing-zip, or the bundled sample
    python benchmarks/source.py --data-path /data/imagenet --split val --size 224

Both read members out of the zip, decode and resize to uint8 in two processes, and hand over batches in a fixed order.
The passes alternate, so that a drifting machine slows both; the first pass of each (processes start, imports) is shown
apart. The DataLoader keeps its workers between passes.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitq_ray.cluster import cluster
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.samples import SampleIndex, open_split
from vitq_ray.data.source import share, stream_batches
from vitq_ray.data.transforms import EvalTransform

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "clothing-zip"


class ZipImages(Dataset):
    """What one would write with `zipfile`; every worker opens the archive for itself."""

    def __init__(self, index: SampleIndex, ids: Sequence[int], transform: EvalTransform) -> None:
        self.path, self.transform = index.source, transform
        self.rows = [(index.name(i), int(index.labels[i])) for i in ids]
        self.archive: zipfile.ZipFile | None = None
        self.names: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if self.archive is None:
            self.archive = zipfile.ZipFile(io.FileIO(self.path))
            members = self.archive.namelist()
            self.names = {m: m for m in members} | {m.partition("/")[2]: m for m in members}
        name, label = self.rows[i]
        data = self.archive.read(self.names[name])
        return torch.from_numpy(self.transform.decode(data, name).copy()), label


def measure(passes: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """{what: images/s of every pass, the first one included}, in turn."""
    speeds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats + 1):
        for name, action in passes.items():
            start = time.perf_counter()
            images = action()
            speeds[name].append(images / (time.perf_counter() - start))
    return speeds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", default=str(PHOTOS if PHOTOS.is_dir() else ROOT / "vitq_ray" / "sample"))
    parser.add_argument("--split", default="train")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=2400, help="of a pass; the split is repeated as often as needed")
    parser.add_argument("--repeats", type=int, default=5, help="warm passes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    index, transform = open_split(args.data_path, args.split), EvalTransform(args.size)
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.permutation(len(index)) for _ in range(-(-args.images // len(index)))])[: args.images]
    dataset = ZipImages(index, ids.tolist(), transform)
    loader = DataLoader(dataset, args.batch_size, num_workers=args.workers, persistent_workers=True)

    with cluster(num_cpus=args.workers, object_store_bytes=1_000_000_000, dashboard=False):
        shared = share(index)
        speeds = measure(
            {
                "torch DataLoader": lambda: sum(len(labels) for _, labels in loader),
                "Ray Data source": lambda: sum(
                    len(b.labels) for b in stream_batches(index, ids, transform, args.batch_size, shared=shared)
                ),
                "threads, no Ray": lambda: sum(
                    len(b.labels) for b in iter_batches(index, ids, transform, args.batch_size, args.workers)
                ),
            },
            args.repeats,
        )
    print(f"{args.images} images to {args.size}x{args.size}, {args.workers} workers, batches of {args.batch_size}")
    for name, (cold, *warm) in speeds.items():
        print(f"{name:<18} first pass {cold:7.1f} images/s, then median {statistics.median(warm):7.1f}")
    pairs = zip(speeds["Ray Data source"][1:], speeds["torch DataLoader"][1:], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    print(f"source / DataLoader, warm: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
