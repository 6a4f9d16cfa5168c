"""Options: one declaration for command line, Python and run.json; options that do nothing are errors, one row each."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import DATA, fresh_package
from vitq_ray.base.config import InputError
from vitq_ray.calibration.setting import Setting
from vitq_ray.commands import combinations, train, tune_job
from vitq_ray.commands.declare import Options
from vitq_ray.commands.inputs import bundled_spaces, find_space
from vitq_ray.commands.main import COMMANDS
from vitq_ray.commands.options import (
    CalibrateOptions,
    EvaluateOptions,
    ExportOptions,
    ReportOptions,
    SensitivityOptions,
    TrainOptions,
    TuneOptions,
)
from vitq_ray.commands.parser import parse, parser_of
from vitq_ray.commands.resume import with_stored
from vitq_ray.commands.screen import SILENT
from vitq_ray.commands.train import complete
from vitq_ray.commands.tune import open_folder
from vitq_ray.commands.tune_job import FREE_OPTIONS, describe, prepare, require_used_with, sidecar_of_search
from vitq_ray.models.load import LoadedModel, load_model
from vitq_ray.quant.plan import Plan, SitePlan, rule_of
from vitq_ray.quant.sites import MODES, sites_of_blocks
from vitq_ray.search.space import load_space, space_of

ALL = (CalibrateOptions, EvaluateOptions, TuneOptions, TrainOptions, ExportOptions, SensitivityOptions, ReportOptions)


@pytest.mark.parametrize("kind", ALL)
def test_both_spellings_of_every_option_are_read(kind: type[Options]) -> None:
    for name, row in kind.declared().items():
        if row.kind.shown is None or row.is_positional:
            continue
        value = {"": "3"}.get(row.kind.shown, row.kind.shown.strip("{}").split(",")[0])
        value = "ft1" if name in ("quant_mode", "target") and not row.kind.shown else value
        value = "0.5" if name in ("alpha", "dropout", "tie_margin") else value
        value = "0.5" if name in ("crop_pct", "min_float_top1", "int8_share") else value
        value = "site" if name == "parts" else value
        bare = row.spelling[2:]
        read = [
            getattr(parse(kind, [f"--{bare.replace(*pair)}", value], "x"), name) for pair in (("_", "-"), ("-", "_"))
        ]
        assert read[0] == read[1] == row.kind.read(value)


@pytest.mark.parametrize("kind", ALL)
def test_defaults_are_the_same_from_everywhere(kind: type[Options]) -> None:
    typed, called = parse(kind, [], "x"), kind.of({})
    assert typed.to_dict() == called.to_dict() == {name: row.default for name, row in kind.declared().items()}
    assert not typed.given
    again = kind.of(typed.to_dict())
    assert again.to_dict() == typed.to_dict(), "what run.json holds can be read back"
    with pytest.raises(dataclasses.FrozenInstanceError):
        typed.use_gpu = True  # type: ignore[attr-defined]


def test_a_folder_is_typed_alone() -> None:
    assert parse(ReportOptions, ["runs/search", "--table"], "x").to_dict() == {"run": "runs/search", "table": True}
    assert ReportOptions.of({"run": "runs/search"}).name_of("run") == "run"
    assert parse(ReportOptions, [], "x").name_of("run") == "DIR"
    assert "[DIR]" in parser_of(ReportOptions, "x").format_usage()


def test_help_says_text_and_default_of_every_option() -> None:
    text = " ".join(parser_of(TuneOptions, "python scripts/tune_calib.py").format_help().split())
    for row in TuneOptions.declared().values():
        assert row.spelling in text
        assert row.help in text
    assert "python scripts/tune_calib.py --resume runs/search" in text
    assert "(default: 0.05)" in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"percentile": 101}, "percentile: expected a number from 0 to 100, got 101"),
        ({"calibrator": "median"}, "calibrator: invalid choice: 'median' is not one of max, percentile, mse, entropy"),
        ({"num_calib_batch": 1.5}, "num_calib_batch: expected an integer >= 1, got 1.5"),
        ({"num_calib_batch": True}, "num_calib_batch: expected an integer >= 1, got True"),
        ({"use_gpu": "yes"}, "use_gpu: expected True or False, got 'yes'"),
        ({"data_path": 3}, "data_path: expected text, got 3"),
        ({"percentil": 3}, "percentil: not an option; the options are pretrained_dir, "),
    ],
)
def test_python_is_checked_as_the_command_line_is(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        CalibrateOptions.of(values)
    assert str(caught.value).startswith(message)


def test_values_of_python() -> None:
    options = CalibrateOptions.of({"data_path": Path("/data"), "quant_mode": "1", "percentile": None, "wprec": 4})
    assert (options.data_path, options.quant_mode, options.wprec) == ("/data", "ft1", 4)
    assert options.given == {"data_path", "quant_mode", "wprec"}
    assert options.name_of("data_path") == "data_path"
    assert parse(CalibrateOptions, [], "x").name_of("calib_batchsz") == "--calib-batchsz"


@pytest.mark.parametrize("line", ["--calib-batch 3", "--lr 1", "extra"])
def test_no_abbreviations_and_nothing_unknown(line: str) -> None:
    with pytest.raises(InputError, match="unrecognized arguments"):
        parse(TrainOptions, line.split(), "x")


IDLE = {
    "calib --percentile 99 --calibrator max": "--percentile: 99.0 given, but the calibrator (--calibrator) does not",
    "calib --threads-per-worker 2": "--threads-per-worker: 2 given, but without --num-workers everything runs in this",
    "calib --ray-address auto": "--ray-address: auto given, but without --num-workers everything runs in this process",
    "evaluate --threads-per-worker 2": "--threads-per-worker: 2 given, but without --num-workers",
    "evaluate --ray-address auto": "--ray-address: auto given, but without --num-workers",
    "tune --num-samples 5": "--num-samples: 5 given, but a grid tries every setting; expected --search-alg random or",
    "tune --from-run d --num-samples 5": "--num-samples: 5 given, but the settings are those of the search that --from",
    "tune --from-run d --search-alg random": "--search-alg: random given, but the settings are those of the search",
    "tune --from-run d --quant-mode ft1": "--quant-mode: ft1 given, but the settings are those of the search",
    "tune --from-run d --calibrator mse": "--calibrator: mse given, but the settings are those of the search",
    "tune --from-run d --percentile 99": "--percentile: 99.0 given, but the settings are those of the search",
    "tune --from-run d --num-calib-batch 3": "--num-calib-batch: 3 given, but the settings are those of the search",
    "tune --from-run d --wprec 4": "--wprec: 4 given, but the settings are those of the search",
    "tune --from-run d --aprec 4": "--aprec: 4 given, but the settings are those of the search",
    "tune --from-run d --weight-calibrator mse": "--weight-calibrator: mse given, but the settings are those of the",
    "tune --from-run d --transforms all": "--transforms: all given, but the settings are those of the search",
    "tune --from-run d --corrections bias": "--corrections: bias given, but the settings are those of the search",
    "tune --from-run d --rules x.*->off": "--rules: x.*->off given, but the settings are those of the search",
    "tune --from-run d --target ort": "--target: ort given, but the settings are those of the search that --from-run",
    "tune --ray-address auto --object-store-memory 2": "--object-store-memory: 2.0 given, but the object store of a",
    "tune --ray-address auto --dashboard": "--dashboard: True given, but a cluster that is joined (--ray-address) has",
    "tune --resume d --output e": "--output: e given, but a run that goes on (--resume) stays in its folder",
    "qat --percentile 99 --calibrator max": "--percentile: 99.0 given, but the calibrator (--calibrator) does not take",
    "qat --no-distill --temperature 2": "--temperature: 2.0 given, but there is no teacher without --distill",
    "qat --no-distill --distill-scale 2": "--distill-scale: 2.0 given, but there is no teacher without --distill",
    "qat --no-distill --teacher x.npz": "--teacher: x.npz given, but nothing is learned from it without --distill",
    "qat --max-failures 1": "--max-failures: 1 given, but one worker (--num-workers 1) trains in this process",
    "qat --ray-address auto --dashboard": "--dashboard: True given, but a cluster that is joined (--ray-address)",
    "qat --resume d --output e": "--output: e given, but a run that goes on (--resume) stays in its folder",
    "export --target ort --use-gpu": "--use-gpu: True given, but a file is verified on the CPU",
    "export --target tensorrt --unsigned-weights": "--unsigned-weights: True given, but TensorRT takes signed ones",
    "sensitivity --percentile 99 --calibrator max": "--percentile: 99.0 given, but the calibrator (--calibrator) does",
    "sensitivity --use-gpu": "--use-gpu: True given, but parts are measured on the CPU",
    "sensitivity --resume d --output e": "--output: e given, but a run that goes on (--resume) stays in its folder",
}
KINDS = dict(zip(COMMANDS, ALL, strict=True))
TABLES = {
    "calib": combinations.CALIBRATE,
    "evaluate": combinations.EVALUATE,
    "tune": combinations.TUNE,
    "qat": combinations.TRAIN,
    "export": combinations.EXPORT,
    "sensitivity": combinations.SENSITIVITY,
}


@pytest.mark.parametrize("line", IDLE)
def test_an_option_that_does_nothing_is_an_error(line: str) -> None:
    command, *argv = line.split()
    with pytest.raises(InputError) as caught:
        combinations.require_used(parse(KINDS[command], argv, "x"), TABLES[command])
    assert str(caught.value).startswith(IDLE[line])


def test_every_row_of_the_tables_has_a_test() -> None:
    rows = {(command, row.option) for command, table in TABLES.items() for row in table}
    spelled = {(line.split()[0], message.split(":")[0][2:].replace("-", "_")) for line, message in IDLE.items()}
    assert rows == spelled


@pytest.mark.parametrize(
    "line",
    [
        "calib --percentile 99 --calibrator percentile",
        "calib --num-workers 2 --threads-per-worker 2 --ray-address auto",
        "tune --wprec 4 --aprec 4",
        "tune --search-alg optuna --num-samples 5 --seed 3 --split-seed 3",
        "tune --ray-address auto --no-dashboard",
        "qat --distill --temperature 2 --distill-scale 3 --teacher x.npz --num-workers 2 --max-failures 1",
        "qat --seed 3",
    ],
)
def test_options_that_do_something_are_none(line: str) -> None:
    command, *argv = line.split()
    combinations.require_used(parse(KINDS[command], argv, "x"), TABLES[command])


@pytest.mark.parametrize(
    ("argv", "column"),
    [
        ("--quant-mode ft1", "mode"),
        ("--calibrator mse", "calibrator"),
        ("--percentile 99", "percentile"),
        ("--num-calib-batch 3", "num_batches"),
        ("--wprec 4", "weight_bits"),
        ("--aprec 4", "act_bits"),
    ],
)
def test_what_a_space_lists_is_not_an_option(argv: str, column: str) -> None:
    values = {"mode": ("ft1",), "calibrator": ("mse", "percentile"), "percentile": (99.0,), "num_batches": (1,)}
    values |= {"weight_bits": (8,), "act_bits": (8,)}
    options = parse(TuneOptions, argv.split(), "x")
    with pytest.raises(InputError, match=rf"given, but the space s \(--search-space\) lists {column}"):
        require_used_with(options, space_of({column: values[column]}, "s.py"))
    if column not in ("percentile", "calibrator"):
        require_used_with(options, space_of({name: v for name, v in values.items() if name != column}, "s.py"))


def test_what_a_space_does_not_use_is_not_an_option() -> None:
    space = space_of({"calibrator": ("max", "mse")}, "s.py")
    with pytest.raises(InputError, match=r"--percentile: 99\.0 given, but no calibrator of the space s takes it"):
        require_used_with(parse(TuneOptions, ["--percentile", "99"], "x"), space)
    with pytest.raises(InputError, match=r"--target-drop: 1.0 given, but the space s \(--search-space\) has no QAT"):
        require_used_with(parse(TuneOptions, ["--target-drop", "1"], "x"), space)
    with pytest.raises(InputError, match=r"--search-space: s given, but --from-run names the settings"):
        require_used_with(parse(TuneOptions, ["--from-run", "d", "--search-space", "s"], "x"), space)
    require_used_with(parse(TuneOptions, ["--percentile", "99"], "x"), space_of({"mode": ("ft1",)}, "s.py"))
    qat = load_space(find_space("qat"))
    require_used_with(parse(TuneOptions, ["--from-run", "d", "--search-space", "qat", "--target-drop", "1"], "x"), qat)


@pytest.mark.parametrize("algorithm", ["grid", "random"])
def test_impossible_rules_are_found_before_anything_is_computed(algorithm: str, tmp_path: Path) -> None:
    space = tmp_path / "s.py"
    space.write_text("SPACE = {'mode': ['ft1', 'ft2'], 'calibrator': ['max'], '0.attn.key._weight_quantizer': ['off']}")
    options = parse(TuneOptions, ["--search-space", str(space), "--search-alg", algorithm], "x")
    with pytest.raises(InputError, match=r"s\.py: setting 'ft2 max n=10 w8a8 .* -> off': rules: .* in being off"):
        prepare(options, SILENT)
    prepare(parse(TuneOptions, ["--search-space", str(space), "--search-alg", "optuna"], "x"), SILENT)


def test_spaces_may_hold_rules_and_calibrators_as_objects(tmp_path: Path) -> None:
    space = tmp_path / "s.py"
    space.write_text(
        """
from vitq_ray import Calibration, Rule
SPACE = {"calibrator": [Calibration("max"), Calibration("percentile", (99.5,))], "weights": [Calibration("mse")],
         "rules": [(), (Rule("0.*", bits=6), "1.* -> mse")]}
"""
    )
    job = prepare(parse(TuneOptions, ["--search-space", str(space), "--output", str(tmp_path / "run")], "x"), SILENT)
    assert describe(job)["search_space"]["choices"] == {
        "calibrator": ["max", "percentile 99.5"],
        "weights": ["mse"],
        "rules": [[], ["0.* -> 6 bits", "1.* -> mse"]],
    }
    open_folder(job, SILENT)
    resumed = replace(job, options=replace(job.options, resume=str(tmp_path / "run")))
    assert open_folder(resumed, SILENT).path == tmp_path / "run", "a search of the same space goes on"


def test_choices_of_the_wide_space_are_those_that_version_0_1_0_stored() -> None:
    own = [None, "max", "mse", "entropy", "percentile 99.9"]
    job = prepare(parse(TuneOptions, ["--search-space", "wide", "--search-alg", "random"], "x"), SILENT)
    choices = describe(job)["search_space"]["choices"]
    assert list(choices.items()) == [
        ("mode", ["ft1", "ft2", "ft3", "trt"]),
        ("calibrator", ["max", "mse", "entropy", "percentile"]),
        ("percentile", [99.0, 99.9, 99.99, 99.999, 99.9999]),
        ("num_batches", [2, 8, 32]),
        ("weight_bits", [4, 8]),
        ("act_bits", [4, 6, 8]),
        ("attention_probabilities", own),
        ("gelu_output", own),
        ("gemm_outputs", own),
        ("weights", ["max", "mse"]),
    ]


def test_every_bundled_space_can_be_searched() -> None:
    for name in bundled_spaces():
        algorithm = "random" if name == "wide" else "grid"
        job = prepare(parse(TuneOptions, ["--search-space", name, "--search-alg", algorithm], "x"), SILENT)
        assert job.proposals().next_round()
    assert len(load_space(find_space("rules")).grid(Setting())) == 18


def test_batches_of_an_earlier_search_are_as_large_as_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches had 4 images; 8 is the default here."""
    monkeypatch.chdir(DATA / "format1")
    argv = ["--from-run", "search", "--pretrained_dir", "vit.npz", "--data-path", "."]
    job = prepare(parse(TuneOptions, argv, "x"), SILENT)
    assert job.options.calib_batchsz == describe(job)["options"]["calib_batchsz"] == 4
    assert job.fixed
    setting = job.fixed[0]
    sites = sites_of_blocks(job.loaded.geometry.depth)
    rules = {key: rule_of(MODES[setting.mode], site, 8, 8) for key, site in sites.items()}
    plan = Plan(setting.mode, {key: SitePlan(torch.ones(()), rule) for key, rule in rules.items()})
    assert setting.batch_size == sidecar_of_search(job, setting, plan, {}).calibration["batch_size"] == 4
    prepare(parse(TuneOptions, [*argv, "--calib-batchsz", "4"], "x"), SILENT)
    message = r"^--calib-batchsz: 8 given, but the settings of search \(--from-run\) were found with 4$"
    with pytest.raises(InputError, match=message):
        prepare(parse(TuneOptions, [*argv, "--calib-batchsz", "8"], "x"), SILENT)


def test_files_of_a_resumed_run_may_be_spelled_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.py").write_text("SPACE = {}")
    stored = TuneOptions.of({"pretrained_dir": "a.npz", "data_path": "s3://b/d", "search_space": "space.py"}).to_dict()

    def resumed(*argv: str, **changes: str) -> TuneOptions:
        return with_stored(parse(TuneOptions, ["--resume", "r", *argv], "x"), {**stored, **changes}, {"resume"})

    again = resumed("--search-space", "./space.py", "--pretrained_dir", str(tmp_path / "a.npz"))
    assert (again.search_space, again.pretrained_dir) == ("space.py", "a.npz"), "what is stored counts"
    resumed("--search-space", "calib", search_space="/some/checkout/search_spaces/calib.py")
    for argv in ("--search-space calib", "--pretrained_dir b.npz", "--data-path b/d", "--data-path s3://b/e"):
        with pytest.raises(InputError, match=r"given, but r was started with"):
            resumed(*argv.split())


@pytest.mark.parametrize(("kind", "free"), [(TuneOptions, FREE_OPTIONS), (TrainOptions, train.FREE_OPTIONS)])
def test_checkpoints_may_move_and_keep_their_names(
    kind: type[TuneOptions | TrainOptions], free: frozenset[str]
) -> None:
    """Their fingerprints are compared later; results are named after them, and `auto` may read their names."""
    teacher = {"teacher": "/there/big.npz"} if kind is TrainOptions else {}
    stored = kind.of({"pretrained_dir": "/there/vit.npz", "data_path": "d", **teacher}).to_dict()

    def resumed(*argv: str, **changes: str | None) -> TuneOptions | TrainOptions:
        return with_stored(parse(kind, ["--resume", "r", *argv], "x"), {**stored, **changes}, free)

    assert resumed().pretrained_dir == "/there/vit.npz"
    for place in ("/here/vit.npz", "s3://key:hush@b/vit.npz?region=x"):
        assert resumed("--pretrained_dir", place).pretrained_dir == place
        with pytest.raises(InputError, match=r"given, but r was started with /there/other\.npz$"):
            resumed("--pretrained_dir", place, pretrained_dir="/there/other.npz")
    if teacher:
        assert resumed("--teacher", "/here/big.npz").teacher == "/here/big.npz"
        for then in ("/there/other.npz", None):
            with pytest.raises(InputError, match=f"--teacher: /here/big.npz given, but r was started with {then}"):
                resumed("--teacher", "/here/big.npz", teacher=then)


def test_a_resumed_run_takes_keys_and_places_as_given() -> None:
    stored = TuneOptions.of({"pretrained_dir": "s3://key:hush@b/vit.npz", "data_path": "/there"}).to_dict()
    given = ["--resume", "r", "--pretrained_dir", "s3://key:hush@b/vit.npz", "--data-path", "/here"]
    again = with_stored(parse(TuneOptions, given, "x"), stored, FREE_OPTIONS)
    assert (again.pretrained_dir, again.data_path) == ("s3://key:hush@b/vit.npz", "/here")
    again = with_stored(parse(TuneOptions, ["--resume", "r"], "x"), stored, FREE_OPTIONS)
    assert (again.pretrained_dir, again.data_path) == ("s3://b/vit.npz", "/there")
    with pytest.raises(InputError, match=r"s3://b/other\.npz given, but r was started with s3://b/vit\.npz$"):
        with_stored(parse(TuneOptions, [*given[:3], "s3://key:hush@b/other.npz"], "x"), stored, FREE_OPTIONS)


def test_the_default_space_takes_bits_from_the_command_line() -> None:
    """`make tune`."""
    job = prepare(parse(TuneOptions, ["--wprec", "4", "--aprec", "4"], "x"), SILENT)
    assert {(s.weight_bits, s.act_bits) for s in job.proposals().next_round()} == {(4, 4)}


def test_distillation_is_on_with_the_sample_and_with_a_teacher() -> None:
    given = "--pretrained_dir a_calib.pth --data-path d"
    assert complete(parse(TrainOptions, [], "x"), SILENT).distill
    assert complete(parse(TrainOptions, [*given.split(), "--teacher", "x.npz"], "x"), SILENT).distill
    assert not complete(parse(TrainOptions, given.split(), "x"), SILENT).distill
    with pytest.raises(InputError, match=r"--temperature: 2\.0 given, but there is no teacher without --distill"):
        complete(parse(TrainOptions, [*given.split(), "--temperature", "2"], "x"), SILENT)


def test_help_names_every_mode() -> None:
    """A mode is a row of the table, also for help: one more, there before anything reads the table."""
    with fresh_package():
        from vitq_ray.quant.sites import MODES

        MODES["ft9"] = MODES["ft1"]
        from vitq_ray.commands.options import TuneOptions

        assert TuneOptions.declared()["quant_mode"].help == "ft1, ft2, ft3, trt, ort, openvino, tensorrt or ft9"


@pytest.mark.parametrize("name", ["qat", "qat.py", "quick", "search_spaces/qat.py", "gone/search_spaces/qat.py"])
def test_bundled_spaces_are_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(find_space(name)) == bundled_spaces()[Path(name).stem]
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("SPACE = {}")
    assert find_space(name) == name, "a file that is there comes first"


def test_an_unknown_space_lists_the_bundled_ones() -> None:
    names = "advanced_ptq, calib, calib_qat, learned_ptq, ptq, qat, quick, rules, wide"
    message = rf"wider\.py: no such file; .*or one of {names}"
    with pytest.raises(InputError, match=message):
        find_space("wider.py")
    with pytest.raises(InputError, match=r"mine/calib\.py: no such file"):
        find_space("mine/calib.py")


def test_what_the_model_does_not_allow_is_left_out_of_the_default_space(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model without biases of q, k and v cannot be rotated, one without that of fc2 has nothing to fit; the rest is
    tried, and who names the space is told so."""

    def load_without_biases(*args: object, **more: object) -> LoadedModel:
        loaded = load_model(*args, **more)  # type: ignore[arg-type]
        for block in loaded.model.blocks:
            block.attn.qkv.bias = None
            block.mlp.fc2.bias = None
        return loaded

    monkeypatch.setattr(tune_job, "load_model", load_without_biases)
    job = prepare(parse(TuneOptions, [], "x"), SILENT)
    assert job.space.choices["transforms"] == (("heads", "balance"), ())
    assert job.space.choices["corrections"] == (("round",), ())
    assert "not tried: transform rotate: " in caplog.text
    assert "; correction fit: mlp.fc2 has no bias" in caplog.text
    with pytest.raises(InputError, match="transform rotate: "):
        prepare(parse(TuneOptions, ["--search-space", "ptq"], "x"), SILENT)


def test_corrections_that_do_not_fit_are_left_out_of_the_default_space(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Eighteen sets of weights, twice, in half of the memory: one byte less is too little."""
    job = prepare(parse(TuneOptions, [], "x"), SILENT)
    assert any(job.space.choices["corrections"])
    monkeypatch.setattr(tune_job, "machine_memory", lambda: 4 * job.weight_bytes)
    assert prepare(parse(TuneOptions, [], "x"), SILENT).space == job.space
    monkeypatch.setattr(tune_job, "machine_memory", lambda: 4 * job.weight_bytes - 1)
    small = prepare(parse(TuneOptions, [], "x"), SILENT)
    assert small.space.choices == {**job.space.choices, "corrections": ((),)}
    assert small.weight_bytes == job.weight_bytes // 9
    assert "not tried: corrections, whose weights would take" in caplog.text
    assert prepare(parse(TuneOptions, ["--search-space", "ptq"], "x"), SILENT).space == job.space


def test_memory_of_the_weights_that_candidates_bring(tmp_path: Path) -> None:
    """A model's for two sets of transforms, and for each of six corrected settings of twelve."""
    space = tmp_path / "space.py"
    space.write_text(
        'SPACE = {"calibrator": ("fisher", "mse"), "transforms": ((), ("rotate",), ("rotate", "shift")), '
        '"corrections": ((), ("round",))}'
    )
    job = prepare(parse(TuneOptions, ["--search-space", str(space)], "x"), SILENT)
    of_model = 4 * sum(parameter.numel() for parameter in job.model.parameters())
    assert job.weight_bytes == (2 + 6) * of_model
    assert job.stored_bytes == job.selection_bytes + job.weight_bytes
    refined = prepare(parse(TuneOptions, ["--search-space", str(space), "--refine"], "x"), SILENT)
    assert refined.weight_bytes > 50 * of_model
    few = ["--search-space", str(space), "--search-alg", "random", "--num-samples", "3"]
    assert prepare(parse(TuneOptions, few, "x"), SILENT).weight_bytes == (2 + 2) * of_model
    plain = prepare(parse(TuneOptions, ["--search-space", "quick"], "x"), SILENT)
    assert plain.weight_bytes == 0
    with pytest.raises(InputError, match=r"--object-store-memory: 0\.1 GB cannot hold 500\d decoded selection images"):
        prepare(
            parse(TuneOptions, ["--search-space", "quick", "--object-store-memory", "0.1", "--img_size", "224"], "x"),
            SILENT,
        )
