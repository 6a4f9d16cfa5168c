"""Figures as SVG that a page can hold: drawn by matplotlib, text kept as text, colours as CSS variables of the page.

Colours are those of Okabe and Ito (2008), which people who see fewer colours tell apart; every series also has a marker
or a dash of its own. A figure is drawn in the colours of the light page, and each of them becomes `var(--name)`, so
that the dark page and the printer have their own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# {CSS variable: its value on the light page}; the page's style sheet has both.
COLOURS = {
    "ink": "#1b1f24",
    "faint": "#5b6570",
    "line": "#d5d9de",
    "blue": "#0072b2",
    "orange": "#e69f00",
    "green": "#009e73",
    "red": "#d55e00",
    "pink": "#cc79a7",
    "sky": "#56b4e9",
}
SERIES = tuple(COLOURS[name] for name in ("blue", "orange", "green", "red", "pink", "sky"))
MARKERS = ("o", "s", "^", "D", "v", "P")
OUTCOMES = {  # (colour, marker)
    "best": ("green", "*"),
    "tied": ("blue", "o"),
    "finished": ("blue", "o"),
    "behind": ("orange", "s"),
    "beaten": ("red", "x"),
    "racing": ("sky", "^"),
    "waiting": ("line", "."),
}
_WIDTH = 5.4  # inches
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may hold a $
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.constrained_layout.use": True,
    "text.color": COLOURS["ink"],
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), COLOURS["faint"]),
    "grid.color": COLOURS["line"],
}


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Attributes:
        svg: of our own making: it needs no escape.
        alt: what it shows, in words, for those who do not see it.
    """

    title: str
    svg: str
    alt: str
    caption: str = ""


@dataclass
class Drawing:
    """A figure that is being drawn on `axes`; its SVG is there once the context has ended."""

    figure: Figure
    axes: Axes
    svg: str = field(default="")


@contextmanager
def drawing(name: str, height: float = 3.2) -> Iterator[Drawing]:
    """`name` makes the ids in the SVG its own; the height is in inches."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height))
        made = Drawing(figure, figure.add_subplot())
        yield made
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        made.svg = _for_page(buffer.getvalue(), name)


def _for_page(text: str, name: str) -> str:
    """The SVG element alone, as wide as its place, with the page's font and colours. Only tags are changed, no text."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    assert box is not None
    rest = re.sub(r"<[^>]*>", lambda tag: _tag_for_page(tag[0], name), rest)
    return f'<svg viewBox="0 0 {box[1]} {box[2]}" aria-hidden="true" focusable="false">{_GAPS.sub(">", rest)}'


_GAPS = re.compile(r">\s*\n\s*")
_OF_MATPLOTLIB = re.compile(
    r'\bid="(figure|axes|patch|line2d|text|legend|matplotlib|xtick|ytick|PathC|Fill|LineC)[^"]*"'
)


def _tag_for_page(tag: str, name: str) -> str:
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", _OF_MATPLOTLIB.sub("", tag).replace("\n", " "))
    tag = re.sub(r"(font: |font-family: )([\d.]+px )?'DejaVu Sans'[^;\"]*", _font, tag)
    for colour, value in COLOURS.items():
        tag = tag.replace(value, f"var(--{colour})")
    return tag


def _font(found: re.Match[str]) -> str:
    return f"font-size: {found[2]}" if found[2] else "font-family: inherit"


def points(axes: Axes, x: Any, y: Any, colour: str, marker: str, **more: Any) -> None:
    """Markers without a line."""
    axes.plot(x, y, linestyle="none", color=colour, marker=marker, markersize=9 if marker == "*" else 5, **more)


def plain_numbers(axis: Axis, unit: str = "") -> None:
    """Ticks as `0.001`, not as powers; on a log scale also between powers of ten. To be called when all is drawn."""
    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        wide = LogLocator(subs=(1.0, 3.0) if high > 50 * low else (1.0, 2.0, 3.0, 5.0))
        axis.set_major_locator(wide if high > 4 * low else MaxNLocator(4))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}{unit}" if value >= 10_000 else f"{value:g}{unit}")
    )
    axis.set_minor_formatter(NullFormatter())
