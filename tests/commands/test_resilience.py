"""Nothing lost: searches and trainings as processes of their own that are killed, or lose what they use."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
import torch

from tests.conftest import ROOT, Project, descendants, hears_ctrl_c, make_project
from tests.killed_search import MOMENTS as KILLS

SPACE = """
SPACE = {"mode": ("ft1", "ft2"), "calibrator": ("max", "percentile"), "percentile": (90.0, 99.0, 99.9),
         "num_batches": (1, 3), "act_bits": (4, 6)}
"""


PATIENCE_S = 900  # for what takes a minute on a machine that does nothing else


def environment() -> dict[str, str]:
    """Also for nodes of a cluster: workers are not niced, as where this program starts Ray."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}


class Run:
    """A script as a process of its own."""

    begun: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, folder: Path, *argv: object, script: str = "tune_calib", **variables: str) -> None:
        self.folder = folder
        command = (ROOT / "scripts" / f"{script}.py", "--no-dashboard", *argv)
        self._start([sys.executable, *command], variables)

    @classmethod
    def killed_at(cls, moment: str, folder: Path, *argv: object) -> Run:
        """A search that kills itself at a moment of `killed_search.MOMENTS`."""
        run = cls.__new__(cls)
        run.folder = folder
        run._start([sys.executable, ROOT / "tests" / "killed_search.py", moment, "--no-dashboard", *argv], {})
        return run

    def _start(self, command: Sequence[object], variables: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [str(part) for part in command],
            env=environment() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=hears_ctrl_c,
        )
        self.begun.append(self.process)

    def finish(self, code: int = 0) -> str:
        text, _ = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == code, text
        return text

    def wait_until(self, reached: Callable[[list[dict]], bool], pause: float = 0.02) -> None:
        """Until the log has come so far."""
        end = time.monotonic() + PATIENCE_S
        while not reached(events(self.folder)):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(pause)

    def stop(self, number: signal.Signals, group: bool) -> tuple[str, list[str]]:
        """(what it says, which of its processes stay) after a signal to the driver, or to Ray's processes, too.

        After half a minute: Ray's agents need twice as long to notice that nobody ends them.
        """
        below = {}
        for pid in descendants(self.process.pid, ""):
            with suppress(OSError):  # it has just ended
                below[pid] = Path(f"/proc/{pid}/cmdline").read_text()[:99]
        (os.killpg if group else os.kill)(self.process.pid, number)
        text = self.finish(128 + number)
        return text, [below[pid] for pid in still_there(below, seconds=30)]

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


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    yield
    for process in Run.begun:
        if process.poll() is None:  # of a test that failed
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=60)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    Run.begun.clear()


def still_there(pids: Iterable[int], seconds: float) -> set[int]:
    """Those that live after so many seconds."""

    def lives(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    left, end = set(pids), time.monotonic() + seconds
    while (left := set(filter(lives, left))) and time.monotonic() < end:
        time.sleep(0.2)
    return left


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


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
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


STOPS: dict[str, tuple[signal.Signals, bool]] = {
    "Ctrl-C": (signal.SIGINT, True),  # a terminal signals all processes
    "closed terminal": (signal.SIGHUP, True),
    "SIGTERM": (signal.SIGTERM, False),  # as Kubernetes sends it
    "SIGTERM to all": (signal.SIGTERM, True),  # as SLURM does
}


def assert_says_how_to_go_on(text: str, script: str, folder: Path) -> None:
    """Once, and why it ended in one line more."""
    *_, hint, error = text.splitlines()
    assert hint.endswith(f"Go on with: python scripts/{script}.py --resume {folder}")
    assert error.startswith(("error: stopped by SIG", "error: interrupted"))
    assert text.count("Go on with") == text.count("error") == 1
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_search_says_how_to_go_on(stop: str, inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Run(folder, *options(inputs, folder))
    run.wait_until(lambda log: sum(e["event"] == "chunk" for e in log) >= 5)
    text, left = run.stop(*STOPS[stop])
    assert_says_how_to_go_on(text, "tune_calib", folder)
    assert not left
    assert not (folder / ".tune").exists()
    Run(folder, "--resume", folder).finish()
    assert_same_outcome(folder, undisturbed)


LOOKS_SPACE = """
SPACE = {"mode": ("ft2",), "calibrator": ("max", "fisher"), "num_batches": (1, 3), "act_bits": (4, 6)}
"""


def looks_options(inputs: Path, output: Path) -> list[object]:
    space = inputs / "looks.py"
    space.write_text(LOOKS_SPACE)
    return [*options(inputs, output), "--search-space", space]


@pytest.fixture(scope="module")
def undisturbed_looks(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "looks"
    Run(folder, *looks_options(inputs, folder)).finish()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLS)
def test_a_search_killed_in_the_middle_of_a_stage_goes_on(
    moment: str, inputs: Path, undisturbed_looks: Path, tmp_path: Path
) -> None:
    """Ray's processes end by themselves, and what stays in the folder goes when the run goes on."""
    folder = tmp_path / "run"
    run = Run.killed_at(moment, folder, *looks_options(inputs, folder))
    below: set[int] = set()
    while run.process.poll() is None:
        below |= set(descendants(run.process.pid, ""))
        time.sleep(0.1)
    run.finish(-signal.SIGKILL)
    assert not (folder / "result.json").exists()
    Run(folder, "--resume", folder).finish()
    assert_same_outcome(folder, undisturbed_looks)
    assert files_of(folder) == files_of(undisturbed_looks)
    if moment == "report":
        assert not still_there(below, seconds=150)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


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


# Clusters -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_that_come_and_go(
    inputs: Path, undisturbed: Path, two_nodes: tuple[str, subprocess.Popen], tmp_path: Path
) -> None:
    """A trial's process is killed, a node joins, another one leaves."""
    address, nodes = two_nodes
    folder = tmp_path / "run"
    run = Run(folder, *options(inputs, folder), "--ray-address", address, "--num-workers", 2)
    run.wait_until(lambda log: sum(e["event"] == "decision" for e in log) >= 1)
    trials = [pid for pid in descendants(nodes.pid, "ray::") if b"Trial" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert trials, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(nodes.pid, "ray::")]
    os.kill(trials[0], signal.SIGKILL)
    assert nodes.stdin is not None
    for decisions, command in ((3, "add"), (6, "kill")):
        run.wait_until(lambda log, least=decisions: sum(e["event"] == "decision" for e in log) >= least)
        nodes.stdin.write(f"{command}\n")
        nodes.stdin.flush()
    run.finish()
    assert_same_outcome(folder, undisturbed)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


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


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}


@pytest.fixture
def head() -> Iterator[str]:
    """The dashboard of a Ray that `ray start --head` began, with `python` on its path and a token."""
    port, dashboard, agent = free_ports(3)
    command = f"start --head --block --num-cpus 2 --object-store-memory 300000000 --port {port}"
    command += f" --dashboard-port {dashboard} --dashboard-agent-listen-port {agent}"
    variables = {**os.environ, **TOKEN, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    process = subprocess.Popen([*RAY, *command.split()], env=variables, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        end = time.monotonic() + 60
        request = Request(f"{url}/api/version", headers={"Authorization": f"Bearer {TOKEN['RAY_AUTH_TOKEN']}"})
        while time.monotonic() < end:
            with suppress(OSError):
                urlopen(request, timeout=5).close()
                break
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


RAY = (sys.executable, "-m", "ray.scripts.scripts")


@pytest.mark.slow
def test_a_submitted_job(inputs: Path, undisturbed: Path, head: str, tmp_path: Path) -> None:
    """As docs/cluster.md says: the repository is sent along, the driver joins the cluster that the job belongs to."""
    folder = tmp_path / "run"
    job = ("python", "scripts/tune_calib.py", "--no-dashboard", "--ray-address", "auto", "--num-workers", "2")
    submit = (*RAY, "job", "submit", "--address", head, "--working-dir", ROOT, "--", *job, *options(inputs, folder))
    run = subprocess.run(
        [str(part) for part in submit],
        cwd=tmp_path,
        env={**os.environ, **TOKEN},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "succeeded" in run.stdout
    assert_same_outcome(folder, undisturbed)


class Server:
    """An S3 server that can go away and come back with all that it had."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self.start()

    def start(self) -> None:
        self._server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    def away(self, seconds: float) -> None:
        self.stop()
        time.sleep(seconds)
        self.start()


@pytest.mark.slow
def test_a_server_that_is_away_for_a_while(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Twice for 20 s: before images are calibrated on, and before the report's images are read."""
    boto3 = pytest.importorskip("boto3")
    server, folder = Server(), tmp_path / "run"
    endpoint = f"http://127.0.0.1:{server.port}"
    access = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=endpoint, **access)
    client.create_bucket(Bucket="bucket")
    for path in (inputs / "project").iterdir():
        client.upload_file(str(path), "bucket", f"data/{path.name}")
    client.close()
    query = f"?endpoint_override={quote(endpoint, safe='')}&scheme=http&region=us-east-1"
    local = [str(part) for part in options(inputs, folder)]
    remote = {
        local[1]: f"s3://bucket/data/vit.npz{query}",
        local[3]: f"s3://bucket/data{query}",
    }
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    run = Run(folder, *(remote.get(part, part) for part in local), **keys)
    try:
        run.wait_until(lambda _: (folder / "run.json").exists())
        server.away(20)
        assert not (folder / "statistics.npz").exists(), "it was not needed"
        run.wait_until(lambda log: sum(e["event"] == "decision" for e in log) >= 12)
        server.away(20)
        assert run.process.poll() is None, "it was not needed"
        run.finish()
    finally:
        server.stop()
    assert_same_outcome(folder, undisturbed)


QAT_MOMENTS: dict[str, Callable[[Path], bool]] = {
    "calibrated": lambda folder: (folder / "start").exists(),
    "before the first step": lambda folder: (folder / "run.json").exists(),
    "in the first epoch": lambda folder: len(lines(folder / "steps.jsonl")) > 3,
}


@pytest.fixture(scope="module")
def undisturbed_training(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "training"
    Run(folder, *training_options(inputs, folder), script="qat").finish()
    return folder


def training_options(inputs: Path, output: Path) -> list[object]:
    small = ("--num-calib-batch", 2, "--calib-batchsz", 4, "--batch-size", 4, "--wprec", 4, "--aprec", 4, "--distill")
    more = ("--num-epochs", 4, "--qat-lr", 1e-3, "--checkpoint-steps", 3, "--output", output)
    return [*Project(inputs / "project").options, *small, *more]


@pytest.mark.slow
@pytest.mark.parametrize("moment", QAT_MOMENTS)
def test_a_killed_training_goes_on(moment: str, inputs: Path, undisturbed_training: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Run(folder, *training_options(inputs, folder), script="qat")
    run.wait_until(lambda _: QAT_MOMENTS[moment](folder), pause=0.002)
    run.kill()
    assert not (folder / "result.json").exists()
    if (folder / "run.json").exists():
        Run(folder, "--resume", folder, script="qat").finish()
    else:  # nothing was begun that could go on
        Run(folder, *training_options(inputs, folder), script="qat").finish()
    assert_same_training(folder, undisturbed_training)


def assert_same_training(folder: Path, undisturbed: Path) -> None:
    """Same counts, same losses, the same weights bit for bit."""
    results = [json.loads((f / "result.json").read_text()) for f in (folder, undisturbed)]
    for key in ("float", "ptq", "qat", "epochs", "best_epoch", "images"):
        assert results[0][key] == results[1][key], key
    weights = [torch.load(f / "vit_qat.pth", weights_only=True) for f in (folder, undisturbed)]
    assert list(weights[0]) == list(weights[1])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


WORKERS: dict[str, tuple[object, ...]] = {"one worker": (), "two workers": ("--num-workers", 2)}
LONG = ("--num-epochs", 30)


@pytest.fixture(scope="module")
def undisturbed_long(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a training on these workers."""

    @cache
    def folder_of(workers: str) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed") / "training"
        Run(folder, *training_options(inputs, folder), *LONG, *WORKERS[workers], script="qat").finish()
        return folder

    return folder_of


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("stop", ["closed terminal", "SIGTERM"])
def test_a_stopped_search_or_training_says_how_to_go_on(
    stop: str, workers: str, inputs: Path, undisturbed_long: Callable[[str], Path], tmp_path: Path
) -> None:
    """In the middle of an epoch. The sum of two ranks is always taken in the same order: the same weights."""
    folder = tmp_path / "run"
    run = Run(folder, *training_options(inputs, folder), *LONG, *WORKERS[workers], script="qat")
    run.wait_until(lambda _: len(lines(folder / "steps.jsonl")) > 32)
    text, left = run.stop(*STOPS[stop])
    assert not (folder / "result.json").exists()
    assert_says_how_to_go_on(text, "qat", folder)
    assert not left
    assert not (folder / ".train").exists()
    Run(folder, "--resume", folder, script="qat").finish()
    assert_same_training(folder, undisturbed_long(workers))


def losses(folder: Path) -> dict[int, float]:
    """{step: loss}; of a step that was done again, the last."""
    rows = map(json.loads, lines(folder / "steps.jsonl"))
    return {row["step"]: row["loss"] for row in rows if "step" in row}


@pytest.mark.slow
def test_a_training_with_a_range_of_workers_loses_a_node(
    inputs: Path, undisturbed_long: Callable[[str], Path], two_nodes: tuple[str, subprocess.Popen], tmp_path: Path
) -> None:
    """It goes on with one worker from the last state, with the same steps; sums are taken in another order."""
    address, nodes = two_nodes
    folder = tmp_path / "run"
    cluster = ("--ray-address", address, "--num-workers", "1-2")
    run = Run(folder, *training_options(inputs, folder), *LONG, *cluster, script="qat")
    run.wait_until(lambda _: len(lines(folder / "steps.jsonl")) > 60)
    assert nodes.stdin is not None
    nodes.stdin.write("kill\n")
    nodes.stdin.flush()
    text = run.finish()
    assert "Traceback" not in text
    ours, theirs = losses(folder), losses(undisturbed_long("two workers"))
    assert list(ours) == list(theirs)
    assert [ours[step] for step in range(1, 50)] == [theirs[step] for step in range(1, 50)]
    assert [*ours.values()] == pytest.approx([*theirs.values()], rel=0.02)


@pytest.mark.slow
def test_a_range_of_workers_on_one_node(inputs: Path, tmp_path: Path) -> None:
    """As many as there is room for take the steps that one takes; sums are taken in another order."""
    same_steps = ("--num-epochs", 6, "--global-batch-size", 16)
    for name, workers in {"one": ("--accumulate", 4), "range": ("--num-workers", "2-4")}.items():
        Run(tmp_path / name, *training_options(inputs, tmp_path / name), *same_steps, *workers, script="qat").finish()
    one, several = losses(tmp_path / "one"), losses(tmp_path / "range")
    assert list(one) == list(several)
    assert [*one.values()] == pytest.approx([*several.values()], rel=0.02)
