"""The page: what a run's folder holds, put together and written as one file without a network.

    folder ──► run/report_*: values ──► charts, tables, sentences ──► Page ──► templates/report.html ──► report.html

Jinja2 escapes every text; what it is told to trust is the SVG of `figures`, and the page's own style and script.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from vitq_ray import __version__
from vitq_ray.base.config import InputError
from vitq_ray.base.files import atomic_file
from vitq_ray.page import summary
from vitq_ray.page.compared import compare_all, why_beaten
from vitq_ray.page.figures import Chart
from vitq_ray.page.flips import Flip, drop, flips_of, per_class
from vitq_ray.page.latency_charts import latency_charts, search_latency_charts
from vitq_ray.page.search_charts import search_charts
from vitq_ray.page.site_charts import histogram_charts
from vitq_ray.page.site_grid import SiteGrid, site_grid
from vitq_ray.page.summary import Fact, accuracy_text
from vitq_ray.page.tables import FORECAST_NAMES, Cell, Row, Table, candidate_table, class_table, reason_table
from vitq_ray.page.texts import duration, percent
from vitq_ray.page.training_charts import training_charts
from vitq_ray.run.image_table import read_images
from vitq_ray.run.report_parts import (
    SiteMap,
    checkpoints,
    measured_sites,
    sites_of_checkpoint,
    statistics_of,
    tolerant,
    verification_of,
)
from vitq_ray.run.report_search import SearchRun, read_search
from vitq_ray.run.report_training import curves_of_search, read_training
from vitq_ray.run.results import read_result
from vitq_ray.run.site_table import SiteTable, read_scales, read_sites

REPORT = "report.html"
Commands = Sequence[tuple[str, str]]  # (what for, command)


@dataclass(frozen=True)
class Page:
    """Everything that stands on the page, in its order; what is empty is left out.

    Attributes:
        next_step: what to do now.
        commands: that reproduce the run, and go on from it.
        details: (name, value) of options and versions.
        notes: what could not be read, and why something is not there.
    """

    title: str
    folder: str
    finished: bool
    sentences: Sequence[str]
    facts: Sequence[Fact]
    commands: Commands
    details: Sequence[tuple[str, str]]
    notes: Sequence[str]
    next_step: str = ""
    candidates: Table | None = None
    charts: Sequence[Chart] = ()
    latency: Sequence[Chart] = ()
    sites: SiteGrid | None = None
    histograms: Sequence[Chart] = ()
    reasons: Table | None = None
    flips: Sequence[Flip] = ()
    flipped: int = 0
    classes: Table | None = None
    training: Sequence[Chart] = ()
    results: Table | None = None
    stages: Table | None = None


# Pages of the kinds of run --------------------------------------------------------------------------------------------


def search_page(folder: Path, commands: Commands) -> Page:
    """Of a search, finished or not."""
    notes: list[str] = []
    search, table = read_search(folder), tolerant(partial(read_sites, folder), notes)
    forecasts = table.forecasts if table is not None else search.forecasts
    rows, images = compare_all(search), tolerant(partial(read_images, folder), notes)
    found, lost = _map_of_search(search, table, notes), drop(images)
    transforms = search.leader.setting.transforms if search.leader else ()
    statistics = tolerant(partial(statistics_of, folder, transforms), notes)
    reasons = why_beaten(search, rows, table)
    curves = curves_of_search(search.epochs, search.result)
    scales = tolerant(partial(read_scales, folder), notes)
    verification = tolerant(partial(verification_of, folder), notes)
    if images is None and search.result is not None:
        notes.append(
            "No images.parquet: which images changed their class was not written by the version that ran this."
        )
    if table is None and search.entries:
        notes.append("No sites.npz: what is lost at which site was not written by the version that ran this.")
    return Page(
        title=f"Search {folder.absolute().name}",
        folder=str(folder.absolute()),
        finished=search.result is not None,
        sentences=summary.search_sentences(search, lost, found),
        facts=summary.search_facts(search, lost),
        commands=commands,
        details=_details(search.run),
        notes=notes,
        next_step=summary.next_step(search, lost),
        candidates=candidate_table(search, rows, forecasts) if rows else None,
        charts=search_charts(search, rows, forecasts),
        latency=[*latency_charts(verification), *search_latency_charts(search.result)],
        sites=None if found is None else site_grid(found, FORECAST_NAMES[forecasts]),
        histograms=() if found is None else histogram_charts(search, found, statistics, table),
        reasons=reason_table(reasons, forecasts) if reasons else None,
        flips=flips_of(images) if images is not None else (),
        flipped=0 if images is None else int(images.flipped.sum()),
        classes=class_table(per_class(images)) if images is not None and per_class(images) else None,
        training=training_charts(curves, scales) if curves else (),
        stages=_stages(search.result),
    )


def _map_of_search(search: SearchRun, table: SiteTable | None, notes: list[str]) -> SiteMap | None:
    """Of the leader: from sites.npz, or without a forecast from the checkpoint of the winner."""
    setting = (search.result or {}).get("winner", {}).get("setting")
    measured = tolerant(partial(measured_sites, search.path, setting), notes)
    if table is not None and search.leader is not None:
        at = table.row(search.leader.same_as or search.leader.name)
        if at is not None:
            row = (table.amax[at], table.bits[at], table.loss[at])
            found = SiteMap(table.sites, *row, table.forecasts, measured)
            return found if search.won_by_race else _with_float(found, search.path, notes)
    return _map_of_checkpoint(search.path, measured, notes)


def _with_float(found: SiteMap, folder: Path, notes: list[str]) -> SiteMap:
    """Of a winner of which parts were left in float behind the race: what its checkpoint says is off is off."""
    saved = _map_of_checkpoint(folder, None, notes)
    if saved is None or saved.sites != found.sites or found.loss is None:
        return found
    return replace(found, bits=saved.bits, loss=np.where(saved.bits > 0, found.loss, np.float32(0)))


def _map_of_checkpoint(folder: Path, measured: Mapping[str, float] | None, notes: list[str]) -> SiteMap | None:
    paths = checkpoints(folder)
    found = tolerant(partial(sites_of_checkpoint, paths[0]), notes) if paths else None
    return None if found is None else replace(found, measured=measured)


def training_page(folder: Path, commands: Commands) -> Page:
    """Of a training, finished or not."""
    notes: list[str] = []
    training, scales = read_training(folder), tolerant(partial(read_scales, folder), notes)
    charts = training_charts([training.curve], scales)
    measured = tolerant(partial(measured_sites, folder), notes)
    found = _map_of_checkpoint(folder, measured, notes)
    if scales is None:
        notes.append("No scales.json: how scales changed is written at the end of a training.")
    learned = scales is not None and any(before != after for before, after in scales.values())
    return Page(
        title=f"Training {folder.absolute().name}",
        folder=str(folder.absolute()),
        finished=training.result is not None,
        sentences=summary.training_sentences(training, learned),
        facts=summary.training_facts(training),
        commands=commands,
        details=_details(training.run),
        notes=notes,
        next_step="Export it, and verify the file." if training.result else "Go on with it: what was done is kept.",
        sites=None if found is None else site_grid(found, ""),
        training=charts,
        results=_judgement(training.result),
        stages=_stages(training.result),
    )


def _judgement(result: Mapping[str, Any] | None) -> Table | None:
    if result is None:
        return None
    names = {"float": "float", "ptq": "before training (PTQ)", "qat": "after training (QAT)"}
    parts = ("selection", "report", "val")
    rows = [
        Row(
            (
                Cell(text),
                *(Cell(accuracy_text(result[name][part]), result[name][part]["top1_correct"]) for part in parts),
            )
        )
        for name, text in names.items()
    ]
    columns = ("top-1 (95 % interval)", "selection images", "report images", "all of val")
    return Table("results", columns, tuple(rows), numbers=frozenset({1, 2, 3}))


def single_page(folder: Path, commands: Commands) -> Page:
    """Of a calibration, an evaluation or an export: what there is of one model."""
    notes: list[str] = []
    result = read_result(folder)
    measured = tolerant(partial(measured_sites, folder), notes)
    found = _map_of_checkpoint(folder, measured, notes)
    verification = tolerant(partial(verification_of, folder), notes)
    label = _label_of(result)
    return Page(
        title=f"{result['script'].capitalize()} {folder.absolute().name}",
        folder=str(folder.absolute()),
        finished=True,
        sentences=[f"{label}: {accuracy_text(result)} on {result['images']:,} images."],
        facts=summary.single_facts(
            result, [("top-1" if "top1_correct" in result else "fidelity", accuracy_text(result))]
        ),
        commands=commands,
        details=_details(result),
        notes=notes,
        sites=None if found is None else site_grid(found, ""),
        latency=latency_charts(verification),
        results=_parts(result),
        stages=_stages(result),
    )


def _parts(result: Mapping[str, Any]) -> Table | None:
    """What each part of a plan costs, of `sensitivity`."""
    rows = [
        Row(
            (
                Cell(part["name"]),
                Cell(part["kind"]),
                Cell(
                    f"{part['kl']:.3g} ({part['kl_interval95'][0]:.3g} to {part['kl_interval95'][1]:.3g})", part["kl"]
                ),
                Cell("" if part["predicted_kl"] is None else f"{part['predicted_kl']:.3g}", part["predicted_kl"]),
                Cell(percent(part["agreement"]), part["agreement"]),
            )
        )
        for part in result.get("parts", ())
    ]
    columns = ("part, alone quantized", "kind", "measured KL, nats", "predicted KL, nats", "agreement")
    return Table("parts", columns, tuple(rows), numbers=frozenset({2, 3, 4})) if rows else None


def _label_of(result: Mapping[str, Any]) -> str:
    setting = result.get("setting")
    if not setting:
        return "The float model"
    calibrator, batches = setting.get("calibrator", ""), setting.get("num_batches", "")
    return f"{setting.get('mode', '')} {calibrator} n={batches} w{setting.get('weight_bits')}a{setting.get('act_bits')}"


def _details(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options that are set, fingerprints and versions."""
    options = [(name, str(value)) for name, value in values.get("options", {}).items() if value not in (None, False)]
    prints = [(name, str(values[name])) for name in values if name.endswith("_fingerprint")]
    space = values.get("search_space", {}).get("choices", {})
    tried = [(f"space: {name}", ", ".join(map(str, choices))) for name, choices in space.items()]
    versions = [(f"version of {name}", str(version)) for name, version in values.get("versions", {}).items()]
    return [*options, *tried, *prints, *versions]


def _stages(result: Mapping[str, Any] | None) -> Table | None:
    if result is None:
        return None
    rows = [Row((Cell(name), Cell(duration(value), value))) for name, value in result["seconds"].items()]
    return Table("stages", ("stage", "time"), tuple(rows), numbers=frozenset({1}))


# The file -------------------------------------------------------------------------------------------------------------


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("vitq_ray.page")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")


def html_of(page: Page) -> str:
    """The page as a file. Its policy lets it load nothing, and run no script but its own."""
    style, script = ((files("vitq_ray.page") / "templates" / name).read_text() for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(page=page, style=style, script=script, script_hash=digest, version=__version__)


def write_page(page: Page, path: Path) -> None:
    """Atomically. OSError naming the file where it cannot be written."""
    with atomic_file(path) as stream:
        stream.write(html_of(page).encode(errors="replace"))


PAGES = {"tune_calib": search_page, "qat": training_page}


def page_of(folder: Path, script: str, commands: Commands) -> Page:
    """Of a folder that the script has written. InputError where its files are damaged, or of a newer version."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected the folder of a run")
    return PAGES.get(script, single_page)(folder, commands)
