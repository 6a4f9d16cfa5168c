"""What the runtimes that a file is exported for compute in integers, and what they refuse.

A target is named as the mode whose sites it has (`quant.sites.MODES`). Rules were found with the runtimes themselves
(`docs/export.md`), those of TensorRT in its documentation only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vitq_ray.models.geometry import Geometry
from vitq_ray.quant.plan import Plan, SitePlan
from vitq_ray.quant.sites import MODES, WEIGHT, Site, sites_of_blocks

TENSORRT = "tensorrt"
RIGHT = ("attn.matmul_k_input_quantizer", "attn.matmul_v_input_quantizer")  # activations that stand like weights
ATTENTION = ("attn.matmul_q_input_quantizer", RIGHT[0], "attn.matmul_a_input_quantizer", RIGHT[1])


@dataclass(frozen=True)
class Shape:
    """What rules ask of a model: N tokens, D head width."""

    tokens: int
    head_width: int

    @staticmethod
    def of(geometry: Geometry) -> Shape:
        return Shape(geometry.num_tokens, geometry.width // geometry.heads)


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        name: that of its mode.
        unsigned: signed activations are written as uint8 around 128: the same integers, and what its kernels take.
        gelu: has the operator Gelu; else it is spelled out, as the runtime expects it.
        whole_attention: it fuses attention with both products in integers, or with none.
        conditions: of the shape, {what must hold: whether it does}, where attention is quantized.
    """

    name: str
    unsigned: bool
    gelu: bool
    asymmetric: bool = True
    whole_attention: bool = False
    conditions: Callable[[Shape], dict[str, bool]] = lambda shape: {}

    def problems(self, plan: Plan, shape: Shape, depth: int) -> Iterator[str]:
        """What in a plan this target has no integer kernels for, one line each."""
        sites = sites_of_blocks(depth)
        on = {key: (sites[key], site) for key, site in plan.sites.items() if site.rule.on}
        yield from _counted("amax 0", (key for key, (_, site) in on.items() if bool((site.amax == 0).any())))
        yield from _counted("not 8 bits", (key for key, (_, site) in on.items() if site.rule.bits != 8))
        mode = MODES[self.name]
        yield from _counted(
            f"{self.name} fuses no quantizer there", (key for key, (site, _) in on.items() if not mode.quantizes(site))
        )
        if not self.asymmetric:
            yield from _counted(
                f"{self.name} takes signed integers without zero point only",
                (key for key, (_, site) in on.items() if not site.rule.signed or site.rule.zero_point),
            )
        yield from _counted("signed weights only", _other_weights(on))
        if any(site.name in ATTENTION for site, _ in on.values()):
            for condition, holds in self.conditions(shape).items():
                if not holds:
                    yield f"{condition}; a rule '*.attn.matmul_* -> off' leaves attention in float"
        if self.whole_attention:
            yield from _counted(
                f"{self.name} fuses both products of attention in integers, or none", _half_attention(plan, depth)
            )


def _other_weights(on: dict[str, tuple[Site, SitePlan]]) -> Iterator[str]:
    for key, (site, plan) in on.items():
        if site.family == WEIGHT and (not plan.rule.signed or plan.rule.zero_point):
            yield key


def _half_attention(plan: Plan, depth: int) -> Iterator[str]:
    for key, site in sites_of_blocks(depth).items():
        if site.name == ATTENTION[0]:
            block = key.removesuffix(site.name)
            if len({plan.sites[block + name].rule.on for name in ATTENTION}) > 1:
                yield key


def _counted(problem: str, keys: Iterator[str]) -> Iterator[str]:
    found = list(keys)
    if found:
        yield f"{found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}: {problem}"


def _tensorrt(shape: Shape) -> dict[str, bool]:
    return {
        f"TensorRT fuses attention with heads of 16, 32 or 64, here {shape.head_width}": shape.head_width
        in (16, 32, 64),
        f"TensorRT fuses attention of at most 512 tokens, here {shape.tokens}": shape.tokens <= 512,
    }


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("ort", unsigned=True, gelu=True),
        Target("openvino", unsigned=False, gelu=True),
        Target(TENSORRT, unsigned=False, gelu=False, asymmetric=False, whole_attention=True, conditions=_tensorrt),
    )
}


def reduced_range(plan: Plan) -> Plan:
    """The plan with one bit less in what stands on the right of a product: two products of such an integer with one of
    8 bits fit the 16 bits in which CPUs without VNNI add them."""

    def reduced(key: str, site: SitePlan) -> SitePlan:
        right = "_weight_quantizer" in key or key.endswith(RIGHT)
        bits = min(site.rule.bits, 7) if right and site.rule.signed else site.rule.bits
        return SitePlan(site.amax, dataclasses.replace(site.rule, bits=bits))

    return dataclasses.replace(plan, sites={key: reduced(key, site) for key, site in plan.sites.items()})


def symmetric(plan: Plan) -> Plan:
    """The plan with signed integers without zero point in place of unsigned ones: the same ranges, in one scale for
    both signs. What it loses is what unsigned and asymmetric grids bring."""

    def signed(site: SitePlan) -> SitePlan:
        if site.rule.signed:
            return site
        largest = torch.maximum(site.amax, site.rule.zero_point * site.scale)
        return SitePlan(largest, dataclasses.replace(site.rule, signed=True, zero_point=0))

    return dataclasses.replace(plan, sites={key: signed(site) for key, site in plan.sites.items()})
