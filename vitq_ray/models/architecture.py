"""What the shapes in a checkpoint say about its model, in Google's names, in timm's and in ViT-pytorch's."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from vitq_ray.base.config import InputError
from vitq_ray.models.weights import GOOGLE, VIT_PYTORCH, Checkpoint
from vitq_ray.quant.sites import LAYER_PREFIX

_COMPARED = {
    "patch_kernel": "patch kernel",
    "width": "width",
    "depth": "depth",
    "heads": "heads",
    "mlp_width": "MLP width",
    "hybrid_stages": "ResNet stages",
}
POSITIONS = "Transformer/posembed_input/pos_embedding"
ATTENTION = "MultiHeadDotProductAttention_1"
PRE_LOGITS = "fc_norm.pre_logits"
OLD_PRE_LOGITS = "pre_logits.fc"  # timm's own name in the imagenet21k files of its first years
_FOREIGN = {  # how a name begins -> what such files are
    "opt/": "a training checkpoint with optimizer state",
    "params/": "a big_vision checkpoint",
    "pos_embedding": "a big_vision checkpoint",
    "Transformer/encoderblock/": "a big_vision checkpoint",
    "vit.encoder.layer.": "a checkpoint of Hugging Face's transformers",
    "encoder.layers.encoder_layer_": "a checkpoint of torchvision",
    "visual.": "a checkpoint of OpenCLIP",
}
AMAX = "._amax"  # how the names of scales end


@dataclass(frozen=True)
class Architecture:
    """What shapes tell about a model.

    Attributes:
        heads: None but for Google's arrays, the only ones that keep heads apart.
        averages: the patches are pooled by their mean, with `fc_norm` behind it instead of `norm` before.
    """

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
    averages: bool = False

    def __str__(self) -> str:
        known = {label: getattr(self, name) for name, label in _COMPARED.items()}
        return ", ".join(f"{label} {value}" for label, value in known.items() if value is not None)

    def same_as(self, other: Architecture) -> bool:
        """Whether both are one architecture, whatever their classes and resolution."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in _COMPARED}
        return all(a == b or (name == "heads" and None in (a, b)) for name, (a, b) in pairs.items())


def require_known_layout(checkpoint: Checkpoint) -> None:
    kinds = {
        beginning: kind
        for beginning, kind in _FOREIGN.items()
        if any(n.startswith(beginning) for n in checkpoint.arrays)
    }
    for beginning, kind in kinds.items():
        raise InputError(
            f"{checkpoint.path}: {kind} (names start with {beginning!r}); expected the float weights of a "
            "ViT as Google released them (embedding/kernel, …) or as timm saves them (patch_embed.proj.weight, …)"
        )
    if any(name.endswith(AMAX) for name in checkpoint.arrays):
        raise InputError(
            f"{checkpoint.path}: a calibrated checkpoint (it has scales, {AMAX}); expected the float weights of a ViT"
        )


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """What the shapes tell, whosever names the arrays have."""
    if checkpoint.names == GOOGLE:
        return google_architecture(checkpoint)
    return vit_pytorch_architecture(checkpoint) if checkpoint.names == VIT_PYTORCH else timm_architecture(checkpoint)


def google_architecture(checkpoint: Checkpoint) -> Architecture:
    kernel = checkpoint.shape("embedding/kernel", 4)
    _require_classifier(checkpoint, "head/kernel")
    block = "Transformer/encoderblock_0"
    stages = _stages(checkpoint, "conv_root/kernel", r"block(\d+)/unit(\d+)/conv1/kernel", first=1)
    ends = [f"block{stage + 1}/unit1/conv3/kernel" for stage in range(len(stages or ()))]
    return Architecture(
        patch_kernel=kernel[0],
        width=kernel[3],
        depth=_count(checkpoint, r"Transformer/encoderblock_(\d+)/"),
        heads=checkpoint.shape(f"{block}/{ATTENTION}/query/kernel", 3)[1],
        mlp_width=checkpoint.shape(f"{block}/MlpBlock_3/Dense_0/kernel", 2)[1],
        num_classes=checkpoint.shape("head/kernel", 2)[1],
        position_tokens=checkpoint.shape(POSITIONS, 3)[1],
        pre_logits=_optional(checkpoint, ["pre_logits/kernel"], ndim=2, axis=1),
        hybrid_stages=stages,
        hybrid_widths=_widths(checkpoint, ["conv_root/kernel", *ends], axis=3) if stages else None,
    )


def timm_architecture(checkpoint: Checkpoint) -> Architecture:
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
        pre_logits=_optional(checkpoint, [f"{PRE_LOGITS}.weight", f"{OLD_PRE_LOGITS}.weight"], ndim=2, axis=0),
        hybrid_stages=stages,
        hybrid_widths=_widths(checkpoint, [f"{resnet}.stem.conv.weight", *ends], axis=0) if stages else None,
        averages="fc_norm.weight" in checkpoint.arrays and "norm.weight" not in checkpoint.arrays,
    )


def vit_pytorch_architecture(checkpoint: Checkpoint) -> Architecture:
    """Also of calibrated checkpoints, whose weights have these names."""
    embeddings, layer = "transformer.embeddings.", re.escape(LAYER_PREFIX)
    kernel = checkpoint.shape(f"{embeddings}patch_embeddings.weight", 4)
    _require_classifier(checkpoint, "head.weight")
    resnet = f"{embeddings}hybrid_model."
    stages = _stages(
        checkpoint,
        f"{resnet}root.conv.weight",
        rf"{re.escape(resnet)}body\.block(\d+)\.unit(\d+)\.conv1\.weight",
        first=1,
    )
    ends = [f"{resnet}body.block{stage + 1}.unit1.conv3.weight" for stage in range(len(stages or ()))]
    return Architecture(
        patch_kernel=kernel[2],
        width=kernel[0],
        depth=_count(checkpoint, rf"{layer}(\d+)\.(?!.*{re.escape(AMAX)}$)"),
        heads=None,
        mlp_width=checkpoint.shape(f"{LAYER_PREFIX}0.ffn.fc1.weight", 2)[0],
        num_classes=checkpoint.shape("head.weight", 2)[0],
        position_tokens=_optional(checkpoint, [f"{embeddings}position_embeddings"], ndim=3, axis=1) or 0,
        pre_logits=_optional(checkpoint, [f"timm.{PRE_LOGITS}.weight"], ndim=2, axis=0),
        hybrid_stages=stages,
        hybrid_widths=_widths(checkpoint, [f"{resnet}root.conv.weight", *ends], axis=0) if stages else None,
        averages="timm.fc_norm.weight" in checkpoint.arrays,
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


def is_square(patches: int) -> bool:
    return patches > 0 and math.isqrt(patches) ** 2 == patches


def grid_side(checkpoint: Checkpoint, patches: int) -> int:
    if not is_square(patches):
        raise InputError(f"{checkpoint.path}: positions of {patches} patches found, expected a square grid")
    return math.isqrt(patches)
