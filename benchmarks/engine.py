"""How fast quantized models run: the engines of this program, PyTorch's float, and other runtimes, in one run.

    python benchmarks/engine.py                                        # ViT-S/16, ViT-B/16 and the bundled sample
    python benchmarks/engine.py --models vit_small_patch16_224 --batches 16 --threads 1
    python benchmarks/engine.py --models ../shared/data/vits14/vits14.npz
    python benchmarks/engine.py --use-gpu --models vit_small_patch16_224

Every row is measured in turn, round after round, and the best round counts; ratios are to PyTorch's compiled float
model. Models of a timm name have random weights: speed does not depend on them. `fake, eager` is PyTorch's own
arithmetic, also in batches of 100 as earlier versions ran it. Peers need `pip install -e '.[bench]'`: ONNX Runtime
(float, and its static INT8 in Q/DQ form) and OpenVINO (float, and NNCF's `quantize`). On CPUs without VNNI the integer
kernels of ONNX Runtime saturate, so its speed there is not that of a right answer. Compilation, which the first call
pays, is measured on its own: `--compile-time` starts two fresh processes with an empty and with a full cache.

With `--use-gpu` the same models run on the first GPU, without peers, next to PyTorch's float16 and bfloat16, compiled.
A row's time is that of several batches in a row, by the GPU's clock; its first call, which compiles, is a column. A
CUDA graph is the same work, recorded once and started as a whole: its first call compiles nothing any more.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
from torch import Tensor, nn

from vitq_ray.base import instructions
from vitq_ray.base.device import exact_float32
from vitq_ray.calibration.calibrators import Calibration
from vitq_ray.calibration.scales import Scales, kinds_needed
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import collect_statistics
from vitq_ray.engines import gemm, gpu
from vitq_ray.engines.execute import Engine, Execution, find_engine
from vitq_ray.engines.gpu import CompiledBlocks, run_block
from vitq_ray.models.load import load_model
from vitq_ray.quant.vit import apply_plan, frozen_weights, quantize_vit

SAMPLE = str(Path(__file__).resolve().parents[1] / "vitq_ray" / "sample" / "vit.npz")
COMPILED = "float, compiled"
SECONDS_ON_GPU = 0.1  # of one measurement
Run = Callable[[], Any]


def machine() -> str:
    """CPU, instruction sets and threads, as far as they decide speed."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    name = {key.strip(): value.strip() for key, value in facts.items()}.get("model name", "unknown CPU")
    has = {
        "AVX2": instructions.HAS_AVX2,
        "AVX-512 VNNI": instructions.HAS_AVX512_VNNI,
        "AVX-VNNI": instructions.HAS_AVX_VNNI,
        "AMX": instructions.HAS_AMX,
    }
    sets = ", ".join(name for name, there in has.items() if there) or "no AVX2"
    return f"{name}, {sets}; {os.cpu_count()} CPUs, {torch.get_num_threads()} threads; PyTorch {torch.__version__}"


def float_model(name: str) -> nn.Module:
    if name.endswith((".npz", ".pth", ".safetensors")):
        return load_model("auto", name, None).model.eval()
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def quantized(name: str, mode: str, bits: int, images: Tensor) -> nn.Module:
    model = quantize_vit(float_model(name)).eval()
    setting = Setting(mode, Calibration.parse("max"), 1, weight_bits=bits, act_bits=bits)
    statistics = collect_statistics(model, [(0, images[:8].cpu())], (1,), kinds=kinds_needed([setting]))
    apply_plan(model, Scales(model, statistics).plan(setting))
    return model.to(images.device)


def eager(name: str, mode: str, bits: int, images: Tensor) -> Run:
    model = quantized(name, mode, bits, images)
    frozen = frozen_weights(model)
    frozen.__enter__()
    return lambda: (model(images), frozen)


def rows(name: str, images: Tensor, mode: str, bits: int) -> dict[str, Run]:
    """{row: what it runs once over the images}."""
    model = float_model(name)
    compiled = torch.compile(model)
    found: dict[str, Run] = {"float, eager": lambda: model(images), COMPILED: lambda: compiled(images)}
    if "avx512bf16" in instructions.FEATURES or "amx-bf16" in instructions.FEATURES:
        half = torch.compile(float_model(name).bfloat16())
        found["bfloat16, compiled"] = lambda: half(images.bfloat16())
    found["fake, eager"] = eager(name, mode, bits, images)
    for engine in ("fake", "int8"):
        run = Execution(quantized(name, mode, bits, images), Engine(engine))
        found[f"{engine}, {'fused' if engine == 'fake' else run_name()}"] = lambda run=run: run(images)
    return found


def run_name() -> str:
    return gemm.INTEGERS[gemm.integers() or "int16"].split(",")[0]


# Peers ---------------------------------------------------------------------------------------------------------------


def peers(name: str, images: Tensor, threads: int, folder: Path) -> dict[str, Run]:
    """ONNX Runtime and OpenVINO, where they are installed."""
    needed = ("onnx", "onnxruntime", "openvino", "nncf")
    if any(importlib.util.find_spec(package) is None for package in needed):
        print(f"  peers left out: {', '.join(needed)} are not all installed")
        return {}
    path = folder / "float.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(float_model(name), (images,), str(path), dynamo=False, opset_version=17, input_names=["x"])
    return {**onnx_runtime(path, images, threads), **openvino(path, images, threads)}


def onnx_runtime(path: Path, images: Tensor, threads: int) -> dict[str, Run]:
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = [{"x": images.numpy()}]

        def get_next(self) -> Any:
            return self._left.pop() if self._left else None

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(str(path), str(prepared))
    files = {"float": path}
    for label, kind in (("INT8", QuantType.QInt8), ("INT8, uint8", QuantType.QUInt8)):  # of activations
        files[label] = path.with_name(f"{kind}.onnx")
        reader = Reader()
        quantize_static(
            str(prepared),
            str(files[label]),
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=kind,
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    found = {}
    for label, file in files.items():
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        found[f"ONNX Runtime, {label}"] = lambda session=session: session.run(None, {"x": images.numpy()})
    return found


def openvino(path: Path, images: Tensor, threads: int) -> dict[str, Run]:
    import nncf
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(path))
    int8 = nncf.quantize(
        core.read_model(str(path)), nncf.Dataset([images.numpy()]), subset_size=1, model_type=nncf.ModelType.TRANSFORMER
    )
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    found = {}
    for label, graph in (("float", model), ("INT8", int8)):
        request = core.compile_model(graph, "CPU", settings).create_infer_request()
        found[f"OpenVINO, {label}"] = lambda request=request: request.infer({0: images.numpy()})
    return found


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(found: dict[str, Run], rounds: int) -> dict[str, float]:
    """{row: seconds of its best round}; rows take turns."""
    best = dict.fromkeys(found, float("inf"))
    with torch.inference_mode():
        for run in found.values():
            run()
        for _ in range(rounds):
            for row, run in found.items():
                start = time.perf_counter()
                run()
                best[row] = min(best[row], time.perf_counter() - start)
    return best


def show(title: str, best: dict[str, float], images: int) -> None:
    print(f"\n{title}\n  {'':<26} {'ms/image':>9} {'images/s':>9} {'× compiled float':>17}")
    for row, seconds in best.items():
        print(f"  {row:<26} {1e3 * seconds / images:>9.2f} {images / seconds:>9.1f} {best[COMPILED] / seconds:>17.2f}")


def peak(rounds: int) -> None:
    """The products alone: what an engine could reach at most."""
    print("\nproducts alone, one thread, (2056, K) · (K, N): GOPS")
    random = np.random.default_rng(0)
    for depth, columns in ((384, 1152), (384, 1536), (1536, 384), (768, 3072)):
        speeds = []
        for kind in ("float32", gemm.integers() or "int16"):
            a = gemm.aligned((2056, depth), kind)
            a[:] = random.integers(0, 127, a.shape)
            b = gemm.packed(columns, depth, kind, "float32" if kind == "float32" else "int8")
            c = gemm.sums(gemm.ROW_BLOCK, columns, kind)

            def run(a: Any = a, b: Any = b, c: Any = c) -> None:
                for first in range(0, 2016, gemm.ROW_BLOCK):
                    gemm.multiply_alone(a, first, gemm.ROW_BLOCK, 0, b, c)

            best = measure({"": run}, 4 * rounds)[""]
            speeds.append(f"{kind} {2e-9 * 2016 * depth * columns / best:.0f}")
        x, w, out = torch.randn(2056, depth), torch.randn(columns, depth), torch.empty(2056, columns)
        best = measure({"": lambda x=x, w=w, out=out: torch.mm(x, w.t(), out=out)}, 4 * rounds)[""]
        print(
            f"  K {depth}, N {columns}: {', '.join(speeds)}, PyTorch float32 {2e-9 * 2056 * depth * columns / best:.0f}"
        )


def compile_time() -> None:
    """Seconds of the first images, with an empty cache of compiled kernels and with a full one."""
    code = (
        "import time, torch; from vitq_ray.models.load import load_model; from vitq_ray.engines.execute import *;"
        "from vitq_ray.quant.vit import *; import sys;"
        f"m = quantize_vit(load_model('auto', {SAMPLE!r}, None).model).eval(); apply_plan(m, unit_plan(m, 'ft2'));"
        "s = time.perf_counter(); integers(); Execution(m, Engine('int8'))(torch.randn(2, 3, *m.patch_embed.img_size));"
        "print(f'{time.perf_counter() - s:.1f}')"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        seconds = [
            subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
            ).stdout.split()[-1]
            for _ in range(2)
        ]
    print(f"\nfirst images of the int8 engine: {seconds[0]} s with an empty cache, {seconds[1]} s with a full one")


# On a GPU ------------------------------------------------------------------------------------------------------------


def gpu_rows(name: str, images: Tensor, mode: str, bits: int) -> dict[str, Callable[[], Run]]:
    """{row: what makes what it runs}"""

    def float_run(kind: torch.dtype, compiled: bool = True) -> Run:
        model, x = float_model(name).to(images.device, kind), images.to(kind)
        run = torch.compile(model, dynamic=False) if compiled else model
        return lambda: run(x)

    def int8_run(compiled: bool) -> Run:
        run = Execution(quantized(name, mode, bits, images), Engine("int8"))
        assert isinstance(run._blocks, CompiledBlocks)
        if not compiled:
            run._blocks._run = run_block
        return lambda: run(images)

    return {
        "float, eager": lambda: float_run(torch.float32, False),
        COMPILED: lambda: float_run(torch.float32),
        "bfloat16, compiled": lambda: float_run(torch.bfloat16),
        "float16, compiled": lambda: float_run(torch.float16),
        "fake, eager": lambda: eager(name, mode, bits, images),
        "int8, not compiled": lambda: int8_run(False),
        "int8, compiled": lambda: int8_run(True),
        "float16, CUDA graph": lambda: recorded(float_run(torch.float16)),
        "int8, CUDA graph": lambda: recorded(int8_run(True)),
        "int8, inductor's": lambda: inductors_products(int8_run(True)),
    }


def inductors_products(run: Run) -> Run:
    """Linear layers by the kernels that the compiler finds fastest and fuses, which nobody has checked."""

    def patched() -> Any:
        with patch.object(gpu, "int8_product", torch._int_mm):
            return run()

    return patched


@torch.inference_mode()
def recorded(run: Run) -> Run:
    """The kernels of a run without the calls that start them, which are all there is to a small batch."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def on_gpu(run: Run, rounds: int) -> tuple[float, float, float]:
    """Seconds of a call in its best round, seconds of the first call, and GiB in use at most."""
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    count, best = 3, float("inf")
    for _ in range(rounds + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        seconds = 1e-3 * begin.elapsed_time(end) / count
        if count > 3:  # the first three only tell how many are enough
            best = min(best, seconds)
        count = max(4, int(SECONDS_ON_GPU / seconds))
    return best, first, torch.cuda.max_memory_allocated() / 2**30


def show_on_gpu(title: str, made: dict[str, Callable[[], Run]], images: int, rounds: int) -> None:
    """Row by row, as they come; a row that fails says so."""
    print(f"\n{title}")
    print(f"  {'':<20} {'ms/image':>9} {'images/s':>9} {'× compiled float':>17} {'first call, s':>14} {'GiB':>6}")
    lines, reference = [], float("nan")
    for row, make in made.items():
        torch.compiler.reset()
        try:
            run = make()
            with torch.inference_mode():
                best, first, memory = on_gpu(run, rounds)
        except Exception as error:
            print(f"  {row:<20} {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        reference = best if row == COMPILED else reference
        lines.append((row, best, first, memory))
        print(f"  {row:<20} {1e3 * best / images:>9.4f}", flush=True)
    for row, best, first, memory in lines:
        speed = f"{1e3 * best / images:>9.4f} {images / best:>9.0f} {reference / best:>17.2f}"
        print(f"  {row:<20} {speed} {first:>14.1f} {memory:>6.2f}", flush=True)


def peak_on_gpu(rounds: int, tokens: int = 100 * 197) -> None:
    """The products alone, in tera-operations per second."""
    print(f"\nproducts alone, ({tokens}, K) · (K, N): TOPS")
    for depth, columns in ((384, 1152), (384, 384), (384, 1536), (1536, 384), (768, 2304), (768, 3072), (3072, 768)):
        x, w = torch.randn(tokens, depth, device="cuda"), torch.randn(columns, depth, device="cuda")
        speeds = []
        for kind in (torch.int8, torch.bfloat16, torch.float16, torch.float32):
            a, b = (10 * x).to(kind), (10 * w).to(kind).t()
            run = (lambda a=a, b=b: torch._int_mm(a, b)) if kind == torch.int8 else (lambda a=a, b=b: a @ b)
            speeds.append(f"{str(kind)[6:]} {2e-12 * tokens * depth * columns / on_gpu(run, rounds)[0]:.0f}")
        print(f"  K {depth}, N {columns}: {', '.join(speeds)}", flush=True)


def main_on_gpu(options: argparse.Namespace) -> None:
    exact_float32()
    logging.basicConfig()  # blocks that are not compiled say so
    print(f"{torch.cuda.get_device_name()}; PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    peak_on_gpu(options.rounds)
    for name in options.models:
        for batch in options.batches or [16, 100, 256]:
            images = torch.randn(batch, 3, *float_model(name).patch_embed.img_size).cuda()
            engine = find_engine("int8", quantized(name, options.mode, options.bits, images), 0, images.device)
            title = f"{Path(name).name}, {options.mode}, {options.bits} bits, batch {batch}; {engine}"
            made = gpu_rows(name, images, options.mode, options.bits)
            chosen = {row: make for row, make in made.items() if row == COMPILED or options.rows in row}
            show_on_gpu(title, chosen, batch, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224", SAMPLE])
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 8 16; on a GPU 16 100 256")
    parser.add_argument("--mode", default="ft2")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-100", action="store_true", help="also eager fake quantization in batches of 100")
    parser.add_argument("--compile-time", action="store_true")
    parser.add_argument("--use-gpu", action="store_true")
    parser.add_argument("--rows", default="", help="on a GPU: only rows with this in their name")
    options = parser.parse_args()
    if options.use_gpu and not torch.cuda.is_available():
        parser.error("--use-gpu: this PyTorch finds no CUDA GPU; leave the option out to run on the CPU")
    if options.use_gpu:
        main_on_gpu(options)
        return
    torch.set_num_threads(options.threads)
    print(machine())
    peak(options.rounds)
    for name in options.models:
        for batch in options.batches or [1, 8, 16]:
            size = float_model(name).patch_embed.img_size
            images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
            with tempfile.TemporaryDirectory() as folder:
                found = rows(name, images, options.mode, options.bits)
                found |= peers(name, images, options.threads, Path(folder))
                show(
                    f"{Path(name).name}, {options.mode}, {options.bits} bits, batch {batch}",
                    measure(found, options.rounds),
                    batch,
                )
        if options.batch_100:
            hundred = torch.randn(100, 3, *size)
            seconds = measure({"": eager(name, options.mode, options.bits, hundred)}, 1)[""]
            print(f"  fake, eager, in batches of 100: {10 * seconds:.2f} ms/image")
    if options.compile_time:
        compile_time()


if __name__ == "__main__":
    main()
