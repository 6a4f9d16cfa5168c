"""What runs record for reports, and what else of a folder a report reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tests.conftest import CLASSES, plan_by_hand
from tests.made_runs import MadeSearch, made_training
from vitq_ray.base.config import InputError
from vitq_ray.data.loader import Batch
from vitq_ray.data.samples import NO_LABEL
from vitq_ray.quant.sites import LAYER_PREFIX
from vitq_ray.run.candidate_table import write_candidates
from vitq_ray.run.image_table import IMAGES, MOST_PICTURES, ImageJudge, read_images, write_images
from vitq_ray.run.report_parts import json_lines, measured_sites, statistics_of, verification_of
from vitq_ray.run.report_search import read_search
from vitq_ray.run.report_training import read_training
from vitq_ray.run.site_table import SITES, SiteTable, read_scales, read_sites, write_scales, write_sites

FC1 = f"{LAYER_PREFIX}0.ffn.fc1._weight_quantizer"


def test_sites_are_what_plans_do(quant_vit: VisionTransformer, images: Tensor, tmp_path: Path) -> None:
    plans = [plan_by_hand(quant_vit, images, mode, bits) for mode, bits in (("ft1", 8), ("ft2", 4))]
    write_sites(tmp_path, SiteTable.of("predicted_kl", [("c000", plans[0], {FC1: 0.5}), ("c001", plans[1], {})]))
    table = read_sites(tmp_path)
    assert table is not None
    assert (table.row("c001"), table.row("c002")) == (1, None)
    at = table.sites.index(FC1)
    assert table.loss[0, at] == 0.5
    assert table.loss.sum() == 0.5
    assert table.amax[0, at] == plans[0].sites[FC1].amax.max(), "of the rows"
    off = {site for site, bits in zip(table.sites, table.bits[1], strict=True) if bits == 0}
    assert off == {site for site, plan in plans[1].sites.items() if not plan.rule.on}
    assert set(table.bits[1].tolist()) == {0, 4}


def test_scales_before_and_after(quant_vit: VisionTransformer, images: Tensor, tmp_path: Path) -> None:
    before = plan_by_hand(quant_vit, images, "ft1")
    after = before.after_training({key: 2 * site.amax for key, site in before.sites.items()})
    write_scales(tmp_path, before, after)
    scales = read_scales(tmp_path)
    assert scales is not None
    assert set(scales) == {key for key, site in before.sites.items() if site.rule.on}
    assert all(second == 2 * first for first, second in scales.values())


def batch(rng: np.random.Generator, start: int, size: int, side: int = 16) -> Batch:
    pixels = torch.from_numpy(rng.integers(0, 256, (size, side, side, 3)).astype(np.uint8))
    labels = torch.from_numpy(rng.integers(0, CLASSES, size))
    return Batch(pixels, labels, torch.arange(start, start + size))


def test_images_are_what_logits_say(tmp_path: Path) -> None:
    """Against NumPy; and the pictures are those of which the float model was surest."""
    rng = np.random.default_rng(0)
    judge, logits, labels = ImageJudge("i{}.png".format), {"float": [], "winner": []}, []
    for start in (0, 70):
        seen = batch(rng, start, 70)
        for name, scale in (("float", 3.0), ("winner", 1.0)):
            values = torch.from_numpy(rng.normal(0, scale, (70, CLASSES)))
            judge(name, seen, values)
            logits[name].append(values.numpy())
        labels.append(seen.labels.numpy())
    write_images(tmp_path, judge.table())
    table = read_images(tmp_path)
    assert table is not None
    said = {name: np.concatenate(parts) for name, parts in logits.items()}
    p = {name: np.exp(x) / np.exp(x).sum(1, keepdims=True) for name, x in said.items()}
    for model, name in (("float", "float"), ("quantized", "winner")):
        ordered = np.sort(p[name], axis=1)
        assert np.array_equal(table[f"{model}_class"], said[name].argmax(1))
        assert table[f"{model}_margin"] == pytest.approx(ordered[:, -1] - ordered[:, -2], rel=1e-5)
    assert table["kl"] == pytest.approx((p["float"] * np.log(p["float"] / p["winner"])).sum(1), rel=1e-4)
    assert np.array_equal(table["label"], np.concatenate(labels))
    flipped = np.flatnonzero(said["float"].argmax(1) != said["winner"].argmax(1))
    assert np.array_equal(np.flatnonzero(table.flipped), flipped)
    surest = flipped[np.argsort(-table["float_margin"][flipped])][:MOST_PICTURES]
    assert list(table.pictures) == surest.tolist()
    assert table.names[5] == "i5.png"


def test_large_pictures_are_made_small() -> None:
    judge = ImageJudge(str)
    seen = batch(np.random.default_rng(0), 0, 1, side=384)
    judge("float", seen, torch.eye(2)[:1])
    judge("winner", replace(seen, labels=torch.tensor([NO_LABEL])), torch.eye(2)[1:])
    (data,) = judge.table().pictures.values()
    assert data.startswith(b"\xff\xd8")
    assert len(data) < 10_000


@pytest.mark.parametrize("name", [SITES, IMAGES, "scales.json"])
def test_what_is_damaged_is_named(name: str, tmp_path: Path) -> None:
    folder = made_training(tmp_path) if name == "scales.json" else MadeSearch().write(tmp_path)
    read = {SITES: read_sites, IMAGES: read_images, "scales.json": read_scales}[name]
    assert read(folder) is not None
    data = (folder / name).read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"[]"):
        (folder / name).write_bytes(damaged)
        with pytest.raises(InputError, match=name):
            read(folder)
    (folder / name).unlink()
    assert read(folder) is None


def test_a_search_is_read_as_it_was_written(tmp_path: Path) -> None:
    search = read_search(MadeSearch().write(tmp_path))
    assert search.leader is search.entries[0]
    assert [entry.outcome for entry in search.entries[:3]] == ["best", "tied", "beaten"]
    assert [entry.images for entry in search.entries[:3]] == [60, 60, 30]
    assert (search.images, len(search.measured), search.forecasts) == (60, 14, "predicted_kl")
    assert search.entries[0].seconds == 1.0


def test_chunks_that_came_twice_count_once(tmp_path: Path) -> None:
    folder = MadeSearch(finished=False).write(tmp_path)
    before = {entry.name: entry.images for entry in read_search(folder).entries}
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    chunk = next(line for line in lines if line["event"] == "chunk")
    plain = [{key: value for key, value in line.items() if key != "check"} for line in (*lines, chunk)]
    plain[0] = {**plain[0], "format": 2}  # without checksums
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plain))
    assert {entry.name: entry.images for entry in read_search(folder).entries} == before


def test_a_training_with_half_a_line(tmp_path: Path) -> None:
    training = read_training(made_training(tmp_path, finished=False))
    assert training.result is None
    assert [epoch for epoch, *_ in training.curve.epochs] == [0, 1]
    assert training.curve.epochs[1] == (1, 2.0, 82, 100)
    assert len(training.curve.steps) == 29
    assert json_lines(tmp_path / "nothing.jsonl") == []


def test_looks_are_found_by_their_transforms(tmp_path: Path) -> None:
    folder = MadeSearch().write(tmp_path)
    found = statistics_of(folder, ())
    assert found is not None
    assert found.snapshots == (2,)
    (folder / "statistics.npz").unlink()
    np.savez(
        folder / "look-1.npz", of=json.dumps({"transforms": ""}), statistics=np.frombuffer(found.to_bytes(), np.uint8)
    )
    again = statistics_of(folder, ())
    assert again is not None
    assert again.keys == found.keys


def test_measured_sites_of_another_setting_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "sensitivity.json").write_text(json.dumps({"setting": {"mode": "ft1"}, "parts": {FC1: 0.25}}))
    assert measured_sites(tmp_path, {"mode": "ft1"}) == {FC1: 0.25}
    with pytest.raises(InputError, match="of another setting than the one shown"):
        measured_sites(tmp_path, {"mode": "ft2"})


@pytest.mark.parametrize(
    "values", [[], {"variants": []}, {"variants": {"a": 5}}, {"variants": {}, "latency": [{}]}, {"latency": []}]
)
def test_a_verification_of_another_shape_is_named(values: object, tmp_path: Path) -> None:
    (tmp_path / "verification.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"verification\.json: not what an export writes"):
        verification_of(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"sites": {FC1: 0.25}},
        {"sites": {FC1.removeprefix(LAYER_PREFIX): {"kl": 0.25, "top1": 0.9}}},
        [{"site": FC1, "kl": 0.25}, {"site": "head", "kl": 3.0}],
        {"parts": [{"kind": "site", "name": FC1.removeprefix(LAYER_PREFIX), "kl": 0.25, "predicted_kl": 0.3}]},
        {"parts": [{"name": "*.ffn.fc1._weight_quantizer", "kl": 3.0}, {"name": "*", "kl": 9.0}, {FC1: 0.25}]},
        {"blocks": [{"sites": [{"site": FC1, "kl": 0.25, "seconds": 1.0}]}], "images": 100},
    ],
)
def test_measured_sites_are_found_wherever_they_stand(values: object, tmp_path: Path) -> None:
    assert measured_sites(tmp_path) is None
    (tmp_path / "sensitivity.json").write_text(json.dumps(values))
    assert measured_sites(tmp_path) == {FC1: 0.25}


def test_other_measurements_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "sensitivity.json").write_text(json.dumps({"sites": {FC1: "much"}, "format": 7}))
    assert measured_sites(tmp_path) is None
    (tmp_path / "sensitivity.json").write_text("{")
    with pytest.raises(InputError, match=r"sensitivity\.json: not JSON"):
        measured_sites(tmp_path)


def test_every_field_of_every_candidate_is_in_the_tables(tmp_path: Path) -> None:
    search = read_search(MadeSearch().write(tmp_path))
    paths = write_candidates(search, "predicted_kl")
    table, text = pq.read_table(paths[1]), pyarrow.csv.read_csv(paths[0])
    assert table.num_rows == text.num_rows == 14
    assert table.column_names == text.column_names
    row = table.slice(5, 1).to_pylist()[0]
    entry = search.entries[5]
    assert set(entry.setting.to_dict()) <= set(row)
    assert (row["name"], row["calibrator"], row["mode"]) == (entry.name, entry.setting.calibrator.name, "ft1")
    assert row["kl"] == pytest.approx(float(entry.results["kl"].mean(dtype=float)))
    assert row["top1_correct"] == entry.results["correct"].sum()
    assert (row["predicted_kl"], row["verdict"], row["against"]) == (entry.forecast, "beaten", "c000")
    assert {r["parameter"] for r in table.to_pylist()} == {None, 99.0, 99.9, 99.99, 99.999}
