"""A search space: a Python file that defines `SPACE`, what to try for each field of a setting.

    SPACE = {
        "mode": ("ft1", "ft2"),
        "calibrator": ("max", "mse", "entropy", "percentile"),
        "percentile": percentiles(99, 99.9999, 5),      # for the percentile calibrator
        "num_batches": (2, 8, 32),
    }

The fields are those of `Setting`: also `weight_bits`, `act_bits` and `weights` (`max`, `mse`). A calibrator's numbers
are fields, too, named as in the table of calibrators. Rules for single sites are spelled in one of two ways:

    "*.attn.matmul_a_input_quantizer": (None, "mse", "percentile 99.9", "x 0.9", "6 bits", "off")    a field of its own
    "rules": ((), ("0.attn.* -> 6 bits", "*.ffn.fc2.* -> mse"))                                      lists of rules

A key with a dot or a star is a site pattern, and its values are what those sites do (`None`: what the others do);
`attention_probabilities`, `gelu_output` and `gemm_outputs` are names for three patterns (`setting.SITE_GROUPS`).

A file may also define `QAT`: what to train the best settings with (`QatSpace`), where calibration alone misses the
target. Ranges are written `loguniform(low, high)`.

Fields that the file leaves out have the values of the command line. Its docstring gives the command, the cost and the
result that was measured with it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitq_ray.base.config import Config, InputError, require_int
from vitq_ray.calibration.calibrators import CALIBRATORS
from vitq_ray.calibration.setting import SITE_GROUPS, Calibration, Rule, Setting, Technique, require_sites, rules_of
from vitq_ray.qat.recipe import RECIPE_OPTIONS

PARAMETERS = tuple(dict.fromkeys(p.name for row in CALIBRATORS.values() for p in row.parameters))
# Columns of a space, in the order in which a grid is gone through; further site patterns come last.
FIELDS = (
    *("mode", "calibrator", *PARAMETERS, "num_batches", "weight_bits", "act_bits"),
    *(*SITE_GROUPS, "weights", "rules", "transforms", "corrections"),
)


MOST_SETTINGS = 100_000  # of one search
MOST_TRAINING_RUNS = 10_000


def percentiles(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` percentiles whose distances from 100 are spread evenly on a log scale, from `low` to `high`."""
    if not (0 <= low < high < 100 and count >= 2):
        raise InputError(f"percentiles: expected 0 <= low < high < 100 and count >= 2, got {low}, {high}, {count}")
    require_int("percentiles: count", count, 2, MOST_SETTINGS)
    ratio = ((100 - high) / (100 - low)) ** (1 / (count - 1))
    return tuple(round(100 - (100 - low) * ratio**i, 10) for i in range(count))


@dataclass(frozen=True)
class LogUniform:
    """Numbers from `low` to `high` whose logarithm is uniform."""

    low: float
    high: float

    def draw(self, rng: np.random.Generator) -> float:
        """One number, to four significant digits."""
        return float(f"{math.exp(rng.uniform(math.log(self.low), math.log(self.high))):.4g}")


def loguniform(low: float, high: float) -> LogUniform:
    """A range for `QAT`."""
    if not 0 < low < high < math.inf:
        raise InputError(f"loguniform: expected 0 < low < high, got {low}, {high}")
    return LogUniform(low, high)


QAT_OPTIONS = {row.name: row for row in RECIPE_OPTIONS if row.searched}  # what a space may vary


@dataclass(frozen=True)
class QatSpace(Config):
    """What QAT tries, and how.

    Attributes:
        choices: {name of QAT_OPTIONS: values, or a range}.
        num_samples: training runs; they start from the best and tied settings in turn.
        starts: how many of those settings at most.
        epochs: length of a run that is not stopped.
        grace_epochs, reduction: ASHA (Li et al. 2020): of the runs that come to epoch grace · reduction^k, all but the
            best 1/reduction so far stop.
    """

    choices: Mapping[str, Any]
    num_samples: int = 8
    starts: int = 3
    epochs: int = 8
    grace_epochs: int = 1
    reduction: int = 2

    def __post_init__(self) -> None:
        for name, low in (("num_samples", 1), ("starts", 1), ("epochs", 1), ("grace_epochs", 1), ("reduction", 2)):
            value = getattr(self, name)
            is_beyond = isinstance(value, int) and value > MOST_TRAINING_RUNS
            require_int(f"QAT {name}", value, low, MOST_TRAINING_RUNS if is_beyond else None)

    def sample(self, seed: int) -> list[dict[str, Any]]:
        """`num_samples` rows {field: value}; a function of the seed."""
        rng = np.random.default_rng(seed)
        return [{name: _draw(values, rng) for name, values in self.choices.items()} for _ in range(self.num_samples)]


def _draw(values: Any, rng: np.random.Generator) -> Any:
    return values.draw(rng) if isinstance(values, LogUniform) else values[int(rng.integers(len(values)))]


def qat_space_of(values: Any) -> QatSpace:
    """Check what a file defines as QAT."""
    if not isinstance(values, Mapping):
        raise InputError(f"QAT is {type(values).__name__}, expected a dictionary")
    plan = {f.name for f in dataclasses.fields(QatSpace)} - {"choices"}
    known = (*QAT_OPTIONS, *sorted(plan))
    choices: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"QAT has the key {name!r}; the keys are {', '.join(known)}")
        if name in QAT_OPTIONS:
            choices[name] = value if isinstance(value, LogUniform) else _checked_values(f"QAT[{name!r}]", value)
            for each in (value.low, value.high) if isinstance(value, LogUniform) else choices[name]:
                QAT_OPTIONS[name].check(each)
    return QatSpace(choices, **{name: values[name] for name in values if name in plan})


def _checked_values(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
        raise InputError(f"{name} is {values!r}, expected a list of values")
    if len(values) > MOST_SETTINGS:
        raise InputError(f"{name} has {len(values):,} values, expected at most {MOST_SETTINGS:,}")
    return tuple(values)


@dataclass(frozen=True)
class SearchSpace:
    """What to try: {column: values}, and then perhaps with QAT. A column is one of `FIELDS` or a site pattern."""

    name: str
    choices: Mapping[str, tuple[Any, ...]]
    qat: QatSpace | None = None

    def grid(self, defaults: Setting) -> list[Setting]:
        """Every distinct setting, in the order of the file; `defaults` fill the fields that it leaves out.

        InputError where there are more than `MOST_SETTINGS` combinations.
        """
        columns, size = self.values(defaults), self.size(defaults)
        if size > MOST_SETTINGS:
            raise InputError(
                f"the space {self.name} has {size:,} settings, and a search tries at most {MOST_SETTINGS:,}; "
                "expected fewer values, or random or optuna with a number of samples"
            )
        rows = itertools.product(*columns.values())
        return list(dict.fromkeys(setting_of(dict(zip(columns, row, strict=True)), defaults) for row in rows))

    def values(self, defaults: Setting) -> dict[str, tuple[Any, ...]]:
        """{column: what to try}, all columns; `defaults` fill those that the file leaves out."""
        own = {name: (value,) for name, value in _columns_of(defaults).items()}
        patterns = {name: values for name, values in self.choices.items() if name not in FIELDS}
        return {name: self.choices.get(name, own[name]) for name in FIELDS} | patterns

    def with_values(self, column: str, values: tuple[Any, ...]) -> SearchSpace:
        """The same space with other values of a column."""
        return replace(self, choices={**self.choices, column: values})

    def size(self, defaults: Setting) -> int:
        """Combinations of the values; settings that are the same count more than once."""
        return math.prod(len(values) for values in self.values(defaults).values())

    def sample(self, defaults: Setting, count: int, seed: int) -> list[Setting]:
        """Up to `count` distinct random settings; fewer only where the space has hardly more."""
        rng = np.random.default_rng(seed)
        values = self.values(defaults)
        if self.size(defaults) <= min(count, MOST_SETTINGS):  # none is left once all of them are found
            count = min(count, len(self.grid(defaults)))
        found: dict[Setting, None] = {}
        for _ in range(50 * count):
            row = {field: choices[int(rng.integers(len(choices)))] for field, choices in values.items()}
            found.setdefault(setting_of(row, defaults))
            if len(found) == count:
                break
        return list(found)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; calibrators and rules, which a space may hold as objects, as their texts."""
        choices = {name: [_as_written(value) for value in values] for name, values in self.choices.items()}
        return {"name": self.name, "choices": choices, "qat": None if self.qat is None else self.qat.to_dict()}

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str) -> SearchSpace:
        """The inverse of `to_dict`, checked as a file is; InputError with `where` it is from."""
        return replace(space_of(values["choices"], where, _qat_from_dict(values["qat"])), name=values["name"])

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Every rule that a setting of this space may have."""
        columns = [rule for name, values in self.choices.items() for rule in _rules_of_column(name, values)]
        return (*columns, *(Rule.parse(rule) for rules in self.choices.get("rules", ()) for rule in rules))

    def representatives(self, defaults: Setting) -> tuple[Setting, ...]:
        """Settings that name everything that a setting of this space may need to have seen: every mode at every number
        of bits under every set of transforms, each with every single rule, list of rules and calibrator."""
        values = self.values(defaults)
        alone: list[dict[str, Any]] = [{}, *({"rules": (rule,)} for rule in (*self.rules, *defaults.rules))]
        alone += [{"rules": tuple(map(Rule.parse, rules))} for rules in values["rules"]]
        alone += [{"calibrator": calibration} for calibration in self.calibrations(defaults)]
        alone += [{"weights": weights} for weights in values["weights"]]
        alone += [{"corrections": names, "calibrator": "fisher"} for names in values["corrections"] if names]
        first = {"calibrator": self.calibrations(defaults)[0], "weights": values["weights"][0]}
        found: dict[Setting, None] = {}
        for mode, weight_bits, act_bits, transforms in itertools.product(
            *(values[name] for name in ("mode", "weight_bits", "act_bits", "transforms"))
        ):
            own: dict[str, Any] = {
                "mode": mode,
                "weight_bits": weight_bits,
                "act_bits": act_bits,
                "transforms": transforms,
            }
            for more in alone:
                setting = replace(defaults, **{"rules": (), "corrections": (), **first, **own, **more})
                found.setdefault(setting)
        return tuple(found)

    def calibrations(self, defaults: Setting) -> tuple[Calibration, ...]:
        """Every calibrator of activations that a setting may have, with whatever numbers."""
        named = (_calibration({**_columns_of(defaults), "calibrator": c}) for c in self.values(defaults)["calibrator"])
        rules = (rule.calibrator for rule in (*self.rules, *defaults.rules) if rule.calibrator is not None)
        return (*named, *rules)


def _as_written(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_as_written(item) for item in value]
    return str(value) if isinstance(value, Calibration | Rule | Technique) else value


def _qat_from_dict(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What `QatSpace.to_dict` says, as a file would define it."""
    if values is None:
        return None
    ranges = {n: LogUniform(**v) if isinstance(v, Mapping) else v for n, v in values["choices"].items()}
    return {**ranges, **{name: value for name, value in values.items() if name != "choices"}}


def _is_pattern(column: str) -> bool:
    return column in SITE_GROUPS or "." in column or "*" in column


def _rules_of_column(column: str, values: Sequence[Any]) -> tuple[Rule, ...]:
    return tuple(rule for value in values for rule in rules_of({column: value})) if _is_pattern(column) else ()


def _columns_of(setting: Setting) -> dict[str, Any]:
    """A setting as one row of a space."""
    columns = {name: getattr(setting, name, None) for name in FIELDS}  # parameters and site groups: None
    numbers = zip(setting.calibrator.row.parameters, setting.calibrator.values, strict=True)
    return {**columns, "calibrator": setting.calibrator.name, **{p.name: value for p, value in numbers}}


def _calibration(row: Mapping[str, Any]) -> Calibration:
    """The calibrator of a row: with its numbers in the text, or in columns of their own, or by default."""
    text = row["calibrator"]
    if isinstance(text, Calibration) or not isinstance(text, str) or text not in CALIBRATORS:
        return Calibration.parse(text)
    wanted = CALIBRATORS[text].parameters
    return Calibration(text, tuple(p.default if row[p.name] is None else row[p.name] for p in wanted))


def setting_of(row: Mapping[str, Any], defaults: Setting) -> Setting:
    """The setting of a row; numbers of other calibrators than the row's do not matter, so such rows are one setting."""
    own = {name: value for name, value in row.items() if name in Setting.__dataclass_fields__}
    if not isinstance(row["rules"], tuple | list):
        raise InputError(f"rules: expected a list of rules, got {row['rules']!r}")
    rules = (*map(Rule.parse, row["rules"]), *rules_of({name: row[name] for name in row if _is_pattern(name)}))
    return Setting(**{**own, "calibrator": _calibration(row), "rules": rules, "batch_size": defaults.batch_size})


def load_space(path: str) -> SearchSpace:
    """Run a search space file. InputError, naming the file, for whatever is wrong with it."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; expected a search space (a Python file that defines SPACE)")
    try:
        defined = runpy.run_path(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        raise InputError(f"{path}: {_place(error, path)}{type(error).__name__}: {error}") from error
    return space_of(defined.get("SPACE"), path, defined.get("QAT"))


def space_of(space: Any, path: str, qat: Any = None) -> SearchSpace:
    """Check what a file defines as SPACE and QAT."""
    if not isinstance(space, Mapping):
        raise InputError(f"{path}: SPACE is {type(space).__name__}, expected a dictionary of field: values")
    for field in space:
        if not isinstance(field, str) or not (field in FIELDS or _is_pattern(field)):
            raise InputError(
                f"{path}: SPACE has the key {field!r}; the keys are {', '.join(FIELDS)}, or a site pattern with a dot "
                "or a star"
            )
    try:
        choices = {field: _checked_values(f"SPACE[{field!r}]", values) for field, values in space.items()}
        checked = SearchSpace(Path(path).stem, choices, None if qat is None else qat_space_of(qat))
        _check_values(checked)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return checked


def _check_values(space: SearchSpace) -> None:
    """Every value on its own, in an otherwise good setting; a grid can be too large to build."""
    good = _columns_of(Setting())
    for field, values in space.choices.items():
        for value in values:
            users = [name for name, row in CALIBRATORS.items() if field in (p.name for p in row.parameters)]
            users = ["fisher"] if field == "corrections" else users
            setting = setting_of({**good, **({"calibrator": users[0]} if users else {}), field: value}, Setting())
            require_sites(setting.rules)
            for calibration in setting.calibrations:
                calibration.require_meant()


def _place(error: BaseException, path: str) -> str:
    """`line N: ` of the user's file, where the error happened there."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: "
    trace, line = error.__traceback__, None
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == path else line
        trace = trace.tb_next
    return "" if line is None else f"line {line}: "
