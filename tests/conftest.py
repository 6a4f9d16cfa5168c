"""Shared fixtures: small models and images; everything is made here, nothing is downloaded.

Ray is imported by those that start it only, so that tests of engines run where there is none, as on a borrowed GPU.
"""

from __future__ import annotations

import importlib.util
import io
import signal
import struct
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitq_ray.calibration.calibrators import Calibration
from vitq_ray.calibration.setting import Setting
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.models.google import google_arrays
from vitq_ray.quant.plan import Plan, SitePlan, SiteRule
from vitq_ray.quant.vit import observing, quantize_vit, site_weights, sites_of, tensor_keys

ROOT = Path(__file__).resolve().parents[1]  # of the repository
DATA = ROOT / "tests" / "data"
REFERENCE = DATA / "reference"  # numbers of an independent implementation


def tiny_vit(seed: int = 0, **overrides: object) -> VisionTransformer:
    """A random float ViT of 2 blocks on 16x16 images, with weights large enough to be interesting."""
    torch.manual_seed(seed)
    options = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 7,
        **overrides,
    }
    model = VisionTransformer(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_setting(
    mode: str = "ft2", calibrator: str = "percentile 99.99", num_batches: int = 10, bits: int = 8, **more: Any
) -> Setting:
    """A setting in few words; `bits` are those of weights and activations."""
    return Setting(mode, Calibration.parse(calibrator), num_batches, **{"weight_bits": bits, "act_bits": bits, **more})


def observed(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Every observed tensor, by full name; each is seen exactly once."""
    seen: dict[str, Tensor] = {}

    def keep(key: str, x: Tensor) -> None:
        assert key not in seen, f"{key} observed twice"
        seen[key] = x.clone()

    observers = {key: lambda x, key=key: keep(key, x) for key in tensor_keys(model)}
    with torch.inference_mode(), observing(model, observers):
        model(images)
    return seen


# DESIGN section 4, by hand: what a mode leaves out (parts of site names), whether weights have a scale per row, and
# whether query, key and value share theirs.
_INNER = ("layernorm_input", "local_input")
BY_HAND: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "ft1": ((*_INNER, "residual_input", "softmax_input", "_aftergemm"), True, False),
    "ft2": ((*_INNER, "residual_input"), False, True),
    "ft3": (_INNER, False, True),
    "trt": (("layernorm_input", "softmax_input", "_aftergemm"), False, True),
    "ort": ((*_INNER, "residual_input", "softmax_input", "_aftergemm"), True, False),
    "openvino": ((*_INNER, "residual_input", "softmax_input", "_aftergemm"), True, False),
    "tensorrt": ((*_INNER, "softmax_input", "_aftergemm"), True, False),
}
FT_MODES = ("ft1", "ft2", "ft3", "trt")  # FasterTransformer's: every grid is signed
_FUSED = ("attn.{}._weight_quantizer", "attn.{}._aftergemm_quantizer", "attn.matmul_{}_input_quantizer")


def plan_by_hand(model: nn.Module, images: Tensor, mode: str, bits: int = 8, act_bits: int | None = None) -> Plan:
    """The plan of max |x| on these images, for a model of two blocks, spelled out without the package's tables."""
    left_out, per_row, fused = BY_HAND[mode]
    tensors, weights = observed(model, images), site_weights(model)
    amax: dict[str, Tensor] = {}
    grids: dict[str, dict[str, Any]] = {}
    for key, site, _ in sites_of(model):
        if key in weights:
            magnitude = weights[key].detach().abs()
            amax[key] = magnitude.amax(1, keepdim=True) if per_row else magnitude.max()
        else:
            x = tensors[key.removesuffix(site.name) + site.tensor]
            amax[key] = x.abs().max()
            if mode in ("ort", "openvino") and "matmul_a" in key:
                grids[key] = {"signed": False}
            elif mode in ("ort", "openvino") and key.endswith("._input_quantizer"):
                largest, low, high = 2 ** (act_bits or bits) - 1, min(x.min().item(), 0), max(x.max().item(), 0)
                step = (high - low) / largest
                zero_point = round(-low / step) if step > 0 else 0
                grids[key] = {"signed": False, "zero_point": zero_point}
                amax[key] = torch.tensor(step * (largest - zero_point))
    for block, pattern in ((i, pattern) for i in (0, 1) for pattern in _FUSED if fused):
        names = "qkv" if "matmul" in pattern else ("query", "key", "value")
        keys = [f"transformer.encoder.layer.{block}.{pattern.format(name)}" for name in names]
        amax |= dict.fromkeys(keys, torch.stack([amax[key] for key in keys]).max())
    sites = {}
    for key, value in amax.items():
        is_weight = "_weight_" in key
        own_bits = bits if is_weight else act_bits or bits
        on = not any(part in key for part in left_out)
        rule = SiteRule(own_bits, 0 if is_weight and per_row else None, on, **grids.get(key, {}))
        sites[key] = SitePlan(value, rule)
    return Plan(mode, sites)


@pytest.fixture
def float_vit() -> VisionTransformer:
    return tiny_vit()


@pytest.fixture
def quant_vit() -> VisionTransformer:
    return quantize_vit(tiny_vit())


@pytest.fixture
def images() -> torch.Tensor:
    """(24, 3, 16, 16) float32 in about [-3, 3]."""
    return torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))


_HALVES = {"selection": [0], "report": [1]}
RUN_DESCRIPTION: dict[str, Any] = {  # what run.json must say, of a search and of a training
    "options": {"split_seed": 0, "calib_batchsz": 8},
    "search_space": {"name": "s", "choices": {}, "qat": None},
    "splits": {**_HALVES, "calibration": {"split": "train", "sample_ids": [2]}},
    "weights_fingerprint": "w",
    "data_fingerprint": "d",
    "geometry": {},
    "config": {},
    "start": {},
}


CLASSES, SIZE = 7, 16


def encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_zip_split(folder: Path, split: str, images: list[bytes], labels: list[int]) -> None:
    """`<split>.zip` and `<split>_map.txt` as in the zip layout."""
    names = [f"c{label}/{i:04d}.png" for i, label in enumerate(labels)]
    with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
        for name, data in zip(names, images, strict=True):
            archive.writestr(name, data)
    rows = zip(names, labels, strict=True)
    (folder / f"{split}_map.txt").write_text("".join(f"{name}\t{label}\n" for name, label in rows))


@dataclass(frozen=True)
class Project:
    """A folder with `vit.npz` and random images in the zip layout, labelled with what the float model says."""

    folder: Path

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "vit.npz")

    @property
    def options(self) -> list[str]:
        return ["--pretrained_dir", self.checkpoint, "--data-path", str(self.folder)]


def make_project(folder: Path, train: int = 40, val: int = 22, seed: int = 0) -> Project:
    model, normalize = tiny_vit(seed), EvalTransform(SIZE).normalize
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (train + val, 1, 1, 3))
    pixels = ((colours + rng.integers(0, 256, (train + val, SIZE, SIZE, 3))) // 2).astype(np.uint8)
    with torch.no_grad():
        logits = model(normalize(torch.from_numpy(pixels)))
        model.head.bias -= logits.mean(0)  # else a random model says one class to all images
        labels = (logits - logits.mean(0)).argmax(1).tolist()
    np.savez(folder / "vit.npz", **google_arrays(model))
    encoded = [encode_png(p) for p in pixels]
    write_zip_split(folder, "train", encoded[:train], labels[:train])
    write_zip_split(folder, "val", encoded[train:], labels[train:])
    return Project(folder)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    folder = tmp_path / "project"
    folder.mkdir()
    return make_project(folder)


def load_script(name: str) -> ModuleType:
    """A script as a module, without running it."""
    path = ROOT / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def fresh_package() -> Iterator[None]:
    """Imports of the package load it anew, as in a new process; what it imports stays loaded, PyTorch above all."""
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vitq_ray"}
    for name in loaded:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vitq_ray"]:
            del sys.modules[name]
        sys.modules.update(loaded)


def hears_ctrl_c() -> None:
    """For a new process: signals that these tests may ignore, as in the background or under nohup, are heard."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def descendants(root: int, title: str | tuple[str, ...]) -> list[int]:
    """Process ids below `root` whose command line begins with (one) `title` (Ray's workers have telling ones)."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # gone meanwhile
            continue
    found, todo = set(), {root}
    while todo:
        todo = {pid for pid, parent in parents.items() if parent in todo}
        found |= todo
    return sorted(pid for pid in found if titles.get(pid, "").startswith(title))


@pytest.fixture(autouse=True)
def no_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process draw no page at their end, but in tests marked `draws`."""
    module = sys.modules.get("vitq_ray.commands.report")
    if module is not None and "draws" not in request.keywords:
        monkeypatch.setattr(module, "draw", lambda folder, script: folder / "report.html")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One small Ray for all tests that need it."""
    from vitq_ray.cluster.start import cluster

    with cluster(num_cpus=2, object_store_bytes=300_000_000, dashboard=False):
        yield


def scrape() -> str:
    """What Prometheus reads from the metrics port of a node of the running Ray."""
    import ray

    node = ray.nodes()[0]
    with urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as page:
        return str(page.read().decode())


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of the event files of a folder, as TensorBoard reads them, in the order of their names.

    The start of a session at a step drops what was said of it and of later ones. A step that comes twice is an error.
    """
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:  # length (8), its checksum (4), record, checksum (4)
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                found = {tag: {s: v for s, v in rows.items() if s < event.step} for tag, rows in found.items()}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    assert event.step not in found.setdefault(value.tag, {}), "a point was doubled"
                    found[value.tag][event.step] = value.simple_value
    return found
