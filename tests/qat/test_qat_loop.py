"""The training loop without Ray: what is random and what is not, resuming, divergence, records."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import SIZE, Project, make_project, make_setting
from vitq_ray.base.config import InputError
from vitq_ray.calibration.scales import apply_setting
from vitq_ray.calibration.statistics import collect_statistics
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.samples import open_split
from vitq_ray.data.transforms import EvalTransform, TrainTransform
from vitq_ray.measure.evaluation import Counts, NonFiniteLogitsError
from vitq_ray.models.checkpoint import CalibratedModel, Sidecar, load_calibrated, save_calibrated
from vitq_ray.models.load import load_model
from vitq_ray.qat import loop as qat_loop
from vitq_ray.qat.loop import DivergedError, train_qat
from vitq_ray.qat.ranks import QatData, Ranks, epoch_order, rank_ids, sharded_evaluation, thread_reader
from vitq_ray.qat.recipe import RECIPE_OPTIONS, Distillation, QatConfig, recipe_of
from vitq_ray.qat.state import EpochReport, QatOutcome, StepReport
from vitq_ray.qat.student import SeededDropout
from vitq_ray.quant.quantizer import State
from vitq_ray.quant.sites import FUSED_GROUPS
from vitq_ray.quant.vit import float_copy, learn_amax, quant_blocks, quantize_vit, sites_of

TRANSFORM = EvalTransform(SIZE)
CONFIG = QatConfig(epochs=2, lr=0.05, global_batch=8, micro_batch=4, augment="light", seed=1)


def calibrated(project: Project, folder: Path, mode: str = "ft2", bits: int = 4) -> CalibratedModel:
    loaded = load_model("auto", project.checkpoint)
    model, train = quantize_vit(loaded.model), open_split(str(project.folder), "train")
    batches = iter_batches(train, range(16), TRANSFORM, 8)
    statistics = collect_statistics(model, ((i, TRANSFORM.normalize(b.images)) for i, b in enumerate(batches)), [2])
    setting = make_setting(mode, "max", 2, bits)
    plan = apply_setting(model, statistics, setting)
    sidecar = Sidecar.of(loaded, setting, plan, "", 0, None, {}, {}, {})
    return load_calibrated(str(save_calibrated(folder, "vit", model, plan, sidecar)))


@dataclasses.dataclass(frozen=True)
class Setup:
    start: CalibratedModel
    data: QatData
    teacher: nn.Module


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("project")
    project = make_project(folder, train=40, val=150)
    start = calibrated(project, folder)
    train, val = (open_split(str(folder), split) for split in ("train", "val"))
    data = QatData(train, np.arange(40), val, np.arange(0, 150, 2), TRANSFORM)
    return Setup(start, data, float_copy(start.loaded.model))


class Log:
    """Collects the reports of a run."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.epochs: list[EpochReport] = []

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.steps]


def run(setup: Setup, folder: Path, config: QatConfig = CONFIG, **options: Any) -> tuple[QatOutcome, Log]:
    log = Log()
    outcome = train_qat(
        config, setup.start, setup.teacher, setup.data, folder,
        on_step=log.steps.append, on_epoch=log.epochs.append, **options,
    )  # fmt: skip
    return outcome, log


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "state.pt", weights_only=True)["model"]
    return state


# Order --------------------------------------------------------------------------------------------------------------


def test_ranks_share_the_same_global_batches() -> None:
    config = QatConfig(global_batch=12, micro_batch=2)
    ids = np.arange(100, 200)
    for epoch in (0, 3):
        order = epoch_order(config, epoch, ids)[:96].reshape(8, 12)
        for world in (1, 2, 3, 4, 5, 6):  # 4 and 5: a rank may have one of the six micro-batches more
            parts = [rank_ids(config, epoch, 2, ids, Ranks(r, world)).reshape(6, -1) for r in range(world)]
            assert np.array_equal(np.concatenate(parts, axis=1), order[2:])
            assert max(p.shape[1] for p in parts) - min(p.shape[1] for p in parts) <= 2
    with pytest.raises(InputError, match="12 is 6 micro-batches of 2, too few for 7 workers"):
        rank_ids(config, 0, 0, ids, Ranks(0, 7))


def test_epochs_and_seeds_differ_and_an_epoch_repeats_nothing() -> None:
    config, ids = QatConfig(global_batch=10, micro_batch=10), np.arange(50)
    first, second = (epoch_order(config, epoch, ids) for epoch in (0, 1))
    other = epoch_order(dataclasses.replace(config, seed=7), 0, ids)
    assert sorted(first) == sorted(second) == list(range(50))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_too_large_a_batch_is_refused(setup: Setup, tmp_path: Path) -> None:
    config = QatConfig(global_batch=64, micro_batch=64)
    with pytest.raises(InputError, match="64 is more than the 40 training images"):
        run(setup, tmp_path, config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"global_batch": 10, "micro_batch": 4}, "10 is not a multiple of 4"),
        ({"lr": 0.0}, "learning rate: expected a number > 0, got 0.0"),
        ({"optimizer": "adam"}, "'adam' is not one of sgd, adamw"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\)"),
        ({"epochs": 0}, "number of epochs: expected an integer >= 1"),
    ],
)
def test_impossible_configurations(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QatConfig(**values)


def test_every_field_of_a_recipe_is_a_row_and_is_checked() -> None:
    names = {f.name for f in dataclasses.fields(QatConfig)} - {"distillation"}
    assert {row.field for row in RECIPE_OPTIONS if not row.of_distillation} == names
    assert {row.field for row in RECIPE_OPTIONS if row.of_distillation} == {"temperature", "scale"}
    for row in RECIPE_OPTIONS:
        with pytest.raises(InputError, match=rf"^{row.label}: .*'wrong'"):
            recipe_of({row.name: "wrong"})
        row.check(row.default)


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("lr", float("nan"), "> 0"),
        ("lr", float("inf"), "> 0"),
        ("momentum", 1.0, r"in \[0, 1\)"),
        ("weight_decay", -0.1, ">= 0"),
        ("max_grad_norm", 0, "> 0"),
        ("temperature", 0.0, "> 0"),
        ("distill_scale", -1, ">= 0"),
    ],
)
def test_numbers_outside_their_limits(name: str, value: float, limits: str) -> None:
    with pytest.raises(InputError, match=rf"expected a number {limits}, got {value}"):
        recipe_of({name: value})


def test_a_recipe_by_names() -> None:
    config = recipe_of({"lr": 0.2, "temperature": 2.0, "distill_scale": 5.0})
    assert config == QatConfig(lr=0.2, distillation=Distillation(2.0, 5.0))
    assert recipe_of({"temperature": 2.0}, distill=False) == QatConfig(distillation=None)
    with pytest.raises(InputError, match="unknown option 'learning_rate'; the options are epochs, lr, "):
        recipe_of({"learning_rate": 1})


def test_the_defaults_are_the_published_recipe() -> None:
    config = QatConfig()
    recipe = (config.optimizer, config.momentum, config.weight_decay, config.schedule, config.max_grad_norm)
    assert recipe == ("sgd", 0.9, 0.0, "constant", 1.0)
    assert (config.dropout, config.global_batch, config.epochs, config.lr) == (0.1, 128, 5, 1e-4)
    assert config.distillation == Distillation(3.0, None)


def test_schedules() -> None:
    config = QatConfig(lr=0.5)
    assert {config.lr_at(step, 10) for step in range(10)} == {0.5}
    cosine = dataclasses.replace(config, schedule="cosine")
    assert [cosine.lr_at(step, 4) for step in (0, 2, 4)] == pytest.approx([0.5, 0.25, 0.0])


# Augmentation and dropout -------------------------------------------------------------------------------------------


def test_augmentation_depends_on_seed_epoch_and_image_only(setup: Setup) -> None:
    def decoded(epoch: int, ids: list[int], threads: int) -> dict[int, torch.Tensor]:
        transform = TrainTransform(TRANSFORM, "toolkit", 5, epoch)
        batches = iter_batches(setup.data.train, ids, transform, 3, threads)
        return {int(i): x for b in batches for i, x in zip(b.sample_ids, b.images, strict=True)}

    ids = list(range(12))
    before = torch.get_rng_state()
    one, other = decoded(0, ids, 1), decoded(0, ids[::-1], 4)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[i], other[i]) for i in ids)
    assert one[0].shape == (3, SIZE, SIZE)
    changed = decoded(1, ids, 1)
    assert not any(torch.equal(one[i], changed[i]) for i in ids)


def test_broken_images_leave_their_batch_smaller(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitq_ray.data.samples import BadImageError

    decode = EvalTransform.decode

    def fail_on_5(self: EvalTransform, data: bytes, name: str, sample_id: int = 0) -> Any:
        if sample_id == 5:
            raise BadImageError(f"{name}: broken")
        return decode(self, data, name, sample_id)

    monkeypatch.setattr(EvalTransform, "decode", fail_on_5)
    bad: list[tuple[str, str]] = []
    batches = list(thread_reader(2, "skip", bad)(setup.data.train, np.arange(12), TRANSFORM, 4))
    assert [b.sample_ids.tolist() for b in batches] == [[0, 1, 2, 3], [4, 6, 7], [8, 9, 10, 11]]
    assert len(bad) == 1


def test_dropout_is_where_the_recipe_says(setup: Setup) -> None:
    model = copy.deepcopy(setup.start.loaded.model)
    qat_loop.add_dropout(model, 0.1, torch.Generator())
    names = [name for name, module in model.named_modules() if isinstance(module, SeededDropout)]
    assert names == ["pos_drop"] + [f"blocks.{i}.mlp.drop{k}" for i in range(2) for k in (1, 2)]
    active = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert active == []


def test_seeded_dropout_is_dropout() -> None:
    generator = torch.Generator().manual_seed(0)
    dropout = SeededDropout(0.25, generator).train()
    y = dropout(torch.ones(100_000))
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(dropout.eval()(torch.ones(3)), torch.ones(3))


# Training -----------------------------------------------------------------------------------------------------------


def test_a_step_is_what_pytorch_does_by_hand(setup: Setup, tmp_path: Path) -> None:
    """Two steps of SGD on whole batches, written out; in micro-batches it must come to the same."""
    config = dataclasses.replace(CONFIG, dropout=0.0, augment="none", epochs=1, global_batch=20, micro_batch=5)
    _, log = run(setup, tmp_path, config)
    student = copy.deepcopy(setup.start.loaded.model).train()
    optimizer = torch.optim.SGD(student.parameters(), config.lr, momentum=0.9)
    losses = []
    for step in range(2):
        ids = epoch_order(config, 0, setup.data.train_ids)[20 * step : 20 * (step + 1)]
        (batch,) = iter_batches(setup.data.train, ids, TRANSFORM, 20)
        x = TRANSFORM.normalize(batch.images)
        with torch.no_grad():
            soft = F.softmax(setup.teacher(x) / 3, 1)
        y = student(x)
        kl = F.kl_div(F.log_softmax(y / 3, 1), soft, reduction="sum") / (20 * 7)
        loss = F.cross_entropy(y, batch.labels) + 70 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert log.losses == pytest.approx(losses, rel=1e-3)


def test_training_lowers_the_loss_and_leaves_the_start_alone(setup: Setup, tmp_path: Path) -> None:
    before = copy.deepcopy(setup.start.loaded.model.state_dict())
    outcome, log = run(setup, tmp_path, dataclasses.replace(CONFIG, epochs=6))
    assert np.mean(log.losses[-5:]) < np.mean(log.losses[:5])
    assert same_state(before, setup.start.loaded.model.state_dict())
    assert [report.epoch for report in outcome.epochs] == list(range(7))
    assert outcome.best_epoch == max(range(7), key=lambda e: outcome.epochs[e].selection.top1_correct)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"best-{outcome.best_epoch}.pt", "state.pt"]
    assert log.steps[-1].step == log.steps[-1].total_steps == 30


def test_without_distillation_no_teacher_is_needed(setup: Setup, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, distillation=None, epochs=1)
    train_qat(config, setup.start, None, setup.data, tmp_path)
    with pytest.raises(InputError, match="needs a teacher"):
        train_qat(CONFIG, setup.start, None, setup.data, tmp_path / "other")


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "adamw", "schedule": "cosine", "lr": 1e-3},
        {"bf16": True},
        {"learn_amax": True},
        {"learn_amax": True, "optimizer": "adamw", "lr": 1e-3},
        {"augment": "toolkit"},
    ],
    ids=str,
)
def test_options_train(change: dict[str, Any], setup: Setup, tmp_path: Path) -> None:
    _, log = run(setup, tmp_path, dataclasses.replace(CONFIG, **{"epochs": 4, **change}))
    assert np.isfinite(log.losses).all()
    assert np.mean(log.losses[-5:]) < np.mean(log.losses[:5])


def test_stored_teacher_logits_change_nothing(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, augment="none")
    _, stored = run(setup, tmp_path / "stored", config)
    assert (tmp_path / "stored" / "teacher_logits.npy").exists()
    real = qat_loop.make_teacher

    def always_run(config: QatConfig, *rest: Any) -> Any:
        return real(dataclasses.replace(config, augment="light"), *rest)

    monkeypatch.setattr(qat_loop, "make_teacher", always_run)
    _, running = run(setup, tmp_path / "running", config)
    assert running.losses == pytest.approx(stored.losses, rel=1e-4)


def test_on_epoch_ends_training(setup: Setup, tmp_path: Path) -> None:
    outcome = train_qat(
        CONFIG, setup.start, setup.teacher, setup.data, tmp_path, on_epoch=lambda report: report.epoch < 1
    )
    assert [report.epoch for report in outcome.epochs] == [0, 1]


# Learned scales -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ft1", "ft2"])
def test_fused_scales_stay_equal_and_positive(mode: str, project: Project, tmp_path: Path) -> None:
    start = calibrated(project, tmp_path, mode)
    train, val = (open_split(str(project.folder), split) for split in ("train", "val"))
    data = QatData(train, np.arange(40), val, np.arange(22), TRANSFORM)
    config = dataclasses.replace(CONFIG, learn_amax=True, lr=0.3)
    train_qat(config, start, float_copy(start.loaded.model), data, tmp_path / "run")
    trained = copy.deepcopy(start.loaded.model)
    trained.load_state_dict(final_weights(tmp_path / "run"))
    was = {key: q.amax for key, _, q in sites_of(start.loaded.model)}
    for key, _, quantizer in sites_of(trained):
        assert (quantizer.amax > 0).all(), key
        moved = not torch.equal(quantizer.amax, was[key])
        assert moved == (quantizer.state is State.QUANTIZE), key
    for block in quant_blocks(trained):
        for group in FUSED_GROUPS:
            values = [block.quantizer(name).amax for name in group]
            equal = all(torch.equal(values[0], value) for value in values)
            assert equal == (mode == "ft2")


def test_each_learned_scale_is_one_parameter(setup: Setup) -> None:
    model = copy.deepcopy(setup.start.loaded.model)
    names = dict(model.named_parameters())
    learned = learn_amax(model, setup.start.plan)
    assert {bits for _, bits in learned} == {4}
    added = [name for name, _ in model.named_parameters() if name not in names]
    # Per block 18 GEMM sites and 5 of attention are on; three groups of three and the shared input count once.
    assert len(added) == len(learned) == 2 * (23 - 2 - 6)


# Resuming -----------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def undisturbed(
    request: pytest.FixtureRequest, setup: Setup, tmp_path_factory: pytest.TempPathFactory
) -> tuple[QatConfig, QatOutcome, Log, Path]:
    config = dataclasses.replace(CONFIG, optimizer=request.param, lr=2e-3, learn_amax=True)
    folder = tmp_path_factory.mktemp("whole")
    return (config, *run(setup, folder, config, checkpoint_steps=3), folder)


@pytest.mark.parametrize("stop_at", [1, 3, 7, 10])
def test_a_resumed_run_equals_an_undisturbed_one(
    stop_at: int, undisturbed: tuple[QatConfig, QatOutcome, Log, Path], setup: Setup, tmp_path: Path
) -> None:
    config, whole, log, folder = undisturbed

    def die(report: StepReport) -> None:
        if report.step == stop_at:
            raise Killed

    arguments = (config, setup.start, setup.teacher, setup.data, tmp_path / "cut")
    with pytest.raises(Killed):
        train_qat(*arguments, checkpoint_steps=3, on_step=die)
    resumed = Log()
    outcome = train_qat(*arguments, checkpoint_steps=3, on_step=resumed.steps.append)
    assert resumed.losses == log.losses[-len(resumed.losses) :]
    assert resumed.steps[0].step <= stop_at
    assert same_state(outcome.best_state, whole.best_state)
    assert same_state(final_weights(tmp_path / "cut"), final_weights(folder))
    assert outcome.epochs == whole.epochs


def test_resuming_with_something_else_is_refused(setup: Setup, tmp_path: Path) -> None:
    run(setup, tmp_path, dataclasses.replace(CONFIG, epochs=1))
    with pytest.raises(InputError, match="was started with epochs 1, now it is 2"):
        run(setup, tmp_path)
    other = dataclasses.replace(setup.data, selection_ids=np.arange(10))
    with pytest.raises(InputError, match="was started with selection images"):
        train_qat(dataclasses.replace(CONFIG, epochs=1), setup.start, setup.teacher, other, tmp_path)
    teacher = copy.deepcopy(setup.teacher)
    with torch.no_grad():
        next(teacher.parameters()).add_(1)
    with pytest.raises(InputError, match="was started with teacher"):
        train_qat(dataclasses.replace(CONFIG, epochs=1), setup.start, teacher, setup.data, tmp_path)


def test_a_diverging_loss_names_step_and_rate_and_keeps_the_state(setup: Setup, tmp_path: Path) -> None:
    def poison(index: Any, ids: Any, transform: Any, size: int) -> Iterator[Any]:
        for i, batch in enumerate(thread_reader()(index, ids, transform, size)):
            if index is setup.data.train and i == 6:
                batch = dataclasses.replace(batch, images=batch.images * float("nan"))
            yield batch

    with pytest.raises(DivergedError, match=r"not finite at step 4 \(epoch 1\) with learning rate 0.05"):
        run(setup, tmp_path, CONFIG, read=poison, checkpoint_steps=2)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert json.loads(state["progress"])["step"] == 2
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    run(setup, tmp_path, CONFIG, checkpoint_steps=2)  # and it can go on from there


def test_logits_that_are_no_numbers_after_an_epoch_are_divergence(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation, calls = qat_loop.sharded_evaluation, []

    def broken(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 1:  # the first is that of the start
            raise NonFiniteLogitsError("the model produced NaN or infinite logits")
        return evaluation(*arguments)

    monkeypatch.setattr(qat_loop, "sharded_evaluation", broken)
    with pytest.raises(DivergedError, match=r"infinite logits, after epoch 1 with learning rate 0.05"):
        run(setup, tmp_path, CONFIG)
    with pytest.raises(NonFiniteLogitsError):
        run(setup, tmp_path / "from the start", CONFIG)


# Evaluation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
def test_sharded_evaluation_adds_up(world: int, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[torch.Tensor] = []
    monkeypatch.setattr(Ranks, "sum", lambda self, values: tables.append(values) or values)
    ids = np.arange(150)
    arguments = (setup.start.loaded.model, setup.data.val, ids, TRANSFORM, thread_reader())
    for rank in range(world):
        try:
            sharded_evaluation(*arguments, Ranks(rank, world))
        except InputError:  # a rank without images of its own
            assert rank == 3
    total = torch.stack(tables).sum(0)
    monkeypatch.undo()
    alone = sharded_evaluation(*arguments, Ranks())
    assert total[0].tolist() == [1] * 150
    assert total[1].tolist() == alone.correct.astype(int).tolist()
    assert total[2].tolist() == alone.results["correct5"].astype(int).tolist()
    half = alone.subset(np.arange(0, 150, 2))
    assert Counts.of(half).images == 75
    assert half.sample_ids.tolist() == list(range(0, 150, 2))
