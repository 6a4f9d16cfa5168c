"""Files of a run that are damaged, of another run, of another type, or in use: one line that says what and what to do.

The files are those that version 0.2.0 wrote (tests/data/format2), sealed again by this version where that matters.
Nothing is computed: what reads the files is called.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import DATA, ROOT, RUN_DESCRIPTION, tiny_vit
from vitq_ray.base.config import InputError
from vitq_ray.base.files import append_whole, atomic_file
from vitq_ray.base.records import write_sealed
from vitq_ray.calibration.statistics import CalibrationStatistics
from vitq_ray.commands.options import TuneOptions
from vitq_ray.commands.parser import parse
from vitq_ray.commands.resume import stored_run, with_stored
from vitq_ray.commands.tune_job import FREE_OPTIONS, space_of_run
from vitq_ray.measure.metrics import unpack_text
from vitq_ray.qat.ranks import Ranks
from vitq_ray.qat.state import load_state, read_outcome, save_tensors
from vitq_ray.qat.task import read_judgement
from vitq_ray.qat.teacher import teacher_table
from vitq_ray.run.folder import RunFolder, read_bad_images, run_around
from vitq_ray.run.lock import LOCK, SECONDS_WITHOUT_SIGN, Lock
from vitq_ray.run.log import Log
from vitq_ray.run.results import SEARCH, TRAINING, read_result

OLD = DATA / "format2"


def message_of(call: Callable[[], object]) -> str:
    """The one line of the InputError that a call raises."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of lines are written here, each synced."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search and a finished training, as this version writes them."""
    runs = tmp_path_factory.mktemp("template") / "runs"
    shutil.copytree(OLD, runs)
    for name in ("search", "qat"):
        for file, key in (("run.json", "id"), ("result.json", "run")):
            values = json.loads((runs / name / file).read_text())
            write_sealed(runs / name / file, {**values, "format": 3, key: name})
    judgement = runs / "qat" / "judgement.json"
    write_sealed(judgement, {**json.loads(judgement.read_text()), "format": 3})
    old = CalibrationStatistics.from_bytes((OLD / "search" / "statistics.npz").read_bytes())
    RunFolder(runs / "search").write_statistics(old, OF)
    log = Log(runs / "search" / "new.jsonl", "search")
    for event in Log(runs / "search" / "trials.jsonl").events():
        log.append(**{key: value for key, value in event.items() if key != "time"})
    log.path.replace(runs / "search" / "trials.jsonl")
    return runs


@pytest.fixture
def runs(template: Path, tmp_path: Path) -> Path:
    """A copy of those that a test may damage."""
    shutil.copytree(template, tmp_path / "runs")
    return tmp_path / "runs"


OF = {"weights": "w", "data": "d", "images": "i"}
READERS: dict[str, Callable[[Path], object]] = {
    "search/run.json": lambda runs: RunFolder.find(runs / "search", SEARCH),
    "qat/run.json": lambda runs: RunFolder.find(runs / "qat", TRAINING),
    "search/result.json": lambda runs: read_result(runs / "search"),
    "qat/result.json": lambda runs: read_result(runs / "qat"),
    "search/trials.jsonl": lambda runs: RunFolder(runs / "search").events(),
    "search/statistics.npz": lambda runs: RunFolder(runs / "search").read_statistics(OF),
    "qat/state.pt": lambda runs: load_state(runs / "qat", json.loads(state_of(runs)["identity"])),
    "qat/best-0.pt": lambda runs: read_outcome(runs / "qat"),
    "qat/judgement.json": lambda runs: read_judgement(runs / "qat"),
}


def state_of(runs: Path) -> dict[str, Any]:
    return dict(torch.load(OLD / "qat" / "state.pt", weights_only=True))


def flipped(data: bytes, at: float) -> bytes:
    position = int(at * (len(data) - 1))
    return data[:position] + bytes([data[position] ^ 0x04]) + data[position + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half of it": lambda data: data[: len(data) // 2],
    "all but the last bytes": lambda data: data[:-30],
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"hello\n",
    "another JSON": lambda data: b"[1, 2]\n",
    "JSON of nothing": lambda data: b"{}\n",
    "not UTF-8": lambda data: b"\xff\xfe" + data,
    "an archive of something else": lambda data: (DATA / "format1" / "val.zip").read_bytes(),
    "a byte flipped at the start": lambda data: flipped(data, 0.05),
    "a byte flipped in the middle": lambda data: flipped(data, 0.5),
    "a byte flipped near the end": lambda data: flipped(data, 0.8),
}


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(name: str, runs: Path) -> None:
    READERS[name](runs)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file(name: str, damage: str, runs: Path) -> None:
    path = runs / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    if name.endswith(".jsonl") and damage in ("empty", "all but the last bytes", "half of it"):
        with RunFolder(runs / "search") as folder:  # what a kill leaves: half a line is cut off, the rest is whole
            folder.log.cut_half_line()
            assert len(folder.events()) < len(Log(OLD / "search" / "trials.jsonl").events())
        return
    message = message_of(lambda: READERS[name](runs))
    assert message.startswith(f"{path}: "), "the file is named"
    assert any(words in message for words in ("delete it and", "bring it back", "cut the log off")), (
        "what to do is said"
    )


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_cannot_be_read(name: str, runs: Path) -> None:
    (runs / name).unlink()
    (runs / name).mkdir()
    if name in ("search/run.json", "qat/run.json"):
        assert "has no run.json; expected the folder of a run" in message_of(lambda: READERS[name](runs))
        return
    assert message_of(lambda: READERS[name](runs)).startswith(f"{runs / name}: cannot be read: Is a directory")


# What must be there --------------------------------------------------------------------------------------------------

MISSING = [
    *(("search/run.json", key) for key in ("options", "search_space", "splits", "weights_fingerprint", "geometry")),
    *(("search/run.json", key) for key in ("options.calib_batchsz", "search_space.choices", "splits.selection")),
    *(("search/run.json", key) for key in ("splits.calibration.sample_ids", "data_fingerprint")),
    *(("qat/run.json", key) for key in ("options", "config", "splits.report", "data_fingerprint")),
    *(("search/result.json", key) for key in ("images", "top1_correct", "winner", "winner.setting", "candidates")),
    *(("qat/result.json", key) for key in ("best_epoch", "float", "ptq.val", "qat.report.top1_correct")),
    *(("qat/judgement.json", key) for key in ("models", "models.float", "models.qat.selection.images")),
]


def change(values: dict[str, Any], key: str, value: Any = None) -> None:
    """Put `value` at a dotted key, or take the key away."""
    *outer, last = key.split(".")
    for name in outer:
        values = values[name]
    if value is None:
        del values[last]
    else:
        values[last] = value


@pytest.mark.parametrize(("name", "key"), MISSING)
def test_a_key_is_missing_or_of_another_type(name: str, key: str, runs: Path) -> None:
    whole = json.loads((runs / name).read_text())
    del whole["checksum"]
    for value, what in ((None, "is missing"), (["x"], "is ['x'], expected")):
        values = json.loads(json.dumps(whole))
        change(values, key, value)
        write_sealed(runs / name, values)
        message = message_of(lambda: READERS[name](runs))
        assert message.startswith(f"{runs / name}: {key} {what}")


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".json")])
def test_a_changed_number_is_found_by_the_checksum(name: str, runs: Path) -> None:
    text = (runs / name).read_text()
    (runs / name).write_text(text.replace("1", "7", 1))
    assert "was changed or damaged: its checksum does not fit" in message_of(lambda: READERS[name](runs))
    (runs / name).write_text(text.replace('"checksum"', '"checksun"'))
    assert "its checksum does not fit" in message_of(lambda: READERS[name](runs))


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".json")])
@pytest.mark.parametrize("number", [0, -1, 99, "3", None, 2.5, True])
def test_a_format_that_is_none(number: object, name: str, runs: Path) -> None:
    values = json.loads((runs / name).read_text())
    (runs / name).write_text(json.dumps({**values, "format": number}))
    message = message_of(lambda: READERS[name](runs))
    assert message.startswith(f"{runs / name}: ")
    assert "format" in message


@pytest.mark.parametrize("name", OF)
def test_statistics_of_something_else(name: str, runs: Path) -> None:
    message = message_of(lambda: RunFolder(runs / "search").read_statistics({**OF, name: "other"}))
    assert message.startswith(
        f"{runs / 'search' / 'statistics.npz'}: are those of other {name} than this run's; delete"
    )


def test_statistics_of_an_earlier_version_belong_to_runs_of_it(runs: Path) -> None:
    shutil.copy(OLD / "search" / "statistics.npz", runs / "search" / "statistics.npz")
    assert "are those of other weights" in message_of(lambda: RunFolder(runs / "search").read_statistics(OF))
    assert RunFolder(OLD / "search").read_statistics(OF).snapshots == (1, 3)


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "identity is missing": lambda state: state.pop("identity"),
    "progress is missing": lambda state: state.pop("progress"),
    "model is 3, expected an object": lambda state: state.update(model=3),
    "optimizer is missing": lambda state: state.pop("optimizer"),
    "identity is 3, expected text": lambda state: state.update(identity=3),
    "truncated or damaged (Expecting value": lambda state: state.update(identity="x"),
    "truncated or damaged (Expecting property name": lambda state: state.update(progress="{"),
    "truncated or damaged ('history')": lambda state: state.update(progress="{}"),
    "unexpected keyword argument 'more'": lambda state: state.update(progress='{"history": [], "more": 1}'),
    "no epoch is done": lambda state: state.update(progress='{"history": []}'),
    "format 0, expected a number from 1": lambda state: state.update(format=0),
    "in format 99; this version reads formats up to": lambda state: state.update(format=99),
}


@pytest.mark.parametrize("problem", STATES)
def test_a_state_that_lacks_something(problem: str, runs: Path) -> None:
    state = state_of(runs)
    STATES[problem](state)
    save_tensors(runs / "qat" / "state.pt", state)
    message = message_of(lambda: read_outcome(runs / "qat"))
    assert message.startswith(f"{runs / 'qat' / 'state.pt'}: ")
    assert problem in message


def test_best_weights_of_another_model(runs: Path) -> None:
    path = runs / "qat" / "best-0.pt"
    save_tensors(path, tiny_vit(depth=1).state_dict())
    message = message_of(lambda: read_outcome(runs / "qat"))
    assert message.startswith(f"{path}: are not weights of the model of state.pt; delete it and state.pt")
    path.unlink()
    assert message_of(lambda: read_outcome(runs / "qat")) == f"{path}: cannot be read: No such file or directory"


# The log -------------------------------------------------------------------------------------------------------------

EVENTS = {
    '{"event": "chunk", "name": "c0", "start": 0, "images": 8}': "none of correct, correct5, kl, agree is there",
    '{"event": "chunk", "name": "c0", "start": "0", "images": 8, "correct": "/w=="}': "start is '0', expected an int",
    '{"event": "chunk", "name": 7, "start": 0, "images": 8, "correct": "/w=="}': "name is 7, expected text",
    '{"event": "chunk", "name": "c0", "start": 0, "images": 8, "correct": null}': "correct is None, expected text",
    '{"event": "candidate", "name": "c0", "predicted_noise": 1, "same_as": null}': "setting is missing",
    '{"event": "candidate", "name": "c0", "setting": {}, "predicted_noise": "1"}': "predicted_noise is '1', expected a",
    '{"event": "candidate", "name": "c0", "setting": {}, "predicted_noise": 1, "same_as": 3}': "same_as is 3, expected",
    '{"event": "decision", "name": "c0", "images": 8}': "verdict is missing",
    '{"event": "float", "correct": "/w=="}': "sample_ids is missing",
    '{"event": "float", "correct": "/w==", "sample_ids": [1, "2"]}': "sample_ids is [1, '2'], expected a list of",
    '{"event": "qat_epoch", "name": "q0", "epoch": 1, "images": 5, "top1_correct": 2}': "loss is missing",
    '{"event": "qat_failed", "name": "q0"}': "reason is missing",
    '{"event": "winner"}': "name is missing",
    '{"event": 3}': "event is 3, expected text",
    '{"time": 3}': "event is missing",
    "[]": "not an event: b'[]'",
    "3": "not an event: b'3'",
    "": "not an event: b''",
    "{": "not an event: b'{'",
    '{"event": "begun", "format": 5}': "in format 5; this version reads formats up to 4",
    '{"event": "begun", "format": 3}': "line 1: was changed",
}


@pytest.mark.parametrize("line", EVENTS)
def test_a_line_that_is_no_event(line: str, tmp_path: Path) -> None:
    log = Log(tmp_path / "trials.jsonl")
    log.path.write_text(line + "\n")
    message = message_of(log.events)
    assert message.startswith(f"{log.path}: ")
    assert EVENTS[line] in message


def lines_of(log: Log) -> list[bytes]:
    return log.path.read_bytes().splitlines(keepends=True)


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a line is lost": lambda lines: lines[:3] + lines[4:],
    "the first line is lost": lambda lines: lines[1:],
    "a line comes twice": lambda lines: lines[:4] + lines[3:],
    "two lines have changed places": lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
    "a digit is another one": lambda lines: [*lines[:4], lines[4].replace(b'"images": 8', b'"images": 9'), *lines[5:]],
    "a checksum is taken away": lambda lines: [
        *lines[:4],
        lines[4][: lines[4].index(b', "check"')] + b"}\n",
        *lines[5:],
    ],
    "a line is made up": lambda lines: [*lines[:4], b'{"event": "resumed"}\n', *lines[4:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_log_proves_that_it_is_what_was_written(change: str, tmp_path: Path) -> None:
    log = Log(tmp_path / "trials.jsonl", "me")
    for i in range(6):
        log.append("chunk", name="c0", start=8 * i, images=8, correct="/w==")
    assert [event["start"] for event in Log(log.path, "me").events()] == [0, 8, 16, 24, 32, 40]
    log.path.write_bytes(b"".join(CHANGES[change](lines_of(log))))
    message = message_of(Log(log.path, "me").events)
    number = int(message.split(": line ")[1].split(":")[0])
    assert "its checksum does not fit; cut the log off before it" in message
    log.path.write_bytes(b"".join(lines_of(log)[: number - 1]))  # what the message says
    again = Log(log.path, "me")
    known = len(again.events())
    again.append("resumed")
    assert len(Log(log.path, "me").events()) == known + 1


def test_a_log_of_another_run(tmp_path: Path) -> None:
    Log(tmp_path / "trials.jsonl", "me").append("resumed")
    assert "is the log of another run than run.json" in message_of(Log(tmp_path / "trials.jsonl", "you").events)


def test_what_is_appended_to_an_old_log_proves_itself(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    shutil.copy(OLD / "search" / "trials.jsonl", path)
    known = len(Log(path, None).events())
    Log(path, None).append("resumed")
    assert len(Log(path, None).events()) == known + 1
    path.write_bytes(path.read_bytes().replace(b'"c000"', b'"c009"', 1))
    assert f"line {known + 2}: was changed, or lines before it" in message_of(Log(path, None).events)


def test_an_event_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path / "trials.jsonl")
    log.append("resumed")
    before = log.path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*trials\.jsonl"):
        log.append("resumed")
    assert log.path.read_bytes() == before
    monkeypatch.undo()
    log.append("resumed")
    assert len(Log(log.path).events()) == 2


FIXED = settings(
    max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["begun", "float", "candidate", "chunk", "decision", "qat_epoch", "winner", "resumed", "x"])
KEYS = st.sampled_from(
    ["format", "name", "start", "images", "correct", "setting", "sample_ids", "time", "check", "run"]
)
LINES = st.builds(
    lambda name, more: json.dumps({"event": name, **more}).encode(), NAMES, st.dictionaries(KEYS, JSON)
) | st.binary(max_size=40)


@settings(
    max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=st.lists(LINES, max_size=5), cut=st.integers(0, 20))
def test_whatever_a_log_holds_is_read_or_refused(lines: list[bytes], cut: int, tmp_path: Path) -> None:
    log = Log(tmp_path / "trials.jsonl", "me")
    data = b"\n".join([*lines, b""])
    log.path.write_bytes(data[: len(data) - cut] if cut < len(data) else data)
    log.cut_half_line()
    try:
        events = log.events()
    except InputError:
        assert message_of(log.events).startswith(f"{log.path}: ")
        return
    log.append("resumed")
    assert [event["event"] for event in Log(log.path, "me").events()] == [*(e["event"] for e in events), "resumed"]


@settings(
    max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.floats(0, 1), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(at: float, bit: int, tmp_path: Path) -> None:
    log = Log(tmp_path / "trials.jsonl", "me")
    log.path.unlink(missing_ok=True)
    for i in range(3):
        log.append("chunk", name="c0", start=8 * i, images=8, correct="/w==")
    data = bytearray(log.path.read_bytes()[:-1])  # without the last line's end, which a kill may cost
    data[int(at * (len(data) - 1))] ^= 1 << bit
    log.path.write_bytes(bytes(data) + b"\n")
    message_of(Log(log.path, "me").events)


PACKED = {
    ("/w==", 8): None,
    ("/w", 8): "not base64",
    ("/*==", 8): "not base64",
    ("/ w==", 8): "not base64",
    ("/wA=", 8): "not the results of 8 images",
    ("", 8): "not the results of 8 images",
    ("/w==", 7): "not the results of 7 images",
    ("/g==", 7): None,
    ("", 0): None,
    ("/w==", -1): "not the results of -1 images",
}


@pytest.mark.parametrize(("text", "images"), PACKED)
def test_results_that_are_garbled(text: str, images: int) -> None:
    """Base64 that decodes to fewer or other bytes used to count as wrong answers."""
    if (problem := PACKED[text, images]) is None:
        assert len(unpack_text({"correct": text}, images)["correct"]) == images
    else:
        assert message_of(lambda: unpack_text({"correct": text}, images)) == f"correct: {problem}"


# Whose folder it is --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    """A run that this process works in."""
    with RunFolder.create(tmp_path / "run", SEARCH) as folder:
        folder.write_run(RUN_DESCRIPTION)
        folder.append("resumed")
        yield folder


def test_one_process_at_a_time(folder: RunFolder) -> None:
    here = f"is in use by process {os.getpid()} on {socket.gethostname()}, since 20"
    assert here in message_of(lambda: RunFolder.resume(folder.path, SEARCH))
    code = f"from vitq_ray.run.lock import Lock; from pathlib import Path; Lock(Path({str(folder.path)!r}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert here in process.stderr
    with folder:
        pass
    with RunFolder.resume(folder.path, SEARCH) as again:
        assert (again.path / LOCK).exists()
    assert not (folder.path / LOCK).exists()


def write_owner(folder: Path, **changes: object) -> None:
    owner = {"pid": os.getpid(), "started": "1", "host": socket.gethostname(), "since": "2026-11-25 14:00:00"}
    (folder / LOCK).write_text(json.dumps({**owner, **changes}))


@pytest.mark.parametrize("owner", [{"pid": 2**22 + 1}, {"started": "1"}, {"host": "elsewhere"}])
def test_an_owner_that_is_gone_holds_nothing(owner: dict[str, object], tmp_path: Path) -> None:
    write_owner(tmp_path, **owner)
    old = time.time() - SECONDS_WITHOUT_SIGN - 10
    os.utime(tmp_path / LOCK, (old, old))
    Lock(tmp_path).release()


@pytest.mark.parametrize("text", ["", "x", "[]", "{}", '{"pid": "1"}', "\0"])
def test_a_lock_that_says_nothing_holds_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(text)
    Lock(tmp_path).release()


def test_an_owner_on_another_host_that_gives_signs(tmp_path: Path) -> None:
    write_owner(tmp_path, host="elsewhere", pid=7)
    message = message_of(lambda: Lock(tmp_path))
    assert (
        message
        == f"{tmp_path}: is in use by process 7 on elsewhere, since 2026-11-25 14:00:00; wait for it, or stop it"
    )


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "tune_calib-20261125-140500")
    made = [RunFolder.create(None, SEARCH) for _ in range(3)]
    assert [folder.path.name for folder in made] == [f"tune_calib-20261125-140500{tail}" for tail in ("", "-2", "-3")]


@pytest.mark.parametrize("existing", [False, True])
def test_a_run_in_which_nothing_ran_is_not_left(existing: bool, tmp_path: Path) -> None:
    path = tmp_path / "run"
    if existing:
        path.mkdir()

    def begin(*events: str) -> None:
        with RunFolder.create(path, SEARCH) as folder:
            folder.write_run(RUN_DESCRIPTION)
            for event in events:
                folder.append(event)
            raise InputError("no GPU")

    assert message_of(begin) == "no GPU"
    assert path.exists() == existing
    assert not existing or not list(path.iterdir())
    assert message_of(lambda: begin("resumed")) == "no GPU"
    assert sorted(file.name for file in path.iterdir()) == ["run.json", "trials.jsonl"], "something ran"


def test_results_are_not_run_over(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("precious")
    assert "already holds results (result.json); choose another" in message_of(
        lambda: RunFolder.create(tmp_path, SEARCH)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json"]


def test_the_run_around_a_path(runs: Path) -> None:
    assert run_around(runs / "search" / "best" / "x.npz") == runs / "search"
    assert run_around(runs / "qat") == runs / "qat"
    assert run_around(runs / "else") is None


def test_bad_images_of_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "bad_images.jsonl").write_bytes(b'["a", "b"]\n3\n["c"]\n{"x": 1}\n\xff\n["d", "e"]\n["f", "g')
    assert read_bad_images(tmp_path) == [("a", "b"), ("d", "e")]


# Resuming ------------------------------------------------------------------------------------------------------------


def test_a_space_that_a_run_names_is_never_executed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried is in run.json; a file that a folder of somebody else names is only compared by its name."""
    monkeypatch.chdir(runs)
    (runs / "space.py").write_text("raise RuntimeError('executed')")
    stored = stored_run("search", SEARCH)
    options = with_stored(parse(TuneOptions, ["--resume", "search"], "x"), stored["options"], FREE_OPTIONS)
    assert options.search_space == "space.py"
    assert len(space_of_run(stored, Path("search")).grid(options.setting)) == 48
    known = hashlib.sha256((runs / "space.py").read_bytes()).hexdigest()
    assert space_of_run({**stored, "space_sha256": known}, Path("search")).name == "space"
    message = message_of(lambda: space_of_run({**stored, "space_sha256": "another"}, Path("search")))
    assert message.startswith("search: this is another search: space.py was changed since it was begun; bring it back")
    (runs / "space.py").unlink()
    assert space_of_run({**stored, "space_sha256": known}, Path("search")).name == "space", "it is not needed"
    argv = ["--resume", "search", "--search-space", "calib"]
    message = message_of(lambda: with_stored(parse(TuneOptions, argv, "x"), stored["options"], FREE_OPTIONS))
    assert message == "--search-space: calib given, but search was started with space.py"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seed", "x", "seed: expected an integer"),
        ("model_type", "../x", "model_type: expected a name"),
        ("alpha", 7, "al"),
    ],
)
def test_stored_options_are_checked_as_typed_ones(name: str, value: object, words: str, runs: Path) -> None:
    stored = {**stored_run(str(runs / "search"), SEARCH)["options"], name: value}
    options = TuneOptions.of({"resume": str(runs / "search")})
    message = message_of(lambda: with_stored(options, stored, FREE_OPTIONS))
    assert message.startswith(f"{runs / 'search' / 'run.json'}: {words}")


@pytest.mark.parametrize(
    ("name", "script", "words"),
    [
        ("search", TRAINING, "holds a run of tune_calib, expected one of qat"),
        ("qat", SEARCH, "holds a run of qat, expected one of tune_calib"),
        ("nowhere", SEARCH, "has no run.json; expected the folder of a run of tune_calib"),
        ("search/run.json", SEARCH, "has no run.json"),
    ],
)
def test_what_is_no_run_to_go_on_with(name: str, script: str, words: str, runs: Path) -> None:
    assert words in message_of(lambda: stored_run(str(runs / name), script))


# Writing -------------------------------------------------------------------------------------------------------------


def limited(write: Callable[[], object]) -> OSError:
    """The OSError that a write raises where files may have 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return caught.value


def test_a_limit_on_files_is_an_oserror_that_names_the_file(tmp_path: Path) -> None:
    """torch.save and NumPy's archives raise errors of their own."""
    values = np.random.default_rng(0).random(50_000)

    def savez() -> None:
        with atomic_file(tmp_path / "a.npz") as stream:
            np.savez(stream, values=values)

    for write, name in (
        (lambda: save_tensors(tmp_path / "a.pt", {"values": torch.from_numpy(values)}), "a.pt"),
        (savez, "a.npz"),
        (lambda: append_whole(tmp_path / "log", base64.b64encode(values.tobytes())), "log"),
    ):
        assert limited(write).filename == str(tmp_path / name)
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("log", 0)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EINVAL])
def test_a_full_disk_is_met_before_a_mapped_file_is_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    data: Any = SimpleNamespace(train=range(8), train_ids=[], transform=None)
    path = tmp_path / "teacher_logits.npy"
    if number == errno.ENOSPC:
        with pytest.raises(OSError, match=r"No space left on device: .*teacher_logits\.partial"):
            teacher_table(path, None, data, 5, None, Ranks())  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())
        return
    assert teacher_table(path, None, data, 5, None, Ranks()).shape == (8, 5)  # type: ignore[arg-type]
    message = message_of(lambda: teacher_table(path, None, data, 6, None, Ranks()))  # type: ignore[arg-type]
    assert message.startswith(f"{path}: holds float32 (8, 5), expected float32 (8, 6); delete it")
    path.write_bytes(path.read_bytes()[:-9])
    message = message_of(lambda: teacher_table(path, None, data, 5, None, Ranks()))  # type: ignore[arg-type]
    assert message.startswith(f"{path}: truncated or damaged")
