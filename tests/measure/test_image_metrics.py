"""The table of per-image results: a row that is added to it is measured, sent, logged, tabled and summed up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from vitq_ray.data.loader import Batch
from vitq_ray.measure.evaluation import Counts, Evaluation, evaluate, evaluate_variants
from vitq_ray.measure.metrics import METRICS, Metric, pack, pack_text, unpack, unpack_text
from vitq_ray.run.folder import RunFolder

LOGITS = torch.tensor([[3.0, 1.0, 0.5], [0.25, 1.0, 2.0], [0.0, -1.0, 4.0], [1.0, 1.5, 0.0], [2.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 1, 2, 0, 0])
MARGINS = [2.0, -1.0, 4.0, -0.5, 2.0]  # by hand: the label's logit minus the largest other one


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    of_label = logits.gather(1, labels[:, None])[:, 0]
    return of_label - logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)


@pytest.fixture
def with_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a metric needs: one row of the table."""
    monkeypatch.setitem(METRICS, "margin", Metric(margin, np.float32, total="margin_sum", mean="margin"))


def batches(size: int) -> list[Batch]:
    """The rows of `LOGITS` as images of one pixel: its first channel says which row."""
    ids = torch.arange(len(LABELS))
    pixels = torch.zeros(len(LABELS), 1, 1, 3, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = ids.to(torch.uint8)
    parts = [slice(i, i + size) for i in range(0, len(LABELS), size)]
    return [Batch(pixels[part], LABELS[part], ids[part] + 100) for part in parts]


class Rows(torch.nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return LOGITS[rows]


def to_input(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, 0, 0].long()


def judged(size: int = 2) -> Evaluation:
    return evaluate(Rows(), batches(size), to_input)


@pytest.mark.usefixtures("with_margin")
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_metric_is_measured_and_summed_up(size: int) -> None:
    evaluation = judged(size)
    assert evaluation.results["margin"].tolist() == MARGINS
    assert evaluation.results["margin"].dtype == np.float32
    summary = evaluation.summary()
    assert (summary["margin_sum"], summary["margin"]) == (6.5, 1.3)
    assert (summary["images"], summary["top1_correct"], summary["top5_correct"]) == (5, 3, 5)
    assert list(summary)[-1] == "top1_interval95"


@pytest.mark.usefixtures("with_margin")
def test_a_metric_stays_with_its_images() -> None:
    evaluation = judged()
    assert evaluation.prefix(2).results["margin"].tolist() == MARGINS[:2]
    some = evaluation.subset([104, 101, 7])
    assert (some.sample_ids.tolist(), some.results["margin"].tolist()) == ([101, 104], [-1.0, 2.0])
    assert Evaluation.concatenate([some, some]).results["margin"].tolist() == [-1.0, 2.0, -1.0, 2.0]


@pytest.mark.usefixtures("with_margin")
def test_a_metric_is_sent_logged_and_tabled(tmp_path: Path) -> None:
    evaluation = judged()
    again = unpack(pack(evaluation.results), 5)
    folder = RunFolder(tmp_path)
    folder.append("chunk", name="a", start=0, images=5, **pack_text(evaluation.results))
    logged = unpack_text(folder.events()[0], 5)
    for results in (again, logged):
        assert list(results) == ["correct", "correct5", "margin"]
        for name, values in evaluation.results.items():
            assert np.array_equal(results[name], values)
            assert results[name].dtype == values.dtype
    folder.write_correct({"a": evaluation})
    assert pq.read_table(tmp_path / "correct.parquet").to_pydict()["margin"] == MARGINS


def test_what_was_written_before_a_metric_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs, counts and tables without it; the column is empty there."""
    old = judged()
    event, counts = pack_text(old.results), Counts.of(old).to_dict()
    monkeypatch.setitem(METRICS, "margin", Metric(margin, np.float32, total="margin_sum", mean="margin"))
    assert list(unpack_text(event, 5)) == ["correct", "correct5"]
    assert Counts.from_dict(counts).summary() == old.summary()
    assert list(Evaluation.concatenate([old, judged()]).results) == ["correct", "correct5"]
    RunFolder(tmp_path).write_correct({"old": old, "new": judged()})
    assert pq.read_table(tmp_path / "correct.parquet").to_pydict()["margin"] == [None] * 5 + MARGINS


def test_the_log_of_an_earlier_version() -> None:
    """As format 1 has it: bits, the first image in the highest one, in base64."""
    event = {"event": "chunk", "name": "c000", "correct": "wIA=", "correct5": "/4A="}
    results = unpack_text(event, 9)
    assert results["correct"].tolist() == [True, True, *[False] * 6, True]
    assert results["correct5"].tolist() == [True] * 9


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 200])
def test_packed_bits(count: int) -> None:
    values = np.random.default_rng(count).random(count) < 0.5
    packed = pack({"correct": values})
    assert len(packed["correct"]) == -(-count // 8)
    assert np.array_equal(unpack(packed, count)["correct"], values)


def test_variants_see_every_image_once() -> None:
    seen: list[int] = []

    def once(images: torch.Tensor) -> torch.Tensor:
        rows = to_input(images)
        seen.extend(rows.tolist())
        return rows

    empty = Batch(torch.empty(0, 0, 0, 3, dtype=torch.uint8), LABELS[:0], LABELS[:0])
    variants = {"as it is": Rows(), "reversed": lambda rows: -LOGITS[rows]}
    results = evaluate_variants(variants, [empty, *batches(2)], once)
    assert seen == [0, 1, 2, 3, 4]
    assert results["as it is"].correct.tolist() == [True, False, True, False, True]
    assert results["reversed"].correct.tolist() == [False] * 5
