"""From encoded bytes to what a model takes: decode, resize, normalise; and the augmentations of training.

    bytes -> uint8 (S, S, 3)          EvalTransform.decode: on CPUs, where the reading is
    uint8 (B, S, S, 3) -> float32     EvalTransform.normalize: on the model's device

Images stay uint8 until then: a quarter of the memory on the way. Legend: B batch, S image size in pixels.
PyTorch is imported by the functions that use it: processes that only decode are ready seconds earlier without it.
"""

from __future__ import annotations

import io
import math
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from vitq_ray.base.config import Config, InputError, require_choice, require_int
from vitq_ray.base.files import one_line
from vitq_ray.data.samples import BadImageError

if TYPE_CHECKING:
    from torch import Tensor

# An image of more pixels is refused unread: nothing that is resized to a few hundred pixels needs them.
MAX_PIXELS = 178_956_970
# An image that Pillow reads counts as readable, whatever it remarks on (odd EXIF, many pixels); what it cannot read is
# an exception.
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "PPM", "WEBP", "JPEG2000", "AVIF")
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
AUGMENTATIONS = ("none", "light", "toolkit")
_CAN_ROTATE = ("nearest", "bilinear", "bicubic")  # with the others Pillow can only resize
Triple = tuple[float, float, float]


class Transform(Protocol):
    """How an image is prepared, in two steps: `decode` where the reading is, `normalize` where the model is."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def dtype(self) -> type[np.generic]: ...

    def decode(self, data: bytes, name: str, sample_id: int = 0) -> npt.NDArray[Any]:
        """An encoded image as an array of `shape` and `dtype`; only augmentations depend on `sample_id`."""

    def normalize(self, images: Tensor) -> Tensor:
        """A batch of what `decode` returned -> float32 (B, 3, S, S)."""


def image_bytes(transform: Transform) -> int:
    """Memory of one decoded image."""
    return math.prod(transform.shape) * np.dtype(transform.dtype).itemsize


@dataclass(frozen=True)
class EvalTransform(Config):
    """Resize to size x size, scale to [0, 1], normalise per channel; cropping only with `crop_pct`.

    Without `crop_pct` the whole image is resized, its aspect ratio lost, as Google's models were fine-tuned. With it,
    timm's rule: the short side becomes size / crop_pct, then the centre is cropped.
    """

    size: int
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)
    interpolation: str = "bilinear"
    crop_pct: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))  # JSON has lists
        object.__setattr__(self, "std", tuple(self.std))
        require_int("image size", self.size, 1)
        require_choice("interpolation", self.interpolation, INTERPOLATIONS)
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != 3 or len(self.std) != 3 or not finite or not all(s > 0 for s in self.std):
            raise InputError(f"mean, std: expected three numbers each, std > 0, got {self.mean} and {self.std}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct: expected a number in (0, 1], got {self.crop_pct!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    @property
    def dtype(self) -> type[np.generic]:
        return np.uint8

    def decode(self, data: bytes, name: str, sample_id: int = 0) -> npt.NDArray[np.uint8]:
        """An encoded image as RGB (S, S, 3). BadImageError, naming it, if that cannot be done."""
        with _naming(name):
            image = self._resize(load_rgb(data))
        return np.asarray(image)

    def _resize(self, image: Image.Image) -> Image.Image:
        if self.crop_pct is None:
            return self._resize_to(image, (self.size, self.size))
        # torchvision's Resize(int) and CenterCrop, which timm uses: the long side is truncated.
        short = int(self.size / self.crop_pct)
        width, height = image.size
        scaled = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        image = self._resize_to(image, scaled)
        left, top = round((scaled[0] - self.size) / 2), round((scaled[1] - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))

    def _resize_to(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        _check_pixels(*size)  # with crop_pct, a very long image becomes a very large one
        return image if image.size == size else image.resize(size, INTERPOLATIONS[self.interpolation])

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S), contiguous: (x / 255 - mean) / std."""
        import torch

        x = images.permute(0, 3, 1, 2).contiguous().float().div_(255)
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.mean, self.std))
        return x.sub_(mean).div_(std)


def load_rgb(data: bytes) -> Image.Image:
    """Decode to RGB. Transparency is dropped, 16-bit greys are scaled to 8 bits; EXIF rotation is not applied, as in
    the data loaders that the checkpoints were trained with."""
    _ignore_pillow_warnings()
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        _check_pixels(*image.size)
        image.load()
        if image.mode == "F":
            raise ValueError("floating-point pixels, of which nobody says what is black and what white")
        if image.mode in ("I", "I;16", "I;16B", "I;16L"):
            grey: Image.Image = Image.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return grey.convert("RGB")
        rgb: Image.Image = image if image.mode == "RGB" else image.convert("RGB")
        return rgb


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """What is opened, if Pillow was built with it. For other formats it starts programs (EPS), or rare parsers."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _ignore_pillow_warnings() -> None:
    """Put the filter first unless it is: later filters (`-W error`, pytest's) would turn a remark into a broken image.
    Switching warnings off around each call instead is not safe in threads."""
    if list(warnings.filters[:1]) != [_PILLOW_FILTER]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, more than the {MAX_PIXELS} allowed (decompression bomb?)")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a BadImageError that names the image."""
    try:
        yield
    except Exception as error:  # Pillow's decoders raise anything from OSError to SyntaxError
        unknown = isinstance(error, UnidentifiedImageError)  # its text has the address of an object of ours
        reason = "cannot identify image file" if unknown else one_line(error) or type(error).__name__
        raise BadImageError(f"{name}: not a readable image: {reason}") from None


def timm_eval_transform(config: Mapping[str, Any], size: int) -> EvalTransform:
    """The evaluation transform of a timm model, from its resolved data configuration; uncropped, as DESIGN asks."""
    return EvalTransform(size, tuple(config["mean"]), tuple(config["std"]), config["interpolation"])


def train_transform(evaluation: EvalTransform, kind: str) -> Callable[[Image.Image], Tensor]:
    """Augmentation for QAT: an RGB image -> float32 (3, S, S), normalised exactly as `evaluation` does.

    `none` is the evaluation transform itself; `light` a random crop of 80 to 100 % of the area and a flip; `toolkit`
    the old toolkit's: timm's RandAugment rand-m9-mstd0.5-inc1, colour jitter 0.4, random erasing 0.25.
    """
    require_choice("augmentation", kind, AUGMENTATIONS)
    if kind == "none":
        return partial(_evaluation_tensor, evaluation)
    return _timm_train_transform(evaluation, kind)


def _evaluation_tensor(evaluation: EvalTransform, image: Image.Image) -> Tensor:
    import torch

    pixels = torch.from_numpy(np.array(evaluation._resize(image)))
    return evaluation.normalize(pixels[None])[0]


def _timm_train_transform(evaluation: EvalTransform, kind: str) -> Callable[[Image.Image], Tensor]:
    from timm.data import create_transform  # a second of imports that evaluation does not need

    settings: dict[str, dict[str, Any]] = {
        "light": {"scale": (0.8, 1.0), "color_jitter": None, "re_prob": 0.0},
        "toolkit": {"color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25},
    }
    transform = create_transform(
        input_size=evaluation.size,
        is_training=True,
        interpolation=evaluation.interpolation if evaluation.interpolation in _CAN_ROTATE else "bicubic",
        mean=evaluation.mean,
        std=evaluation.std,
        **settings[kind],
    )
    for operation in (op for step in transform.transforms for op in getattr(step, "ops", ())):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    augment: Callable[[Image.Image], Tensor] = transform
    return augment


# Augmentations draw from the random generators of the process: one image at a time may own them.
_RANDOM = threading.Lock()


@dataclass(frozen=True)
class TrainTransform(Config):
    """`train_transform` whose randomness is a function of (seed, epoch, sample id), whichever worker decodes.

    Images come out as float32 (3, S, S), already normalised: erased rectangles have the mean colour, which uint8 has
    no number for.
    """

    evaluation: EvalTransform
    kind: str
    seed: int
    epoch: int

    def __post_init__(self) -> None:
        require_choice("augmentation", self.kind, AUGMENTATIONS)

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.evaluation.size, self.evaluation.size

    @property
    def dtype(self) -> type[np.generic]:
        return np.float32

    def decode(self, data: bytes, name: str, sample_id: int = 0) -> npt.NDArray[np.float32]:
        with _naming(name):
            image = load_rgb(data)
            with _RANDOM, _seeded(self.seed, self.epoch, sample_id):
                return _cached_train_transform(self.evaluation, self.kind)(image).numpy()

    def normalize(self, images: Tensor) -> Tensor:
        return images


_cached_train_transform = lru_cache(maxsize=4)(train_transform)


@contextmanager
def _seeded(*entropy: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's generators from these integers; afterwards they go on as if untouched."""
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(entropy).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """At magnitude 10, one RandAugment draw in 44, timm asks to keep 0 bits, which Pillow 13 refuses."""
    return ImageOps.posterize(image, max(bits, 1))
