"""Open a zip of ImageNet's size: seconds and memory until every image is indexed, and reads per second after that.

    python benchmarks/open_zip.py                   # 1,281,167 members, ~200 MB in a temporary folder
    python benchmarks/open_zip.py --members 50000

The zip is written byte by byte (stored members of a few bytes, zip64 end records, names as in ImageNet), then opened
in fresh processes that import nothing but `vitq_ray.data.samples`: one with an empty cache of compiled kernels, then
`--repeats` with a full one. Asked for: at most 5 s and 500 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

CLASSES = 1000
READS = 20_000
UNIX_IDS = struct.pack("<2HBBIBI", 0x7875, 11, 1, 4, 0, 4, 0)
LOCAL_EXTRA = struct.pack("<2HBII", 0x5455, 9, 3, 0, 0) + UNIX_IDS  # as Info-ZIP writes them
EXTRA = struct.pack("<2HBI", 0x5455, 5, 3, 0) + UNIX_IDS

CHILD = """
import json, sys, time
def resident(what):  # getrusage would count the parent's memory too
    line = next(l for l in open("/proc/self/status") if l.startswith(what))
    return int(line.split()[1]) / 1024
start = time.perf_counter()
import vitq_ray.data.samples as samples
imported = time.perf_counter()
baseline = resident("VmRSS")
index = samples.open_split(sys.argv[1], "train", num_classes=1000)
opened = time.perf_counter()
peak, after = resident("VmHWM"), resident("VmRSS")
import numpy as np
ids = np.random.default_rng(0).integers(len(index), size=int(sys.argv[2])).tolist()
before_reads = time.perf_counter()
for i in ids:
    assert index.read(i) == index.name(i).rsplit("_", 1)[1].encode(), i
after_reads = time.perf_counter()
index.fingerprint
print(json.dumps({
    "images": len(index),
    "import": imported - start,
    "open": opened - imported,
    "fingerprint": time.perf_counter() - after_reads,
    "baseline_mb": baseline,
    "peak_mb": peak,
    "after_mb": after,
    "reads_per_s": len(ids) / (after_reads - before_reads),
}))
"""


def names(count: int) -> Iterator[str]:
    """ImageNet-like: a thousand synset folders, files in no particular order of numbers."""
    per_class = -(-count // CLASSES)
    for i in range(count):
        synset = 1_440_764 + 13_807 * (i // per_class)
        yield f"n{synset:08d}/n{synset:08d}_{i * 7919 % 1_000_003}.JPEG"


def write_archive(root: Path, count: int) -> None:
    """train.zip and train_map.txt; each member holds the end of its own name."""
    local, central = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I")
    per_class = -(-count // CLASSES)
    directory: list[bytes] = []
    offset = 0
    with open(root / "train.zip", "wb") as archive, open(root / "train_map.txt", "w") as lines:
        for i, name in enumerate(names(count)):
            path, data = name.encode(), name.rsplit("_", 1)[1].encode()
            sizes = (zlib.crc32(data), len(data), len(data))
            archive.write(local.pack(b"PK\x03\x04", 20, 0, 0, 0, 33, *sizes, len(path), 28) + path + LOCAL_EXTRA + data)
            header = central.pack(
                b"PK\x01\x02", 20, 20, 0, 0, 0, 33, *sizes, len(path), 24, 0, 0, 0, 0x81A4 << 16, offset
            )
            directory.append(header + path + EXTRA)
            lines.write(f"{name}\t{i // per_class}\n")
            offset += local.size + len(path) + len(LOCAL_EXTRA) + len(data)
        raw = b"".join(directory)
        archive.write(raw)
        end = offset + len(raw)
        archive.write(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(raw), offset))
        archive.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
        entries, size, start = min(count, 0xFFFF), min(len(raw), 0xFFFFFFFF), min(offset, 0xFFFFFFFF)
        archive.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, entries, entries, size, start, 0))


def measure(root: Path, kernel_cache: Path) -> dict[str, float]:
    """One fresh process: what CHILD prints."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(kernel_cache)}
    reads = str(READS)
    done = subprocess.run([sys.executable, "-c", CHILD, str(root), reads], env=environment, stdout=-1, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=1_281_167)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_archive(root, args.members)
        megabytes = (root / "train.zip").stat().st_size / 1e6
        print(f"{args.members} members, {megabytes:.0f} MB")
        for run in range(args.repeats + 1):
            m = measure(root, root / "kernels")
            kernels = "compiled first" if run == 0 else "cached"
            print(
                f"kernels {kernels:14}  open {m['open']:6.2f} s  (import {m['import']:.2f} s, fingerprint "
                f"{m['fingerprint']:.2f} s)  peak {m['peak_mb']:.0f} MB ({m['baseline_mb']:.0f} before, "
                f"{m['after_mb']:.0f} after)  {m['reads_per_s']:.0f} reads/s"
            )


if __name__ == "__main__":
    main()
