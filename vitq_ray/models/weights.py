"""Checkpoint files: read whole, recognised by their content, as finite float32 arrays under the file's own names.

Nothing is dropped or guessed in silence, and no pickle is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line, read_bytes

State = dict[str, Tensor]
_PICKLE = "{}: holds a pickled object{}, which is never executed; expected {}"


@dataclass(frozen=True)
class Checkpoint:
    """The arrays of one file under the file's own names."""

    path: str
    is_google: bool
    arrays: Mapping[str, Tensor]

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Shape of an array that must be there and have `ndim` axes."""
        if name not in self.arrays:
            example = f" such as {next(iter(self.arrays))!r}" if self.arrays else ""
            raise InputError(f"{self.path}: array {name!r} is missing; {len(self.arrays)} found{example}")
        shape = tuple(self.arrays[name].shape)
        if len(shape) != ndim:
            raise InputError(f"{self.path}: array {name!r} has shape {shape}, expected {ndim} axes")
        return shape


def read_state(path: str | Path) -> State:
    """The arrays of a Google `.npz`, or of a timm or calibrated `.pth` or `.safetensors`, under their names.

    The format is told by content. Floating-point arrays become float32. Paths may be `s3://`. Raises
    InputError for a file that is absent, damaged, of another format, or holds a pickle, NaN or Inf.
    """
    return dict(read_checkpoint(str(path)).arrays)


def read_checkpoint(path: str) -> Checkpoint:
    data = read_bytes(path, "a checkpoint")
    try:
        read = _reader(path, data)
        arrays = read(path, data)
    except InputError:
        raise
    except Exception as error:  # damaged bytes make zipfile, NumPy and torch raise nearly anything
        raise InputError(f"{path}: truncated or damaged ({one_line(error)[:200]})") from None
    return Checkpoint(path, read is _read_npz, {name: _as_float32(path, name, array) for name, array in arrays.items()})


def _reader(path: str, data: bytes) -> Callable[[str, bytes], State]:
    if data[:2] == b"PK":
        return _zip_reader(path, data)
    if data[:1] == b"\x80":  # torch.save before 1.6, or any other pickle, which torch.load refuses
        return _read_torch
    if data[8:9] == b"{":  # an 8-byte length, then a header in JSON
        return _read_safetensors
    raise InputError(f"{path}: not a checkpoint (it starts with {data[:8]!r}); expected .npz, .pth or .safetensors")


def _zip_reader(path: str, data: bytes) -> Callable[[str, bytes], State]:
    names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    for suffix, reader in {".npy": _read_npz, "data.pkl": _read_torch}.items():
        if any(name.endswith(suffix) for name in names):
            return reader
    raise InputError(f"{path}: an archive of {len(names)} files without arrays; expected .npz or .pth")


def _read_npz(path: str, data: bytes) -> State:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise InputError(_PICKLE.format(path, "", "plain arrays")) from None
        raise
    return {name: _from_numpy(path, name, array) for name, array in arrays.items()}


def _from_numpy(path: str, name: str, array: Any) -> Tensor:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: member {name!r} is not an array")
    if array.dtype == np.dtype("V2"):  # bfloat16, which NumPy knows only as two bytes
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiub":
        raise InputError(f"{path}: array {name!r} has dtype {array.dtype}, expected numbers")
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    # Google's files hold the vectors of a GroupNorm as (1, 1, 1, channels).
    return tensor.flatten() if re.search(r"(^|/)gn\w+/", name) else tensor


def _read_torch(path: str, data: bytes) -> State:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about archives that are refused just below
            payload = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise InputError(_PICKLE.format(path, what, "a plain state_dict of tensors")) from None
    return _state_dict(path, payload)


def _read_safetensors(path: str, data: bytes) -> State:
    return _state_dict(path, safetensors.torch.load(data))


def _state_dict(path: str, payload: Any) -> State:
    """The state dict inside what training scripts save: nested, or prefixed by DDP or torch.compile."""
    for key in ("state_dict", "model"):
        if isinstance(payload, Mapping) and isinstance(payload.get(key), Mapping):
            payload = payload[key]
    if not isinstance(payload, Mapping):
        raise InputError(f"{path}: holds a {type(payload).__name__}, expected a state_dict")
    for name, value in payload.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{path}: {name!r} is a {type(value).__name__}, expected a named tensor")
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in payload):
            payload = {name.removeprefix(prefix): value for name, value in payload.items()}
    return {name: value.detach() for name, value in payload.items()}


def _as_float32(path: str, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor  # a counter of BatchNorm; anything else fails the comparison with the model
    tensor = tensor.to(torch.float32)
    # The extremes carry every NaN and Inf, and take a fifth of the time of looking at each value.
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise InputError(f"{path}: array {name!r} has NaN or infinite values")
    return tensor


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256, in hex, of the names, dtypes, shapes and bytes of all tensors, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
