"""The page in Debian's Chromium: no errors, tables sort, nothing is wider than the window."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tests.made_runs import MadeSearch
from vitq_ray.page.page import html_of, page_of

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")

# Runs behind the page's own script, and leaves what it found in the DOM.
PROBE = """
const found = {width: document.documentElement.scrollWidth, inner: innerWidth, errors: window.problems, sorted: {}};
const wide = [...document.querySelectorAll("body *")].filter((node) => !node.closest(".scroll *, .skip, svg *"));
const over = wide.filter((node) => node.getBoundingClientRect().right > innerWidth + 1);
found.wide = over.map((node) => node.outerHTML.slice(0, 80));
const table = document.querySelector("#table-candidates"), heads = [...table.tHead.rows[0].cells];
const column = heads.findIndex((head) => head.textContent.startsWith("KL to float"));
const button = heads[column].querySelector("button");
const values = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.v));
button.focus();
found.focused = document.activeElement === button;
for (const way of ["ascending", "descending"]) {
  button.click();
  found.sorted[way] = [heads[column].getAttribute("aria-sort"), values()];
}
heads[1].querySelector("button").click();
found.names = [...table.tBodies[0].rows].map((row) => row.cells[1].textContent.trim());
document.querySelector("#show-bits").click();
const cell = document.querySelector(".grid td:not(.off)");
const shown = [...cell.querySelectorAll("span")].filter((span) => getComputedStyle(span).display !== "none");
found.shown = shown.map((span) => span.className);
found.background = getComputedStyle(document.body).backgroundColor;
found.drawn = [...document.querySelectorAll(".drawing svg")].every((svg) => svg.getBoundingClientRect().height > 50);
const report = document.createElement("pre");
report.id = "probe";
report.textContent = JSON.stringify(found);
document.body.append(report);
parent.postMessage(report.textContent, "*");
"""
FRAME = """<!DOCTYPE html><iframe src="{page}" width="{width}" height="900" style="border:0"></iframe><script>
addEventListener("message", (event) => {{
  const report = document.createElement("pre");
  report.id = "probe";
  report.textContent = event.data;
  document.body.append(report);
}});
</script>"""
NARROW = 400  # pixels: less than a window of Chromium has, so the page is shown in a frame
CATCH = 'window.problems = []; window.addEventListener("error", (event) => window.problems.push(event.message));'
CATCH += (
    'document.addEventListener("securitypolicyviolation", (event) => window.problems.push(event.violatedDirective));'
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose policy also lets the probe run, and beside it a dark frame that shows it narrow."""
    folder = tmp_path_factory.mktemp("browser")
    names = [*"abcdefgh", "a_very_long_name_of_a_class_without_any_place_to_break_it_" * 2]
    long = f"python scripts/tune_calib.py --data-path /{'x' * 150}"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("vitq_ray.page.site_charts.MOST_SITES", 2)
        made = page_of(MadeSearch(candidates=28, names=names).write(folder), "tune_calib", [("Again", long)])
    html = html_of(made)
    for script, place in ((CATCH, "<title>"), (PROBE, "</body>")):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        html = html.replace("script-src ", f"script-src 'sha256-{digest}' ")
        html = html.replace(place, f"<script>{script}</script>{place}")
    path = folder / "probed.html"
    path.write_text(html)
    (folder / "narrow.html").write_text(FRAME.format(page=path.name, width=NARROW))
    return path


@cache
def probe(page: Path, narrow: bool) -> tuple[dict[str, Any], str]:
    """What the probe found in a light window of 1440 pixels or a dark frame of 400, and what Chromium said."""
    assert CHROMIUM is not None
    path, profile = page.with_name("narrow.html") if narrow else page, page.with_name(f"profile-{narrow}")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    scheme = [f"--blink-settings=preferredColorScheme={0 if narrow else 1}"]
    shown = ["--enable-logging=stderr", "--hide-scrollbars", "--window-size=1440,900", "--dump-dom"]
    shown += ["--virtual-time-budget=5000"] if narrow else []  # messages come after the frame is loaded
    environment = os.environ | {"HOME": str(page.parent), "DBUS_SESSION_BUS_ADDRESS": "disabled:"}
    process = subprocess.run(
        [CHROMIUM, *flags, *scheme, *shown, path.as_uri()], capture_output=True, text=True, timeout=60, env=environment
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', process.stdout, re.DOTALL)
    assert found is not None, process.stderr[-2000:]
    return json.loads(unescape(found[1])), process.stderr


def test_it_renders_without_errors(page: Path) -> None:
    found, console = probe(page, False)
    assert found["errors"] == []
    assert "CONSOLE" not in console
    assert found["drawn"]


def test_tables_sort_both_ways_and_say_so(page: Path) -> None:
    found, _ = probe(page, False)
    assert found["focused"]
    for way, ordered in (("ascending", False), ("descending", True)):
        said, values = found["sorted"][way]
        assert said == way
        assert values == sorted(values, reverse=ordered)
        assert len(set(values)) > 20
    names = found["names"]
    assert [n for n in names if n.startswith("ft1 max")] == [f"ft1 max n={n} w8a8" for n in (2, 8)], "2 before 8"
    assert sorted(name[:7] for name in names) == [name[:7] for name in names]


def test_the_site_map_shows_what_is_chosen(page: Path) -> None:
    assert probe(page, False)[0]["shown"] == ["b"]


@pytest.mark.parametrize("narrow", [False, True])
def test_nothing_is_wider_than_the_window(page: Path, narrow: bool) -> None:
    found, _ = probe(page, narrow)
    assert found["inner"] == (NARROW if narrow else 1440)
    assert found["wide"] == []
    assert found["width"] <= found["inner"]
    assert found["errors"] == []


def test_the_dark_page_is_dark(page: Path) -> None:
    def brightness(dark: bool) -> int:
        return sum(map(int, re.findall(r"\d+", probe(page, dark)[0]["background"])[:3]))

    assert brightness(False) == 3 * 255
    assert brightness(True) < 100
