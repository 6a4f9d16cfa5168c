"""What surrounds a command: signals, its output, the system's errors, CPUs, folders. One row a situation."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import pytest
import ray
import torch

from tests.conftest import ROOT, make_project
from vitq_ray.base import cpus
from vitq_ray.base.config import InputError
from vitq_ray.base.kernels import compiled
from vitq_ray.cluster import address as cluster_address
from vitq_ray.cluster import start
from vitq_ray.cluster.metrics import Metrics
from vitq_ray.cluster.workers import require_memory
from vitq_ray.commands import api, main, parser
from vitq_ray.commands.options import TrainOptions
from vitq_ray.commands.surroundings import exit_code
from vitq_ray.qat.loop import DivergedError

# How a command ends -------------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Named as those of PyTorch and Ray."""


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def signalled(number: signal.Signals) -> Callable[[], None]:
    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:  # what ends meanwhile is not interrupted by another one
            signal.raise_signal(number)

    return work


def swallowed() -> None:
    """Ray's calls raise a KeyboardInterrupt of their own where a signal came."""
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None


ENDS: dict[str, tuple[Callable[[], None], int, str]] = {
    "done": (lambda: None, 0, ""),
    "SIGTERM": (signalled(signal.SIGTERM), 143, "stopped by SIGTERM"),
    "SIGHUP": (signalled(signal.SIGHUP), 129, "stopped by SIGHUP"),
    "SIGTERM inside Ray": (swallowed, 143, "stopped by SIGTERM"),
    "Ctrl-C": (raising(KeyboardInterrupt()), 130, "interrupted"),
    "bad input": (raising(InputError("x: 1 is\nno good")), 2, "x: 1 is no good"),
    "endless message": (raising(InputError("y" * 5000)), 2, "yyy"),
    "--help": (raising(SystemExit(0)), 0, ""),
    "disk full": (raising(OSError(errno.ENOSPC, "No space left", "a.pth")), 1, "a.pth: disk full; nothing"),
    "quota": (raising(OSError(errno.EDQUOT, "Quota exceeded")), 1, "disk quota used up; nothing"),
    "file-size limit": (raising(OSError(errno.EFBIG, "File too large", "a")), 1, "a: file larger than the limit"),
    "no permission": (raising(PermissionError(errno.EACCES, "Permission denied", "/x")), 1, "/x: Permission denied"),
    "OSError of a library": (raising(OSError("AWS Error\nNETWORK")), 1, "AWS Error NETWORK"),
    "no memory": (raising(MemoryError()), 1, "out of memory"),
    "no GPU memory": (raising(OutOfMemoryError("CUDA out of memory.\nTried")), 1, "CUDA out of memory. Tried"),
    "diverged": (raising(DivergedError("step 3: the loss is nan")), 1, "step 3: the loss is nan"),
}


@pytest.fixture
def heard_signals() -> Iterator[None]:
    """Also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard_signals")
@pytest.mark.parametrize("situation", ENDS)
def test_how_a_command_ends(situation: str, capsys: pytest.CaptureFixture[str]) -> None:
    work, code, message = ENDS[situation]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert exit_code(work) == code
    printed = capsys.readouterr().err
    assert printed.count("\n") == bool(message)
    assert len(printed) < 1100
    assert all(part in printed for part in message.split(" … "))
    assert printed.startswith("error: " if message else "")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == handlers


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()))


def test_nohup_stays_deaf_to_the_end_of_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert exit_code(lambda: signal.raise_signal(signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_in_a_thread_leaves_signals_alone() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(exit_code(lambda: None)))
    thread.start()
    thread.join()
    assert codes == [0]


# Output -------------------------------------------------------------------------------------------------------------


@contextmanager
def output_to(stream: Any) -> Iterator[None]:
    before = sys.stdout
    sys.stdout = stream
    try:
        yield
    finally:
        sys.stdout = before


def pipe_without_reader() -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", encoding="utf-8")


def full_disk() -> io.TextIOWrapper:
    return open("/dev/full", "w", encoding="utf-8")


def ascii_terminal() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


OUTPUTS: dict[str, tuple[Callable[[], Any], int, str]] = {
    "full": (full_disk, 1, "standard output: No space left on device"),
    "nobody reads": (pipe_without_reader, 0, ""),
    "closed": (lambda: None, 0, ""),
    "ASCII": (ascii_terminal, 0, ""),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("arguments", ["--help", "tune --help", "evaluate --help"])
def test_output_that_takes_no_text(kind: str, arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, code, message = OUTPUTS[kind]
    stream = make()
    with output_to(stream):
        assert main.main(arguments.split()) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == bool(message)
    if kind == "ASCII":
        assert stream.buffer.getvalue().startswith(b"usage: vitq-ray")
    elif stream is not None:
        stream.close()  # says nothing more


def test_work_goes_on_where_output_is_lost() -> None:
    done: list[int] = []

    def work() -> None:
        for step in range(3):
            print("text", flush=True)
            done.append(step)

    with pipe_without_reader() as stream, output_to(stream):
        assert exit_code(work) == 0
    assert done == [0, 1, 2]


def test_ascii_replaces_what_it_must(capsys: pytest.CaptureFixture[str]) -> None:
    stream = ascii_terminal()
    with output_to(stream):
        assert exit_code(lambda: print("modèle … 91 %")) == 0
    assert stream.buffer.getvalue() == b"mod?le ? 91 %\n"


# CPUs ---------------------------------------------------------------------------------------------------------------

QUOTAS: dict[str, tuple[str, dict[str, str], int]] = {
    "no quota, version 2": ("0::/", {"cpu.max": "max 100000"}, 64),
    "no quota, version 1": ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
    "version 2": ("0::/", {"cpu.max": "200000 100000"}, 2),
    "version 2, of a group above": ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
    "version 1": ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    "version 1, own group": (
        "4:memory:/\n3:cpu:/jobs/7",
        {"cpu/jobs/7/cpu.cfs_quota_us": "50000", "cpu/jobs/7/cpu.cfs_period_us": "100000"},
        1,
    ),
    "path of the host": ("0::/kubepods/pod7", {"cpu.max": "400000 100000"}, 4),
    "nothing mounted": ("", {}, 64),
    "more than the mask": ("0::/", {"cpu.max": "9900000 100000"}, 64),
    "garbage": ("0::/", {"cpu.max": "\0"}, 64),
}


@pytest.mark.parametrize("situation", QUOTAS)
def test_cpus_of_a_container(situation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    membership, files, expected = QUOTAS[situation]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    monkeypatch.setattr(cpus, "GROUPS", tmp_path)
    monkeypatch.setattr(cpus, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert cpus.available_cpus() == expected


def test_cpus_are_counted_in_one_place() -> None:
    words = ("sched_getaffinity", "cpu_count(", "numba.njit")
    for path in (ROOT / "vitq_ray").rglob("*.py"):
        if path.name not in ("cpus.py", "kernels.py"):
            assert not [word for word in words if word in path.read_text()], path


def test_pytorch_gets_no_more_threads_than_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 64, set_num_threads=given.append))
    monkeypatch.setattr(main, "available_cpus", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    main.limit_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    main.limit_threads()
    assert given == [3]


# Folders ------------------------------------------------------------------------------------------------------------


def test_kernels_need_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache function"):
        numba.njit(cache=True)(lambda x: x + 1)
    assert compiled(lambda x: x + 1)(2) == 3


READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && ! touch "$1/written" 2>/dev/null && shift && exec "$@"
"""


def can_mount() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "--mount", "true"]).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not can_mount(), reason="mounts the repository read-only")
def test_a_read_only_installation(tmp_path: Path) -> None:
    """Neither the package nor a home can be written to: here and on workers, the same scales, and nothing is said."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/proc/none", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    read_only = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", ROOT]
    small = (*make_project(tmp_path).options, "--num-calib-batch", "4", "--calib-batchsz", "4", "--calib-output-path")
    states = []
    for name, workers in {"here": (), "workers": ("--num-workers", "2")}.items():
        command = [*read_only, sys.executable, ROOT / "scripts" / "calib.py", *small, tmp_path / name, *workers]
        run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        said = [line for line in run.stderr.splitlines() if "core_worker.cc" not in line]  # Ray's, of every BatchWorker
        assert (run.returncode, said) == (0, []), run.stdout + run.stderr
        assert "cache" not in run.stdout
        states.append(torch.load(tmp_path / name / "vit_calib.pth", weights_only=True))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0] | states[1])


@pytest.mark.parametrize("home", ["", "/proc/none"])
def test_a_home_that_cannot_keep_a_token(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home or str(tmp_path))
    token = start._own_token(dashboard=False)
    assert (not token) == (not home)
    assert all(len(text) == 64 for text in token.values())
    assert start._own_token(dashboard=False) == token  # Ray reads it once
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert start._own_token(dashboard=False) == {}


def failing(error: Exception) -> Callable[..., None]:
    def init(**_: Any) -> None:
        raise error

    return init


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_temporary_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, "/scratch/" + "ü" * 40)
    monkeypatch.setattr(ray, "init", failing(OSError("AF_UNIX path length cannot exceed 107 bytes")))
    with pytest.raises(InputError, match=rf"^{name}: /scratch/ü+ has 89 bytes, .* at most \d\d; set RAY_TMPDIR"):
        start._start(1, None, False)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/tmp/ray"),
        RuntimeError("no\nport"),
        Exception("The current node timed out during startup."),  # so Ray says it
    ],
)
def test_a_ray_that_cannot_start(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setattr(ray, "init", failing(error))
    with pytest.raises(InputError, match=r"^a local Ray: cannot be started: "):
        start._start(1, None, False)


def test_sigterm_while_ray_starts_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own handler ends the process; ours is called instead, and is there again afterwards."""

    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    def work() -> None:
        with start._own_sigterm():
            start._start(1, None, False)

    monkeypatch.setattr(ray, "init", init)
    assert exit_code(work) == 143


def test_a_closed_terminal_is_not_heard_by_ray(monkeypatch: pytest.MonkeyPatch, heard_signals: None) -> None:
    """Its processes inherit the mask; ours stops, but not before Ray has started."""
    started: list[str] = []

    def init(**_: Any) -> None:
        signal.raise_signal(signal.SIGHUP)
        code = "import signal; signal.raise_signal(signal.SIGHUP); print('lives')"
        started.append(subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True).stdout)

    monkeypatch.setattr(ray, "init", init)
    assert exit_code(lambda: start._start(1, None, False)) == 129
    assert started == ["lives\n"]
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


# Clusters -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


ADDRESSES = {
    "nobody listens": ("127.0.0.1:1", r"127\.0\.0\.1:1: no Ray answers there \(.*refused\); expected"),
    "no Ray listens": ("127.0.0.1:{port}", r"127\.0\.0\.1:\d+: no Ray answers there within 1 s"),
    "Ray Client": ("ray://127.0.0.1:10001", r"ray://127\.0\.0\.1:10001: not an address of a cluster; expected"),
    "RAY_ADDRESS": ("auto", r"auto \(RAY_ADDRESS 127\.0\.0\.1:1\): no Ray answers"),
    "RAY_ADDRESS of Ray Client": ("auto", r"auto \(RAY_ADDRESS ray://there:1\): not an address"),
}


@pytest.mark.parametrize("situation", ADDRESSES)
def test_a_cluster_that_is_not_there(situation: str, deaf_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    address, message = ADDRESSES[situation]
    monkeypatch.setenv("RAY_ADDRESS", "ray://there:1" if "Client" in situation else "127.0.0.1:1")
    monkeypatch.setattr(cluster_address, "_PATIENCE_S", 1)
    with pytest.raises(InputError, match="^the Ray cluster at " + message):
        cluster_address.require_cluster(address.format(port=deaf_port))


CALLS = {
    "tune": lambda address: api.tune(ray_address=address, pretrained_dir="missing.pth"),
    "train": lambda address: api.train(ray_address=address, pretrained_dir="missing.pth"),
    "calibrate": lambda address: api.calibrate(ray_address=address, pretrained_dir="missing.pth", num_workers=2),
    "evaluate": lambda address: api.evaluate(ray_address=address, pretrained_dir="missing.pth", num_workers=2),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_cluster_is_asked_before_anything_is_opened(call: str) -> None:
    with pytest.raises(InputError, match=r"^the Ray cluster at 127\.0\.0\.1:1: no Ray answers there"):
        CALLS[call]("127.0.0.1:1")


@pytest.mark.parametrize(
    "given", ["--ray-address={}", "--ray_address {}", "--wprec 99 --ray-address 127.0.0.1:2 --ray-address {}"]
)
@pytest.mark.parametrize("place", ["127.0.0.1:1", "127.0.0.1:{port}"])
def test_a_command_asks_for_its_cluster_before_it_imports_pytorch(place: str, given: str, deaf_port: int) -> None:
    """Its import alone can take most of the ten seconds after which a user wants to know."""
    address = place.format(port=deaf_port)
    code = (
        "import sys; from vitq_ray.cluster import address; from vitq_ray.commands import main; "
        "address._PATIENCE_S = 0.5; code = main.tune_calib(sys.argv[1:]); "
        "print(code, sorted({'torch', 'timm', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *given.format(address).split()], capture_output=True, text=True)
    assert done.stdout == "2 []\n"
    assert done.stderr.startswith(f"error: the Ray cluster at {address}: no Ray answers there")
    assert done.stderr.count("\n") == 1


JOINED: dict[str, list[str]] = {
    "": [],
    "--ray-address": [],
    "--ray a:1": [],
    "--ray-address=": [],
    "--ray-address a:1 -h": [],
    "--ray-address a:1 --num-workers": ["a:1"],
    "--ray-address a:1 --wprec x": ["a:1"],
    "--ray_address a:1 --ray-address=b:1": ["b:1"],
}


@pytest.mark.parametrize("line", JOINED)
def test_the_cluster_that_a_command_line_names(line: str) -> None:
    assert parser.texts_of(["--ray-address"], line.split()) == JOINED[line]
    assert parser.texts_of(["--ray-address", "--num-workers"], line.split()) == []
    assert parser.texts_of([], line.split()) == []


NOT_ASKED = {
    "calib --ray-address {}": "--ray-address: {} given, but without --num-workers everything runs in this process",
    "evaluate --ray-address {}": "--ray-address: {} given, but without --num-workers everything runs in this process",
    "export --ray-address {}": "unrecognized arguments: --ray-address {}",
    "report --ray-address {}": "unrecognized arguments: --ray-address",
    "sensitivity --ray-address {}": "unrecognized arguments: --ray-address {}",
    "tune --ray-address=": "--ray-address: expected text",
}


@pytest.mark.parametrize("line", NOT_ASKED)
def test_no_cluster_is_asked_that_is_not_joined(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(line.format("127.0.0.1:1").split()) == 2
    assert capsys.readouterr().err.startswith("error: " + NOT_ASKED[line].format("127.0.0.1:1"))


def test_help_asks_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["tune", "--ray-address", "127.0.0.1:1", "--help"]) == 0
    assert "--ray-address" in capsys.readouterr().out


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "no\udc80name", "[::1"])
def test_what_is_no_name_of_a_host(host: str) -> None:
    with pytest.raises(InputError, match=r"no Ray answers there \(.*\); expected a running one") as caught:
        cluster_address.require_cluster(f"{host}:1")
    assert "\n" not in str(caught.value)


def test_a_name_service_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def silent(*_: Any, **__: Any) -> list[Any]:
        released.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    monkeypatch.setattr(cluster_address, "_CONNECT_S", 0.2)
    with pytest.raises(InputError, match=r"no Ray answers there \(nothing within 0\.2 s\); expected"):
        cluster_address.require_cluster("head.example:6379")
    released.set()


def test_an_answer_counts_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cluster_address, "_answered", {})
    monkeypatch.setattr(cluster_address, "_require_port", lambda what, named: asked.append(named))
    monkeypatch.setattr(cluster_address, "_require_answer", lambda *_: None)
    for known in (60.0, 60.0, 0.0):
        monkeypatch.setattr(cluster_address, "_KNOWN_S", known)
        cluster_address.require_cluster("head:6379")
    assert asked == ["head:6379", "head:6379"]


def test_sigterm_is_heard_while_a_cluster_is_asked(deaf_port: int) -> None:
    code = "import sys; from vitq_ray.commands import main; sys.exit(main.tune_calib(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--ray-address", f"127.0.0.1:{deaf_port}"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while run.poll() is None and not children.read_text():  # the process that asks
        time.sleep(0.05)
    run.terminate()
    assert run.communicate(timeout=7)[1] == "error: stopped by SIGTERM\n"
    assert run.returncode == 143


# Ray's end, and its metrics ----------------------------------------------------------------------------------------


def test_streams_are_closed_before_ray_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that a traceback still holds; one that cannot be closed does not keep Ray."""
    ended: list[str] = []

    def stream(name: str, error: Exception | None = None) -> Iterator[int]:
        try:
            yield 1
        finally:
            ended.append(name)
            if error is not None:
                raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(start, "_start", lambda *_: None)
    monkeypatch.setattr(start, "_describe", lambda: start.Cluster(None, 1))
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append("Ray"))
    held = [stream("first"), stream("second", RuntimeError("the cluster is gone"))]

    def consume() -> None:
        with start.cluster():
            for each in held:
                next(start.closed_with_ray(each))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert sorted(ended[:2]) == ["first", "second"]
    assert ended[2:] == ["Ray"]


@pytest.mark.parametrize(
    ("folder", "tag"), [("runs", "runs"), ("modèle", r"mod\xe8le"), ("模型", r"\u6a21\u578b"), ("it's", "it's")]
)
def test_tags_of_metrics_are_ascii(folder: str, tag: str) -> None:
    assert Metrics(folder)._tags({"candidate": "c1"}) == {"run": tag, "candidate": "c1"}


def test_scripts_start_ray_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ENABLE_AUTO_CONNECT", raising=False)
    assert main.main(["tune", "--nonsense"]) == 2
    assert os.environ["RAY_ENABLE_AUTO_CONNECT"] == "0"


def test_the_error_names_of_the_boundary_exist() -> None:
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    assert issubclass(ray.exceptions.OutOfMemoryError, Exception)


# Numbers of workers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "workers"), [("1", (1, 1)), (3, (3, 3)), ("2-8", (2, 8)), ("4-4", (4, 4)), ("01-2", (1, 2))]
)
def test_a_range_of_workers(given: Any, workers: tuple[int, int]) -> None:
    options = TrainOptions.of({"num_workers": given})
    assert options.workers == workers
    assert TrainOptions.of({"num_workers": options.num_workers}).workers == workers  # as run.json has it


@pytest.mark.parametrize("given", ["0", "8-2", "2-", "-2", "2-3-4", "a", "", True, 2.5, "1e3", "0-2"])
def test_no_range_of_workers(given: Any) -> None:
    with pytest.raises(InputError, match=r"expected .* range such as 2-8, got "):
        TrainOptions.of({"num_workers": given})


def test_more_workers_than_memory_are_refused() -> None:
    nodes = [{"CPU": 2.0, "memory": 3e9}, {"CPU": 2.0, "memory": 1.9e9}]
    require_memory(4, 10**9, nodes)
    with pytest.raises(InputError, match=r"5 workers of about 1.0 GB each do not fit into memory; 4 would"):
        require_memory(5, 10**9, nodes)
