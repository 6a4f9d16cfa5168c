"""What a training run computes: the recipe, and the one table of what a recipe can vary.

Every field of `Distillation` and `QatConfig` is written with `option`: default, what messages call it, its limits,
and where users meet it. `RECIPE_OPTIONS` collects them. The checks below, the command line and the search space read
that table, so a new option of QAT is one field here, and its use.

The defaults are the published recipe, except that `global_batch` counts the images of all workers together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitq_ray.base.config import Config, InputError, is_number, require_choice, require_int
from vitq_ray.data.transforms import AUGMENTATIONS

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "cosine")
SCALE_PER_CLASS = 10.0
MOST_SEED = 2**63 - 1
_MOST = 1_000_000_000  # of an integer that has no limit of its own


@dataclass(frozen=True)
class RecipeOption:
    """One thing that a recipe can vary.

    Attributes:
        name: key in a search space, and of `recipe_of`.
        field: name of the field that holds it.
        of_distillation: the field is one of `Distillation`, else of `QatConfig`.
        kind: `int`, `float`, `str` or `bool`.
        default: of a run that says nothing else.
        label: what messages call it.
        help: half a sentence for the command line.
        choices: the values of a `str`.
        low, high: limits of a number, None where there is none.
        open_low, open_high: the limit itself is not allowed.
        argument: its name on the command line, with underscores; None where it has none.
        searched: a search space may vary it.
    """

    name: str
    field: str
    of_distillation: bool
    kind: type
    default: Any
    label: str
    help: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    argument: str | None = None
    searched: bool = False

    def check(self, value: Any) -> None:
        """InputError, naming label, value and what was expected; the default is always allowed."""
        if value is None and self.default is None:
            return
        if self.kind is str:
            require_choice(self.label, value, self.choices)
        elif self.kind is bool:
            require_choice(self.label, value, (False, True))
        elif self.kind is int:
            self._check_int(value)
        elif not self._holds(value):
            raise InputError(f"{self.label}: expected a number {self.limits}, got {value!r}")

    def _check_int(self, value: Any) -> None:
        low, high = int(self.low or 0), _MOST if self.high is None else int(self.high)
        is_beyond = isinstance(value, int) and value > high
        require_int(self.label, value, low, high if is_beyond else None)

    def _holds(self, value: Any) -> bool:
        if not is_number(value):
            return False
        above = self.low is None or (value > self.low if self.open_low else value >= self.low)
        return above and (self.high is None or (value < self.high if self.open_high else value <= self.high))

    @property
    def limits(self) -> str:
        """`> 0`, `>= 0` or `in [0, 1)`."""
        if self.high is None:
            return f"{'>' if self.open_low else '>='} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


def option(default: Any, label: str, kind: type | None = None, **row: Any) -> Any:
    """A dataclass field that is a row of `RECIPE_OPTIONS`; `row` as the attributes of `RecipeOption`."""
    return field(default=default, metadata={"kind": kind or type(default), "label": label, **row})


def _options_of(config: type, of_distillation: bool) -> list[RecipeOption]:
    return [_row(f, of_distillation) for f in dataclasses.fields(config) if f.metadata]


def _row(f: dataclasses.Field[Any], of_distillation: bool) -> RecipeOption:
    values: dict[str, Any] = {"name": f.name, "field": f.name, "default": f.default, **f.metadata}
    return RecipeOption(of_distillation=of_distillation, **values)


def _check(config: Any, options: list[RecipeOption]) -> None:
    for row in options:
        row.check(getattr(config, row.field))


@dataclass(frozen=True)
class Distillation(Config):
    """How much the teacher counts. `scale` None means `SCALE_PER_CLASS` times the number of classes."""

    temperature: float = option(
        3.0, "temperature", low=0, open_low=True, argument="temperature", searched=True, help="of distillation"
    )
    scale: float | None = option(
        None, "distillation scale", float, name="distill_scale", low=0, argument="distill_scale", searched=True,
        help="weight of the teacher; default: 10 x classes",
    )  # fmt: skip

    def __post_init__(self) -> None:
        _check(self, _OF_DISTILLATION)

    def scale_for(self, num_classes: int) -> float:
        return SCALE_PER_CLASS * num_classes if self.scale is None else self.scale


@dataclass(frozen=True)
class QatConfig(Config):
    """Everything that decides what a training run computes.

    `global_batch` images make a step, in micro-batches of `micro_batch` images, which ranks share out. `distillation`
    None trains with cross entropy alone. `lr` is the learning rate of the first step.
    """

    epochs: int = option(5, "number of epochs", low=1, argument="num_epochs", help="epochs")
    lr: float = option(
        1e-4, "learning rate", low=0, open_low=True, argument="qat_lr", searched=True, help="learning rate"
    )
    global_batch: int = option(128, "global batch size", low=1, searched=True, help="images of a step")
    micro_batch: int = option(32, "images per micro-batch", low=1, help="images of a forward pass")
    optimizer: str = option(
        "sgd", "optimizer", choices=OPTIMIZERS, argument="optimizer", searched=True, help="optimizer"
    )
    schedule: str = option(
        "constant", "schedule", choices=SCHEDULES, argument="schedule", searched=True, help="of the learning rate"
    )
    momentum: float = option(0.9, "momentum", low=0, high=1, open_high=True, help="of SGD")
    weight_decay: float = option(0.0, "weight decay", low=0, help="of all weights, not of learned scales")
    max_grad_norm: float = option(1.0, "max grad norm", low=0, open_low=True, help="where gradients are clipped")
    dropout: float = option(
        0.1, "dropout", low=0, high=1, open_high=True, argument="dropout", searched=True, help="of the student"
    )
    augment: str = option(
        "toolkit", "augmentation", choices=AUGMENTATIONS, argument="augment", searched=True, help="of training images"
    )
    distillation: Distillation | None = field(default_factory=Distillation)
    learn_amax: bool = option(
        False, "learned scales", argument="learn_amax", searched=True, help="learn the scales too (LSQ)"
    )
    bf16: bool = option(False, "bfloat16", argument="bf16", help="matrix products in bfloat16")
    seed: int = option(42, "seed", low=0, high=MOST_SEED, help="of every random choice")

    def __post_init__(self) -> None:
        _check(self, _OF_CONFIG)
        if self.global_batch % self.micro_batch:
            raise InputError(f"global batch size: {self.global_batch} is not a multiple of {self.micro_batch}")

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 0 … total - 1; cosine falls to (almost) 0."""
        return self.lr if self.schedule == "constant" else self.lr * (1 + math.cos(math.pi * step / total)) / 2


_OF_CONFIG = _options_of(QatConfig, of_distillation=False)
_OF_DISTILLATION = _options_of(Distillation, of_distillation=True)
RECIPE_OPTIONS: tuple[RecipeOption, ...] = (*_OF_CONFIG, *_OF_DISTILLATION)


def recipe_of(values: Mapping[str, Any], distill: bool = True) -> QatConfig:
    """A recipe from {name of RECIPE_OPTIONS: value}; what is left out has its default.

    Without `distill` the options of distillation are not looked at. Raises InputError for an unknown name and for
    values that a recipe cannot have.
    """
    fields = {row.name: row for row in RECIPE_OPTIONS}
    for name in values:
        if name not in fields:
            raise InputError(f"QAT: unknown option {name!r}; the options are {', '.join(fields)}")
    parts: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    for name, value in values.items():
        parts[fields[name].of_distillation][fields[name].field] = value
    return QatConfig(**parts[False], distillation=Distillation(**parts[True]) if distill else None)
