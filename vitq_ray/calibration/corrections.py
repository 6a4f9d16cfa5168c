"""Corrections: small changes of weights and biases that undo a part of the quantization error of one plan.

    float model, plan ──► each correction that is asked for, in the order of `CORRECTIONS` ──► changed weights

`split`, `fit` and `learn` have files of their own. `round` chooses for every weight of a layer whether it is rounded
up or down by what the layer's output then loses (GPTQ: Frantar et al., arXiv 2210.17323).
`bias` takes the mean error of each branch out of the bias of its last layer, block after block (Nagel et al., arXiv
1906.04721, with the tokens weighted by how much the output depends on them).

Legend: B images, N tokens, C width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.calibration.sensitivity import Moments
from vitq_ray.quant.fake_quant import fake_quantize
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.sites import site_key
from vitq_ray.quant.vit import QuantBlock, apply_plan, frozen_weights, quant_blocks, site_weights

SPLIT, FIT, ROUND, BIAS, LEARN = "split", "fit", "round", "bias", "learn"
CORRECTIONS = {
    SPLIT: "large values of fc2's input shared among neurons, so that its scale is smaller",
    FIT: "gain, centre and offset of every head, mean errors of what fc2 reads (least squares)",
    ROUND: "weights rounded by what the layer's output loses (GPTQ)",
    BIAS: "mean errors taken out of the biases of out and fc2, block after block",
    LEARN: "scales, biases and norms by gradient descent on KL to float, no labels",
}
RETIRED = {"centre": FIT}  # {correction of earlier versions: what took its place}; files may name it
# {correction: layers of a block that must have a bias}
_BIASES = {SPLIT: ("mlp.fc1", "mlp.fc2"), FIT: ("attn.proj", "mlp.fc2"), BIAS: ("attn.proj", "mlp.fc2")}
FEWEST_TO_LEARN = 32  # calibration images that `learn` needs
_AT_ONCE = 8  # images in one forward pass
_DAMP = 0.01  # of the mean diagonal, added to a layer's second moments before they are inverted
_COLUMNS = 64  # of a weight that are rounded before the others are told


def require_correctable(model: nn.Module, name: str) -> None:
    """InputError where the model's parts do not allow the correction, or where it is of an earlier version."""
    if name in RETIRED:
        raise InputError(f"correction {name}: of an earlier version; its place was taken by {RETIRED[name]}")
    for block in quant_blocks(model):
        for layer in _BIASES.get(name, ()):
            if block.get_submodule(layer).bias is None:
                raise InputError(f"correction {name}: {layer} has no bias that could be changed")


def rounded(model: nn.Module, plan: Plan, moments: Moments) -> dict[str, Tensor]:
    """{timm name: weight} whose values are levels already, chosen one input channel after the other: what one loses,
    those that follow make up for."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    changed: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, weight in site_weights(model).items():
            site = plan.sites[key]
            if not site.rule.on:
                continue
            _, moment = moments.of_weight(key)
            base = weight._base if weight._base is not None else weight  # q, k and v are rows of one
            name = names[id(base)]
            whole = changed.setdefault(name, base.detach().clone())
            first = 0 if weight._base is None else int(weight.storage_offset()) // weight.shape[1]
            whole[first : first + len(weight)] = _rounded(weight, moment, site.amax, site.rule.axis, site.rule.levels)
    return changed


def _rounded(weight: Tensor, moment: Tensor, amax: Tensor, axis: int | None, levels: tuple[int, int]) -> Tensor:
    """GPTQ of one weight (out, in), the input channels with the largest second moment first."""
    order = moment.diagonal().argsort(descending=True)
    w = weight.detach()[:, order].double()
    hessian = moment[order][:, order].double()
    hessian = hessian + _DAMP * hessian.diagonal().mean().clamp(min=1e-30) * torch.eye(len(hessian)).to(hessian)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    w, inverse, amax = w.float(), inverse.float(), amax.to(weight.device)
    result = torch.empty_like(w)
    for start in range(0, w.shape[1], _COLUMNS):
        end = min(start + _COLUMNS, w.shape[1])
        errors = torch.empty_like(w[:, start:end])
        for column in range(start, end):
            own = w[:, column : column + 1]
            result[:, column : column + 1] = fake_quantize(own, amax, axis=axis, levels=levels)
            error = (own - result[:, column : column + 1]) / inverse[column, column]
            w[:, column:end] -= error * inverse[column, column:end]
            errors[:, column - start] = error[:, 0]
        w[:, end:] -= errors @ inverse[start:end, end:]
    back = torch.empty_like(result)
    back[:, order] = result
    return back.to(weight.dtype)


def debiased(model: nn.Module, plan: Plan, images: Tensor, moments: Moments) -> dict[str, Tensor]:
    """{timm name: bias} of out and fc2, with the weighted mean of (float output - quantized output) added.

    `model` is the float model; the plan's own weights count. Block after block: the quantized stream has the
    corrections of the layers before.
    """
    quantized = copy.deepcopy(model).eval()
    apply_plan(quantized, plan)
    changed: dict[str, Tensor] = {}
    with torch.inference_mode(), frozen_weights(quantized):
        x = y = torch.cat([_embedded(model, part) for part in images.split(_AT_ONCE)])
        for index, (block, twin) in enumerate(zip(quant_blocks(model), quant_blocks(quantized), strict=True)):
            for branch, layer, name in (
                (1, twin.attn.proj, f"blocks.{index}.attn.proj.bias"),
                (2, twin.mlp.fc2, f"blocks.{index}.mlp.fc2.bias"),
            ):
                gemm = site_key(index, "attn.out" if branch == 1 else "ffn.fc2")
                weight = moments.tokens[gemm][: len(images)].to(x)[:, :, None]
                wanted, found = _branch(block, branch, x), _branch(twin, branch, y)
                shift = ((wanted - found) * weight).sum(dim=(0, 1)) / weight.sum().clamp(min=1e-30)
                x = _added(block, branch, x, wanted)
                y = _added(twin, branch, y, found + shift)
                assert isinstance(layer, nn.Linear)
                changed[name] = (layer.bias + shift).clone()
                layer.bias.copy_(changed[name])
    return changed


def _embedded(model: nn.Module, images: Tensor) -> Tensor:
    """What the first block reads, (B, N, C)."""
    seen: list[Tensor] = []
    hook = quant_blocks(model)[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        model(images)
    finally:
        hook.remove()
    return seen[0]


def _branch(block: QuantBlock, branch: int, x: Tensor) -> Tensor:
    """Output of the last layer of the attention (1) or the MLP (2), for the residual stream before it."""
    parts = []
    for part in x.split(_AT_ONCE):
        if branch == 1:
            parts.append(block.attn(block.norm1(block.layernorm_input1_quantizer(part))))
        else:
            parts.append(block._feed_forward(block.norm2(block.layernorm_input2_quantizer(part))))
    return torch.cat(parts)


def _added(block: QuantBlock, branch: int, x: Tensor, local: Tensor) -> Tensor:
    """The residual stream behind a branch."""
    if branch == 1:
        return block.add1_residual_input_quantizer(x) + block.add1_local_input_quantizer(block.ls1(local))
    return block.add2_residual_input_quantizer(x) + block.add2_local_input_quantizer(block.ls2(local))


def with_weights(plan: Plan, changes: Mapping[str, Tensor]) -> Plan:
    """The plan with more changed weights."""
    return Plan(plan.mode, plan.sites, {**plan.weights, **changes})
