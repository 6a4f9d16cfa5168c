"""What TensorRT's fusions ask of a graph with Q/DQ, looked up in the graph that was written.

From its documentation of explicit quantization; no engine is built here.
"""

from __future__ import annotations

import re
from typing import Any

from vitq_ray.engines.targets import TARGETS, Shape

_THROUGH = {"Reshape", "Transpose", "Gather", "Split"}
_LEAST_SIDE = 16


def tensorrt_conditions(model: Any, shape: Shape) -> dict[str, bool]:
    """{condition: whether it is met everywhere in an `onnx.ModelProto`}."""
    nodes = {output: node for node in model.graph.node for output in node.output}
    constants = {row.name: row for row in model.graph.initializer}

    def source(name: str) -> Any:
        """The node that makes a tensor, past those that only move its values; None for an input or a constant."""
        node = nodes.get(name)
        return source(node.input[0]) if node is not None and node.op_type in _THROUGH else node

    def kind(name: str) -> str:
        node = source(name)
        return "" if node is None else node.op_type

    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    weighted = [node for node in products if _weight(nodes, constants, node) is not None]
    quantized = [node for node in weighted if kind(node.input[1]) == "DequantizeLinear"]
    attention = [node for node in products if _weight(nodes, constants, node) is None]
    inner = [node for node in attention if "blocks." in node.name]
    softmax = [node for node in model.graph.node if node.op_type == "Softmax" and "blocks." in node.name]
    points = [node.input[2] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    signed = [constants[name] for name in points]
    both: dict[str, list[bool]] = {}  # of every block: what the inputs of its two products are
    for node in inner:
        block = both.setdefault(node.name.partition(".attn.")[0], [])
        block += [kind(side) == "DequantizeLinear" for side in node.input]
    branches = [node.input[1] for node in model.graph.node if _ADDITION.fullmatch(node.name)]
    sides = [_weight(nodes, constants, node).dims for node in quantized]
    return {
        "Q/DQ on both inputs of every linear layer of the blocks": all(
            kind(node.input[0]) == "DequantizeLinear" for node in quantized
        )
        and sum("blocks." in node.name for node in weighted) == len(quantized),
        "no Q/DQ behind a linear layer before its bias": not any(
            _reads(model, node.output[0], "QuantizeLinear") and node in weighted for node in products
        ),
        "linear layers in integers at least 16 wide on both sides": all(min(dims) >= _LEAST_SIDE for dims in sides),
        "attention: both products of a block with Q/DQ on both sides, or none": all(
            all(block) or not any(block) for block in both.values()
        ),
        "attention: nothing between q·kᵀ and softmax": all(kind(node.input[0]) == "MatMul" for node in softmax),
        "no Q/DQ on the branch of a residual addition": "DequantizeLinear" not in map(kind, branches),
        "int8, zero points 0": all(row.data_type == _INT8 and not any(_values(row)) for row in signed),
        **TARGETS["tensorrt"].conditions(shape),
    }


_ADDITION = re.compile(r"blocks\.\d+\.add[12]")
_INT8 = 3  # onnx.TensorProto.INT8


def _values(row: Any) -> list[int]:
    return list(row.raw_data) or list(row.int32_data)


def _weight(nodes: dict[str, Any], constants: dict[str, Any], product: Any) -> Any:
    """The constant on the right of a product, behind its DequantizeLinear where there is one; else None."""
    name = product.input[1]
    node = nodes.get(name)
    if node is not None and node.op_type == "DequantizeLinear":
        name = node.input[0]
    return constants.get(name)


def _reads(model: Any, name: str, kind: str) -> bool:
    return any(node.op_type == kind and name in node.input for node in model.graph.node)
