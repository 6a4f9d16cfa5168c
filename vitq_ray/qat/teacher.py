"""The teacher: a float model whose logits the student learns from, run for every batch or looked up in a table.

Legend: B images of a micro-batch, K classes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vitq_ray.base.records import checked, own_error
from vitq_ray.data.loader import Batch
from vitq_ray.qat.ranks import EVAL_BATCH, QatData, Ranks, Reader
from vitq_ray.qat.recipe import QatConfig

TEACHER_LOGITS = "teacher_logits.npy"  # of a run folder; as large as the training split, gone when a run is finished

Teacher = Callable[[Batch, Tensor], Tensor]  # (batch, its images as the model takes them) -> logits (B, K)


def running_teacher(model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> Teacher:
    """The teacher's forward pass, in eval mode, for every batch."""
    model.eval()

    def logits(batch: Batch, images: Tensor) -> Tensor:
        with torch.no_grad(), autocast():
            return cast(Tensor, model(images))

    return logits


def stored_teacher(table: npt.NDArray[np.float32], device: torch.device) -> Teacher:
    """Logits computed before, one row per sample id."""

    def logits(batch: Batch, images: Tensor) -> Tensor:
        return torch.from_numpy(table[batch.sample_ids.numpy()]).to(device)

    return logits


def teacher_table(
    path: Path, teacher: Teacher, data: QatData, num_classes: int, read: Reader, ranks: Ranks
) -> npt.NDArray[np.float32]:
    """The teacher's logits of every training image, computed once by all ranks, in a file that they share.

    (images of the split, classes) float32, mapped; 4 GB for every million images of 1000 classes. The file appears
    under its name once complete, so a later start only opens it.
    """
    if not path.exists():
        partial = path.with_suffix(".partial")
        if ranks.is_first:
            shape = (len(data.train), num_classes)
            np.lib.format.open_memmap(partial, "w+", np.float32, shape).flush()
            _reserve(partial)
        ranks.barrier()
        rows = np.load(partial, mmap_mode="r+")
        ids = np.asarray(data.train_ids, np.int64)
        chunks = [ids[i : i + EVAL_BATCH] for i in range(0, len(ids), EVAL_BATCH)][ranks.rank :: ranks.world]
        for batch in read(data.train, np.concatenate(chunks), data.transform, EVAL_BATCH) if chunks else ():
            if len(batch.labels):
                logits = teacher(batch, data.transform.normalize(batch.images.to(ranks.device)))
                rows[batch.sample_ids.numpy()] = logits.float().cpu().numpy()
        rows.flush()
        ranks.barrier()
        if ranks.is_first:
            os.replace(partial, path)
        ranks.barrier()
    table: npt.NDArray[np.float32] = checked(path, "teacher's logits", lambda: np.load(path, mmap_mode="r"))
    wanted = (len(data.train), num_classes)
    if table.shape != wanted or table.dtype != np.float32:
        raise own_error(path, "teacher's logits", f"holds {table.dtype} {table.shape}, expected float32 {wanted}")
    return table


def _reserve(path: Path) -> None:
    """Have the disk keep room for the whole file: where it is full, writing to a mapped one would end the process."""
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                return  # a file system that cannot reserve
            path.unlink()
            raise OSError(error.errno, error.strerror, str(path)) from None


def make_teacher(
    config: QatConfig,
    model: nn.Module | None,
    autocast: Callable[[], AbstractContextManager[Any]],
    data: QatData,
    folder: Path,
    read: Reader,
    ranks: Ranks,
) -> Teacher | None:
    if config.distillation is None or model is None:
        return None
    teacher = running_teacher(model.to(ranks.device).requires_grad_(False), autocast)
    if config.augment != "none":
        return teacher
    classes = int(getattr(model, "num_classes", 0)) or data.train.num_classes_seen
    table = teacher_table(folder / TEACHER_LOGITS, teacher, data, classes, read, ranks)
    return stored_teacher(table, ranks.device)
