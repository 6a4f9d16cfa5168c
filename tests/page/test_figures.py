"""Figures: text stays text, colours become variables, and no id is in two of them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from vitq_ray.page.figures import COLOURS, SERIES, drawing, plain_numbers, points

NAME = '<script>alert("1.23456")</script> $x$ & 99.99999'


def svg_of(name: str) -> str:
    with drawing(name) as made:
        points(made.axes, [1, 2, 3], [0.01, 0.1, 1], SERIES[0], "o", label=NAME)
        made.axes.errorbar([1, 2], [0.02, 0.2], [0.01, 0.1], color=SERIES[1], fmt="s")
        made.axes.set_yscale("log")
        plain_numbers(made.axes.yaxis)
        made.axes.legend()
    return made.svg


def test_text_is_text_and_harmless() -> None:
    svg = svg_of("a")
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    texts = ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("text")]
    assert NAME in texts, "as it was given: neither markup nor mathematics, nor rounded as coordinates are"
    assert "0.03" in texts
    assert "<script" not in svg


def test_a_narrow_log_scale_has_ticks_too() -> None:
    with drawing("narrow") as made:
        points(made.axes, [1, 2], [0.0104, 0.0117], SERIES[0], "o")
        made.axes.set_yscale("log")
        plain_numbers(made.axes.yaxis)
    assert len(set(re.findall(r">(0\.01\d*)</text>", made.svg))) >= 3


def test_colours_are_those_of_the_page() -> None:
    svg = svg_of("a")
    assert {"var(--blue)", "var(--orange)", "var(--line)", "var(--faint)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert not any(value in svg for value in COLOURS.values())
    assert "DejaVu" not in svg
    assert "<metadata" not in svg


def test_ids_of_two_figures_are_different() -> None:
    ids = [set(re.findall(r'id="([^"]+)"', svg_of(name))) for name in ("a", "b")]
    assert all(ids)
    assert not ids[0] & ids[1]
    assert svg_of("a") == svg_of("a")
