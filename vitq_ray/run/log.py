"""trials.jsonl: one line per event, appended and synced, read back with proof that it is what was written.

    {"event": "begun", "format": 3, "vitq_ray": …, "run": id of run.json, "time": …, "check": "1f0a93c2"}
    {"event": "chunk", "name": "c003", "start": 200, …, "check": "77d01b4e"}

`check` is the CRC-32 of everything in the file up to it. A line that was changed, lost, doubled or moved is found at
the first check behind it. Lines that an earlier version began with have none; what is appended to them has.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitq_ray.base.config import InputError
from vitq_ray.base.files import append_whole, one_line
from vitq_ray.base.formats import require_format, stamp
from vitq_ray.base.records import NUMBER, Schema, problem_with
from vitq_ray.measure.metrics import METRICS

_CHECKED_SINCE = 3
_CHECK = re.compile(rb'(.*), "check": "([0-9a-f]{8})"\}')

# What an event must hold; of other events, a name.
EVENTS: dict[str, Schema] = {
    "float": {"sample_ids": [int]},
    "engine": {"name": str, "arithmetic": str, "images_per_second": dict},
    "candidate": {"name": str, "setting": dict, "predicted_noise": NUMBER, "same_as": (str, type(None))},
    "chunk": {"name": str, "start": int, "images": int},
    "decision": {"name": str, "verdict": str, "images": int},
    "effect": {"kind": str, "name": str, "images": int, "kl": str},
    "float_set": {"name": str, "setting": dict},
    "winner": {"name": str},
    "qat_epoch": {"name": str, "epoch": int, "images": int, "top1_correct": int, "loss": (*NUMBER, type(None))},
    "qat_failed": {"name": str, "reason": str},
}


class Log:
    """The log of one run. `run` is the id of its run.json; None where that has none, as of an earlier version."""

    def __init__(self, path: Path, run: str | None = None) -> None:
        self.path = path
        self._run = run
        self._crc: int | None = None  # of all that is in the file; None: not read yet

    def append(self, event: str, **values: Any) -> None:
        """One event, on disk when this returns, or OSError and nothing of it. The first one says who began the log."""
        lines = [{"event": event, "time": round(time.time(), 3), **values}]
        if self._crc is None:
            self.events()
        if not self.path.exists() or not self.path.stat().st_size:
            run = {} if self._run is None else {"run": self._run}
            lines.insert(0, {"event": "begun", **stamp("log"), **run})
        data, crc = b"", self._crc or 0
        for line in lines:
            text = json.dumps(line, allow_nan=False)[:-1].encode()
            checked = b'%s, "check": "%08x"}\n' % (text, zlib.crc32(text, crc))
            data, crc = data + checked, zlib.crc32(checked, crc)
        append_whole(self.path, data)
        self._crc = crc

    def events(self, whole: bool = True) -> list[dict[str, Any]]:
        """All events so far, in order, without the first line and the checksums.

        Where the log need not be `whole`, half a line at its end, being written or left by a kill, does not count.

        Raises:
            InputError: naming the line, where one is not an event or not what was written; where a newer version began
                the log, or another run.
        """
        try:
            lines = (self.path.read_bytes() if self.path.exists() else b"").split(b"\n")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from None
        if not lines[-1] or not whole:
            lines.pop()
        events, crc, checks = [], 0, False
        for number, line in enumerate(lines, start=1):
            found, event = _CHECK.fullmatch(line), self._event(number, line)
            if number == 1 and event["event"] == "begun":
                checks = self._began(event) >= _CHECKED_SINCE
            else:
                events.append(event)
            checks = checks or found is not None
            if checks and (found is None or zlib.crc32(found[1], crc) != int(found[2], 16)):
                raise self.error(number, "was changed, or lines before it are lost: its checksum does not fit")
            event.pop("check", None)
            crc = zlib.crc32(line + b"\n", crc)
        self._crc = crc
        return events

    def _event(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            values = json.loads(line)
        except ValueError:
            raise self.error(number, f"not an event: {line[:80]!r}") from None
        if not isinstance(values, dict):
            raise self.error(number, f"not an event: {line[:80]!r}")
        problem = problem_with(values, {"event": str}) or problem_with(values, EVENTS.get(values["event"], {}))
        if problem is None and values["event"] == "chunk":
            measured = {name: str for name in METRICS if name in values}
            problem = problem_with(values, measured) if measured else f"none of {', '.join(METRICS)} is there"
        if problem is not None:
            raise self.error(number, f"not a whole event: {problem}")
        return values

    def _began(self, event: Mapping[str, Any]) -> int:
        """The format that the first line says. InputError where a newer version wrote it, or it is another run's."""
        found = require_format("log", str(self.path), event)
        if self._run is not None and found >= _CHECKED_SINCE and event.get("run") != self._run:
            raise InputError(f"{self.path}: is the log of another run than run.json; bring back the one of this run")
        return found

    def error(self, number: int | None, problem: str) -> InputError:
        """What is wrong with a line, or with what the log says as a whole, and what to do."""
        if number is None:
            return InputError(f"{self.path}: {one_line(problem)}; this run cannot be resumed, begin a new one")
        what = f"{self.path}: line {number}: {one_line(problem)}"
        return InputError(f"{what}; cut the log off before it (head -n {number - 1}) and resume the run")

    def cut_half_line(self) -> None:
        """What a kill left of a last line is cut off."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
            self._crc = None
