"""Float Vision Transformers: their names, their geometry, and strict loading of a checkpoint.

A checkpoint is read whole, recognised by its content and compared array by array with the model it is meant
for: nothing is left random, dropped or guessed in silence, and no pickle is ever executed.

    path or s3://  ->  Checkpoint: finite float32 arrays under the file's own names
                   ->  Architecture: what their shapes say  ->  Geometry: what is asked for, or `auto`
                   ->  timm VisionTransformer without memory  ->  same arrays, same shapes?  ->  LoadedModel

Google's `.npz` names are tied to timm's by one table (`google_rules`), which loading and `google_arrays` read
in opposite directions. timm's own `.pth` and `.safetensors` need no translation.

Legend: C width, H heads, D head width, N tokens, k kernel side.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import logging
import math
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import HybridEmbed, PatchEmbed, StdConv2dSame, resample_abs_pos_embed
from timm.models import is_model_in_modules
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitq_ray.base.config import Config, InputError, require_int
from vitq_ray.base.files import one_line, read_bytes
from vitq_ray.quant.sites import LAYER_PREFIX
from vitq_ray.quant.vit import require_supported

log = logging.getLogger(__name__)

AUTO = "auto"
AUTO_HEAD_WIDTH = 64  # of every plain ViT that Google published, and of nearly all of timm's
Channels = tuple[float, float, float]
HALF: Channels = (0.5, 0.5, 0.5)  # Google's mean and std

# ---- names and geometry ----------------------------------------------------------------------------------

_BASE = {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072}
_LARGE = {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096}
_HUGE = {"width": 1280, "depth": 32, "heads": 16, "mlp_width": 5120}
_RESNET50 = {"hybrid_stages": (3, 4, 9), "hybrid_widths": (64, 256, 512, 1024)}
_GOOGLE: dict[str, dict[str, Any]] = {
    "ViT-B_16": {"patch_size": 16, **_BASE},
    "ViT-B_32": {"patch_size": 32, **_BASE},
    "ViT-L_16": {"patch_size": 16, **_LARGE},
    "ViT-L_32": {"patch_size": 32, **_LARGE},
    "ViT-H_14": {"patch_size": 14, **_HUGE},
    "R50-ViT-B_16": {"patch_size": 16, **_BASE, **_RESNET50},
}
_RESOLUTIONS = {"": 384, "-224": 224}  # pixels, by the end of the name
GOOGLE_MODEL_TYPES = tuple(name + end for end in _RESOLUTIONS for name in _GOOGLE)
_TIMM_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit")  # where timm's plain ViTs live


@dataclass(frozen=True)
class Geometry(Config):
    """Everything needed to build the float model again; a JSON value through `to_dict` and `from_dict`.

    `patch_size` is the side, in pixels, of what one token covers. In a hybrid the patch convolution sees the
    feature map of the ResNet, so its kernel is smaller (`patch_kernel`). `hybrid_stages` are the bottleneck
    units of each ResNet stage, `hybrid_widths` the channels after the stem and after each stage. `pre_logits`
    is the width of the tanh(Linear) between the pooled token and the head. With `timm_name` the model comes
    from timm's registry and the other fields describe it.
    """

    model_type: str
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    img_size: int
    num_classes: int
    num_prefix_tokens: int = 1
    pre_logits: int | None = None
    hybrid_stages: tuple[int, ...] | None = None
    hybrid_widths: tuple[int, ...] | None = None
    timm_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("patch_size", "width", "depth", "heads", "mlp_width", "img_size", "num_classes"):
            require_int(name, getattr(self, name), 1)
        require_int("num_prefix_tokens", self.num_prefix_tokens, 0)
        if self.pre_logits is not None:
            require_int("pre_logits", self.pre_logits, 1)
        if self.width % self.heads:
            raise InputError(f"heads: {self.heads} does not divide the width {self.width}")
        if self.img_size % self.patch_size:
            lower = self.img_size // self.patch_size * self.patch_size
            raise InputError(
                f"img_size: {self.img_size} is not a multiple of the patch size {self.patch_size}; "
                f"expected for example {lower or self.patch_size} or {lower + self.patch_size}"
            )
        self._restore_tuples()
        self._require_hybrid()

    def _restore_tuples(self) -> None:
        for name in ("hybrid_stages", "hybrid_widths"):  # JSON knows only lists
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))

    def _require_hybrid(self) -> None:
        stages, widths = self.hybrid_stages, self.hybrid_widths
        if stages is None and widths is None:
            return
        if not stages or widths is None or len(widths) != len(stages) + 1:
            raise InputError(f"hybrid: expected stages and one width more, got {stages} and {widths}")
        for units in stages:
            require_int("units of a hybrid stage", units, 1)
        # GroupNorm has 32 groups, and a bottleneck is a quarter as wide inside as at its end.
        for width, multiple in zip(widths, (32, *[128] * len(stages)), strict=True):
            if width < 1 or width % multiple:
                raise InputError(f"hybrid_widths: expected multiples of {multiple}, got {width} in {widths}")
        if self.patch_size % self.backbone_stride:
            raise InputError(
                f"patch_size: {self.patch_size} is no multiple of the ResNet's stride {self.backbone_stride}"
            )

    @property
    def backbone_stride(self) -> int:
        """Pixels per feature of the ResNet in front of the patch convolution; 1 without a ResNet."""
        return _stride(self.hybrid_stages)

    @property
    def patch_kernel(self) -> int:
        """Side of the patch convolution's kernel."""
        return self.patch_size // self.backbone_stride

    @property
    def grid(self) -> int:
        """Tokens per side of the image."""
        return self.img_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """N: patches and prefix tokens (class, register, distillation)."""
        return self.grid**2 + self.num_prefix_tokens


def _stride(stages: tuple[int, ...] | None) -> int:
    return 4 * 2 ** (len(stages) - 1) if stages else 1  # the stem has stride 4, every later stage 2


def named_geometry(model_type: str) -> Geometry | None:
    """Geometry of a Google or timm name at its default resolution, with 1000 classes; None for `auto`.

    Raises InputError, with the valid or the closest names, for any other name and for unsupported blocks.
    """
    if model_type == AUTO:
        return None
    for end, resolution in _RESOLUTIONS.items():
        name = model_type.removesuffix(end)
        if name + end == model_type and name in _GOOGLE:
            return _google_geometry(model_type, resolution, **_GOOGLE[name])
    if timm.is_model(model_type):
        return _timm_geometry(model_type)
    names = [*GOOGLE_MODEL_TYPES, *(n for module in _TIMM_MODULES for n in timm.list_models(module=module))]
    close = difflib.get_close_matches(model_type, names, n=4, cutoff=0.5)
    raise InputError(
        f"model_type: {model_type!r} is neither {AUTO}, nor one of {', '.join(GOOGLE_MODEL_TYPES)}, "
        f"nor a timm ViT" + (f"; closest: {', '.join(close)}" if close else "")
    )


def _google_geometry(model_type: str, resolution: int, patch_size: int, **values: Any) -> Geometry:
    # 384 is no multiple of ViT-H_14's patch: 378 has the same 27 x 27 tokens.
    img_size = resolution // patch_size * patch_size
    return Geometry(model_type, patch_size, img_size=img_size, num_classes=1000, **values)


def _timm_geometry(name: str) -> Geometry:
    if not is_model_in_modules(name, _TIMM_MODULES):
        raise InputError(
            f"model_type: timm's {name!r} is not a VisionTransformer; "
            f"expected a model of timm's {', '.join(_TIMM_MODULES)}"
        )
    with torch.device("meta"):
        model = _create_timm(name, num_classes=1000)
    require_supported(model)
    return replace(geometry_of(model, name), timm_name=name)


def geometry_of(model: VisionTransformer, model_type: str = AUTO) -> Geometry:
    """The geometry of a timm model of plain blocks, read off its parameters and attributes.

    `img_size` is rounded down to whole patches: timm ignores the pixels beyond (384 at patch 14 is 378).
    """
    view: Any = model
    height, width = view.patch_embed.img_size
    if height != width:
        raise InputError(f"model {model_type}: takes images of {height} x {width}, expected a square")
    patch_size = view.patch_embed.feat_ratio()
    found = _timm_architecture(Checkpoint(model_type, False, model.state_dict()))
    return Geometry(
        model_type=model_type,
        patch_size=patch_size,
        width=found.width,
        depth=found.depth,
        heads=view.blocks[0].attn.num_heads,
        mlp_width=found.mlp_width,
        img_size=height // patch_size * patch_size,
        num_classes=found.num_classes,
        num_prefix_tokens=view.num_prefix_tokens,
        pre_logits=found.pre_logits,
        hybrid_stages=found.hybrid_stages,
        hybrid_widths=found.hybrid_widths,
    )


def _auto_geometry(checkpoint: Checkpoint, found: Architecture) -> Geometry:
    patch_size = found.patch_kernel * _stride(found.hybrid_stages)
    return Geometry(
        model_type=AUTO,
        patch_size=patch_size,
        width=found.width,
        depth=found.depth,
        heads=found.heads or _assumed_heads(checkpoint, found.width),
        mlp_width=found.mlp_width,
        img_size=_grid_side(checkpoint, found.position_tokens - 1) * patch_size,
        num_classes=found.num_classes,
        hybrid_stages=found.hybrid_stages,
        hybrid_widths=found.hybrid_widths,
    )


def _assumed_heads(checkpoint: Checkpoint, width: int) -> int:
    if width % AUTO_HEAD_WIDTH:
        raise InputError(
            f"model_type: auto cannot read the heads from {checkpoint.path}, and its width {width} is no "
            f"multiple of {AUTO_HEAD_WIDTH}; expected the name of a timm model"
        )
    heads = width // AUTO_HEAD_WIDTH
    message = "%s: a timm file does not tell its heads, %d of width %d assumed; a timm name settles it"
    log.warning(message, checkpoint.path, heads, AUTO_HEAD_WIDTH)
    return heads


def _grid_side(checkpoint: Checkpoint, patches: int) -> int:
    side = math.isqrt(max(patches, 0))
    if side == 0 or side * side != patches:
        raise InputError(f"{checkpoint.path}: positions of {patches} patches found, expected a square grid")
    return side


# ---- building --------------------------------------------------------------------------------------------


def build_model(geometry: Geometry) -> VisionTransformer:
    """The timm model of `geometry` with timm's random initial weights, in eval mode.

    Under `with torch.device("meta")` it takes no memory. LayerNorm's eps is 1e-6 and GELU exact (timm's
    defaults and Google's definition), unless `timm_name` says otherwise. `pre_logits` becomes
    `fc_norm.pre_logits` with a tanh behind it: timm applies `fc_norm` to the pooled token just before the
    head, which is where Google's layer sits.

    Raises InputError where timm has no such model.
    """
    g = geometry
    if g.timm_name is not None:
        model = _create_timm(g.timm_name, num_classes=g.num_classes, img_size=g.img_size)
    else:
        model = VisionTransformer(
            img_size=g.img_size,
            patch_size=g.patch_kernel,
            num_classes=g.num_classes,
            embed_dim=g.width,
            depth=g.depth,
            num_heads=g.heads,
            mlp_ratio=(g.mlp_width + 0.5) / g.width,  # timm truncates width * ratio: the half keeps it exact
            embed_layer=_embed_layer(g),
        )
    if g.pre_logits is not None:
        _add_pre_logits(model, g.pre_logits, g.num_classes)
    return model.eval()


def _create_timm(name: str, **options: Any) -> Any:
    try:
        return timm.create_model(name, pretrained=False, **options)
    except RuntimeError as error:  # timm's word for an unknown pretrained tag behind the dot
        raise InputError(f"model_type: timm cannot build {name!r}: {one_line(error)}") from None


def _embed_layer(geometry: Geometry) -> Callable[..., nn.Module]:
    """The patch convolution; for hybrids, on top of a ResNet as in timm's `vit_base_r50_s16_*`."""
    if geometry.hybrid_stages is None or geometry.hybrid_widths is None:
        return PatchEmbed
    backbone = ResNetV2(
        layers=list(geometry.hybrid_stages),
        channels=geometry.hybrid_widths[1:],
        stem_chs=geometry.hybrid_widths[0],
        num_classes=0,
        global_pool="",
        stem_type="same",
        preact=False,
        conv_layer=partial(StdConv2dSame, eps=1e-8),
    )
    return partial(HybridEmbed, backbone=backbone)


def _add_pre_logits(model: VisionTransformer, width: int, num_classes: int) -> None:
    if not isinstance(model.fc_norm, nn.Identity):
        raise InputError("pre_logits: belongs behind the class token, but this model pools an average")
    model.fc_norm = nn.Sequential(
        OrderedDict(pre_logits=nn.Linear(model.embed_dim, width), tanh=nn.Tanh()),
    )
    model.head = nn.Linear(width, num_classes)


# ---- reading files ---------------------------------------------------------------------------------------

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
    return dict(_read_checkpoint(str(path)).arrays)


def _read_checkpoint(path: str) -> Checkpoint:
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


# ---- what the arrays of a file are -----------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """What shapes tell about a model; `heads` is None for timm's arrays, which do not keep heads apart."""

    patch_kernel: int
    width: int
    depth: int
    heads: int | None
    mlp_width: int
    num_classes: int
    position_tokens: int
    pre_logits: int | None
    hybrid_stages: tuple[int, ...] | None
    hybrid_widths: tuple[int, ...] | None

    def __str__(self) -> str:
        known = {label: getattr(self, name) for name, label in _COMPARED.items()}
        return ", ".join(f"{label} {value}" for label, value in known.items() if value is not None)

    def same_as(self, other: Architecture) -> bool:
        """Whether both are one architecture, whatever their classes and resolution."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in _COMPARED}
        return all(a == b or (name == "heads" and None in (a, b)) for name, (a, b) in pairs.items())


_COMPARED = {
    "patch_kernel": "patch kernel",
    "width": "width",
    "depth": "depth",
    "heads": "heads",
    "mlp_width": "MLP width",
    "hybrid_stages": "ResNet stages",
}
_POSITIONS = "Transformer/posembed_input/pos_embedding"
_ATTENTION = "MultiHeadDotProductAttention_1"
_PRE_LOGITS = "fc_norm.pre_logits"
_OLD_PRE_LOGITS = "pre_logits.fc"  # timm's own name in the imagenet21k files of its first years
_FOREIGN = {  # how a name begins -> what such files are
    "opt/": "a training checkpoint with optimizer state",
    "params/": "a big_vision checkpoint",
    "pos_embedding": "a big_vision checkpoint",
    "Transformer/encoderblock/": "a big_vision checkpoint",
    LAYER_PREFIX: "a calibrated checkpoint, which is opened through its JSON sidecar",
}


def _require_known_layout(checkpoint: Checkpoint) -> None:
    for beginning, kind in _FOREIGN.items():
        if any(name.startswith(beginning) for name in checkpoint.arrays):
            raise InputError(
                f"{checkpoint.path}: {kind} (names start with {beginning!r}); expected the float weights of a "
                "ViT as Google released them (embedding/kernel, …) or as timm saves them (patch_embed.proj.weight, …)"
            )


def _google_architecture(checkpoint: Checkpoint) -> Architecture:
    kernel = checkpoint.shape("embedding/kernel", 4)
    _require_classifier(checkpoint, "head/kernel")
    block = "Transformer/encoderblock_0"
    stages = _stages(checkpoint, "conv_root/kernel", r"block(\d+)/unit(\d+)/conv1/kernel", first=1)
    ends = [f"block{stage + 1}/unit1/conv3/kernel" for stage in range(len(stages or ()))]
    return Architecture(
        patch_kernel=kernel[0],
        width=kernel[3],
        depth=_count(checkpoint, r"Transformer/encoderblock_(\d+)/"),
        heads=checkpoint.shape(f"{block}/{_ATTENTION}/query/kernel", 3)[1],
        mlp_width=checkpoint.shape(f"{block}/MlpBlock_3/Dense_0/kernel", 2)[1],
        num_classes=checkpoint.shape("head/kernel", 2)[1],
        position_tokens=checkpoint.shape(_POSITIONS, 3)[1],
        pre_logits=_optional(checkpoint, ["pre_logits/kernel"], ndim=2, axis=1),
        hybrid_stages=stages,
        hybrid_widths=_widths(checkpoint, ["conv_root/kernel", *ends], axis=3) if stages else None,
    )


def _timm_architecture(checkpoint: Checkpoint) -> Architecture:
    kernel = checkpoint.shape("patch_embed.proj.weight", 4)
    _require_classifier(checkpoint, "head.weight")
    resnet = "patch_embed.backbone"
    stages = _stages(
        checkpoint, f"{resnet}.stem.conv.weight", rf"{resnet}\.stages\.(\d+)\.blocks\.(\d+)\.conv1\.weight"
    )
    ends = [f"{resnet}.stages.{stage}.blocks.0.conv3.weight" for stage in range(len(stages or ()))]
    return Architecture(
        patch_kernel=kernel[2],
        width=kernel[0],
        depth=_count(checkpoint, r"blocks\.(\d+)\."),
        heads=None,
        mlp_width=checkpoint.shape("blocks.0.mlp.fc1.weight", 2)[0],
        num_classes=checkpoint.shape("head.weight", 2)[0],
        position_tokens=_optional(checkpoint, ["pos_embed"], ndim=3, axis=1) or 0,
        pre_logits=_optional(checkpoint, [f"{_PRE_LOGITS}.weight", f"{_OLD_PRE_LOGITS}.weight"], ndim=2, axis=0),
        hybrid_stages=stages,
        hybrid_widths=_widths(checkpoint, [f"{resnet}.stem.conv.weight", *ends], axis=0) if stages else None,
    )


def _require_classifier(checkpoint: Checkpoint, name: str) -> None:
    if name not in checkpoint.arrays:
        raise InputError(
            f"{checkpoint.path}: has no classifier (array {name!r} is missing); a feature extractor has no "
            "classes to evaluate, expected a checkpoint with its head"
        )


def _count(checkpoint: Checkpoint, pattern: str) -> int:
    """One more than the highest index, so that a block lost from the middle is missing, not uncounted."""
    return 1 + max((int(m[1]) for name in checkpoint.arrays if (m := re.match(pattern, name))), default=-1)


def _stages(checkpoint: Checkpoint, stem: str, unit: str, first: int = 0) -> tuple[int, ...] | None:
    """Units per ResNet stage, counted as blocks are; None without a ResNet. Indices start at `first`."""
    if stem not in checkpoint.arrays:
        return None
    units: dict[int, int] = {}
    for match in filter(None, (re.match(unit, name) for name in checkpoint.arrays)):
        stage = int(match[1]) - first
        units[stage] = max(units.get(stage, 0), int(match[2]) - first + 1)
    return tuple(units.get(stage, 0) for stage in range(1 + max(units, default=-1)))


def _widths(checkpoint: Checkpoint, names: list[str], axis: int) -> tuple[int, ...]:
    return tuple(checkpoint.shape(name, 4)[axis] for name in names)


def _optional(checkpoint: Checkpoint, names: list[str], ndim: int, axis: int) -> int | None:
    """Length of an axis of the first of `names` that is there."""
    return next((checkpoint.shape(name, ndim)[axis] for name in names if name in checkpoint.arrays), None)


# ---- Google's names and layouts <-> timm's ---------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """The two directions between a timm tensor and Google's array; `to_google` is also told the heads."""

    to_google: Callable[[Tensor, int], Tensor]
    to_timm: Callable[[Tensor], Tensor]


# timm <-> Google
_SAME = _Layout(lambda x, _: x, lambda x: x)
# (out, in) <-> (in, out)
_DENSE = _Layout(lambda x, _: x.T, lambda x: x.T)
# (out, in, k, k) <-> (k, k, in, out)
_CONV = _Layout(lambda x, _: x.permute(2, 3, 1, 0), lambda x: x.permute(3, 2, 0, 1))
# (H·D, C) <-> (C, H, D)
_INTO_HEADS = _Layout(lambda x, heads: x.T.unflatten(1, (heads, -1)), lambda x: x.flatten(1).T)
# (H·D) <-> (H, D)
_HEAD_BIAS = _Layout(lambda x, heads: x.unflatten(0, (heads, -1)), lambda x: x.flatten())
# (C, H·D) <-> (H, D, C)
_OUT_OF_HEADS = _Layout(lambda x, heads: x.T.unflatten(0, (heads, -1)), lambda x: x.flatten(0, 1).T)


@dataclass(frozen=True)
class _Rule:
    """One timm tensor is one of Google's arrays, or the rows of several (query, then key, then value)."""

    timm: str
    google: tuple[str, ...]
    layout: _Layout

    def under(self, timm_prefix: str, google_prefix: str) -> _Rule:
        google = tuple(google_prefix + name for name in self.google)
        return _Rule(timm_prefix + self.timm, google, self.layout)

    def to_google(self, tensor: Tensor, heads: int) -> State:
        parts = tensor.chunk(len(self.google))
        return {n: self.layout.to_google(part, heads) for n, part in zip(self.google, parts, strict=True)}

    def to_timm(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([self.layout.to_timm(arrays[name]) for name in self.google]).contiguous()


def _norm(timm_name: str, google: str) -> tuple[_Rule, ...]:
    return (
        _Rule(f"{timm_name}.weight", (f"{google}/scale",), _SAME),
        _Rule(f"{timm_name}.bias", (f"{google}/bias",), _SAME),
    )


def _linear(timm_name: str, *google: str, kernel: _Layout = _DENSE, bias: _Layout = _SAME) -> tuple[_Rule, ...]:
    return (
        _Rule(f"{timm_name}.weight", tuple(f"{name}/kernel" for name in google), kernel),
        _Rule(f"{timm_name}.bias", tuple(f"{name}/bias" for name in google), bias),
    )


def _convolution(timm_name: str, google: str, timm_norm: str, google_norm: str) -> tuple[_Rule, ...]:
    return (_Rule(f"{timm_name}.weight", (f"{google}/kernel",), _CONV), *_norm(timm_norm, google_norm))


_QKV = tuple(f"{_ATTENTION}/{part}" for part in ("query", "key", "value"))
_EMBEDDING_RULES = (
    *_linear("patch_embed.proj", "embedding", kernel=_CONV),
    _Rule("cls_token", ("cls",), _SAME),
    _Rule("pos_embed", (_POSITIONS,), _SAME),
)
_BLOCK_RULES = (
    *_norm("norm1", "LayerNorm_0"),
    *_linear("attn.qkv", *_QKV, kernel=_INTO_HEADS, bias=_HEAD_BIAS),
    *_linear("attn.proj", f"{_ATTENTION}/out", kernel=_OUT_OF_HEADS),
    *_norm("norm2", "LayerNorm_2"),
    *_linear("mlp.fc1", "MlpBlock_3/Dense_0"),
    *_linear("mlp.fc2", "MlpBlock_3/Dense_1"),
)
_STEM_RULES = _convolution("conv", "conv_root", "norm", "gn_root")
_UNIT_RULES = (
    *_convolution("conv1", "conv1", "norm1", "gn1"),
    *_convolution("conv2", "conv2", "norm2", "gn2"),
    *_convolution("conv3", "conv3", "norm3", "gn3"),
)
_PROJECTION_RULES = _convolution("downsample.conv", "conv_proj", "downsample.norm", "gn_proj")
_HEAD_RULES = (*_norm("norm", "Transformer/encoder_norm"), *_linear("head", "head"))
_PRE_LOGITS_RULES = _linear(_PRE_LOGITS, "pre_logits")


def google_rules(geometry: Geometry) -> tuple[_Rule, ...]:
    """Which timm tensor is which of Google's arrays in a model of this geometry, in a fixed order."""
    rules = list(_EMBEDDING_RULES)
    if geometry.hybrid_stages is not None:
        rules += [rule.under("patch_embed.backbone.stem.", "") for rule in _STEM_RULES]
    for stage, units in enumerate(geometry.hybrid_stages or ()):
        for unit in range(units):
            timm_unit = f"patch_embed.backbone.stages.{stage}.blocks.{unit}."
            of_unit = _UNIT_RULES + (_PROJECTION_RULES if unit == 0 else ())
            rules += [rule.under(timm_unit, f"block{stage + 1}/unit{unit + 1}/") for rule in of_unit]
    for i in range(geometry.depth):
        rules += [rule.under(f"blocks.{i}.", f"Transformer/encoderblock_{i}/") for rule in _BLOCK_RULES]
    rules += _HEAD_RULES + (() if geometry.pre_logits is None else _PRE_LOGITS_RULES)
    return tuple(rules)


def google_arrays(model: VisionTransformer, geometry: Geometry | None = None) -> dict[str, np.ndarray]:
    """The weights of `model` as the arrays of a Google `.npz`; `geometry` is read off the model if not given.

    Kernels are (in, out), convolutions (k, k, in, out), query, key and value (C, H, D), the output projection
    (H, D, C). Raises InputError naming the first parameter that Google's layout has no place for, such as a
    LayerScale or a register token.
    """
    arrays = _to_google(model.state_dict(), geometry or geometry_of(model))
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in arrays.items()}


def _to_google(state: Mapping[str, Tensor], geometry: Geometry) -> State:
    rules = google_rules(geometry)
    known = {rule.timm for rule in rules}
    lacks = [f"lacks {name!r}" for name in known if name not in state]
    has = [f"has {name!r}" for name in state if name not in known]
    for problem in sorted(lacks) + has:
        raise InputError(
            f"model {geometry.model_type}: does not fit Google's .npz layout, it {problem}; "
            "expected a timm .pth or .safetensors"
        )
    return {k: v for rule in rules for k, v in rule.to_google(state[rule.timm], geometry.heads).items()}


# ---- loading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedModel:
    """A float32 model in eval mode and what its images must look like.

    `mean` and `std` are per channel of RGB in [0, 1]; `fingerprint` is `weights_fingerprint` of the model.
    """

    model: VisionTransformer
    geometry: Geometry
    mean: Channels
    std: Channels
    interpolation: str
    fingerprint: str


def load_model(
    model_type: str, pretrained: str | Path, img_size: int | None = None, num_classes: int | None = None
) -> LoadedModel:
    """Load a float classifier strictly.

    `model_type` is one of `GOOGLE_MODEL_TYPES` (resolution 384, the `-224` variants 224), a timm ViT name
    (timm's resolution), or `auto`, which reads geometry and resolution from the arrays of the file. A timm
    file does not tell its number of heads: `auto` then assumes width // 64, logs so, and reads only the plain
    layout (class token, biases, final norm); any other needs the timm name.

    `pretrained` is a path or `s3://` URI of an `.npz`, `.pth` or `.safetensors`. The classes are those of its
    head. Where `img_size`, in pixels, differs from the file's, position embeddings are resized: of `.npz`
    files as Google does, of timm files as timm does.

    Raises InputError for an unknown name, an unreadable file, another architecture, missing, extra or
    misshapen arrays, NaN, no classifier, or a `num_classes` that is not the file's.
    """
    named = named_geometry(model_type)
    checkpoint = _read_checkpoint(str(pretrained))
    _require_known_layout(checkpoint)
    found = _google_architecture(checkpoint) if checkpoint.is_google else _timm_architecture(checkpoint)
    if num_classes not in (None, found.num_classes):
        raise InputError(f"num_classes: {num_classes}, but {checkpoint.path} has {found.num_classes} classes")
    geometry = named or _auto_geometry(checkpoint, found)
    geometry = replace(geometry, num_classes=found.num_classes, pre_logits=found.pre_logits)
    geometry = geometry if img_size is None else replace(geometry, img_size=img_size)
    model = _load(checkpoint, found, geometry)
    fingerprint = weights_fingerprint(model.state_dict())
    return LoadedModel(model, geometry, *_preprocessing(model, geometry), fingerprint)


def _load(checkpoint: Checkpoint, found: Architecture, geometry: Geometry) -> VisionTransformer:
    with torch.device("meta"):  # the file's arrays become the parameters: random ones would only cost time
        model = build_model(geometry)
    require_supported(model)
    asked = replace(
        _timm_architecture(Checkpoint(geometry.model_type, False, model.state_dict())), heads=geometry.heads
    )
    if not found.same_as(asked):
        raise InputError(f"{checkpoint.path}: another architecture, {found}; {geometry.model_type} is {asked}")
    to_state = _google_state if checkpoint.is_google else _timm_state
    model.load_state_dict(to_state(checkpoint, geometry, model), strict=True, assign=True)
    return model


def _google_state(checkpoint: Checkpoint, geometry: Geometry, model: VisionTransformer) -> State:
    expected = _to_google(model.state_dict(), geometry)
    arrays = {**checkpoint.arrays, _POSITIONS: _resize_as_google(checkpoint, geometry.grid)}
    _require_same_arrays(checkpoint.path, arrays, expected)
    return {rule.timm: rule.to_timm(arrays) for rule in google_rules(geometry)}


def _timm_state(checkpoint: Checkpoint, geometry: Geometry, model: VisionTransformer) -> State:
    expected = model.state_dict()
    old = re.compile(rf"^{re.escape(_OLD_PRE_LOGITS)}\b")
    arrays = {old.sub(_PRE_LOGITS, name): tensor for name, tensor in checkpoint.arrays.items()}
    if "pos_embed" in arrays and "pos_embed" in expected:
        arrays["pos_embed"] = _resize_as_timm(checkpoint, geometry, model)
    _require_same_arrays(checkpoint.path, arrays, expected)
    return {name: arrays[name].contiguous() for name in expected}


def _require_same_arrays(path: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        count = f"{len(missing)} of {len(expected)} arrays"
        raise InputError(f"{path}: {count} are missing, first {missing[0]!r}")
    extra = [name for name in found if name not in expected]
    if extra:
        count = f"{len(extra)} of {len(found)} arrays"
        raise InputError(f"{path}: {count} have no place in the model, first {extra[0]!r}")
    for name, wanted in expected.items():
        shape, dtype = tuple(found[name].shape), found[name].dtype
        if shape != tuple(wanted.shape):
            raise InputError(f"{path}: array {name!r} has shape {shape}, expected {tuple(wanted.shape)}")
        if dtype != wanted.dtype:
            raise InputError(f"{path}: array {name!r} has dtype {dtype}, expected {wanted.dtype}")


def _resize_as_google(checkpoint: Checkpoint, side: int) -> Tensor:
    """(1, 1 + old², C) -> (1, 1 + side², C): bilinear with aligned corners, the class token's part untouched.

    Google's rule is `scipy.ndimage.zoom(order=1)` of the grid (load_pretrained in vit_jax/checkpoint.py),
    which maps corner to corner and computes in float64, as done here.
    """
    positions = checkpoint.arrays[_POSITIONS]
    old = _grid_side(checkpoint, positions.shape[1] - 1)
    if old == side:
        return positions
    token, grid = positions[:, :1], positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.double(), size=(side, side), mode="bilinear", align_corners=True)
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2).to(token.dtype)], dim=1)


def _resize_as_timm(checkpoint: Checkpoint, geometry: Geometry, model: VisionTransformer) -> Tensor:
    """timm's rule (its `checkpoint_filter_fn`): bicubic with antialiasing; plain bilinear for FlexiViT."""
    positions = checkpoint.arrays["pos_embed"]
    prefix = 0 if model.no_embed_class else geometry.num_prefix_tokens
    side = _grid_side(checkpoint, positions.shape[1] - prefix)
    flexible = "flexi" in (geometry.timm_name or "")
    return resample_abs_pos_embed(
        positions,
        new_size=[geometry.grid, geometry.grid],
        old_size=[side, side],
        num_prefix_tokens=prefix,
        interpolation="bilinear" if flexible else "bicubic",
        antialias=not flexible,
    )


def _preprocessing(model: VisionTransformer, geometry: Geometry) -> tuple[Channels, Channels, str]:
    if geometry.timm_name is None:
        return HALF, HALF, "bilinear"
    config = resolve_model_data_config(model)
    return tuple(config["mean"]), tuple(config["std"]), config["interpolation"]


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256, in hex, of the names, dtypes, shapes and bytes of all tensors, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
