"""The geometry of a ViT: by name, read off a model or a checkpoint; and the float model built from it."""

from __future__ import annotations

import difflib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import HybridEmbed, PatchEmbed, StdConv2dSame
from timm.models import is_model_in_modules
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitq_ray.base.config import Config, InputError, require_choice, require_int
from vitq_ray.base.files import one_line
from vitq_ray.models.architecture import Architecture, grid_side, timm_architecture
from vitq_ray.models.weights import TIMM, Checkpoint
from vitq_ray.quant.vit import require_supported

log = logging.getLogger(__name__)

AUTO = "auto"
AUTO_HEAD_WIDTH = 64  # of nearly every plain ViT that was published
_HEADS = {1280: 16, 1152: 16, 1408: 16, 1664: 16}  # by width: ViT-H, so400m, g and G, whose heads are wider
_LIMITS = {  # far beyond every ViT: a larger number is a mistake, and what is built of it would fill the memory
    "patch_size": 4096,
    "width": 65536,
    "depth": 1000,
    "heads": 4096,
    "mlp_width": 2**20,
    "img_size": 65536,
    "num_classes": 2**24,
    "num_prefix_tokens": 4096,
    "pre_logits": 2**20,
}
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
TIMM_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit")  # where timm's plain ViTs live


@dataclass(frozen=True)
class Geometry(Config):
    """Everything needed to build the float model again; a JSON value through `to_dict` and `from_dict`.

    `patch_size` is the side, in pixels, of what one token covers. In a hybrid the patch convolution sees the
    feature map of the ResNet, so its kernel is smaller (`patch_kernel`). `hybrid_stages` are the bottleneck
    units of each ResNet stage, `hybrid_widths` the channels after the stem and after each stage. `pre_logits`
    is the width of the tanh(Linear) between the pooled token and the head. `pool` is `avg` where the patches are
    pooled by their mean, with a norm behind it; None: as the model type does, by default the class token. With
    `timm_name` the model comes from timm's registry and the other fields describe it.
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
    pool: str | None = None

    def __post_init__(self) -> None:
        for name, most in _LIMITS.items():
            if name != "pre_logits" or self.pre_logits is not None:
                require_int(name, getattr(self, name), 0 if name == "num_prefix_tokens" else 1, most)
        require_choice("pool", self.pool, (None, "avg"))
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
        require_int("stages of a hybrid", len(stages), 1, 8)
        for units in stages:
            require_int("units of a hybrid stage", units, 1, 1000)
        # GroupNorm has 32 groups, and a bottleneck is a quarter as wide inside as at its end.
        for width, multiple in zip(widths, (32, *[128] * len(stages)), strict=True):
            require_int("hybrid_widths", width, 1, 65536)
            if width % multiple:
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

    def least_bytes(self, images: int, sees_attention: bool) -> int:
        """Memory that a forward pass of so many images takes at the very least.

        The images as bytes and as floats, the MLP's two inner tensors, and with `sees_attention`, where calibration or
        quantizers look at scores and probabilities, two tensors of N x N for each head.
        """
        pixels = 15 * self.img_size**2  # 3 channels, 1 + 4 bytes
        inner = 8 * self.num_tokens * self.mlp_width
        return images * (pixels + max(inner, 8 * self.heads * self.num_tokens**2 if sees_attention else 0))


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
    names = [*GOOGLE_MODEL_TYPES, *(n for module in TIMM_MODULES for n in timm.list_models(module=module))]
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
    if not is_model_in_modules(name, TIMM_MODULES):
        raise InputError(
            f"model_type: timm's {name!r} is not a VisionTransformer; "
            f"expected a model of timm's {', '.join(TIMM_MODULES)}"
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
    found = timm_architecture(Checkpoint(model_type, TIMM, model.state_dict()))
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
        pool="avg" if found.averages and view.global_pool == "avg" else None,
    )


def auto_geometry(checkpoint: Checkpoint, found: Architecture, heads: int | None = None) -> Geometry:
    """The plain layout of these shapes: class token, biases. `heads` are for arrays that do not tell them.

    InputError, naming the file, where no model has such shapes.
    """
    try:
        return _auto_geometry(checkpoint, found, heads)
    except InputError as error:
        named = str(error).startswith(checkpoint.path)
        raise InputError(str(error) if named else f"{checkpoint.path}: {error}") from None


def _auto_geometry(checkpoint: Checkpoint, found: Architecture, heads: int | None) -> Geometry:
    patch_size = found.patch_kernel * _stride(found.hybrid_stages)
    return Geometry(
        model_type=AUTO,
        patch_size=patch_size,
        width=found.width,
        depth=found.depth,
        heads=found.heads or heads or _assumed_heads(checkpoint, found.width),
        mlp_width=found.mlp_width,
        img_size=grid_side(checkpoint, found.position_tokens - 1) * patch_size,
        num_classes=found.num_classes,
        hybrid_stages=found.hybrid_stages,
        hybrid_widths=found.hybrid_widths,
        pool="avg" if found.averages else None,
    )


def _assumed_heads(checkpoint: Checkpoint, width: int) -> int:
    heads = _HEADS.get(width, width // AUTO_HEAD_WIDTH)
    if width % AUTO_HEAD_WIDTH or not heads:
        raise InputError(
            f"model_type auto cannot read the heads of float weights under {checkpoint.names}'s names, and its width "
            f"{width} is no multiple of {AUTO_HEAD_WIDTH}; expected a model's name, or --heads"
        )
    message = "%s: its arrays do not tell its heads, %d of width %d assumed; the name of a model or --heads settles it"
    log.warning(message, checkpoint.path, heads, width // heads)
    return heads


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
    own: dict[str, Any] = {} if g.pool is None else {"global_pool": g.pool}
    if torch.get_default_device().type == "meta":
        own["weight_init"] = "skip"  # what has no values takes timm most of the time to draw
    if g.timm_name is not None:
        model = _create_timm(g.timm_name, num_classes=g.num_classes, img_size=g.img_size, **own)
    else:
        model = VisionTransformer(
            **own,
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
    ready: VisionTransformer = model.eval()
    return ready


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
