"""Which products to leave in float: the least loss for a given share of the work that stays in integers.

    plan ──► choices: layers, and attention's products, of every block ──► loss of each, predicted or measured alone
         ──► knapsack ──► rules `3.ffn.fc2._* -> off`

Of each group of choices one at most is taken: a block's attention can leave the probabilities in float, or both of its
products. Losses are taken to add up, as predicted ones do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vitq_ray.calibration.setting import Rule
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.sites import sites_of_blocks
from vitq_ray.quant.work import MIXED, SCORES, Product
from vitq_ray.search.site_effects import Part

_UNITS = 2000  # that a budget of multiply-accumulates is divided into
_QKV = ("attn.query", "attn.key", "attn.value")
_PROBABILITIES, _ATTENTION = "probabilities", "attention"
# {choice of a block: (patterns of sites below the block, products that are then in float)}
_CHOICES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "qkv": (tuple(f"{name}._*" for name in _QKV), _QKV),
    _PROBABILITIES: (("attn.matmul_a_input_quantizer",), (MIXED,)),
    _ATTENTION: (("attn.matmul_*", "attn.softmax_input_quantizer"), (SCORES, MIXED)),
    **{gemm: ((f"{gemm}._*",), (gemm,)) for gemm in ("attn.out", "ffn.fc1", "ffn.fc2")},
}


@dataclass(frozen=True)
class Choice:
    """Something that can be left in float.

    Attributes:
        group: of its group one choice is taken at most.
        rules: that leave it in float.
        part: its sites that are on in the plan.
        macs: multiply-accumulates that are then in float.
    """

    group: str
    rules: tuple[Rule, ...]
    part: Part
    macs: int


def choices_of(plan: Plan, products: Sequence[Product]) -> list[Choice]:
    """Every choice that leaves something in float which the plan has in integers."""
    macs = {(p.block, p.name): p.macs if p.in_integers(plan) else 0 for p in products}
    depth = 1 + max(product.block for product in products)
    found = []
    for block in range(depth):
        for name, (patterns, names) in _CHOICES.items():
            rules = tuple(Rule.parse((f"{block}.{pattern}", "off")) for pattern in patterns)
            keys = tuple(
                key
                for key in sites_of_blocks(depth)
                if plan.sites[key].rule.on and any(rule.matches(key) for rule in rules)
            )
            if keys:
                group = f"{block}.{_ATTENTION if name == _PROBABILITIES else name}"
                part = Part("choice", f"{block}.{name}", keys)
                found.append(Choice(group, rules, part, sum(macs[block, product] for product in names)))
    return found


def float_set(choices: Sequence[Choice], losses: Mapping[str, float], budget: float) -> list[Choice]:
    """The choices that lose the most together when they are quantized, for at most `budget` multiply-accumulates.

    A knapsack with groups, exact but for the rounding of work up to a 2000th of the budget. `losses` are by the names
    of the parts; what loses nothing stays in integers.
    """
    if budget < 1:
        return []
    groups: dict[str, list[Choice]] = {}
    for choice in choices:
        if losses[choice.part.name] > 0 and choice.macs <= budget:
            groups.setdefault(choice.group, []).append(choice)
    units_of = {choice.part.name: math.ceil(choice.macs * _UNITS / budget) for choice in choices}
    best = np.zeros(_UNITS + 1)  # the most that can be won back for so many units of work
    taken: list[npt.NDArray[np.int64]] = []
    for members in groups.values():
        now, which = best.copy(), np.full(_UNITS + 1, -1)
        for index, choice in enumerate(members):
            units = units_of[choice.part.name]
            tried = np.full(_UNITS + 1, -np.inf)
            tried[units:] = best[: _UNITS + 1 - units] + losses[choice.part.name]
            which = np.where(tried > now, index, which)
            now = np.maximum(now, tried)
        best = now
        taken.append(which)
    left, chosen = _UNITS, []
    for members, which in zip(reversed(groups.values()), reversed(taken), strict=True):
        if which[left] >= 0:
            choice = members[int(which[left])]
            chosen.append(choice)
            left -= units_of[choice.part.name]
    return chosen[::-1]


def rules_of_set(chosen: Sequence[Choice]) -> tuple[Rule, ...]:
    """For a setting that leaves these in float."""
    return tuple(rule for choice in chosen for rule in choice.rules)
