"""The page of a run: what stands on it, how large it is, and what names can do to it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.conftest import DATA, make_setting
from tests.made_runs import MadeSearch, made_training
from vitq_ray.measure.paired import Interval
from vitq_ray.page.compared import Reason
from vitq_ray.page.page import Page, html_of, page_of
from vitq_ray.page.summary import points_from_float
from vitq_ray.page.tables import reason_table
from vitq_ray.run.report_search import RaceEntry

HOSTILE = ('"><img src=x onerror=alert(1)>', "</script><script>alert(2)</script>", "{{ 7 * 7 }} $\\frac{$ 'x'")
VOID = {"meta", "img", "input", "br"}


class Reader(HTMLParser):
    """Checks that tags are closed in order; keeps texts, ids and what elements there are."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        self.ids += [values["id"]] if values.get("id") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(folder: Path, script: str = "tune_calib") -> Page:
    return page_of(folder, script, [("Do it again", "python scripts/tune_calib.py --seed 3")])


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes the time of these tests."""
    for name in ("search_charts", "histogram_charts"):
        monkeypatch.setattr(f"vitq_ray.page.page.{name}", lambda *_: [])


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page(MadeSearch().write(tmp_path_factory.mktemp("search")))


def test_a_finished_search(search: Page) -> None:
    reader = Reader(html_of(search))
    assert len(reader.ids) == len(set(reader.ids))
    first, second, third = search.sentences
    assert first.startswith(
        "Of 14 settings, ft1 max n=2 w8a8 is the best: top-1 83.33 % (78.10 to 87.52) on 240 report"
    )
    assert first.endswith("20.00 points (14.75 to 24.92) below the float model's 95.83 %.")
    assert second.startswith(
        "Of the others, 1 tied with it, 12 beaten: the chance that the race lost the best one is at"
    )
    assert third.startswith("Its predicted KL comes to ")
    assert search.candidates is not None
    assert [row.kind for row in search.candidates.rows] == ["best", "tied"] + ["beaten"] * 12
    assert search.candidates.rows[0].cells[1].text == "ft1 max n=2 w8a8"
    titles = [chart.title for chart in search.charts]
    assert titles == [
        *("Calibrators: ft1 w8a8", "Calibrators: ft2 w8a8"),
        *("Predicted and measured loss", "The race", "What matters"),
    ]
    assert len(search.histograms) == 6
    assert search.classes is not None
    assert {row.cells[0].text for row in search.classes.rows} == {"boot", "coat", "dress"}
    assert (len(search.flips), search.flipped) == (48, 48)
    assert "python scripts/tune_calib.py --seed 3" in reader.text


def test_sites_are_a_table_of_blocks(search: Page) -> None:
    grid = search.sites
    assert grid is not None
    assert grid.blocks == ("0", "1")
    assert len(grid.rows) == 29
    cells = [cell for _, row in grid.rows for cell in row]
    assert {cell.bits for cell in cells} == {"8", "off"}
    assert all(cell.shade.background for cell in cells if cell.bits == "8")


def test_nothing_is_loaded_and_nothing_runs_but_the_page_itself(search: Page) -> None:
    html = html_of(search)
    reader = Reader(html)
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert not any(tag in ("link", "iframe", "object") for tag, _ in reader.tags)
    sources = [values.get(name) or "" for _, values in reader.tags for name in ("src", "href", "xlink:href")]
    assert all(source.startswith(("data:image/", "#")) for source in sources if source)
    assert "default-src 'none'" in html
    assert not re.search(r"url\((?!#)", html)


def test_every_figure_has_words_and_every_column_a_button(search: Page) -> None:
    reader = Reader(html_of(search))
    figures = [values for tag, values in reader.tags if values.get("role") == "img"]
    assert len(figures) == len(search.charts) + len(search.histograms)
    assert all(len(values["aria-label"] or "") > 30 for values in figures)
    assert all(values.get("alt") for tag, values in reader.tags if tag == "img")
    heads = [values for tag, values in reader.tags if tag == "th" and "aria-sort" in values]
    buttons = [values for tag, values in reader.tags if tag == "button"]
    assert len(heads) == len(buttons) > 20


@pytest.mark.usefixtures("without_charts")
def test_names_can_do_nothing(tmp_path: Path) -> None:
    folder = MadeSearch(names=HOSTILE).write(tmp_path / '"><svg onload=alert(3)>')
    made = page(folder)
    html = html_of(made)
    reader = Reader(html)
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert not any(name.startswith("on") for _, values in reader.tags for name in values)
    assert not any(values.get("src") == "x" for _, values in reader.tags)
    assert HOSTILE[2] in reader.text
    assert "/data/<b>x</b>" in reader.text


def test_what_one_family_wins_is_no_share_of_what_others_lose() -> None:
    entry = RaceEntry("c001", make_setting(), "beaten", None, 1.0, {}, None, 0.0)
    families = {"probabilities": 3.0, "weight": 1.0, "input": -3.0}
    reason = Reason(entry, (("mode", "ft2", "ft1"),), 1.0, families, ("0.attn.matmul_a_input_quantizer", 2.0))
    (row,) = reason_table([reason], "predicted_kl").rows
    assert row.cells[1].text == "mode ft2, not ft1"
    assert row.cells[3].text == "attention probabilities 75 %, weights 25 %"


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(-0.0154, -0.0209, -0.0099), "1.54 points (0.99 to 2.09) below"),
        (Interval(0.0, -0.0301, 0.0301), "0 points (−3.01 to +3.01) from"),
        (Interval(0.01, -0.002, 0.03), "1.00 points (−0.20 to 3.00) above"),
    ],
)
def test_points_from_float_are_said_in_words(interval: Interval, text: str) -> None:
    assert points_from_float(interval) == text


def test_a_killed_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitq_ray.page.site_charts.MOST_SITES", 1)
    folder = MadeSearch(finished=False).write(tmp_path)
    with open(folder / "trials.jsonl", "ab") as log:
        log.write(b'{"event": "chunk", "na')
    before = (folder / "trials.jsonl").read_bytes()
    made = page(folder)
    reader = Reader(html_of(made))
    assert (folder / "trials.jsonl").read_bytes() == before, "another process may be writing it"
    assert "not finished" in reader.text
    assert made.sentences[0].startswith("This search has not come to its end: 6 of 14 candidates are decided")
    assert made.sentences[1].startswith("ft1 m")
    assert {row.kind for row in made.candidates.rows} == {"finished", "beaten", "racing", "waiting"}  # type: ignore[union-attr]
    assert made.charts
    assert made.sites is not None


def test_a_search_that_has_hardly_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MadeSearch(finished=False, candidates=2).write(tmp_path)
    lines = (folder / "trials.jsonl").read_bytes().splitlines(keepends=True)
    monkeypatch.setattr("vitq_ray.page.page.histogram_charts", lambda *_: [])
    for kept, sentence in ((0, "no candidate was evaluated yet"), (3, "no candidate was evaluated yet"), (6, "leads")):
        (folder / "trials.jsonl").write_bytes(b"".join(lines[:kept]))
        made = page(folder)
        Reader(html_of(made))
        assert sentence in " ".join(made.sentences)


@pytest.mark.usefixtures("without_charts")
def test_without_labels(tmp_path: Path) -> None:
    made = page(MadeSearch(labels=False).write(tmp_path))
    reader = Reader(html_of(made))
    assert "agreement 80.00 %, KL 0.01 nats to the float model" in made.sentences[0]
    assert made.classes is None
    assert "top-1 of" not in reader.text


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize("number", [1, 2])
def test_searches_of_earlier_versions(number: int) -> None:
    made = page(DATA / f"format{number}" / "search")
    Reader(html_of(made))
    assert made.finished
    assert made.sites is not None, "from the checkpoint"
    assert any(note.startswith("No images.parquet") for note in made.notes)


@pytest.mark.usefixtures("without_charts")
def test_what_is_damaged_is_told_and_the_rest_is_drawn(tmp_path: Path) -> None:
    folder = MadeSearch().write(tmp_path)
    for name in ("sites.npz", "images.parquet", "statistics.npz"):
        (folder / name).write_bytes(b"PK" + b"x" * 50)
    made = page(folder)
    Reader(html_of(made))
    assert [note.partition(": ")[0].rpartition("/")[2] for note in made.notes[:3]] == [
        *("sites.npz", "images.parquet", "statistics.npz")
    ]
    assert made.candidates is not None


def test_a_training(tmp_path: Path) -> None:
    made = page(made_training(tmp_path / "t"), "qat")
    reader = Reader(html_of(made))
    assert [chart.title for chart in made.training] == ["Accuracy while training", "Training loss", "Learned scales"]
    assert made.sentences[0] == (
        "After training top-1 is 86.00 % (77.86 to 91.47) on 100 report images; before it was 80.00 %, and the float "
        "model has 90.00 %: 60 % of the 10.00 points lost were won back."
    )
    assert made.sentences[2] == "The scales were learned, too."
    assert "after training (QAT)" in reader.text


def test_a_killed_training(tmp_path: Path) -> None:
    made = page(made_training(tmp_path / "t", finished=False), "qat")
    Reader(html_of(made))
    assert made.sentences[0] == "This training has not come to its end: 1 of 3 epochs are done."
    assert len(made.training) == 2


def test_a_large_search_makes_a_small_page(tmp_path: Path) -> None:
    """100 candidates, 12 blocks with some 20 sites that are on."""
    made = page(
        MadeSearch(candidates=100, images=400, depth=12, names=[f"class {i}" for i in range(60)]).write(tmp_path)
    )
    html = html_of(made)
    assert len(html.encode()) < 2_500_000, "5 MB are allowed"
    assert made.candidates is not None
    assert len(made.candidates.rows) == 100
    assert made.sites is not None
    assert len(made.sites.blocks) == 12
