"""A timm VisionTransformer with quantizers at every site, in place of its blocks.

A QuantBlock reuses the parameters and submodules of a timm Block under their timm names, so `state_dict()` is timm's
plus `_amax` buffers, and adds quantizers under FasterTransformer's names (`attn.query._input_quantizer`, …), so
that a site is found by its name. Query, key and value stay one parameter and are three GEMMs on its rows.

Legend: B batch, N tokens, C width, H heads, D head width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.quantizer import Observer, State, TensorQuantizer
from vitq_ray.quant.sites import FC2_INPUT, FUSED_GROUPS, MODES, SITES, WEIGHT, Site, observed_tensors, site_key


class GemmQuantizers(nn.Module):
    """The three quantizers of a linear layer; `linear` applies them around its GEMM."""

    def __init__(self) -> None:
        super().__init__()
        self._input_quantizer = TensorQuantizer()
        self._weight_quantizer = TensorQuantizer()
        self._aftergemm_quantizer = TensorQuantizer()
        self.product: Callable[[Tensor], Tensor] | None = None  # in place of x·Wᵀ, where an engine computes it

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + b with W and x·Wᵀ quantized; the input has been quantized by the caller. (…, in) -> (…, out)"""
        both = (self._input_quantizer.state, self._weight_quantizer.state)
        if self.product is not None and both == (State.QUANTIZE, State.QUANTIZE):
            y = self._aftergemm_quantizer(self.product(x))
            return y if bias is None else y + bias
        weight = self._weight_quantizer(weight)
        if self._aftergemm_quantizer.state is State.OFF:
            return F.linear(x, weight, bias)
        y = self._aftergemm_quantizer(F.linear(x, weight))
        if bias is None:
            return y
        return y + bias if torch.is_grad_enabled() else y.add_(bias)


class QuantAttention(nn.Module):
    """timm's Attention with its sites. The input of query, key and value is one tensor and one quantizer."""

    qkv: nn.Linear
    proj: nn.Linear
    attn_drop: nn.Dropout

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = attention.num_heads, attention.head_dim, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop
        self.query, self.key, self.value, self.out = (GemmQuantizers() for _ in range(4))
        self.key._input_quantizer = self.value._input_quantizer = self.query._input_quantizer
        self.matmul_q_input_quantizer = TensorQuantizer()
        self.matmul_k_input_quantizer = TensorQuantizer()
        self.matmul_v_input_quantizer = TensorQuantizer()
        self.matmul_a_input_quantizer = TensorQuantizer()
        self.softmax_input_quantizer = TensorQuantizer()

    def forward(self, x: Tensor) -> Tensor:
        x = self.query._input_quantizer(x)
        weights = self.qkv.weight.chunk(3)
        biases = (None, None, None) if self.qkv.bias is None else self.qkv.bias.chunk(3)
        gemms = (self.query, self.key, self.value)
        q, k, v = (self._split_heads(g.linear(x, w, b)) for g, w, b in zip(gemms, weights, biases, strict=True))
        y = self._attend(self.q_norm(q), self.k_norm(k), v)
        y = self.out._input_quantizer(y.transpose(1, 2).flatten(2))
        dropped: Tensor = self.proj_drop(self.out.linear(y, self.proj.weight, self.proj.bias))
        return dropped

    def _split_heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2)  # (B, H, N, D)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q·kᵀ/√d)·v with its five sites; (B, H, N, D) each."""
        if self._attention_is_float():
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self._dropout(), scale=self.scale)
        q = self.matmul_q_input_quantizer(q)
        k = self.matmul_k_input_quantizer(k)
        v = self.matmul_v_input_quantizer(v)
        scores = self.softmax_input_quantizer(q @ k.transpose(-2, -1)) * self.scale  # (B, H, N, N)
        probabilities: Tensor = self.attn_drop(scores.softmax(dim=-1))
        return self.matmul_a_input_quantizer(probabilities) @ v

    def _attention_is_float(self) -> bool:
        quantizers = (
            self.matmul_q_input_quantizer,
            self.matmul_k_input_quantizer,
            self.matmul_v_input_quantizer,
            self.matmul_a_input_quantizer,
            self.softmax_input_quantizer,
        )
        return all(quantizer.state is State.OFF for quantizer in quantizers)

    def _dropout(self) -> float:
        return float(self.attn_drop.p) if self.training else 0.0

    def weights(self) -> dict[str, Tensor]:
        """{site name within a block: the rows it quantizes}, each (rows, columns)."""
        q, k, v = self.qkv.weight.chunk(3)
        weights = {"query": q, "key": k, "value": v, "out": self.proj.weight}
        return {f"attn.{name}._weight_quantizer": weight for name, weight in weights.items()}


class FeedForwardQuantizers(nn.Module):
    """The quantizers of the two layers of an MLP, under FasterTransformer's name `ffn`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = GemmQuantizers(), GemmQuantizers()


class QuantBlock(nn.Module):
    """timm's pre-norm Block with its sites."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn = QuantAttention(cast(Attention, block.attn))
        self.mlp = cast(Mlp, block.mlp)
        self.ls1, self.ls2 = block.ls1, block.ls2
        self.drop_path1, self.drop_path2 = block.drop_path1, block.drop_path2
        self.ffn = FeedForwardQuantizers()
        self.layernorm_input1_quantizer, self.layernorm_input2_quantizer = (
            TensorQuantizer(),
            TensorQuantizer(),
        )
        self.add1_local_input_quantizer, self.add2_local_input_quantizer = (
            TensorQuantizer(),
            TensorQuantizer(),
        )
        self.add1_residual_input_quantizer = TensorQuantizer()
        self.add2_residual_input_quantizer = TensorQuantizer()

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, N, C)
        local = self.ls1(self.attn(self.norm1(self.layernorm_input1_quantizer(x))))
        local = self.drop_path1(self.add1_local_input_quantizer(local))
        x = self.add1_residual_input_quantizer(x) + local
        local = self.ls2(self._feed_forward(self.norm2(self.layernorm_input2_quantizer(x))))
        local = self.drop_path2(self.add2_local_input_quantizer(local))
        total: Tensor = self.add2_residual_input_quantizer(x) + local
        return total

    def _feed_forward(self, x: Tensor) -> Tensor:
        mlp, fc1, fc2 = self.mlp, self.ffn.fc1, self.ffn.fc2
        x = fc1.linear(fc1._input_quantizer(x), mlp.fc1.weight, mlp.fc1.bias)
        x = mlp.drop1(mlp.act(x))
        x = fc2.linear(fc2._input_quantizer(x), mlp.fc2.weight, mlp.fc2.bias)
        dropped: Tensor = mlp.drop2(x)
        return dropped

    def gemms(self) -> Iterator[tuple[GemmQuantizers, Tensor]]:
        """The linear layers: their quantizers and the weight rows they multiply with."""
        attention, ffn = self.attn, self.ffn
        yield from zip((attention.query, attention.key, attention.value), attention.qkv.weight.chunk(3), strict=True)
        yield attention.out, attention.proj.weight
        yield from ((ffn.fc1, self.mlp.fc1.weight), (ffn.fc2, self.mlp.fc2.weight))

    def quantizer(self, site: str) -> TensorQuantizer:
        """The quantizer of a site, by its name within a block."""
        found = self.get_submodule(site)
        assert isinstance(found, TensorQuantizer)
        return found

    def weights(self) -> dict[str, Tensor]:
        """{site name within a block: the (rows, columns) weight it quantizes}."""
        ffn = {"fc1": self.mlp.fc1.weight, "fc2": self.mlp.fc2.weight}
        return self.attn.weights() | {f"ffn.{n}._weight_quantizer": w for n, w in ffn.items()}


def require_supported(model: nn.Module) -> None:
    """Raise InputError, naming the type, unless `model` is a timm VisionTransformer of plain blocks.

    Types are compared exactly: a subclass may compute something else than the quantized block that replaces
    it. Class, register and distillation tokens, LayerScale and qk-norm are fine.
    """
    if not isinstance(model, VisionTransformer):
        raise InputError(f"model: {type(model).__name__} is not a timm VisionTransformer")
    for index, block in enumerate(model.blocks):
        for name, module, wanted in _replaced_modules(block):
            if type(module) is not wanted:
                raise InputError(
                    f"model: blocks.{index}{name} is a {type(module).__name__}, which cannot be quantized; "
                    f"expected {wanted.__name__}"
                )


def _replaced_modules(block: Any) -> Iterable[tuple[str, Any, type]]:
    """(name, module, the type it must have) of what a quantized block takes over; lazy, outermost first."""
    yield "", block, Block
    yield ".attn", block.attn, Attention
    yield ".attn.qkv", block.attn.qkv, nn.Linear
    yield ".attn.norm", block.attn.norm, nn.Identity  # set by scale_attn_norm
    yield ".attn.gate", getattr(block.attn, "gate", None), type(None)
    yield ".mlp", block.mlp, Mlp
    yield ".mlp.fc1", block.mlp.fc1, nn.Linear
    yield ".mlp.norm", block.mlp.norm, nn.Identity  # set by scale_mlp_norm


def quantize_vit(model: VisionTransformer) -> VisionTransformer:
    """Put quantizers, all of them off, into `model` in place; returns it. InputError as `require_supported`."""
    require_supported(model)
    model.blocks = nn.Sequential(*(QuantBlock(cast(Block, block)) for block in model.blocks))
    return model


def quant_blocks(model: nn.Module) -> list[QuantBlock]:
    """The blocks of a model made by `quantize_vit`."""
    return list(model.blocks)  # type: ignore[arg-type]


def sites_of(model: nn.Module) -> Iterator[tuple[str, Site, TensorQuantizer]]:
    """(full FasterTransformer name, site, quantizer) of every site, block by block."""
    for index, block in enumerate(quant_blocks(model)):
        for site in SITES:
            yield site_key(index, site.name), site, block.quantizer(site.name)


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[nn.Module]:
    """The float model, with the weights it had before any plan, for as long as the context lasts."""
    before = [(quantizer, quantizer.state) for _, _, quantizer in sites_of(model)]
    changed = _restore_weights(model)
    try:
        for quantizer, _ in before:
            quantizer.state = State.OFF
        yield model
    finally:
        _change_weights(model, changed)
        for quantizer, state in before:
            quantizer.restore(state)


def float_copy(model: nn.Module) -> nn.Module:
    """A copy of the model with all quantizers off and the weights it had before any plan, for good."""
    twin = copy.deepcopy(model)
    _restore_weights(twin)
    for _, _, quantizer in sites_of(twin):
        quantizer.state = State.OFF
    return twin


def clipped(model: nn.Module, amax: Mapping[str, float]) -> nn.Module:
    """The model, changed in place, whose activations clip as the quantizers of {site of fc2's input: amax} do.

    Weights of the correction `split` count on that: with it they compute what the float model does.
    """
    for index, block in enumerate(quant_blocks(model)):
        limit = amax.get(site_key(index, FC2_INPUT))
        if limit is not None:
            block.mlp.act = nn.Sequential(block.mlp.act, _Ceiling(limit))
    return model


class _Ceiling(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(max=self.limit)


@contextmanager
def observing(model: nn.Module, observers: Mapping[str, Observer]) -> Iterator[None]:
    """Show every distinct activation tensor of the float model to its observer, once per forward pass.

    `observers` maps the full names of `tensor_keys` to what is called with the tensor.
    """
    with quantizers_off(model):
        for key, quantizer in _representatives(model):
            quantizer.observe(observers[key])
        yield


def tensor_keys(model: nn.Module) -> tuple[str, ...]:
    """Full names of the distinct activation tensors, in order: what calibration statistics are kept for."""
    return tuple(key for key, _ in _representatives(model))


def _representatives(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    for index, block in enumerate(quant_blocks(model)):
        for tensor in observed_tensors():
            yield site_key(index, tensor), block.quantizer(tensor)


def site_weights(model: nn.Module) -> dict[str, Tensor]:
    """{full name of a weight site: the (rows, columns) weight it quantizes}."""
    return {
        site_key(index, name): weight
        for index, block in enumerate(quant_blocks(model))
        for name, weight in block.weights().items()
    }


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Make the model do what a plan says: scales, states, and the weights that the plan changes.

    Weights that an earlier plan changed are first as they were. InputError where the plan is of another model.
    """
    if [key for key, _, _ in sites_of(model)] != list(plan.sites):
        raise InputError(f"plan: has {len(plan.sites)} sites, which are not those of this model")
    _restore_weights(model)
    _change_weights(model, plan.weights)
    for key, _, quantizer in sites_of(model):
        quantizer.take(plan.sites[key].amax, plan.sites[key].rule)


def require_follows(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError unless the model has the scales and the changed weights of the plan."""
    parameters = dict(model.named_parameters())
    for key, amax in scales_of(model).items():
        if key not in plan.sites or not torch.equal(amax.detach().cpu(), plan.sites[key].amax.cpu()):
            raise ValueError(f"the model does not follow this plan: {key} has another amax")
    for name, tensor in plan.weights.items():
        if not torch.equal(parameters[name].detach().cpu(), tensor.cpu()):
            raise ValueError(f"the model does not follow this plan: {name} has other values")


def _change_weights(model: nn.Module, changes: Mapping[str, Tensor]) -> None:
    """Take over changed weights, in place; what they were is kept with the model for `_restore_weights`."""
    parameters = dict(model.named_parameters())
    for name, tensor in changes.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise InputError(f"plan: changes {name!r} of shape {tuple(tensor.shape)}, which this model does not have")
    before = _weights_before(model)
    with torch.no_grad():
        for name, tensor in changes.items():
            before[name] = parameters[name].detach().clone()
            parameters[name].copy_(tensor)


def _restore_weights(model: nn.Module) -> dict[str, Tensor]:
    """Undo `_change_weights`; returns what was undone."""
    parameters, before = dict(model.named_parameters()), _weights_before(model)
    changed = {name: parameters[name].detach().clone() for name in before}
    with torch.no_grad():
        for name, tensor in before.items():
            parameters[name].copy_(tensor)
    before.clear()
    return changed


def _weights_before(model: nn.Module) -> dict[str, Tensor]:
    return cast("dict[str, Tensor]", model.__dict__.setdefault("_weights_before_plan", {}))


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    """{site: amax} as the model has it now, learned ones included."""
    return {key: quantizer.amax for key, _, quantizer in sites_of(model)}


def learn_amax(model: nn.Module, plan: Plan) -> list[tuple[nn.Parameter, int]]:
    """Turn amax of every quantizer that the plan has on into a parameter; those that its mode fuses share one.

    Sites whose amax is 0 stay as they are: they have no step to learn. Returns (parameter, bits), each once.
    """
    leader = {name: group[0] for group in FUSED_GROUPS for name in group} if MODES[plan.mode].fuse_qkv else {}
    learned: list[tuple[nn.Parameter, int]] = []
    for index, block in enumerate(quant_blocks(model)):
        made: dict[str, nn.Parameter] = {}
        for site in SITES:
            quantizer, on = block.quantizer(site.name), plan.sites[site_key(index, site.name)].rule.on
            if not on or not bool((quantizer.amax > 0).all()):
                continue
            if not isinstance(quantizer.amax, nn.Parameter):  # the inputs of query, key and value are one quantizer
                key = leader.get(site.name, site.name)
                if key not in made:
                    made[key] = nn.Parameter(quantizer.amax.detach().clone())
                    learned.append((made[key], quantizer.bits))
                quantizer.learn(made[key], batched=site.family != WEIGHT)
    return learned


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Quantize the weights once instead of in every forward pass: the same numbers, for as long as they do not
    learn."""
    quantizers = {key: quantizer for key, _, quantizer in sites_of(model)}
    pairs = [(quantizers[key], weight) for key, weight in site_weights(model).items()]
    try:
        for quantizer, weight in pairs:
            quantizer.freeze(weight)
        yield
    finally:
        for quantizer, _ in pairs:
            quantizer.thaw()
