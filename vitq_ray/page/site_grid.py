"""The site map: a table of sites by blocks, coloured by what is predicted, or was measured, to be lost there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vitq_ray.quant.sites import SITES, local_name
from vitq_ray.run.report_parts import SiteMap

# matplotlib's viridis at twelve places, and the colour of text on each.
_VIRIDIS = (
    *("#440154", "#482173", "#433e85", "#38588c", "#2d708e", "#25858e"),
    *("#1e9b8a", "#2ab07f", "#52c569", "#86d549", "#c2df23", "#fde725"),
)
_DECADES = 4  # that the colours stand for
Legend = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Shade:
    """Colours of a cell; empty where nothing is known."""

    background: str = ""
    text: str = ""


@dataclass(frozen=True)
class SiteCell:
    """A site: texts of what is shown in turn, and its shades. `bits` is `off` for a site in floating point."""

    bits: str
    amax: str = ""
    predicted: str = ""
    measured: str = ""
    shade: Shade = Shade()
    measured_shade: Shade = Shade()


@dataclass(frozen=True)
class SiteGrid:
    """Rows are sites in the order of a block; columns are blocks.

    Attributes:
        what: what is predicted: `predicted KL, nats`; empty where nothing is.
        total: of all sites.
        scale, measured_scale: (colour, what it stands for) of the legends, from small to large.
    """

    blocks: tuple[str, ...]
    rows: tuple[tuple[str, tuple[SiteCell, ...]], ...]
    what: str
    has_measured: bool
    total: float
    scale: Legend
    measured_scale: Legend


def site_grid(found: SiteMap, what: str) -> SiteGrid:
    """Of a plan; `what` names the forecast."""
    places = {local_name(site): index for index, site in enumerate(found.sites)}
    blocks = sorted({name.partition(".")[0] for name in places}, key=int)
    losses = [] if found.loss is None else [float(value) for value in found.loss]
    measured = found.measured or {}
    shades, measured_shades = _Shades(losses), _Shades(list(measured.values()))

    def cell(block: str, name: str) -> SiteCell:
        index = places.get(f"{block}.{name}")
        if index is None:
            return SiteCell("")
        if not found.bits[index]:
            return SiteCell("off", f"{found.amax[index]:.3g}")
        kl = measured.get(found.sites[index])
        return SiteCell(
            str(found.bits[index]),
            f"{found.amax[index]:.3g}",
            f"{losses[index]:.1e}" if losses else "",
            "" if kl is None else f"{kl:.1e}",
            shades.of(losses[index]) if losses else Shade(),
            Shade() if kl is None else measured_shades.of(kl),
        )

    rows = tuple(
        (site.name.removesuffix("_quantizer"), tuple(cell(block, site.name) for block in blocks)) for site in SITES
    )
    what = what if losses else ""
    legends = shades.legend if losses else (), measured_shades.legend if measured else ()
    return SiteGrid(tuple(blocks), rows, what, bool(measured), math.fsum(losses), *legends)


class _Shades:
    """Twelve colours from the smallest to the largest value, over four decades at most, on a log scale."""

    def __init__(self, values: Sequence[float]) -> None:
        self._largest = max(values, default=0.0)
        smallest = min((value for value in values if value > 0), default=0.0)
        self._least = max(smallest, self._largest / 10**_DECADES)

    def of(self, value: float) -> Shade:
        span = math.log(self._largest / self._least) if self._least > 0 else 0.0
        place = math.log(max(value, self._least) / self._least) / span if span > 0 else 0.0
        index = min(len(_VIRIDIS) - 1, int(place * len(_VIRIDIS)))
        return Shade(_VIRIDIS[index], "#000" if index > 5 else "#fff")

    @property
    def legend(self) -> Legend:
        texts = {0: f"{self._least:.2g} or less", len(_VIRIDIS) - 1: f"{self._largest:.2g}"}
        return tuple((colour, texts.get(index, "")) for index, colour in enumerate(_VIRIDIS))
