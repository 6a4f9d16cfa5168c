"""images.parquet: what the float model and the winner of a search say of every report image.

With small pictures of those on which they differ. For reports; no run is decided by it, or needs it to go on.

    batches of the report stage ──► ImageJudge ──► ImageTable ──► images.parquet
"""

from __future__ import annotations

import heapq
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from vitq_ray.base.config import InputError
from vitq_ray.base.files import atomic_file, one_line
from vitq_ray.base.formats import require_format, stamp
from vitq_ray.data.loader import Batch
from vitq_ray.measure.fidelity import kl_to_float
from vitq_ray.measure.metrics import FLOAT

IMAGES = "images.parquet"
MOST_PICTURES, _SIDE = 48, 96  # pixels
_SMALL = 48  # pixels up to which a picture is kept without loss
_COLUMNS = {
    "sample_id": np.int64,
    "label": np.int32,
    "float_class": np.int32,
    "quantized_class": np.int32,
    "float_margin": np.float32,
    "quantized_margin": np.float32,
    "kl": np.float32,
}


@dataclass(frozen=True)
class ImageTable:
    """One row an image.

    Attributes:
        columns: {name of `_COLUMNS`: (N,) values}. A margin is the probability of the class that a model says, less
            that of its second choice; `label` is `NO_LABEL` where there is none.
        names: of the image files, as the data set has them.
        pictures: {row: bytes of a PNG or JPEG} of images on which the two models differ, the surest first.
    """

    columns: Mapping[str, npt.NDArray[Any]]
    names: tuple[str, ...]
    pictures: Mapping[int, bytes]

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.columns[name]

    @property
    def flipped(self) -> npt.NDArray[np.bool_]:
        """(N,) the quantized model says another class than the float model."""
        return np.asarray(self["float_class"] != self["quantized_class"])


class ImageJudge:
    """Sees every batch of the report stage, with the float model's logits before the winner's."""

    def __init__(self, name_of: Callable[[int], str]) -> None:
        """`name_of` gives the file name of a sample."""
        self._name_of = name_of
        self._float: Tensor | None = None
        self._parts: list[dict[str, npt.NDArray[Any]]] = []
        self._seen = 0
        self._pictures: list[tuple[float, int, npt.NDArray[np.uint8]]] = []  # a heap: the least sure one first

    def __call__(self, name: str, batch: Batch, logits: Tensor) -> None:
        """As `evaluate_variants` tells of a batch."""
        if name == FLOAT:
            self._float = logits
            return
        assert self._float is not None
        columns = {"sample_id": batch.sample_ids, "label": batch.labels, "kl": kl_to_float(logits, self._float)}
        for model, values in ((FLOAT, self._float), ("quantized", logits)):
            top = values.double().softmax(dim=1).topk(min(2, values.shape[1]), dim=1)
            columns |= {f"{model}_class": top.indices[:, 0], f"{model}_margin": top.values[:, 0] - top.values[:, -1]}
        part = {column: columns[column].cpu().numpy().astype(kind) for column, kind in _COLUMNS.items()}
        self._keep_pictures(part, batch.images)
        self._parts.append(part)
        self._seen += len(part["label"])

    def _keep_pictures(self, part: Mapping[str, npt.NDArray[Any]], images: Tensor) -> None:
        for i in np.flatnonzero(part["float_class"] != part["quantized_class"]).tolist():
            sure = float(part["float_margin"][i])
            heapq.heappush(self._pictures, (sure, self._seen + i, images[i].cpu().numpy().copy()))
            if len(self._pictures) > MOST_PICTURES:
                heapq.heappop(self._pictures)

    def table(self) -> ImageTable:
        columns = {name: np.concatenate([part[name] for part in self._parts]) for name in _COLUMNS}
        names = tuple(map(self._name_of, columns["sample_id"].tolist()))
        return ImageTable(columns, names, {row: picture(x) for _, row, x in sorted(self._pictures, reverse=True)})


def picture(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A small image (S, S, 3) as PNG, a larger one as a JPEG of 96 pixels."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= _SMALL:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((_SIDE, _SIDE))
        image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def write_images(folder: Path, table: ImageTable) -> None:
    """images.parquet, atomically."""
    order = [table.pictures.get(row) for row in range(len(table.names))]
    columns = {**table.columns, "name": list(table.names), "picture": pa.array(order, pa.binary())}
    arrow = pa.table(columns).replace_schema_metadata({k: str(v) for k, v in stamp("images").items()})
    with atomic_file(folder / IMAGES) as stream:
        pq.write_table(arrow, stream, compression="zstd")


def read_images(folder: Path) -> ImageTable | None:
    """What `write_images` wrote; None where there is none. InputError where it is damaged, or of a newer version."""
    path = folder / IMAGES
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
        said = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        require_format("images", str(path), {**said, "format": int(said["format"])})
        columns = {name: table[name].to_numpy().astype(kind) for name, kind in _COLUMNS.items()}
        found = {row: data for row, data in enumerate(table["picture"].to_pylist()) if data is not None}
        surest = sorted(found, key=lambda row: -columns["float_margin"][row])
        return ImageTable(columns, tuple(table["name"].to_pylist()), {row: found[row] for row in surest})
    except InputError:
        raise
    except Exception as error:  # damaged bytes make Arrow raise nearly anything
        raise InputError(f"{path}: truncated or damaged ({one_line(error)[:200]})") from None
