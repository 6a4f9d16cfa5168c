"""The options of a run that goes on: those of before, and the free ones as given now."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from vitq_ray.base.config import InputError
from vitq_ray.base.files import real_path
from vitq_ray.commands.declare import Options
from vitq_ray.commands.inputs import find_space
from vitq_ray.run.folder import RUN, RunFolder

O = TypeVar("O", bound=Options)  # noqa: E741


_FILES = frozenset({"pretrained_dir", "data_path", "teacher", "search_space", "from_run"})
# Files that may have moved, where the command compares their fingerprints. Not their names: results are named after
# them, and with `auto` the name may say what model it is.
_MAY_MOVE = frozenset({"pretrained_dir", "teacher"})


def stored_run(folder: str, script: str) -> dict[str, Any]:
    """run.json of a run's folder. InputError where it holds no run, or one of another script."""
    return RunFolder.find(Path(folder), script).read_run()


def with_stored(options: O, stored: Mapping[str, Any], free: Collection[str]) -> O:
    """The stored options; of those given now the free ones count, and the others must be as stored.

    A URI counts as given, since stored ones have lost their keys.
    """
    now = options.to_dict()
    for name in sorted(options.given - (set(free) - _MAY_MOVE)):
        moved = name in free and _file_name(now[name]) == _file_name(stored.get(name))
        if not moved and not _same(name, now[name], stored.get(name)):
            raise InputError(
                f"{options.name_of(name)}: {now[name]} given, but {now['resume']} was started with {stored.get(name)}"
            )
    before = {name: stored[name] for name in options.declared() if name in stored and name not in ("resume", "output")}
    try:
        kept = type(options).of(before, options.typed).to_dict()
    except InputError as error:
        raise InputError(f"{Path(now['resume']) / RUN}: {error}") from None
    uris = [name for name in _FILES & options.given if "://" in getattr(options, name)]
    merged = type(options).of({**kept, **options.only({*free, *uris})}, options.typed)
    return replace(merged, given=options.given & frozenset(free))


def _file_name(path: str | None) -> str | None:
    return path and path.partition("?")[0].rpartition("/")[2]


def _same(name: str, given: Any, stored: Any) -> bool:
    """Whether an option was given as it is stored; files may be spelled differently."""
    if given == stored or name not in _FILES or given is None or stored is None:
        return bool(given == stored)
    return _place(name, given) == _place(name, stored)


def _place(name: str, text: str) -> str:
    """What a path or the name of a bundled space stands for. A URI, and a space that is not there, for itself."""
    if "://" in text:
        return text
    if name == "search_space":
        with suppress(InputError):
            text = find_space(text)
    return str(real_path(text))
