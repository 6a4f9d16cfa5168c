"""A quantized ViT as an ONNX model: QuantizeLinear and DequantizeLinear at exactly the sites of its plan.

    model that follows a plan, Plan, Target  ──►  onnx.ModelProto: images (batch, 3, S, S) ──► logits (batch, classes)

Weights are int8 initializers behind a DequantizeLinear. 1/√d is folded into what makes q, whose scales follow. A site's
integers are those of the plan; where the target wants unsigned ones, both they and the zero point are 128 larger.

Operators are of opset 20. Legend: B batch, N tokens, C width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.layers import AttentionPoolLatent, Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitq_ray import __version__
from vitq_ray.base.config import InputError
from vitq_ray.engines.targets import RIGHT, Target
from vitq_ray.quant.fake_quant import finite_scale
from vitq_ray.quant.plan import Plan, SitePlan
from vitq_ray.quant.sites import site_key
from vitq_ray.quant.vit import QuantAttention, QuantBlock, quant_blocks

OPSET, IR_VERSION = 20, 9
IMAGES, LOGITS = "images", "logits"
_PASSED = (nn.Identity, nn.Dropout)


def needed(package: str, extra: str) -> Any:
    """A package that is an extra. InputError where it is not installed."""
    try:
        return import_module(package)
    except ImportError:
        raise InputError(f"{package}: is not installed; pip install 'vitq_ray[{extra}]'") from None


@dataclass(frozen=True)
class Encoding:
    """How a plan is written down.

    Attributes:
        float16: scales and all that is not an integer are of 16 bits; images and logits stay float32.
        unsigned_right: weights, k and v, too, are written as uint8 around 128: products of uint8 with uint8 do not
            saturate on CPUs without VNNI.
    """

    target: Target
    float16: bool = False
    unsigned_right: bool = False


def onnx_model(model: VisionTransformer, plan: Plan, encoding: Encoding, metadata: dict[str, str]) -> Any:
    """The model as an `onnx.ModelProto`, checked. `model` follows `plan`.

    Raises InputError for a part of the model that has no translation, and for numbers that 16 bits do not hold.
    """
    onnx = needed("onnx", "onnx")
    graph = _Graph(onnx, encoding.float16)
    logits = _Writer(graph, model, plan, encoding).logits(IMAGES)
    size = model.patch_embed.img_size
    info = onnx.helper.make_tensor_value_info
    inputs = [info(IMAGES, onnx.TensorProto.FLOAT, ["batch", 3, *size])]
    outputs = [info(logits, onnx.TensorProto.FLOAT, ["batch", model.num_classes])]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, "vit", inputs, outputs, list(graph.constants.values())),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="vitq_ray",
        producer_version=__version__,
    )
    onnx.helper.set_model_props(made, metadata)
    onnx.checker.check_model(made, full_check=True)
    return made


class _Graph:
    """Nodes and constants as they are made."""

    def __init__(self, onnx: Any, float16: bool) -> None:
        self._onnx, self._float = onnx, np.float16 if float16 else np.float32
        self.float16 = float16
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def op(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output, which has the node's name. Returns it."""
        self.nodes.append(self._onnx.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def split(self, name: str, x: str, parts: int) -> list[str]:
        """x in equal parts along the last axis."""
        outputs = [f"{name}.{part}" for part in range(parts)]
        self.nodes.append(self._onnx.helper.make_node("Split", [x], outputs, name=name, axis=-1, num_outputs=parts))
        return outputs

    def cast(self, name: str, x: str, to_float32: bool) -> str:
        """Between float32, outside, and float16, inside, where that is used."""
        kinds = self._onnx.TensorProto
        return self.op("Cast", name, x, to=kinds.FLOAT if to_float32 else kinds.FLOAT16) if self.float16 else x

    def integers(self, name: str, values: Any, dtype: Any = np.int64) -> str:
        return self._constant(name, np.asarray(values, dtype))

    def floats(self, name: str, values: Tensor | float) -> str:
        """A constant of the graph's float type. InputError where that does not hold it."""
        array = np.asarray(values.detach().cpu().float().numpy() if isinstance(values, Tensor) else values, np.float32)
        with np.errstate(over="ignore"):
            kept = array.astype(self._float)
        if not np.isfinite(kept).all():
            raise InputError(f"float16: {name} has values up to {np.abs(array).max():.4g}, which 16 bits do not hold")
        return self._constant(name, kept)

    def scale(self, name: str, values: Tensor) -> str:
        """As `floats`; a scale must be a normal number."""
        smallest = float(values.min())
        if self.float16 and smallest < 2.0**-14:
            raise InputError(f"float16: {name} is {smallest:.4g}, which 16 bits do not hold exactly enough")
        return self.floats(name, values)

    def _constant(self, name: str, array: npt.NDArray[Any]) -> str:
        if name not in self.constants:
            self.constants[name] = self._onnx.numpy_helper.from_array(
                np.ascontiguousarray(array).reshape(array.shape), name
            )
        return name


class _Writer:
    """Writes one model."""

    def __init__(self, graph: _Graph, model: VisionTransformer, plan: Plan, encoding: Encoding) -> None:
        self._graph, self._plan, self._encoding = graph, plan, encoding
        self._model: Any = model

    # The float ends ------------------------------------------------------------------------------------------------

    def logits(self, images: str) -> str:
        g, model = self._graph, self._model
        x = self._tokens(g.cast("images.cast", images, to_float32=False))
        x = self._module("norm_pre", model.norm_pre, x)
        for index, block in enumerate(quant_blocks(model)):
            x = self._block(index, block, x)
        x = self._classes(self._module("norm", model.norm, x))
        return g.op("Cast", LOGITS, x, to=1) if g.float16 else g.op("Identity", LOGITS, x)

    def _tokens(self, images: str) -> str:
        """Patches, prefix tokens and positions: (B, 3, S, S) -> (B, N, C)."""
        g, embed = self._graph, self._model.patch_embed
        if type(embed) is not PatchEmbed or not embed.flatten:
            raise InputError(f"export: {type(embed).__name__} has no translation; expected a convolution of patches")
        weight, bias = g.floats("patch_embed.weight", embed.proj.weight), embed.proj.bias
        biases = () if bias is None else (g.floats("patch_embed.bias", bias),)
        x = g.op("Conv", "patch_embed", images, weight, *biases, strides=embed.proj.stride)
        width, patches = embed.proj.out_channels, embed.num_patches
        x = g.op("Reshape", "patch_embed.flat", x, g.integers("patch_embed.shape", (0, width, patches)))
        x = self._module("patch_embed.norm", embed.norm, g.op("Transpose", "patch_embed.tokens", x, perm=(0, 2, 1)))
        with torch.no_grad():  # prefix tokens and positions are what is there without patches
            added = self._model._pos_embed(torch.zeros(1, patches, width))
        if prefix := self._model.num_prefix_tokens:
            pads = g.integers("prefix.pads", (0, prefix, 0, 0, 0, 0))
            x = g.op("Pad", "prefix", x, pads)
        return g.op("Add", "tokens", x, g.floats("tokens.added", added))

    def _classes(self, x: str) -> str:
        """(B, N, C) -> (B, classes)"""
        g, model = self._graph, self._model
        if isinstance(model, VisionTransformerDistilled):
            both = [
                self._module(
                    name, head, g.op("Gather", f"{name}.token", x, g.integers(f"token.{place}", place), axis=1)
                )
                for place, (name, head) in enumerate((("head", model.head), ("head_dist", model.head_dist)))
            ]
            return g.op("Mul", "heads.mean", g.op("Add", "heads.sum", *both), g.floats("half", 0.5))
        x = self._module("head", model.head, self._module("fc_norm", model.fc_norm, self._pooled(x)))
        return x

    def _pooled(self, x: str) -> str:
        g, model = self._graph, self._model
        if model.attn_pool is None and model.global_pool == "token":
            return g.op("Gather", "pool", x, g.integers("token.0", 0), axis=1)
        if not model.pool_include_prefix and model.num_prefix_tokens:
            ends = (
                g.integers(f"pool.{n}", [v]) for n, v in (("from", model.num_prefix_tokens), ("to", 2**31), ("axis", 1))
            )
            x = g.op("Slice", "pool.patches", x, *ends)
        if model.attn_pool is not None:
            return self._attention_pool(model.attn_pool, x)
        kinds = {"avg": "ReduceMean", "max": "ReduceMax"}
        if model.global_pool not in kinds:
            raise InputError(
                f"export: pooling {model.global_pool!r} has no translation; expected token, avg, max or map"
            )
        return g.op(kinds[model.global_pool], "pool", x, g.integers("pool.axes", [1]), keepdims=0)

    def _attention_pool(self, pool: Any, x: str) -> str:
        """Attention of a learned query over the tokens: (B, N, C) -> (B, C)."""
        g, p = self._graph, "attn_pool"
        is_known = type(pool) is AttentionPoolLatent
        if not is_known or pool.pos_embed is not None or pool.pool != "token":
            raise InputError(f"export: {type(pool).__name__} has no translation; expected timm's AttentionPoolLatent")
        heads, width = pool.num_heads, pool.head_dim
        with torch.no_grad():
            query = pool.q_norm(pool.q(pool.latent).reshape(1, -1, heads, width).transpose(1, 2)) * pool.scale
        keys, values = g.split(f"{p}.split", self._module(f"{p}.kv", pool.kv, x), 2)
        shape = g.integers(f"{p}.heads", (0, -1, heads, width))
        keys = self._module(f"{p}.k_norm", pool.k_norm, g.op("Reshape", f"{p}.k", keys, shape))
        keys = g.op("Transpose", f"{p}.k.t", keys, perm=(0, 2, 3, 1))
        values = g.op("Transpose", f"{p}.v.t", g.op("Reshape", f"{p}.v", values, shape), perm=(0, 2, 1, 3))
        scores = g.op("MatMul", f"{p}.scores", g.floats(f"{p}.query", query), keys)
        mixed = g.op("MatMul", f"{p}.mixed", g.op("Softmax", f"{p}.softmax", scores, axis=-1), values)
        mixed = g.op("Transpose", f"{p}.mixed.t", mixed, perm=(0, 2, 1, 3))
        x = g.op("Reshape", f"{p}.merged", mixed, g.integers(f"{p}.shape", (0, -1, heads * width)))
        x = self._module(f"{p}.proj", pool.proj, x)
        if pool.mlp is not None:
            mlp = self._module(f"{p}.mlp", pool.mlp, self._module(f"{p}.norm", pool.norm, x))
            x = g.op("Add", f"{p}.add", x, mlp)
        return g.op("Gather", "pool", x, g.integers("token.0", 0), axis=1)

    def _module(self, name: str, module: nn.Module, x: str) -> str:
        """A part in float, by its type."""
        g = self._graph
        if isinstance(module, _PASSED):
            return x
        if isinstance(module, nn.LayerNorm):
            return self._norm(name, module, x)
        if isinstance(module, nn.Linear):
            weight = g.floats(f"{name}.weight", module.weight.t())
            return self._biased(name, g.op("MatMul", f"{name}.matmul", x, weight), module.bias)
        if isinstance(module, nn.GELU):
            return self._gelu(name, module, x)
        if isinstance(module, nn.Tanh):
            return g.op("Tanh", name, x)
        if isinstance(module, Mlp):
            parts: Iterable[tuple[str, nn.Module]] = [(n, getattr(module, n)) for n in ("fc1", "act", "norm", "fc2")]
        elif isinstance(module, nn.Sequential):
            parts = module.named_children()
        else:
            raise InputError(f"export: {name} is a {type(module).__name__}, which has no translation")
        for part, child in parts:
            x = self._module(f"{name}.{part}", child, x)
        return x

    def _norm(self, name: str, norm: nn.LayerNorm, x: str, factor: float = 1.0) -> str:
        g = self._graph
        gain = torch.ones(norm.normalized_shape) if norm.weight is None else norm.weight
        inputs = [g.floats(f"{name}.weight", gain * factor)]
        if norm.bias is not None:
            inputs.append(g.floats(f"{name}.bias", norm.bias * factor))
        return g.op("LayerNormalization", name, x, *inputs, axis=-1, epsilon=norm.eps)

    def _gelu(self, name: str, gelu: nn.GELU, x: str) -> str:
        g = self._graph
        if self._encoding.target.gelu or gelu.approximate != "none":
            return g.op("Gelu", name, x, approximate=gelu.approximate)
        erf = g.op("Erf", f"{name}.erf", g.op("Div", f"{name}.div", x, g.floats("gelu.root2", 2**0.5)))
        one = g.op("Add", f"{name}.add", erf, g.floats("gelu.one", 1.0))
        return g.op("Mul", name, g.op("Mul", f"{name}.mul", x, one), g.floats("half", 0.5))

    def _biased(self, name: str, x: str, bias: Tensor | None, factor: float = 1.0) -> str:
        g = self._graph
        return x if bias is None else g.op("Add", name, x, g.floats(f"{name}.bias", bias * factor))

    # The blocks ----------------------------------------------------------------------------------------------------

    def _block(self, index: int, block: QuantBlock, x: str) -> str:
        b = f"blocks.{index}"
        local = self._quantized(index, "layernorm_input1_quantizer", x)
        local = self._attention(index, block.attn, self._module(f"{b}.norm1", block.norm1, local))
        x = self._added(index, 1, x, self._scaled(f"{b}.ls1", block.ls1, local))
        local = self._quantized(index, "layernorm_input2_quantizer", x)
        local = self._module(f"{b}.norm2", block.norm2, local)
        hidden = self._linear(
            index, "ffn.fc1", self._quantized(index, "ffn.fc1._input_quantizer", local), block.mlp.fc1
        )
        hidden = self._module(f"{b}.mlp.act", block.mlp.act, hidden)
        hidden = self._quantized(index, "ffn.fc2._input_quantizer", hidden)
        local = self._linear(index, "ffn.fc2", hidden, block.mlp.fc2)
        return self._added(index, 2, x, self._scaled(f"{b}.ls2", block.ls2, local))

    def _scaled(self, name: str, scale: nn.Module, x: str) -> str:
        gamma = getattr(scale, "gamma", None)
        return x if gamma is None else self._graph.op("Mul", name, x, self._graph.floats(f"{name}.gamma", gamma))

    def _added(self, index: int, place: int, x: str, local: str) -> str:
        """The residual addition `place`, 1 or 2, of a block."""
        local = self._quantized(index, f"add{place}_local_input_quantizer", local)
        x = self._quantized(index, f"add{place}_residual_input_quantizer", x)
        return self._graph.op("Add", f"blocks.{index}.add{place}", x, local)

    def _attention(self, index: int, attention: QuantAttention, x: str) -> str:
        g, b, root = self._graph, f"blocks.{index}.attn", float(attention.scale)
        heads, width = attention.num_heads, attention.head_dim
        x = self._quantized(index, "attn.query._input_quantizer", x)
        weights = attention.qkv.weight.chunk(3)
        biases = (None, None, None) if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
        norms = (attention.q_norm, attention.k_norm, nn.Identity())
        shape = g.integers("heads.shape", (0, -1, heads, width))
        made = []
        for name, weight, bias, norm in zip(("query", "key", "value"), weights, biases, norms, strict=True):
            factor = root if name == "query" else 1.0
            own = 1.0 if isinstance(norm, nn.LayerNorm) else factor  # behind a norm it would be lost
            y = self._gemm(index, f"attn.{name}", x, weight, bias, own)
            y = g.op("Reshape", f"{b}.{name}.heads", y, shape)
            if isinstance(norm, nn.LayerNorm):
                y = self._norm(f"{b}.{name}.norm", norm, y, factor)
            else:
                y = self._module(f"{b}.{name}.norm", norm, y)
            perm = (0, 2, 3, 1) if name == "key" else (0, 2, 1, 3)
            y = g.op("Transpose", f"{b}.{name}.transposed", y, perm=perm)
            made.append(self._quantized(index, f"attn.matmul_{name[0]}_input_quantizer", y, factor))
        q, k, v = made
        scores = g.op("MatMul", f"{b}.scores", q, k)
        scores = self._quantized(index, "attn.softmax_input_quantizer", scores, root)
        p = g.op("Softmax", f"{b}.softmax", scores, axis=-1)
        mixed = g.op("MatMul", f"{b}.mixed", self._quantized(index, "attn.matmul_a_input_quantizer", p), v)
        mixed = self._quantized(index, "attn.out._input_quantizer", mixed)
        mixed = g.op("Transpose", f"{b}.mixed.transposed", mixed, perm=(0, 2, 1, 3))
        merged = g.op("Reshape", f"{b}.merged", mixed, g.integers("merged.shape", (0, -1, heads * width)))
        return self._gemm(index, "attn.out", merged, attention.proj.weight, attention.proj.bias)

    def _linear(self, index: int, name: str, x: str, layer: nn.Module) -> str:
        assert isinstance(layer, nn.Linear)
        return self._gemm(index, name, x, layer.weight, layer.bias)

    def _gemm(self, index: int, name: str, x: str, weight: Tensor, bias: Tensor | None, factor: float = 1.0) -> str:
        """factor · (x·Wᵀ + b) with the sites of the weight and of the product; (…, K) -> (…, N)."""
        b = f"blocks.{index}.{name}"
        y = self._graph.op("MatMul", f"{b}.matmul", x, self._weight(index, name, weight, factor))
        y = self._quantized(index, f"{name}._aftergemm_quantizer", y, factor)
        return self._biased(b, y, bias, factor)

    def _site(self, index: int, name: str) -> SitePlan | None:
        site = self._plan.sites[site_key(index, name)]
        return site if site.rule.on else None

    def _weight(self, index: int, name: str, weight: Tensor, factor: float) -> str:
        """A weight (N, K) as (K, N), stored as integers where its site is on."""
        g, b = self._graph, f"blocks.{index}.{name}.weight"
        site, weight = self._site(index, f"{name}._weight_quantizer"), weight.detach()
        if site is None:
            return g.floats(b, weight.t() * factor)
        step, rule = site.scale, site.rule
        levels = (weight * step.reciprocal()).round().clamp(*rule.levels).t()
        step = torch.where(finite_scale(step) > 0, step, torch.ones_like(step))  # of zeros: any
        shift, dtype = (128, np.uint8) if self._encoding.unsigned_right else (0, np.int8)
        values = g.integers(f"{b}.levels", levels.numpy() + shift, dtype)
        scale = step.flatten() if rule.axis == 0 else step
        zeros = np.full(scale.shape, shift)
        inputs = (g.scale(f"{b}.scale", scale * factor), g.integers(f"{b}.zero_point", zeros, dtype))
        return g.op("DequantizeLinear", b, values, *inputs, **({"axis": 1} if rule.axis == 0 else {}))

    def _quantized(self, index: int, name: str, x: str, factor: float = 1.0) -> str:
        """x quantized and back where the site is on; `factor` is what the plan's tensor was multiplied with."""
        g, site, key = self._graph, self._site(index, name), f"blocks.{index}.{name}"
        if site is None:
            return x
        rule, step = site.rule, site.scale * factor
        unsigned = self._encoding.unsigned_right if name in RIGHT else self._encoding.target.unsigned
        shift = 128 if rule.signed and unsigned else 0
        dtype = np.int8 if rule.signed and not shift else np.uint8
        if rule.bits < 8:  # what saturates at 8 bits saturates later
            ends = (
                g.floats(f"{key}.{end}", step * level) for end, level in zip(("low", "high"), rule.levels, strict=True)
            )
            x = g.op("Clip", f"{key}.clip", x, *ends)
        inputs = (g.scale(f"{key}.scale", step), g.integers(f"{key}.zero_point", rule.zero_point + shift, dtype))
        return g.op("DequantizeLinear", f"{key}.dequantized", g.op("QuantizeLinear", key, x, *inputs), *inputs)
