"""Files of this program against files of other quantizers: closeness to the float model, speed, size.

    python benchmarks/peers.py --pretrained_dir ../shared/data/vits14/vits14.npz \
        --data-path ../shared/data/clothing-zip --output runs/peers
    python benchmarks/peers.py … --only openvino                       # rows whose name holds this text

Every program calibrates on the first images of train in one random order: ours on 24, peers on `--images`, those that
keep all tensors for their histograms on `--histogram-images`. It is judged on all of val: `int8` is the
file as the runtime executes it, `exact` the same file in ONNX Runtime with its integer kernels switched off
(`session.disable_quant_qdq`), which is what a CPU whose kernels do not saturate would find. OpenVINO has no such
switch; our rows for it are also run in ONNX Runtime for that column. `plan`: images of our rows with the same class as
the plan, as PyTorch executes it with float32 quantizers. Behind the rows come times: all files of a runtime take turns,
warm, and the median of the rounds counts; then `exact`, which takes longest.

A row is a process of its own and leaves NAME.onnx (or .xml), NAME.npy (its logits) and NAME.json in the output folder.
Rows that are there are not made again. Needs `pip install -e '.[bench]'`; rows whose package is missing are left out,
aloud.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from engine import machine
from torch import Tensor

import vitq_ray
from vitq_ray.base.files import write_json
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.samples import open_split
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.runtimes import open_file
from vitq_ray.measure.fidelity import agrees, kl_to_float
from vitq_ray.measure.latency import milliseconds
from vitq_ray.models.load import load_model

INPUT = "images"
FLOAT = "float"
ATTENTION_OFF = "*.attn.matmul_* -> off"
MIXED_OFF = "*.attn.matmul_a_input_quantizer -> off; *.attn.matmul_v_input_quantizer -> off"
RANKED = 32  # of the 100 labelled images: by them the accuracy control orders the layers, in 10 minutes


class Bench:
    """The model, its images, and the folder of the files."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.output)
        self.loaded = load_model("auto", options.pretrained_dir, None)
        self.transform = EvalTransform(self.loaded.geometry.img_size)

    def images(self, split: str, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(images as the model takes them, labels), eight at a time; of train the first `count` in a random order."""
        index = open_split(self.options.data_path, split, self.loaded.geometry.num_classes)
        ids: Any = range(len(index))
        if split == "train":
            ids = np.random.default_rng(0).permutation(len(index))[:count].tolist()
        elif self.options.limit is not None:
            ids = np.random.default_rng(0).permutation(len(index))[: self.options.limit].tolist()
        for batch in iter_batches(index, ids, self.transform, 8, 2):
            yield self.transform.normalize(batch.images), batch.labels

    def calibration(self, count: int) -> list[np.ndarray]:
        return [images.numpy() for images, _ in self.images("train", count)]

    @cached_property
    def float_logits(self) -> Tensor:
        path = self.folder / "float_logits.npy"
        if not path.exists():
            model = self.loaded.model.eval()
            with torch.inference_mode():
                np.save(path, torch.cat([model(images) for images, _ in self.images("val")]).numpy())
        return torch.from_numpy(np.load(path))

    @cached_property
    def float_file(self) -> Path:
        """What every peer starts from, and the two float rows run."""
        path = self.folder / f"{FLOAT}.onnx"
        if not path.exists():
            timm.layers.set_fused_attn(False)
            model = load_model("auto", self.options.pretrained_dir, None).model.eval()
            names = {"input_names": [INPUT], "output_names": ["logits"], "dynamic_axes": {INPUT: {0: "batch"}}}
            size = self.transform.size
            torch.onnx.export(
                model, (torch.zeros(2, 3, size, size),), str(path), dynamo=False, opset_version=17, **names
            )
        return path

    def plan_logits(self, plan: Path) -> Tensor:
        """Of the calibrated checkpoint in this folder, with its quantizers in float32."""
        path = plan / "logits.npy"
        if not path.exists():
            (checkpoint,) = plan.glob("*_calib.pth")
            model = vitq_ray.load_calibrated(str(checkpoint)).loaded.model.eval()
            with torch.inference_mode():
                np.save(path, torch.cat([model(images) for images, _ in self.images("val")]).numpy())
        return torch.from_numpy(np.load(path))

    def judged(self, path: Path, runtime: str, integers: bool = True, keep: Path | None = None) -> dict[str, Any]:
        """top-1, agreement and KL of a file on all of val; its logits are kept in `keep`."""
        run, logits, labels = open_file(str(path), runtime, integers), [], []
        for images, truth in self.images("val"):
            logits.append(run(images))
            labels.append(truth)
        found, right = torch.cat(logits), torch.cat(labels)
        if keep is not None:
            np.save(keep, found.numpy())
        kl = kl_to_float(found, self.float_logits)
        return {
            "images": len(found),
            "top1": float((found.argmax(1) == right).double().mean()),
            "agreement": float(agrees(found, self.float_logits).double().mean()),
            "kl": float(kl.mean()),
            "kl_error": float(kl.std() / len(kl) ** 0.5),
            "kl_of_images": [float(f"{value:.4g}") for value in kl],
        }


# What makes a file ---------------------------------------------------------------------------------------------------

Make = Callable[[Bench, Path], Path]  # bench, where the file shall lie without its ending -> where it lies


def float_row(bench: Bench, path: Path) -> Path:
    return bench.float_file


def ours(target: str, rules: str | None = None, **options: Any) -> Make:
    """A calibration and an export by this program. Rows with the same rules share the checkpoint: the modes `ort` and
    `openvino` have the same sites."""

    def make(bench: Bench, path: Path) -> Path:
        plan = bench.folder / "plans" / PLANS[rules]
        data = {"pretrained_dir": bench.options.pretrained_dir, "data_path": bench.options.data_path}
        if not (plan / "result.json").exists():
            vitq_ray.calibrate(**data, quant_mode="ort", rules=rules, calib_output_path=str(plan), **OURS)
        (checkpoint,) = plan.glob("*_calib.pth")
        data["pretrained_dir"] = str(checkpoint)
        result = vitq_ray.export(**data, target=target, output=str(path), limit=8, force=True, **options)
        return Path(shutil.move(result.file, path.with_suffix(".onnx")))

    return make


PLANS = {None: "integers", ATTENTION_OFF: "attention", MIXED_OFF: "values"}
OURS: dict[str, Any] = {
    "calibrator": "fisher",
    "weight_calibrator": "fisher",
    "transforms": "rotate,shift,heads",
    "num_calib_batch": 3,
}


def ort_static(method: str, exclude: str = "", **options: Any) -> Make:
    """ONNX Runtime's static quantization of the linear layers and products, per channel, u8 activations, s8 weights."""

    def make(bench: Bench, path: Path) -> Path:
        import onnx
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        prepared, made = bench.folder / "prepared.onnx", path.with_suffix(".onnx")
        if not prepared.exists():
            quant_pre_process(str(bench.float_file), str(prepared))
        is_range = method == "MinMax"
        batches = bench.calibration(bench.options.images if is_range else bench.options.histogram_images)
        left = iter(batches)
        reader = type(
            "Reader", (), {"get_next": lambda self: {INPUT: i} if (i := next(left, None)) is not None else None}
        )
        known = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8} | {
            key: getattr(QuantType, value) if key.endswith("_type") else value for key, value in options.items()
        }
        kept = next(k for k in range(2, 99) if len(batches) % k)  # it fails where no batch is left over at the end
        more = {"CalibMaxIntermediateOutputs": kept} if is_range else {}
        nodes = [node for node in onnx.load(prepared).graph.node if node.op_type == "MatMul"]
        quantize_static(
            str(prepared),
            str(made),
            reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            per_channel=True,
            calibrate_method=getattr(CalibrationMethod, method),
            nodes_to_exclude=[node.name for node in nodes if exclude and is_product(node, exclude)],
            extra_options=more | known.pop("extra_options", {}),
            **known,
        )
        return made

    return make


def is_product(node: Any, which: str) -> bool:
    """Whether a node is q·kᵀ (the first product of attention), or probabilities · v: "values", or "both"."""
    name = node.name
    return {"values": name.endswith("attn/MatMul_1"), "both": name.endswith(("attn/MatMul", "attn/MatMul_1"))}[which]


def nncf_quantized(backend: str, smooth: bool, accuracy_control: bool = False, **options: Any) -> Make:
    """NNCF of the ONNX or the OpenVINO model, model type transformer."""

    def make(bench: Bench, path: Path) -> Path:
        import nncf
        import onnx
        import openvino

        is_onnx = backend == "onnx"
        model = onnx.load(bench.float_file) if is_onnx else openvino.Core().read_model(str(bench.float_file))
        parts = [image[None] for images in bench.calibration(bench.options.images) for image in images]
        data = nncf.Dataset(parts, lambda image: {INPUT: image})
        alphas = nncf.AdvancedSmoothQuantParameters(**({} if smooth else {"matmul": -1}))
        advanced = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=alphas, **options)
        known = {"subset_size": len(parts), "model_type": nncf.ModelType.TRANSFORMER}
        if accuracy_control:
            rows = labelled(bench)
            made = nncf.quantize_with_accuracy_control(
                model,
                data,
                nncf.Dataset(rows, lambda row: {INPUT: row[0]}),
                accuracy,
                advanced_quantization_parameters=advanced,
                advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                    ranking_subset_size=RANKED
                ),
                **known,
            )
        else:
            made = nncf.quantize(model, data, advanced_parameters=advanced, **known)
        if is_onnx:
            onnx.save(made, path.with_suffix(".onnx"))
            return path.with_suffix(".onnx")
        openvino.save_model(made, str(path.with_suffix(".xml")), compress_to_fp16=False)
        return path.with_suffix(".xml")

    return make


def labelled(bench: Bench) -> list[tuple[np.ndarray, int]]:
    """(image (1, 3, S, S), label) of other images of train, for the accuracy control."""
    parts = list(bench.images("train", bench.options.images + 100))
    rows = [
        (image[None].numpy(), int(label))
        for images, labels in parts
        for image, label in zip(images, labels, strict=True)
    ]
    return rows[bench.options.images :]


def accuracy(model: Any, rows: Any) -> tuple[float, None]:
    return float(np.mean([model(image)[0].argmax() == label for image, label in rows])), None


def modelopt_quantized(config: str) -> Make:
    """nvidia-modelopt of the PyTorch model, exported with its Q/DQ."""

    def make(bench: Bench, path: Path) -> Path:
        import modelopt.torch.quantization as mtq

        timm.layers.set_fused_attn(False)
        model = load_model("auto", bench.options.pretrained_dir, None).model.eval()
        calibration = [torch.from_numpy(images) for images in bench.calibration(bench.options.images)]

        def loop(model: Any) -> None:
            with torch.inference_mode():
                for images in calibration:
                    model(images)

        model = mtq.quantize(model, getattr(mtq, config), loop)
        names = {"input_names": [INPUT], "output_names": ["logits"], "dynamic_axes": {INPUT: {0: "batch"}}}
        made = path.with_suffix(".onnx")
        with torch.inference_mode():
            torch.onnx.export(model, (calibration[0],), str(made), dynamo=False, opset_version=17, **names)
        return made

    return make


@dataclass(frozen=True)
class Row:
    """`plan`: folder of the calibrated checkpoint that a file of ours computes; one of 7 bits is another plan."""

    runtime: str
    make: Make
    plan: str | None = None


def our_row(runtime: str, rules: str | None = None, **options: Any) -> Row:
    return Row(runtime, ours(runtime, rules, **options), None if "reduce_range" in options else PLANS[rules])


ROWS: dict[str, Row] = {
    "ort, float": Row("ort", float_row),
    "ort, ours": our_row("ort"),
    "ort, ours, unsigned weights": our_row("ort", unsigned_weights=True),
    "ort, ours, 7-bit weights": our_row("ort", reduce_range=True),
    "ort, ours, attention float": our_row("ort", ATTENTION_OFF),
    "ort, ours, attention float, unsigned weights": our_row("ort", ATTENTION_OFF, unsigned_weights=True),
    "ort, ours, attention float, 7-bit weights": our_row("ort", ATTENTION_OFF, reduce_range=True),
    "ort, ours, A·V float": our_row("ort", MIXED_OFF),
    "ort, ours, A·V float, unsigned weights": our_row("ort", MIXED_OFF, unsigned_weights=True),
    "ort, ours, A·V float, 7-bit weights": our_row("ort", MIXED_OFF, reduce_range=True),
    "ort, quantize_static, MinMax": Row("ort", ort_static("MinMax")),
    "ort, quantize_static, Entropy": Row("ort", ort_static("Entropy")),
    "ort, quantize_static, Percentile": Row("ort", ort_static("Percentile")),
    "ort, quantize_static, MinMax, A·V float": Row("ort", ort_static("MinMax", "values")),
    "ort, quantize_static, MinMax, attention float": Row("ort", ort_static("MinMax", "both")),
    "ort, quantize_static, MinMax, 7-bit weights": Row("ort", ort_static("MinMax", reduce_range=True)),
    "ort, quantize_static, MinMax, attention float, 7-bit weights": Row(
        "ort", ort_static("MinMax", "both", reduce_range=True)
    ),
    "ort, quantize_static, MinMax, u8 weights": Row("ort", ort_static("MinMax", "both", weight_type="QUInt8")),
    "ort, quantize_static, MinMax, s8 activations": Row("ort", ort_static("MinMax", activation_type="QInt8")),
    "ort, NNCF": Row("ort", nncf_quantized("onnx", smooth=True)),
    "ort, NNCF, no SmoothQuant": Row("ort", nncf_quantized("onnx", smooth=False)),
    "ort, modelopt": Row("ort", modelopt_quantized("INT8_DEFAULT_CFG")),
    "ort, modelopt, SmoothQuant": Row("ort", modelopt_quantized("INT8_SMOOTHQUANT_CFG")),
    "openvino, float": Row("openvino", float_row),
    "openvino, ours": our_row("openvino"),
    "openvino, ours, unsigned weights": our_row("openvino", unsigned_weights=True),
    "openvino, ours, 7-bit weights": our_row("openvino", reduce_range=True),
    "openvino, ours, attention float": our_row("openvino", ATTENTION_OFF),
    "openvino, ours, A·V float": our_row("openvino", MIXED_OFF),
    "openvino, NNCF": Row("openvino", nncf_quantized("openvino", smooth=True)),
    "openvino, NNCF, no SmoothQuant": Row("openvino", nncf_quantized("openvino", smooth=False)),
    "openvino, NNCF, no SmoothQuant, accuracy control": Row(
        "openvino", nncf_quantized("openvino", False, accuracy_control=True)
    ),
}


# Rows, times and the table --------------------------------------------------------------------------------------------


def place_of(folder: Path, name: str) -> Path:
    return folder / name.replace(", ", "_").replace(" ", "-").replace("·", "")


def make_row(bench: Bench, name: str) -> None:
    row, place = ROWS[name], place_of(bench.folder, name)
    file = row.make(bench, place)
    size = sum(part.stat().st_size for part in {file, file.with_suffix(".bin")} if part.exists())
    logits = place.with_suffix(".npy")
    found = {"file": file.name, "bytes": size, "int8": bench.judged(file, row.runtime, keep=logits)}
    if row.plan is not None:
        expected = bench.plan_logits(bench.folder / "plans" / row.plan)
        found["plan"] = float(agrees(torch.from_numpy(np.load(logits)), expected).double().mean())
    write_json(place.with_suffix(".json"), found)


def has_exact(folder: Path, name: str) -> bool:
    """Whether the file of a row can be run without integer kernels, and differs then."""
    file = Path(read(folder, name)["file"])
    return file.suffix == ".onnx" and file.stem != FLOAT


def add_exact(bench: Bench, name: str) -> None:
    found = read(bench.folder, name)
    found["exact"] = bench.judged(bench.folder / found["file"], "ort", integers=False)
    write_json(place_of(bench.folder, name).with_suffix(".json"), found)


def time_rows(bench: Bench, names: list[str]) -> None:
    """Milliseconds per image of all files of a runtime, in turns."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for runtime in ("ort", "openvino"):
        files = {n: bench.folder / read(bench.folder, n)["file"] for n in names if ROWS[n].runtime == runtime}
        models = {name: open_file(str(file), runtime) for name, file in files.items()}
        for batch in bench.options.batches:
            images = torch.randn(batch, 3, bench.transform.size, bench.transform.size)
            for name, ms in milliseconds(models, images, bench.options.rounds).items():
                found[name][str(batch)] = ms
    write_json(bench.folder / "times.json", found)


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(place_of(folder, name).with_suffix(".json").read_text())
    return found


def table(folder: Path, names: list[str], bytes_of_float: int, batches: list[int]) -> None:
    times = json.loads((folder / "times.json").read_text())
    heads = "".join(f"{f'ms, {batch}':>9}" for batch in batches)
    print(f"{'':<62}{'top-1':>8}{'agrees':>8}{'KL':>9}{'±':>8}{'exact':>9}{'plan':>8}{heads}{'size':>7}")
    for name in names:
        row, ms = read(folder, name), times.get(name, {})
        judged = row["int8"]
        exact = f"{row['exact']['kl']:9.4f}" if "exact" in row else f"{'':>9}"
        plan = f"{row['plan']:8.1%}" if "plan" in row else f"{'':>8}"
        speeds = "".join(f"{ms[str(b)]:9.1f}" if str(b) in ms else f"{'':>9}" for b in batches)
        print(
            f"{name:<62}{judged['top1']:8.2%}{judged['agreement']:8.1%}{judged['kl']:9.4f}{judged['kl_error']:8.4f}"
            f"{exact}{plan}{speeds}{row['bytes'] / bytes_of_float:7.1%}"
        )


def require_same(folder: Path, options: argparse.Namespace) -> None:
    """Rows of another model, or of other images, do not belong into one table."""
    wanted = {
        key: getattr(options, key) for key in ("pretrained_dir", "data_path", "limit", "images", "histogram_images")
    }
    path = folder / "options.json"
    known = json.loads(path.read_text()) if path.exists() else wanted
    if known != wanted:
        sys.exit(f"{folder}: has rows of {known}; expected the same options, or another --output")
    write_json(path, wanted)


def run_alone(argv: list[str], what: list[str]) -> bool:
    """This script as a process of its own; its last line is shown where it fails."""
    done = subprocess.run([sys.executable, __file__, *argv, *what], capture_output=True, text=True)
    if done.returncode:
        print(f"  left out: {what[-1]}: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_dir", required=True)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--output", default="runs/peers")
    parser.add_argument("--limit", type=int, help="judge on so many images of val, in a random order; default: all")
    parser.add_argument("--images", type=int, default=300, help="of train, that peers calibrate on")
    parser.add_argument("--histogram-images", type=int, default=24, help="for peers that keep all tensors of them")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8], help="sizes that times are measured at")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--exact", help=argparse.SUPPRESS)
    parser.add_argument("--times", action="store_true", help="make no row; measure those that are there again")
    options = parser.parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in ROWS if options.only in name]
    if options.row:
        make_row(Bench(options), options.row)
        return
    if options.exact:
        add_exact(Bench(options), options.exact)
        return
    print(machine())
    require_same(folder, options)
    for name in names:
        if not options.times and not place_of(folder, name).with_suffix(".json").exists():
            run_alone(sys.argv[1:], ["--row", name])
    names = [name for name in names if place_of(folder, name).with_suffix(".json").exists()]
    times = folder / "times.json"
    if options.times or not times.exists() or not set(names) <= set(json.loads(times.read_text())):
        time_rows(Bench(options), names)
    left = [name for name in names if has_exact(folder, name) and "exact" not in read(folder, name)]
    if left:
        table(folder, names, Bench(options).float_file.stat().st_size, options.batches)
        print("exact: " + ", ".join(left), flush=True)
    for name in left:
        run_alone(sys.argv[1:], ["--exact", name])
    table(folder, names, Bench(options).float_file.stat().st_size, options.batches)


if __name__ == "__main__":
    main()
