"""What each part of a plan costs: KL to the float model where that part alone is quantized, image by image.

    plan ──► parts: sites, families, blocks ──► each alone, the rest float ──► KL of every image
                                            ──► beside it what gradients predict

A part alone is measured, not the plan without it: that is what a prediction is of, and it is not drowned in roundings
elsewhere that flip. Effects do not add up exactly; `whole`, the plan as it is, shows by how much.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitq_ray.base.config import require_choice
from vitq_ray.data.samples import NO_LABEL
from vitq_ray.engines.execute import Engine, Execution, executed
from vitq_ray.measure.metrics import Results, measure
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.sites import SHARED_SITES, local_name
from vitq_ray.quant.vit import apply_plan

WHOLE, SITE, FAMILY, BLOCK = KINDS = ("whole", "site", "family", "block")
_ALSO = {name: names[0] for names in SHARED_SITES for name in names}  # what is one quantizer has one name here


@dataclass(frozen=True)
class Part:
    """Some sites of a plan that are on.

    Attributes:
        kind: one of `KINDS`.
        name: as rules' patterns have it: `3.attn.out._input_quantizer`, `*.attn.out._input_quantizer`, `3.*`, `*`.
        keys: full names of the sites.
    """

    kind: str
    name: str
    keys: tuple[str, ...]


def parts_of(plan: Plan, kinds: Iterable[str] = KINDS) -> list[Part]:
    """The parts of a plan, of the kinds asked for, in the order of `kinds`."""
    parts = []
    for kind in kinds:
        require_choice("kind of part", kind, KINDS)
        groups: dict[str, list[str]] = {}
        for key, site in plan.sites.items():
            if site.rule.on:
                groups.setdefault(_part_name(kind, key), []).append(key)
        parts += [Part(kind, name, tuple(keys)) for name, keys in groups.items()]
    return parts


def _part_name(kind: str, key: str) -> str:
    block, _, site = local_name(key).partition(".")
    site = _ALSO.get(site, site)
    return {WHOLE: "*", SITE: f"{block}.{site}", FAMILY: f"*.{site}", BLOCK: f"{block}.*"}[kind]


@dataclass(frozen=True)
class Effect:
    """What a part alone costs.

    Attributes:
        results: of every image against the float model, `kl` and `agree`.
        predicted: KL in nats; None where gradients were not taken.
    """

    part: Part
    results: Results
    predicted: float | None = None

    @property
    def images(self) -> int:
        return len(self.results["kl"])

    @property
    def mean(self) -> float:
        """Mean KL, nats."""
        return float(self.results["kl"].mean(dtype=float))

    @property
    def interval95(self) -> tuple[float, float]:
        """Of the mean over images like these, by its standard error; never below 0."""
        if self.images < 2:
            return 0.0, float("inf")
        half = 1.96 * float(self.results["kl"].std(dtype=float, ddof=1)) / self.images**0.5
        return max(0.0, self.mean - half), self.mean + half

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, without the images."""
        low, high = self.interval95
        return {
            "kind": self.part.kind,
            "name": self.part.name,
            "sites": len(self.part.keys),
            "predicted_kl": self.predicted,
            "kl": self.mean,
            "kl_interval95": [low, high],
            "agreement": float(self.results["agree"].mean()),
        }


def predicted_of(part: Part, losses: Mapping[str, float]) -> float:
    """The sum over the part's sites of {site: predicted KL}."""
    return sum(losses[key] for key in part.keys)


def effects(
    model: nn.Module, plan: Plan, parts: Sequence[Part], images: Sequence[Tensor], engine: Engine
) -> Iterator[tuple[Part, Results]]:
    """(part, what every image came to against the float model) of every part, as each is measured.

    Args:
        model: from `quantize_vit`; it follows `plan` afterwards.
        plan: without corrections, which change weights that a part alone leaves in float.
        images: batches as the model takes them, (B, 3, S, S).
    """
    apply_plan(model, plan.only(()))
    with executed(model, engine) as run:
        wanted = _logits(run, images)
        no_labels = torch.full((len(wanted),), NO_LABEL)
        for part in parts:
            apply_plan(model, plan.only(part.keys))
            run.follow()
            yield part, measure(_logits(run, images), no_labels, wanted)
    apply_plan(model, plan)


def _logits(run: Execution, images: Sequence[Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([run(part).cpu() for part in images])
