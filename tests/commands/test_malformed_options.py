"""Malformed options, search spaces and places of outputs: one line that names the thing, or the right value.

Everything here calls what parses and reads, in this process: no Ray, no evaluation.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import RUN_DESCRIPTION
from vitq_ray.base.config import InputError
from vitq_ray.calibration.setting import Setting
from vitq_ray.commands.declare import Flag, Options
from vitq_ray.commands.inputs import bundled_spaces, checkpoint_name, find_space
from vitq_ray.commands.main import exit_code
from vitq_ray.commands.options import CalibrateOptions, EvaluateOptions, TrainOptions, TuneOptions
from vitq_ray.commands.outputs import require_apart
from vitq_ray.commands.parser import parse
from vitq_ray.commands.tune_job import require_used_with
from vitq_ray.run.folder import RunFolder
from vitq_ray.run.results import SEARCH
from vitq_ray.search.proposals import proposals
from vitq_ray.search.space import MOST_SETTINGS, SearchSpace, load_space, space_of

KINDS = {"calib": CalibrateOptions, "evaluate": EvaluateOptions, "tune": TuneOptions, "qat": TrainOptions}
NUMBERS = {
    f"{command} {row.spelling}": (kind, name)
    for command, kind in KINDS.items()
    for name, row in kind.declared().items()
    if type(row.kind).__name__ in ("Number", "Recipe", "CalibratorNumber")
}
TEXTS = {
    f"{command} {row.spelling}": (kind, name)
    for command, kind in KINDS.items()
    for name, row in kind.declared().items()
    if type(row.kind).__name__ in ("Text", "Place", "Name")
}
PLACES = {line: found for line, found in TEXTS.items() if type(found[0].declared()[found[1]].kind).__name__ == "Place"}


def message_of(call: Callable[[], object]) -> str:
    """The one line of the InputError that a call raises."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def typed(kind: type[Options], name: str, *texts: str) -> Options:
    return parse(kind, [f"{kind.declared()[name].spelling}={text}" for text in texts], "x")


# Every option --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", NUMBERS)
def test_what_is_no_number(line: str) -> None:
    kind, name = NUMBERS[line]
    for text in ("nan", "inf", "-inf", "1e400", "-1e9", "1" * 400, "", " ", "three", "1,5", "0x10", "--1"):
        message = message_of(lambda text=text: typed(kind, name, text))  # type: ignore[misc]
        assert "expected" in message, text
    for value in (float("nan"), float("inf"), -(10**400), 10**400, [], {}, b"1", True, 1j):
        message = message_of(lambda value=value: kind.of({name: value}))  # type: ignore[misc]
        assert message.startswith(f"{name}: "), value


@pytest.mark.parametrize("line", TEXTS)
def test_what_is_no_text(line: str) -> None:
    kind, name = TEXTS[line]
    for text in ("", "  ", "a\0b", os.fsdecode(b"mod\xe8le")):
        assert message_of(lambda text=text: typed(kind, name, text)).startswith(f"{line.split()[1]}: expected text")  # type: ignore[misc]
    for value in (3, [], b"a", True):
        assert message_of(lambda value=value: kind.of({name: value})) == f"{name}: expected text, got {value!r}"  # type: ignore[misc]


def test_every_path_is_a_place() -> None:
    """What else takes text is none, so `~` is the user's home wherever a path is given."""
    assert {name for _, name in TEXTS.values()} - {name for _, name in PLACES.values()} == {
        "name",
        "ray_address",
        "model_type",
        "transforms",
        "corrections",
        "rules",
    }


@pytest.mark.parametrize("line", PLACES)
def test_places(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, name = PLACES[line]
    spelling = line.split()[1]
    monkeypatch.setenv("HOME", "/home/me")
    for text, place in (("~/a", "/home/me/a"), ("~", "/home/me"), ("./~/a", "./~/a"), ("a~b", "a~b"), ("a b", "a b")):
        assert getattr(typed(kind, name, text), name) == place
    message = message_of(lambda: typed(kind, name, "~nosuchuser/a"))
    assert message.startswith(f"{spelling}: ~nosuchuser/a: there is no home folder of ~nosuchuser")
    message = message_of(lambda: typed(kind, name, "a/" + "b" * 256))
    assert message.startswith(f"{spelling}: a/bbb")
    assert message.endswith("longer than 255 bytes")
    assert getattr(typed(kind, name, "b" * 255), name) == "b" * 255
    assert message_of(lambda: typed(kind, name, "a/" * 2001)).endswith("is longer than 4000 bytes")
    if name in ("pretrained_dir", "data_path", "teacher", "reference"):
        assert getattr(typed(kind, name, "s3://bucket/key"), name) == "s3://bucket/key"
    else:
        for text in ("s3://bucket/key", "gs://b", "file:///tmp/a", "s3:/bucket/key"):
            message = message_of(lambda text=text: typed(kind, name, text))  # type: ignore[misc]
            assert message == f"{spelling}: {text} is a URI; expected a path on a local or shared file system"
        assert message_of(lambda: kind.of({name: Path("s3://bucket")})).startswith(f"{name}: s3:/bucket is a URI")


# Single options ------------------------------------------------------------------------------------------------------

REFUSED = {
    "calib --percentile 0.9999": "--percentile: 0.9999 given, expected a number in percent, such as 99.99: more than 1",
    "calib --percentile 1": "--percentile: 1 given, expected a number in percent",
    "calib --percentile 0": "--percentile: 0 given, expected a number in percent",
    "tune --percentile .5": "--percentile: 0.5 given, expected a number in percent",
    "qat --percentile 0.9999": "--percentile: 0.9999 given, expected a number in percent",
    "calib --percentile 100.1": "--percentile: expected a number from 0 to 100, got '100.1'",
    "calib --threads-per-worker 1099511627776": "--threads-per-worker: expected an integer from 1 to 1024, got '109951",
    "calib --decode-threads 100000": "--decode-threads: expected an integer from 1 to 1024, got '100000'",
    "calib --num-workers 10001": "--num-workers: expected an integer from 1 to 10000, got '10001'",
    "calib --img_size 4097": "--img_size: expected an integer from 1 to 4096, got '4097'",
    "calib --img_size 224.0": "--img_size: expected an integer from 1 to 4096, got '224.0'",
    "calib --crop-pct 0": "--crop-pct: expected a number from 0.01 to 1, got '0'",
    "calib --num-calib-batch 0": "--num-calib-batch: expected an integer >= 1, got '0'",
    "calib --num-calib-batch 1e3": "--num-calib-batch: expected an integer >= 1, got '1e3'",
    "calib --calib-batchsz 1000000001": "--calib-batchsz: expected an integer from 1 to 1000000000, got '1000000001'",
    "calib --wprec 9": "--wprec: expected an integer from 2 to 8, got '9'",
    "calib --seed 9223372036854775808": "--seed: expected an integer from 0 to 9223372036854775807, got '922",
    "calib --seed -1": "--seed: expected an integer from 0 to",
    "tune --object-store-memory inf": "--object-store-memory: expected a number from 0.1 to 100000, got 'inf'",
    "tune --object-store-memory 1e9": "--object-store-memory: expected a number from 0.1 to 100000, got '1e9'",
    "tune --gpus-per-trial nan": "--gpus-per-trial: expected a number from 0 to 1024, got 'nan'",
    "tune --num-samples 1000000": "--num-samples: expected an integer from 1 to 100000, got '1000000'",
    "tune --alpha 0": "--alpha: expected a number from 1e-09 to 0.999, got '0'",
    "tune --tie-margin -0.1": "--tie-margin: expected a number from 0 to 0.5, got '-0.1'",
    "tune --min-float-top1 80": "--min-float-top1: expected a number from 0 to 1, got '80'",
    "tune --search-alg Grid": "--search-alg: invalid choice: 'Grid' is not one of grid, random, optuna",
    "tune --output s3://b/run": "--output: s3://b/run is a URI; expected a path on a local or shared file system",
    "tune --resume s3://b/run": "--resume: s3://b/run is a URI",
    "tune --from-run s3://b/run": "--from-run: s3://b/run is a URI",
    "evaluate --save-logits s3://b/l.npz": "--save-logits: s3://b/l.npz is a URI",
    "calib --calib-output-path s3://b": "--calib-output-path: s3://b is a URI",
    "qat --model_type ../x": "--model_type: expected a name of letters, digits and . _ -, got '../x'",
    "qat --model_type a/b": "--model_type: expected a name of letters, digits and . _ -, got 'a/b'",
    "calib --model_type ..": "--model_type: expected a name of letters, digits and . _ -, got '..'",
    "calib --model_type .hidden": "--model_type: expected a name of letters",
    "tune --model_type ''": "--model_type: expected a name of letters",
    "qat --qat-lr 0": "--qat-lr: learning rate: expected a number > 0, got 0.0",
    "qat --dropout 1": "--dropout: dropout: expected a number in [0, 1), got 1.0",
    "qat --num-epochs 0": "--num-epochs: number of epochs: expected an integer >= 1, got 0",
    "qat --num-epochs 1e12": "--num-epochs: number of epochs: expected an integer >= 1, got '1e12'",
    "qat --num-epochs 1000000000000": "--num-epochs: number of epochs: expected an integer from 1 to 1000000000, got 1",
    "qat --temperature -3": "--temperature: temperature: expected a number > 0, got -3.0",
    "qat --max-failures -1": "--max-failures: expected an integer from 0 to 10000, got '-1'",
    "qat --checkpoint-steps 0": "--checkpoint-steps: expected an integer >= 1, got '0'",
    "qat --global-batch-size 0": "--global-batch-size: expected an integer >= 1, got '0'",
    "evaluate --limit 0": "--limit: expected an integer >= 1, got '0'",
    "tune --percentile -1": "--percentile: expected a number from 0 to 100, got '-1'",
    "evaluate --limit": "argument --limit: expected one argument",
    "evaluate --quant-mode ft9": "--quant-mode: invalid choice: 'ft9' is not one of ft1, ft2, ft3, trt, ort,",
    "evaluate --on-bad-image ignore": "--on-bad-image: invalid choice: 'ignore' is not one of",
    "evaluate --use-gpu=yes": "argument --use-gpu/--use_gpu: ignored explicit argument 'yes'",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line: str) -> None:
    command, *argv = line.split()
    assert message_of(lambda: parse(KINDS[command], argv, "x")).startswith(REFUSED[line])


READ = {
    "tune --seed 20261125140500": 20261125140500,
    "tune --seed 9223372036854775807": 2**63 - 1,
    "qat --split-seed 20261125140500": 20261125140500,
    "calib --percentile 1.5": 1.5,
    "calib --percentile 100": 100.0,
    "calib --num-calib-batch +3": 3,
    "calib --num-calib-batch 1_000": 1000,
    "qat --qat-lr 1e-4": 1e-4,
    "tune --num-samples 100000": 100_000,
    "tune --object-store-memory 0.5": 0.5,
    "calib --quant-mode 2": "ft2",
    "calib --model_type vit_base_patch16_224.augreg_in21k": "vit_base_patch16_224.augreg_in21k",
    "evaluate --output ./s3:": "./s3:",
    "evaluate --output runs/modèle": "runs/modèle",
}


@pytest.mark.parametrize("line", READ)
def test_read(line: str) -> None:
    command, *argv = line.split()
    options = parse(KINDS[command], argv, "x")
    (name,) = options.given
    assert getattr(options, name) == READ[line]


def test_numbers_of_numpy() -> None:
    options = CalibrateOptions.of({"seed": np.int64(3), "crop_pct": np.float32(0.5), "wprec": np.uint8(4)})
    assert options.to_dict()["seed"] == 3
    assert (options.crop_pct, options.wprec) == (0.5, 4)
    json.dumps(options.to_dict())
    assert message_of(lambda: CalibrateOptions.of({"seed": np.bool_(1)})).startswith("seed: expected an integer")


# Search spaces -------------------------------------------------------------------------------------------------------

SPACES = {
    "SPACE = {'percentile': [99.9, 0.9999]}": "percentile: 0.9999 given, expected a number in percent",
    "SPACE = {'calibrator': ['percentile 0.9999']}": "percentile: 0.9999 given, expected a number in percent",
    "SPACE = {'gelu_output': [None, 'percentile 1']}": "percentile: 1 given, expected a number in percent",
    "SPACE = {'rules': [('0.* -> percentile 0.5',)]}": "percentile: 0.5 given, expected a number in percent",
    "SPACE = {'percentile': [float('nan')]}": "percentile: expected a number in [0, 100], got nan",
    "SPACE = {'num_batches': range(1, 10**9)}": "SPACE['num_batches'] has 999,999,999 values, expected at most 100,000",
    "SPACE = {'num_batches': [0]}": "number of calibration batches: expected an integer >= 1, got 0",
    "SPACE = {'num_batches': [2.0]}": "number of calibration batches: expected an integer >= 1, got 2.0",
    "SPACE = {'wprec': [8]}": "SPACE has the key 'wprec'; the keys are mode, calibrator",
    "SPACE = {3: [8]}": "SPACE has the key 3; the keys are mode",
    "SPACE = {'mode': {'ft1': 1}}": "SPACE['mode'] is {'ft1': 1}, expected a list",
    "SPACE = {'mode': [['ft1']]}": "quant mode: ['ft1'] is not one of ft1",
    "SPACE = {'weight_bits': [True]}": "weight bits: expected an integer from 2 to 8, got True",
    "SPACE = {'*.ffn.*': ['x 0']}": "rule of *.ffn.*: factor: expected a number > 0, got 0.0",
    "SPACE = {'*.ffn.*': ['x inf']}": "rule of *.ffn.*: factor: expected a number > 0, got inf",
    "SPACE = {'*.ffn.*': ['9 bits']}": "rule of *.ffn.*: bits: expected an integer from 2 to 8, got 9",
    "SPACE = {'*.ffn.*': ['4.5 bits']}": "rule of *.ffn.*: '4.5 bits' is not one of",
    "SPACE = {'x.*': ['off']}": "rule 'x.* -> off': its pattern matches no site",
    "import vitq_ray.search_space as s; SPACE = {'percentile': s.percentiles(99, 99.9, 10**9)}": "percentiles: count:",
    "SPACE = {}; QAT = 3": "QAT is int, expected a dictionary",
    "SPACE = {}; QAT = {'lr': 0.1}": "QAT['lr'] is 0.1, expected a list",
    "SPACE = {}; QAT = {'lr': [0]}": "learning rate: expected a number > 0, got 0",
    "SPACE = {}; QAT = {'num_samples': 10**9}": "QAT num_samples: expected an integer from 1 to 10000",
    "SPACE = {}; QAT = {'epochs': 0}": "QAT epochs: expected an integer >= 1, got 0",
    "SPACE = {}; QAT = {'reduction': 1}": "QAT reduction: expected an integer >= 2, got 1",
    "raise SystemExit(0)": "line 1: SystemExit: 0",
    "exec('x' * 3)": "line 1: NameError",
    "SPACE = {'mode': ['ft1'] * 200_000}": "SPACE['mode'] has 200,000 values",
    "\\0": "SyntaxError",
}


@pytest.mark.parametrize("text", SPACES)
def test_a_malformed_space(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text.replace("\\0", "\0"))
    message = message_of(lambda: load_space(str(path)))
    assert message.startswith(f"{path}: ")
    assert SPACES[text] in message


def large_space() -> SearchSpace:
    """A billion settings and more."""
    patterns = {f"{block}.attn.*": (None, "mse", "max", "x 0.9", "6 bits", "7 bits", "off") for block in range(11)}
    return space_of(patterns, "large.py")


def test_a_billion_settings() -> None:
    """A grid is refused at once; what draws settings draws as many as were asked for."""
    space, defaults = large_space(), Setting()
    assert space.size(defaults) == 7**11 > 1_000_000_000
    message = message_of(lambda: proposals("grid", space, defaults, None, 0))
    assert message.startswith("the space large has 1,977,326,743 settings, and a search tries at most 100,000")
    assert len(proposals("random", space, defaults, 20, 0).next_round()) == 20
    assert len(proposals("optuna", space, defaults, 20, 20261125140500).next_round()) == 8, "the first round"


def test_as_many_samples_as_one_likes_of_a_small_space() -> None:
    space = space_of({"mode": ("ft1", "ft2"), "calibrator": ("max", "mse"), "percentile": (99.0, 99.9)}, "s.py")
    found = proposals("random", space, Setting(), MOST_SETTINGS, 0).next_round()
    assert len(found) == 4, "numbers of a calibrator that is not there make no further settings"


def test_numbers_in_the_text_leave_nothing_to_the_option() -> None:
    space = space_of({"calibrator": ("percentile 99", "max")}, "s.py")
    options = parse(TuneOptions, ["--percentile", "99.9"], "x")
    assert "--percentile: 99.9 given, but no calibrator of the space s takes it" in message_of(
        lambda: require_used_with(options, space)
    )
    require_used_with(options, space_of({"calibrator": ("percentile 99", "percentile")}, "s.py"))


@pytest.mark.parametrize("name", sorted(bundled_spaces()))
def test_a_space_is_read_back_from_a_run(name: str) -> None:
    space = load_space(find_space(name))
    again = SearchSpace.from_dict(json.loads(json.dumps(space.to_dict())), "run.json")
    assert again.name == space.name
    assert again.values(Setting()).keys() == space.values(Setting()).keys()
    assert again.sample(Setting(), 10, 0) == space.sample(Setting(), 10, 0)
    assert (again.qat is None) == (space.qat is None)
    if again.qat is not None and space.qat is not None:
        assert again.qat.sample(3) == space.qat.sample(3)


# Outputs and inputs --------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint, a calibrated one, data, a space and a run, which the process stands in."""
    for name in ("vit.npz", "vit_calib.pth", "vit_calib.json", "space.py", "d/train.zip", "d/val_map.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    (tmp_path / "d" / "val" / "cats").mkdir(parents=True)
    (tmp_path / "link.npz").symlink_to("vit.npz")
    with RunFolder.create(tmp_path / "run", SEARCH) as folder:
        folder.write_run(RUN_DESCRIPTION)
        folder.append("resumed")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"a run": "of somebody else"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


OVER = {
    "evaluate --save-logits vit_calib.pth": "vit_calib.pth of --pretrained_dir would be overwritten",
    "evaluate --save-logits ./d/../vit_calib.pth": "vit_calib.pth of --pretrained_dir would be overwritten",
    "evaluate --save-logits vit_calib.json": "vit_calib.json of --pretrained_dir would be overwritten",
    "evaluate --save-logits d/train.zip": "train.zip of --data-path would be overwritten",
    "evaluate --save-logits d/val_map.txt": "val_map.txt of --data-path would be overwritten",
    "evaluate --save-logits d/val/cats/l.npz": "lies among the images of --data-path",
    "evaluate --save-logits run/l.npz": "lies in the folder of a run, ",
    "evaluate --output out --save-logits out/result.json": "is written twice",
    "evaluate --output run": "already holds a run; choose another place",
    "evaluate --output run/best/again": "lies in the folder of a run, ",
    "evaluate --output d/val": "lies among the images of --data-path",
    "calib --calib-output-path d/train": "lies among the images of --data-path",
    "calib --calib-output-path run": "already holds a run; choose another place",
    "calib --calib-output-path . --model_type vit": "vit_calib.pth of --pretrained_dir would be overwritten",
    "tune --output run": "already holds a run; resume it, or choose another place",
    "tune --output run/inner": "lies in the folder of a run, ",
    "tune --output d/val/cats": "lies among the images of --data-path",
    "qat --output run/qat": "lies in the folder of a run, ",
    "qat --output out --teacher out/vit_calib_qat.pth": "vit_calib_qat.pth of --teacher would be overwritten",
}
APART = (
    "evaluate --save-logits logits.npz --output .",
    "evaluate --save-logits out/l.npz --output out",
    "evaluate --output d",
    "evaluate --output other",
    "calib --calib-output-path .",
    "tune --output calib --search-space calib",
    "tune --resume run",
    "qat --output train",
)


@pytest.mark.parametrize("line", OVER)
def test_no_output_over_an_input(line: str, inputs: Path) -> None:
    command, *argv = line.split()
    given = ["--pretrained_dir", "vit_calib.pth", "--data-path", "d"]
    options = parse(KINDS[command], [*given, *argv], "x")
    message = message_of(lambda: require_apart(options))
    assert message.startswith(f"{argv[0]}: ")
    assert OVER[line] in message
    assert (inputs / "vit_calib.pth").read_text() == "precious"


def test_no_output_over_what_a_link_stands_for(inputs: Path) -> None:
    for checkpoint, logits in (("link.npz", "vit.npz"), ("vit.npz", "link.npz")):
        argv = ["--pretrained_dir", checkpoint, "--data-path", "d", "--save-logits", logits]
        assert "would be overwritten" in message_of(lambda: require_apart(parse(EvaluateOptions, argv, "x")))  # noqa: B023


@pytest.mark.parametrize("line", APART)
def test_outputs_apart(line: str, inputs: Path) -> None:
    command, *argv = line.split()
    require_apart(parse(KINDS[command], ["--pretrained_dir", "vit_calib.pth", "--data-path", "d", *argv], "x"))


def test_a_checkpoint_whose_name_is_too_long_to_name_files_by() -> None:
    argv = ["--pretrained_dir", "b" * 230 + ".npz", "--data-path", "d"]
    message = message_of(lambda: checkpoint_name(parse(CalibrateOptions, argv, "x")))
    assert message.startswith("--pretrained_dir: bbb")
    assert checkpoint_name(parse(CalibrateOptions, [*argv, "--model_type", "ViT-B_16"], "x")) == "ViT-B_16"


# The last line -------------------------------------------------------------------------------------------------------


def test_an_error_line_is_one_line_of_readable_length(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise InputError("thing: \n" + "x" * 100_000 + "\x1b[31m expected something else")

    assert exit_code(fails) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert len(line) < 700
    assert line.startswith("error: thing: xxx")
    assert line.endswith("\\x1b[31m expected something else\n")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk full"),
        (errno.EDQUOT, "disk quota used up"),
        (errno.EFBIG, "file larger than the limit"),
        (errno.EROFS, "the file system has become read-only"),
    ],
)
def test_a_disk_that_cannot_be_written(number: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise OSError(number, os.strerror(number), "run/state.pt")

    assert exit_code(fails) == 1
    assert capsys.readouterr().err.startswith(f"error: run/state.pt: {words}")


def test_flags_are_left() -> None:
    """What the tables above do not go through."""
    for kind in KINDS.values():
        for name in (name for name, row in kind.declared().items() if isinstance(row.kind, Flag)):
            expected = f"{name}: expected True or False, got 1"
            assert message_of(lambda name=name, kind=kind: kind.of({name: 1})) == expected  # type: ignore[misc]
