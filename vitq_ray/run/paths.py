"""Paths among the options of run.json: below the run's folder relative to it, else absolute, so that a run can be moved
and resumed from any working directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PATHS = ("pretrained_dir", "data_path", "teacher", "from_run", "run")


def stored_paths(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Options as run.json has them."""
    found, root = absolute_paths(options), os.path.abspath(folder)
    for name in _given_paths(found):
        if os.path.commonpath((root, found[name])) == root:
            found[name] = os.path.relpath(found[name], root)
    return found


def absolute_paths(options: Mapping[str, Any], folder: Path = Path()) -> dict[str, Any]:
    """Options with absolute paths; relative ones begin at `folder`."""
    root = os.path.abspath(folder)
    places = {name: os.path.normpath(os.path.join(root, options[name])) for name in _given_paths(options)}
    return {**options, **places}


def _given_paths(options: Mapping[str, Any]) -> list[str]:
    """Those that are paths of files, not URIs."""
    values = {name: options.get(name) for name in _PATHS}
    return [name for name, value in values.items() if isinstance(value, str) and "://" not in value]
