"""ONNX files run by ONNX Runtime and OpenVINO, and which of their products run as integers.

file ──► open_file(path, "ort" | "openvino") ──► FileModel: images -> logits,  census: product by product
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line
from vitq_ray.engines.onnx import needed

ORT, OPENVINO = RUNTIMES = ("ort", "openvino")
METADATA = "vitq_ray"  # under which a file says how its images are prepared, and what it is of
_PRODUCTS = {"MatMul", "Gemm", "Conv"}
_INTEGER = {"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "QLinearConv", "MatMulInteger", "ConvInteger"}
_FLOAT = _PRODUCTS | {"FusedMatMul", "FusedGemm", "FusedConv"}


@dataclass(frozen=True)
class Census:
    """The products of a file as a runtime executes them.

    Attributes:
        integer, floating: {name of the product in the file: its multiply-accumulates for one image}.
        kinds: how many of which operator, all of them.
    """

    integer: Mapping[str, int]
    floating: Mapping[str, int]
    kinds: Mapping[str, int]

    @property
    def share(self) -> float:
        """Multiply-accumulates in integers, a fraction."""
        counted = sum(self.integer.values()), sum(self.floating.values())
        return counted[0] / max(1, sum(counted))

    def to_dict(self) -> dict[str, Any]:
        return {
            "integer_products": len(self.integer),
            "integer_share": self.share,
            "float_products": dict(self.floating),
            "operators": dict(self.kinds),
        }


class FileModel(nn.Module):
    """An ONNX file with one input, images, and one output, logits, as a model."""

    def __init__(self, path: str, run: Any, batch: int | None, img_size: int | None, optimized: Any) -> None:
        super().__init__()
        self._path, self._run, self._batch, self.img_size, self._optimized = path, run, batch, img_size, optimized

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, classes)
        if self._batch is None:
            return self._logits(images)
        parts = []
        for part in images.split(self._batch):  # the file takes so many, no less
            short = self._batch - len(part)
            parts.append(self._logits(torch.cat([part, part[:1].expand(short, -1, -1, -1)]))[: len(part)])
        return torch.cat(parts)

    def _logits(self, images: Tensor) -> Tensor:
        try:
            found = torch.from_numpy(np.array(self._run(images.float().cpu().numpy())))
        except Exception as error:  # of a runtime: of any kind
            raise InputError(f"{self._path}: cannot be run: {one_line(error)[:300]}") from None
        if found.ndim != 2 or len(found) != len(images):
            raise InputError(
                f"{self._path}: gives {tuple(found.shape)} for {len(images)} images, expected their logits"
            )
        return found

    def census(self) -> Census:
        """What of its products runs in integers. The names are those of `onnx_model`'s nodes."""
        census: Census = self._optimized()
        return census


def open_file(path: str, runtime: str, integers: bool = True, threads: int | None = None) -> FileModel:
    """An ONNX file, ready to run. With `integers` off ONNX Runtime computes what Q/DQ say in float32, exactly.

    Raises InputError where the file is damaged or takes something else than images, or a package is not installed.
    """
    return _ort(path, integers, threads) if runtime == ORT else _openvino(path, threads)


def read_metadata(path: str) -> dict[str, Any]:
    """What the file says of itself, {} where another program wrote it. InputError where it is no ONNX file."""
    onnx = needed("onnx", "onnx")
    try:
        props = {row.key: row.value for row in onnx.load(path, load_external_data=False).metadata_props}
        values = json.loads(props.get(METADATA, "{}"))
        return values if isinstance(values, dict) else {}
    except FileNotFoundError:
        raise InputError(f"{path}: not found; expected an ONNX file") from None
    except Exception as error:
        raise InputError(f"{path}: not an ONNX file: {one_line(error)[:200]}") from None


def _ort(path: str, integers: bool, threads: int | None) -> FileModel:
    ort = needed("onnxruntime", "onnx")

    def opened(optimized_file: str = "") -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # or it warns that the optimized graph is for this CPU, which is what it is for
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it takes CPUs of what runs next
        options.add_session_config_entry("session.disable_quant_qdq", "0" if integers else "1")
        options.optimized_model_filepath = optimized_file
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    try:
        session = opened()
    except Exception as error:
        raise InputError(f"{path}: ONNX Runtime cannot load it: {one_line(error)[:300]}") from None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    batch, size = _sizes(path, [(row.name, row.shape) for row in inputs])

    def run(images: Any) -> Any:
        return session.run([outputs[0].name], {inputs[0].name: images})[0]

    def optimized() -> Census:
        macs, producers = _macs(needed("onnx", "onnx").load(path))
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "optimized.onnx")
            opened(file)
            nodes = needed("onnx", "onnx").load(file, load_external_data=False).graph.node
        rows = []
        for node in nodes:
            if node.op_type in _INTEGER | _FLOAT:
                known = producers.get(node.output[0]) or _longest_start(node.name, macs)
                rows.append((known, node.op_type in _INTEGER))
        return _census(rows, macs, Counter(node.op_type for node in nodes))

    return FileModel(path, run, batch, size, optimized)


def _openvino(path: str, threads: int | None) -> FileModel:
    openvino = needed("openvino", "openvino")
    core = openvino.Core()
    config = {"INFERENCE_NUM_THREADS": threads or torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    try:
        compiled = core.compile_model(core.read_model(path), "CPU", config)
    except Exception as error:
        raise InputError(f"{path}: OpenVINO cannot load it: {one_line(error)[:300]}") from None
    shapes = [
        (port.any_name, [n.get_length() if n.is_static else None for n in port.partial_shape])
        for port in compiled.inputs
    ]
    batch, size = _sizes(path, shapes)

    def run(images: Any) -> Any:
        return compiled(images)[0]

    def optimized() -> Census:
        macs, producers = _macs(needed("onnx", "onnx").load(path))
        producers |= {name: name for name in macs}
        rows, kinds = [], Counter[str]()
        for op in compiled.get_runtime_model().get_ops():
            info = {
                name: str(op.get_rt_info()[name].astype(str))
                for name in ("layerType", "originalLayersNames", "runtimePrecision")
            }
            kinds[f"{info['layerType']} {info['runtimePrecision']}"] += 1
            is_integer = info["runtimePrecision"] in ("i8", "u8")
            names = (name.strip() for name in info["originalLayersNames"].split(","))
            if info["layerType"] in ("FullyConnected", "MatMul", "Convolution"):
                rows += [(product, is_integer) for product in {producers[n] for n in names if n in producers}]
        return _census(rows, macs, kinds)

    return FileModel(path, run, batch, size, optimized)


def _sizes(path: str, inputs: list[tuple[str, Any]]) -> tuple[int | None, int | None]:
    """(images that one call takes, side of an image), None where the file does not fix them."""
    shape = [n if isinstance(n, int) and n > 0 else None for n in inputs[0][1]] if len(inputs) == 1 else []
    if len(shape) != 4 or shape[1] not in (3, None) or shape[2] != shape[3]:
        text = ", ".join(f"{name} {list(shape)}" for name, shape in inputs)
        raise InputError(f"{path}: takes {text}; expected one input, images of (batch, 3, S, S)")
    return shape[0], shape[2]


def _longest_start(name: str, known: Iterable[str]) -> str:
    """The product that a fused node is named after."""
    return max((start for start in known if name.startswith(start)), key=len, default=name)


def _census(rows: Iterable[tuple[str, bool]], macs: Mapping[str, int], kinds: Mapping[str, int]) -> Census:
    """What is not seen as integers is float: a runtime may hide a product in an operator of another name."""
    integer = {name: macs.get(name, 0) for name, is_integer in rows if is_integer}
    return Census(integer, {name: n for name, n in macs.items() if name not in integer}, dict(kinds))


def _macs(model: Any) -> tuple[dict[str, int], dict[str, str]]:
    """({product: multiply-accumulates of one image}, {tensor behind it, up to where it is fused: the product})."""
    onnx = needed("onnx", "onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        row.name: [d.dim_value for d in row.type.tensor_type.shape.dim]
        for row in (*graph.value_info, *graph.input, *graph.output)
    }
    shapes |= {row.name: list(row.dims) for row in graph.initializer}
    macs: dict[str, int] = {}
    producers: dict[str, str] = {}
    for node in graph.node:
        out = node.output[0]
        if node.op_type in _PRODUCTS:
            weight = shapes[node.input[1]]
            depth = int(np.prod(weight[1:])) if node.op_type == "Conv" else weight[-2]
            macs[node.name], producers[out] = int(np.prod(shapes[out])) * depth, node.name
        elif node.op_type in ("Add", "QuantizeLinear", "Mul", "DequantizeLinear", "Gelu", "Clip"):
            for source in node.input:
                if source in producers:
                    producers.setdefault(out, producers[source])
    return macs, producers
