"""sites.npz: what every candidate of a search does at every site, and what is forecast to be lost there.
scales.json: amax before and after a training.

Both are for reports: no run is decided by them, or needs them to go on.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitq_ray.base.config import InputError
from vitq_ray.base.files import atomic_file, one_line, write_json
from vitq_ray.base.formats import require_format, stamp
from vitq_ray.quant.plan import Plan, SitePlan

SITES, SCALES = "sites.npz", "scales.json"
MOST_CANDIDATES = 1000  # that are kept: some 3 kB each
Floats = npt.NDArray[np.float32]
Planned = tuple[str, Plan, Mapping[str, float]]  # name of a candidate, its plan, its forecast by site


@dataclass(frozen=True)
class SiteTable:
    """Candidates C by sites S.

    Attributes:
        forecasts: what `loss` is: `predicted_kl` in nats, or `predicted_noise`, noise over signal.
        loss, amax: (C, S) float32; the loss of a site that is off is 0; amax is the largest of a weight's rows.
        bits: (C, S) uint8, 0 where the site is off.
    """

    forecasts: str
    candidates: tuple[str, ...]
    sites: tuple[str, ...]
    loss: Floats
    amax: Floats
    bits: npt.NDArray[np.uint8]

    @staticmethod
    def of(forecasts: str, planned: Iterable[Planned]) -> SiteTable:
        """Of at least one candidate."""
        rows = list(planned)
        sites = tuple(rows[0][1].sites)
        loss = [[by_site.get(key, 0.0) for key in sites] for _, _, by_site in rows]
        amax = [[largest(plan.sites[key]) for key in sites] for _, plan, _ in rows]
        bits = [[plan.sites[key].rule.bits * plan.sites[key].rule.on for key in sites] for _, plan, _ in rows]
        names = tuple(name for name, _, _ in rows)
        return SiteTable(
            forecasts, names, sites, np.array(loss, np.float32), np.array(amax, np.float32), np.array(bits, np.uint8)
        )

    def row(self, candidate: str) -> int | None:
        """Where a candidate stands; None where it is not kept."""
        return self.candidates.index(candidate) if candidate in self.candidates else None


def largest(site: SitePlan) -> float:
    """amax of a site; of a weight with one a row, the largest."""
    return float(site.amax.max())


def write_sites(folder: Path, table: SiteTable) -> None:
    """sites.npz, atomically."""
    values = {name: np.array(value) for name, value in {**stamp("sites"), **vars(table)}.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **values)
    with atomic_file(folder / SITES) as stream:
        stream.write(buffer.getvalue())


def read_sites(folder: Path) -> SiteTable | None:
    """What `write_sites` wrote; None where there is none. InputError where it is damaged, or of a newer version."""
    path = folder / SITES
    if not path.is_file():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
        require_format("sites", str(path), {"format": int(arrays["format"]), "vitq_ray": str(arrays["vitq_ray"])})
        names, sites = (tuple(map(str, arrays[name])) for name in ("candidates", "sites"))
        loss, amax, bits = (arrays[name].reshape(len(names), len(sites)) for name in ("loss", "amax", "bits"))
        return SiteTable(str(arrays["forecasts"]), names, sites, loss, amax, bits)
    except InputError:
        raise
    except Exception as error:  # damaged bytes make zipfile, zlib and NumPy raise nearly anything
        raise InputError(f"{path}: truncated or damaged ({one_line(error)[:200]})") from None


def write_scales(folder: Path, before: Plan, after: Plan) -> None:
    """scales.json: {site that is on: [amax before, after training]}."""
    rows = {key: [largest(site), largest(after.sites[key])] for key, site in before.sites.items() if site.rule.on}
    write_json(folder / SCALES, {**stamp("scales"), "sites": rows})


def read_scales(folder: Path) -> dict[str, tuple[float, float]] | None:
    """What `write_scales` wrote; None where there is none. InputError where it is not that."""
    path = folder / SCALES
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        require_format("scales", str(path), values)
        return {str(key): (float(before), float(after)) for key, (before, after) in values["sites"].items()}
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: not the scales of a training ({one_line(error)[:200]})") from None
