"""Nothing lost: searches as processes of their own that are killed, interrupted, or lose a node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Project, descendants, hears_ctrl_c, make_project

SPACE = """
SPACE = {"mode": ("ft1", "ft2"), "calibrator": ("max", "percentile"), "percentile": (90.0, 99.0, 99.9),
         "num_batches": (1, 3), "act_bits": (4, 6)}
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Run:
    """`tune_calib.py` as a process of its own."""

    def __init__(self, folder: Path, *argv: object) -> None:
        self.folder = folder
        command = [sys.executable, ROOT / "scripts" / "tune_calib.py", "--no-dashboard", *argv]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=hears_ctrl_c,
        )

    def finish(self, code: int = 0) -> str:
        text, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == code, text
        return text

    def wait_until(self, reached: Callable[[list[dict]], bool]) -> None:
        """Until the log has come so far."""
        end = time.monotonic() + 240
        while not reached(events(self.folder)):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.02)

    def kill(self) -> None:
        """`kill -9` of the driver, at once; then of what Ray left behind, so that it does not disturb."""
        left = descendants(self.process.pid, "")
        self.process.kill()
        self.process.communicate()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def events(folder: Path) -> list[dict]:
    log = folder / "trials.jsonl"
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_bytes().rpartition(b"\n")[0].splitlines()]


def count(folder: Path, kind: str) -> int:
    return sum(event["event"] == kind for event in events(folder))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "space.py").write_text(SPACE)
    (folder / "project").mkdir()
    make_project(folder / "project", val=900)
    return folder


def options(inputs: Path, output: Path) -> list[object]:
    small = ("--calib-batchsz", 4, "--batch-size", 10, "--chunk-images", 20, "--search-space", inputs / "space.py")
    return [*Project(inputs / "project").options, *small, "--output", output]


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    Run(folder, *options(inputs, folder)).finish()
    return folder


def assert_same_outcome(folder: Path, undisturbed: Path) -> None:
    """Same winner, same decisions on the same images; no chunk evaluated twice."""
    results = [json.loads((f / "result.json").read_text()) for f in (folder, undisturbed)]
    for key in ("winner", "candidates", "selection", "images", "top1_correct", "float"):
        assert results[0][key] == results[1][key], key
    chunks = [(e["name"], e["start"]) for e in events(folder) if e["event"] == "chunk"]
    assert len(chunks) == len(set(chunks))
    decided = [e["name"] for e in events(folder) if e["event"] == "decision"]
    assert len(decided) == len(set(decided))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the race": lambda folder: count(folder, "float") == 1,
    "in the first candidate": lambda folder: count(folder, "chunk") >= 3,
    "in the middle": lambda folder: count(folder, "decision") >= 5,
    "near the end": lambda folder: count(folder, "decision") >= 15,
}


@pytest.mark.parametrize(
    "moment", ["in the middle", *(pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS if m != "in the middle")]
)
def test_a_killed_search_goes_on(moment: str, inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Run(folder, *options(inputs, folder))
    run.wait_until(lambda _: MOMENTS[moment](folder))
    run.kill()
    assert not (folder / "result.json").exists()
    before = events(folder)
    Run(folder, "--resume", folder).finish()
    assert events(folder)[: len(before)] == before
    assert [e["event"] for e in events(folder)[len(before) :]].count("engine") == 1
    assert_same_outcome(folder, undisturbed)


def test_ctrl_c_keeps_the_state_and_says_how_to_go_on(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Run(folder, *options(inputs, folder))
    run.wait_until(lambda log: sum(e["event"] == "chunk" for e in log) >= 5)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    text = run.finish(130)
    assert f"Go on with: python scripts/tune_calib.py --resume {folder}" in text
    assert "Traceback" not in text
    assert not (folder / ".tune").exists()
    Run(folder, "--resume", folder).finish()
    assert_same_outcome(folder, undisturbed)


QAT_SPACE = """
SPACE = {"mode": ("ft2",), "calibrator": ("max",), "num_batches": (1,), "act_bits": (3,), "weight_bits": (3,)}
QAT = {"lr": (0.01, 0.003), "global_batch": (8,), "augment": ("none",), "dropout": (0.0,),
       "num_samples": 2, "epochs": 3, "optimizer": ("adamw",)}
"""


@pytest.mark.slow
def test_a_search_killed_while_it_trains_goes_on(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    project = make_project(tmp_path / "project", train=640, val=60)
    (tmp_path / "space.py").write_text(QAT_SPACE)
    small = ("--calib-batchsz", 4, "--batch-size", 20, "--search-space", tmp_path / "space.py")
    argv = (*project.options, *small, "--max-trials-in-flight", 1, "--target-drop", 0, "--output")
    folders = [tmp_path / "undisturbed", tmp_path / "killed"]
    Run(folders[0], *argv, folders[0]).finish()
    run = Run(folders[1], *argv, folders[1])
    run.wait_until(lambda log: sum(e["event"] == "qat_epoch" for e in log) >= 5)
    run.kill()  # the first run is through, the second has begun
    assert not (folders[1] / "result.json").exists()
    Run(folders[1], "--resume", folders[1]).finish()
    results = [json.loads((folder / "result.json").read_text())["qat"] for folder in folders]
    assert results[0] == results[1]
    logged = [(e["name"], e["epoch"]) for e in events(folders[1]) if e["event"] == "qat_epoch"]
    assert len(logged) == len(set(logged))
    assert not list(folders[1].glob("qat/*/teacher_logits.npy"))


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, subprocess.Popen]]:
    """(address, process) of a cluster of two nodes of one CPU each; the process takes `kill`."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "nodes.py"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.communicate(timeout=60)


@pytest.mark.slow
def test_the_loss_of_a_node(
    inputs: Path, undisturbed: Path, two_nodes: tuple[str, subprocess.Popen], tmp_path: Path
) -> None:
    address, nodes = two_nodes
    folder = tmp_path / "run"
    run = Run(folder, *options(inputs, folder), "--ray-address", address, "--num-workers", 2)
    run.wait_until(lambda log: sum(e["event"] == "decision" for e in log) >= 3)
    assert nodes.stdin is not None
    nodes.stdin.write("kill\n")
    nodes.stdin.flush()
    run.finish()
    assert_same_outcome(folder, undisturbed)
    assert (folder / "statistics.npz").read_bytes() == (undisturbed / "statistics.npz").read_bytes()
