"""A search that is killed in the middle of a stage, for tests: `kill -9` at a moment, not at a time.

python tests/killed_search.py MOMENT OPTIONS OF tune_calib.py …
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vitq_ray.commands import main, screen
from vitq_ray.run.folder import RunFolder

MOMENTS = {  # moment: how many of it were begun
    "calibrate": 2,  # batches
    "gradients": 2,  # parts of the model
    "float model": 5,  # batches
    "candidate": 4,  # events, of which each has its scales
    "report": 5,  # batches
    "result.json": 1,  # written, but not under its name yet
}


def killing(moment: str) -> Callable[[str], None]:
    """To be called with the name of whatever begins."""
    left = MOMENTS[moment]

    def begins(name: str) -> None:
        nonlocal left
        left -= name == moment
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return begins


def install(begins: Callable[[str], None]) -> None:
    append, replace = RunFolder.append, os.replace

    def track(self: Any, items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
        for item in items:
            begins(label)
            yield item

    def tell_append(self: RunFolder, event: str, **values: Any) -> None:
        begins(event)
        append(self, event, **values)

    def tell_replace(source: Any, target: Any) -> None:
        begins(os.path.basename(target))
        replace(source, target)

    screen.Terminal.track = track  # type: ignore[method-assign]
    RunFolder.append = tell_append  # type: ignore[method-assign]
    os.replace = tell_replace


if __name__ == "__main__":
    install(killing(sys.argv[1]))
    sys.exit(main.tune_calib(sys.argv[2:]))
