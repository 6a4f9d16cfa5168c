"""Checkpoint files: read whole, recognised by their content, as finite float32 arrays under the file's own names.

Nothing is dropped or guessed in silence, and no pickle is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line, read_bytes
from vitq_ray.base.memory import machine_memory, size_text
from vitq_ray.quant.sites import LAYER_PREFIX

log = logging.getLogger(__name__)

State = dict[str, Tensor]
Read = tuple[State, str | None]  # arrays, and the model that the file says they are of
_PICKLE = "{}: holds a pickled object{}, which is never executed; expected {}"
_CONVERT = (
    "a plain state_dict of tensors. A file that you trust is converted once by: "
    "import torch; d = torch.load('IN', weights_only=False); "
    "torch.save({k: d[k] for k in ('state_dict', 'state_dict_ema', 'model', 'model_ema', 'arch') if k in d}, 'OUT')"
)
_AVERAGES = {"state_dict_ema": "state_dict", "model_ema": "model"}  # running average: the weights it is of
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.", "student.", "teacher.")

GOOGLE, TIMM, VIT_PYTORCH = "google", "timm", "ViT-pytorch"  # whose names the arrays have


@dataclass(frozen=True)
class Checkpoint:
    """The arrays of one file under the file's own names.

    Attributes:
        names: whose names these are: `GOOGLE`, `TIMM` or `VIT_PYTORCH`.
        arch: the timm model that the file says it is of; None where it says nothing.
    """

    path: str
    names: str
    arrays: Mapping[str, Tensor]
    arch: str | None = None

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Shape of an array that must be there and have `ndim` axes."""
        if name not in self.arrays:
            example = f" such as {next(iter(self.arrays))!r}" if self.arrays else ""
            raise InputError(f"{self.path}: array {name!r} is missing; {len(self.arrays)} found{example}")
        shape = tuple(self.arrays[name].shape)
        if len(shape) != ndim:
            raise InputError(f"{self.path}: array {name!r} has shape {shape}, expected {ndim} axes")
        return shape


def read_checkpoint(path: str) -> Checkpoint:
    """The arrays of a Google `.npz`, or of a timm, ViT-pytorch or calibrated `.pth` or `.safetensors`.

    The format is told by content. Floating-point arrays become float32. Paths may be `s3://`. Raises
    InputError for a file that is absent, damaged, of another format, or holds a pickle, NaN or Inf.
    """
    data = read_bytes(path, "a checkpoint")
    try:
        read = _reader(path, data)
        found, arch = read(path, data)
        arrays = {name: _as_float32(path, name, array, len(data)) for name, array in found.items()}
    except InputError:
        raise
    except Exception as error:  # damaged bytes make zipfile, NumPy and torch raise nearly anything
        raise InputError(f"{path}: truncated or damaged ({one_line(error)[:200]})") from None
    return Checkpoint(path, GOOGLE if read is _read_npz else _names_of(arrays), arrays, arch)


def _names_of(arrays: Mapping[str, Tensor]) -> str:
    return VIT_PYTORCH if any(name.startswith(LAYER_PREFIX) for name in arrays) else TIMM


def _reader(path: str, data: bytes) -> Callable[[str, bytes], Read]:
    if data[:2] == b"PK":
        return _zip_reader(path, data)
    if data[:1] == b"\x80":  # torch.save before 1.6, or any other pickle, which torch.load refuses
        return _read_torch
    if data[8:9] == b"{":  # an 8-byte length, then a header in JSON
        return _read_safetensors
    raise InputError(f"{path}: not a checkpoint (it starts with {data[:8]!r}); expected .npz, .pth or .safetensors")


def _zip_reader(path: str, data: bytes) -> Callable[[str, bytes], Read]:
    archive = zipfile.ZipFile(io.BytesIO(data))
    size = sum(member.file_size for member in archive.infolist())
    if size > machine_memory():
        raise InputError(f"{path}: unpacks to {size_text(size)}, this machine has {size_text(machine_memory())}")
    names = archive.namelist()
    for suffix, reader in {".npy": _read_npz, "data.pkl": _read_torch}.items():
        if any(name.endswith(suffix) for name in names):
            return reader
    raise InputError(f"{path}: an archive of {len(names)} files without arrays; expected .npz or .pth")


def _read_npz(path: str, data: bytes) -> Read:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise InputError(_PICKLE.format(path, "", "plain arrays")) from None
        raise
    return {name: _from_numpy(path, name, array) for name, array in arrays.items()}, None


def _from_numpy(path: str, name: str, array: Any) -> Tensor:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: member {name!r} is not an array")
    if array.dtype == np.dtype("V2"):  # bfloat16, which NumPy knows only as two bytes
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiub":
        raise InputError(f"{path}: array {name!r} has dtype {array.dtype}, expected numbers")
    tensor = torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C", copy=None))
    # Google's files hold the vectors of a GroupNorm as (1, 1, 1, channels).
    return tensor.flatten() if re.search(r"(^|/)gn\w+/", name) else tensor


def _read_torch(path: str, data: bytes) -> Read:
    _require_checksums(path, data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about archives that are refused just below
            payload = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise InputError(_PICKLE.format(path, what, _CONVERT)) from None
    return _state_dict(path, payload)


def _require_checksums(path: str, data: bytes) -> None:
    """PyTorch writes checksums into its archives and does not look at them."""
    if data[:2] == b"PK" and (member := zipfile.ZipFile(io.BytesIO(data)).testzip()) is not None:
        raise InputError(
            f"{path}: damaged: the checksum of {member!r} is another (or it was saved with "
            "torch.serialization.set_crc32_options(False): save it again without)"
        )


def _read_safetensors(path: str, data: bytes) -> Read:
    return _state_dict(path, safetensors.torch.load(data))


def _state_dict(path: str, payload: Any) -> Read:
    """The state dict inside what training scripts save, nested or under the prefixes of wrappers; and its `arch`."""
    arch = payload.get("arch") if isinstance(payload, Mapping) else None
    while isinstance(payload, Mapping) and (key := _chosen_weights(path, payload)) is not None:
        payload = payload[key]
    if not isinstance(payload, Mapping):
        raise InputError(f"{path}: holds a {type(payload).__name__}, expected a state_dict")
    for name, value in payload.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{path}: {name!r} is a {type(value).__name__}, expected a named tensor")
    state = {name: value.detach() for name, value in payload.items()}
    return _without_wrappers(state), arch if isinstance(arch, str) else None


def _chosen_weights(path: str, payload: Mapping[Any, Any]) -> str | None:
    """Which entry has the weights; None where `payload` itself is them. Of weights and their running average it is the
    average, as timm does. InputError where several sets are there and none is known to be meant."""
    known = (*_AVERAGES, *_AVERAGES.values())
    sets = [
        key for key, value in payload.items() if isinstance(value, Mapping) and (key in known or _has_arrays(value))
    ]
    filled = [key for key in sets if payload[key]]
    chosen = next((key for key in known if key in filled), None)
    if chosen is None:
        if any(isinstance(value, Tensor) for value in payload.values()) or not sets:
            return None
        chosen = sets[0]
        if len(sets) > 1:
            raise InputError(
                f"{path}: holds several sets of weights, {', '.join(map(repr, sets))}; expected one, for example as "
                f"torch.save(torch.load('IN', weights_only=True)[{chosen!r}], 'OUT') writes it"
            )
    alike = [key for key in filled if key in known or not set(payload[key]).isdisjoint(payload[chosen])]
    others = [key for key in alike if key != chosen]
    if others:
        what = f"the running average {chosen!r}, as timm does" if chosen in _AVERAGES else repr(chosen)
        message = (
            "%s: holds several sets of weights, %s; taken is %s (another: torch.save(torch.load('IN')[%r], 'OUT'))"
        )
        log.warning(message, path, ", ".join(map(repr, alike)), what, others[0])
    return str(chosen)


def _has_arrays(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(item, Tensor) for item in value.values())


def _without_wrappers(state: State) -> State:
    """Without the prefixes that DDP, torch.compile, Lightning and others put before all names, in whatever order."""
    while prefix := next((p for p in _WRAPPERS if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _as_float32(path: str, name: str, tensor: Tensor, file_bytes: int) -> Tensor:
    tensor = _plain(path, name, tensor, file_bytes)
    if not tensor.is_floating_point():
        return tensor  # a counter of BatchNorm; anything else fails the comparison with the model
    tensor = tensor.to(torch.float32)
    # The extremes carry every NaN and Inf, and take a fifth of the time of looking at each value.
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise InputError(f"{path}: array {name!r} has NaN or infinite values")
    return tensor


def _plain(path: str, name: str, tensor: Tensor, file_bytes: int) -> Tensor:
    """With every element in memory of its own. InputError for sparse, nested, quantized and meta tensors."""
    kind = "nested" if tensor.is_nested else "sparse" if tensor.layout is not torch.strided else ""
    kind = kind or ("quantized" if tensor.is_quantized else "meta (it has no values)" if tensor.is_meta else "")
    if kind:
        raise InputError(f"{path}: array {name!r} is a {kind} tensor, expected a dense one of numbers")
    size = tensor.numel() * tensor.element_size()
    if size <= tensor.untyped_storage().nbytes():
        return tensor
    if size > file_bytes:  # elements that share memory: a few bytes of a file may claim to be terabytes
        raise InputError(
            f"{path}: array {name!r} repeats its elements (strides {tuple(tensor.stride())}): {size_text(size)}, the "
            f"file has {size_text(file_bytes)}; expected a plain tensor"
        )
    return tensor.clone(memory_format=torch.contiguous_format)


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256, in hex, of the names, dtypes, shapes and bytes of all tensors, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
