"""Files that are whole or not there, and what is left beside them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from vitq_ray.base import files
from vitq_ray.base.files import atomic_file, remove_temporary

WRITING = """
import os, signal, sys
from pathlib import Path
from vitq_ray.base.files import atomic_file

with atomic_file(Path(sys.argv[1])) as stream:
    stream.write(b"half")
    stream.flush()
    print(flush=True)
    sys.stdin.read()
"""
DAY = 86_400


def writing(path: Path) -> subprocess.Popen[bytes]:
    """A process that has begun to write a file, and goes on when its input ends."""
    command = [sys.executable, "-c", WRITING, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, env={"PYTHONPATH": str(ROOT)}, **pipes)  # type: ignore[call-overload]
    process.stdout.readline()
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_goes_with_the_next_output(tmp_path: Path) -> None:
    """And what another one is writing stays, also in this process."""
    killed, living = writing(tmp_path / "vit_calib.pth"), writing(tmp_path / "vit_calib.pth")
    killed.kill()
    killed.communicate()
    assert len(names(tmp_path)) == 2
    (tmp_path / ".of the user.tmp").touch()
    with atomic_file(tmp_path / "logits.npz") as stream:
        stream.write(b"whole")
        with atomic_file(tmp_path / "vit_calib.json") as other:
            other.write(b"{}")
    assert len(list(tmp_path.glob(".vit_calib.pth.*"))) == 1
    living.communicate()
    assert living.returncode == 0
    assert names(tmp_path) == [".of the user.tmp", "logits.npz", "vit_calib.json", "vit_calib.pth"]
    assert [(tmp_path / name).read_bytes() for name in names(tmp_path)] == [b"", b"whole", b"{}", b"half"]


def test_what_another_host_left_goes_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock may not be seen here; where it is seen, or in a folder of one's own, age does not matter."""
    for name, age in (("new", DAY - 60), ("old", DAY + 60)):
        path = tmp_path / f".{name}.12345678.elsewhere.vitq.tmp"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    remove_temporary(tmp_path)
    assert names(tmp_path) == [".new.12345678.elsewhere.vitq.tmp"]
    with atomic_file(tmp_path / "written") as stream:
        (temporary,) = tmp_path.glob(".written.*")
        os.utime(temporary, (0, 0))
        monkeypatch.setattr(files.socket, "gethostname", lambda: "elsewhere/2")
        remove_temporary(tmp_path, is_own=True)
        stream.write(b"whole")
    assert names(tmp_path) == ["written"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says whether a file is being written; only the folder of a run is known to have no other writer."""

    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    (tmp_path / f".a.{files._host()}.vitq.tmp").touch()
    with atomic_file(tmp_path / "b") as stream:
        stream.write(b"whole")
    assert len(names(tmp_path)) == 2
    remove_temporary(tmp_path, is_own=True)
    assert names(tmp_path) == ["b"]


def test_a_file_that_is_taken_for_an_abandoned_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its lock, another process may find it."""
    mkstemp = files.tempfile.mkstemp
    made: list[str] = []

    def found(*arguments: object) -> tuple[int, str]:
        handle, name = mkstemp(*arguments)
        if not made:
            remove_temporary(tmp_path)
            assert not os.path.exists(name)
        made.append(name)
        return handle, name

    monkeypatch.setattr(files.tempfile, "mkstemp", found)
    with atomic_file(tmp_path / "a") as stream:
        stream.write(b"whole")
    assert len(made) == 2
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert names(tmp_path) == ["a"]
