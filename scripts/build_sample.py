"""Build the bundled sample: Fashion-MNIST in the zip layout and a small ViT trained on it, from scratch.

    OMP_WAIT_POLICY=PASSIVE nice -n 19 .venv/bin/python scripts/build_sample.py --output vitq_ray/sample

(PASSIVE: threads that wait for each other sleep, which matters when other work shares the cores)
reads Debian's package `dataset-fashion-mnist` (four idx files) and writes `train.zip`, `train_map.txt`
(10,000 of the 60,000 training images, 1,000 per class), `val.zip`, `val_map.txt` (the 10,000 test images) and
`vit.npz` (Google's array names). Cost, measured accuracy and licence: `vitq_ray/sample/README.md`.

How the recipe was chosen: `--recipe NAME --epochs E --held-out 5000` trains one of `RECIPES` without the last
5,000 training images, prints the accuracy on those after every epoch, and writes nothing. Only a run without
`--held-out` looks at the test images: once, after its last epoch.

Legend: B batch, C classes. Images are uint8 (B, 28, 28), labels int64 (B,). Accuracy is a fraction.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import io
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from vitq_ray.base.config import InputError, require_int
from vitq_ray.base.files import atomic_file
from vitq_ray.models.google import google_arrays

SOURCE = Path("/usr/share/datasets/fashion-mnist")
SAMPLE = Path(__file__).resolve().parents[1] / "vitq_ray" / "sample"
CLASSES, SIDE, TRAIN_PER_CLASS = 10, 28, 1000


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Architecture and training of one candidate; images are moved by up to `shift` pixels and mirrored."""

    patch: int
    width: int
    heads: int
    depth: int = 6
    epochs: int = 30
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    shift: int = 1


RECIPES = {
    "patch7-shift2": Recipe(patch=7, width=96, heads=3, batch=256, lr=1e-3, shift=2),
    "patch7": Recipe(patch=7, width=96, heads=3),
    "patch4": Recipe(patch=4, width=64, heads=2),
}
DEFAULT_RECIPE = "patch7"


# ---- the data ------------------------------------------------------------------------------------


def read_idx(path: Path) -> np.ndarray:
    """An idx file: 4 bytes of magic (the last is the rank), big-endian int32 sizes, uint8 values."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"--source: {path} does not exist; expected the idx files of Debian's package "
            "dataset-fashion-mnist (apt-get install dataset-fashion-mnist)"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"--source: {path} cannot be read as a gzip file: {error}") from None
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


class Split(NamedTuple):
    images: np.ndarray  # uint8 (B, 28, 28)
    labels: np.ndarray  # uint8 (B,)

    def divide(self, count: int) -> tuple[Split, Split]:
        """The first `count` images, and the rest."""
        head, tail = slice(count), slice(count, None)
        return Split(self.images[head], self.labels[head]), Split(self.images[tail], self.labels[tail])


def read_split(source: Path, prefix: str) -> Split:
    """All images and labels of `train` or `t10k`."""
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    return Split(images, read_idx(source / f"{prefix}-labels-idx1-ubyte.gz"))


def choose_balanced(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Indices of `per_class` random images of every class, such that every ten in a row hold all ten classes.

    `RandomState` because NumPy never changes its stream, so the choice is the same with every version.
    """
    random = np.random.RandomState(seed)
    columns = [random.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(CLASSES)]
    rounds = np.stack(columns, axis=1)  # (per_class, C)
    return np.concatenate([row[random.permutation(CLASSES)] for row in rounds])


def png_bytes(image: np.ndarray) -> bytes:
    """One greyscale image (28, 28) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_zip(file: BinaryIO, images: np.ndarray, indices: np.ndarray) -> None:
    """Members `{index:05d}.png`, stored (PNG is compressed), dated 1980: a rebuild gives identical bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for index in indices:
            member = zipfile.ZipInfo(f"{index:05d}.png")
            member.create_system, member.external_attr = 3, 0o644 << 16
            archive.writestr(member, png_bytes(images[index]))


def write_split(output: Path, name: str, split: Split, indices: np.ndarray) -> None:
    """`{name}.zip` and `{name}_map.txt` with the images at `indices`, in that order."""
    with atomic_file(output / f"{name}.zip") as file:
        write_zip(file, split.images, indices)
    with atomic_file(output / f"{name}_map.txt") as file:
        file.writelines(f"{index:05d}.png\t{split.labels[index]}\n".encode() for index in indices)


def write_dataset(output: Path, train_split: Split, test_split: Split) -> None:
    """The four files of the zip layout; val is the whole test set in its own order."""
    chosen = choose_balanced(train_split.labels, TRAIN_PER_CLASS, seed=0)
    write_split(output, "train", train_split, chosen)
    write_split(output, "val", test_split, np.arange(len(test_split.labels)))


# ---- the model -----------------------------------------------------------------------------------


def build_model(recipe: Recipe) -> VisionTransformer:
    """Pre-norm ViT with GELU and a class token, as timm builds it."""
    return VisionTransformer(
        img_size=SIDE,
        patch_size=recipe.patch,
        embed_dim=recipe.width,
        depth=recipe.depth,
        num_heads=recipe.heads,
        num_classes=CLASSES,
    )


def to_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 28, 28) -> float32 (B, 3, 28, 28) in [-1, 1]: grey replicated, mean 0.5, std 0.5."""
    return ((images.float() / 255 - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)


def augment(images: torch.Tensor, shift: int, random: torch.Generator) -> torch.Tensor:
    """Each image (28, 28) moved by up to `shift` pixels both ways and mirrored with probability 1/2."""
    count = len(images)
    padded = F.pad(images, (shift,) * 4)
    down, right = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=random)
    mirror = torch.rand(count, 1, generator=random) < 0.5
    axis = torch.arange(SIDE)
    rows = axis + down  # (B, 28)
    columns = torch.where(mirror, axis.flip(0), axis) + right  # (B, 28)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def to_tensors(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (B, 28, 28), labels int64 (B,)."""
    return torch.from_numpy(split.images.copy()), torch.from_numpy(split.labels.astype(np.int64))


def count_correct(model: VisionTransformer, split: Split) -> int:
    """Number of images whose highest logit is the label."""
    images, labels = to_tensors(split)
    model.eval()
    with torch.inference_mode():
        batches = zip(images.split(500), labels.split(500), strict=True)
        return sum(int((model(to_input(x)).argmax(1) == y).sum()) for x, y in batches)


def make_optimizer(model: VisionTransformer, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; biases and LayerNorms, all vectors, are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


def train(model: VisionTransformer, split: Split, recipe: Recipe, seed: int) -> Iterator[float]:
    """Train in place with a one-cycle learning rate, yielding the mean loss after every epoch."""
    images, labels = to_tensors(split)
    random = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, recipe)
    steps = len(images) // recipe.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=steps * recipe.epochs, pct_start=0.1
    )
    for _ in range(recipe.epochs):
        model.train()
        order = torch.randperm(len(images), generator=random)[: steps * recipe.batch]
        total = 0.0
        for chosen in order.split(recipe.batch):
            logits = model(to_input(augment(images[chosen], recipe.shift, random)))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=recipe.label_smoothing)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
        yield total / steps


def train_and_report(recipe: Recipe, training: Split, held_out: Split, seed: int) -> VisionTransformer:
    """Train a new model, printing loss, seconds and the accuracy on `held_out` (if any) after every epoch."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    model = build_model(recipe)
    count, parameters = len(held_out.labels), sum(p.numel() for p in model.parameters())
    print(f"{recipe}, seed {seed}: {parameters} parameters, {len(training.labels)} images", flush=True)
    start = time.perf_counter()
    for epoch, loss in enumerate(train(model, training, recipe, seed), start=1):
        seconds = time.perf_counter() - start
        held = f", held-out top-1 {count_correct(model, held_out) / count:.2%}" if count else ""
        print(f"epoch {epoch}/{recipe.epochs}: loss {loss:.4f}{held}, {seconds:.0f} s", flush=True)
    return model.eval()


def write_model(path: Path, model: VisionTransformer) -> None:
    """Float32 arrays under Google's names."""
    with atomic_file(path) as file:
        np.savez(file, **google_arrays(model))  # type: ignore[arg-type]


# ---- the command line ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Build the bundled sample: Fashion-MNIST as zip + map files, a trained ViT.")
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder with the idx files")
    parser.add_argument("--output", type=Path, default=SAMPLE, help="folder to write")
    parser.add_argument("--recipe", choices=RECIPES, default=DEFAULT_RECIPE, help="architecture and training")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--held-out", type=int, default=0, metavar="N", help="training images left out")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    parser.add_argument("--skip-training", action="store_true", help="only write the zip and map files")
    options = parser.parse_args(argv)
    require_int("--held-out", options.held_out, 0, 59_000)
    require_int("--seed", options.seed, 0)
    if options.epochs is not None:
        require_int("--epochs", options.epochs, 1)
    return options


def build(options: argparse.Namespace) -> None:
    recipe = RECIPES[options.recipe]
    recipe = dataclasses.replace(recipe, epochs=options.epochs or recipe.epochs)
    everything = read_split(options.source, "train")
    training, held_out = everything.divide(len(everything.labels) - options.held_out)
    if options.held_out:
        train_and_report(recipe, training, held_out, options.seed)
        return
    test = read_split(options.source, "t10k")
    write_dataset(options.output, training, test)
    if not options.skip_training:
        model = train_and_report(recipe, training, held_out, options.seed)
        write_model(options.output / "vit.npz", model)
        print(f"test top-1: {count_correct(model, test)} of {len(test.labels)}")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        build(parse_options(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
