"""A setting: what is asked for, as a hashable value. A search races settings; a checkpoint says which one it has.

    mode, calibrator, number and size of calibration batches, bits, calibrator of weights
    then rules, in order:      site pattern -> calibrator | factor on amax | bits | grid | off
    then named transforms and corrections with their strengths

A rule is written as text, `0.attn.* -> percentile 99.9`, `*.ffn.fc2._input_quantizer -> x 0.9`,
`*.attn.matmul_a_input_quantizer -> 6 bits`, `attention_probabilities -> unsigned`, `gemm_outputs -> off`. Its pattern
is matched as `fnmatch` does against `<block>.<site>`; `SITE_GROUPS` has names for patterns that are often wanted. A
later rule wins over an earlier one of its kind; rules of different kinds (calibrator, factor, bits, grid, off) add up.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vitq_ray.base.config import Config, InputError, is_number, require_choice, require_int
from vitq_ray.calibration.calibrators import CALIBRATORS, PERCENTILE, Calibration, weight_calibrators
from vitq_ray.calibration.corrections import CORRECTIONS, FEWEST_TO_LEARN, LEARN, RETIRED
from vitq_ray.calibration.transforms import TRANSFORMS
from vitq_ray.quant.plan import MAX_BITS, MIN_BITS
from vitq_ray.quant.sites import GRIDS, MODES, local_name, sites_of_blocks

SITE_GROUPS: dict[str, str] = {
    "attention_probabilities": "*.attn.matmul_a_input_quantizer",
    "gelu_output": "*.ffn.fc2._input_quantizer",
    "gemm_outputs": "*._aftergemm_quantizer",
}
_ARROW = " -> "
_MOST_SHOWN = 8  # rules and techniques in a label
_PERCENTILE, _MAX = Calibration("percentile", (PERCENTILE.default,)), Calibration("max")
_ANY_DEPTH = 100  # blocks that a pattern is tried on where the model is not known yet


@dataclass(frozen=True)
class Rule:
    """What the sites that match a pattern do instead: exactly one of calibrator, factor, bits, grid and off.

    Attributes:
        sites: pattern, or a name of `SITE_GROUPS`.
        calibrator: for the matched sites it can calibrate: weights only where it is one of `weight_calibrators()`.
        factor: on amax, > 0.
        bits: 2 to 8.
        off: the sites stay in floating point.
        grid: one of `GRIDS`, of activations only: `unsigned` for tensors that are never negative, `asymmetric` for the
            same integers with a zero point, `signed` for what most modes do anyway.
    """

    sites: str
    calibrator: Calibration | None = None
    factor: float | None = None
    bits: int | None = None
    off: bool = False
    grid: str | None = None

    def __post_init__(self) -> None:
        given = [value is not None for value in (self.calibrator, self.factor, self.bits, self.grid)] + [self.off]
        if sum(given) != 1:
            raise InputError(f"rule of {self.sites}: expected one of {_ACTIONS}")
        if self.factor is not None and not (is_number(self.factor, 0) and self.factor > 0):
            raise InputError(f"rule of {self.sites}: factor: expected a number > 0, got {self.factor!r}")
        if self.bits is not None:
            require_int(f"rule of {self.sites}: bits", self.bits, MIN_BITS, MAX_BITS)
        if self.grid is not None:
            require_choice(f"rule of {self.sites}: grid", self.grid, GRIDS)

    @property
    def pattern(self) -> str:
        return SITE_GROUPS.get(self.sites, self.sites)

    def matches(self, key: str) -> bool:
        """Whether it is about the site of this full name."""
        return fnmatch.fnmatchcase(local_name(key), self.pattern)

    @staticmethod
    def parse(value: Any) -> Rule:
        """A rule from its text, or as a pair (sites, action). InputError naming it where it is neither."""
        if isinstance(value, Rule):
            return value
        sites, action = value if isinstance(value, tuple | list) and len(value) == 2 else ("", None)
        if isinstance(value, str) and _ARROW in value:
            sites, _, action = value.partition(_ARROW)
        if not isinstance(sites, str) or not sites or not isinstance(action, str):
            raise InputError(f"rule: {value!r} is not of the form 'site pattern{_ARROW}{_ACTIONS}'")
        return Rule(sites, **_parse_action(sites, action))

    def __str__(self) -> str:
        return f"{self.sites}{_ARROW}{self.action}"

    @property
    def action(self) -> str:
        """The text behind the arrow."""
        if self.factor is not None:
            return f"x {self.factor!r}".removesuffix(".0")
        if self.bits is not None:
            return f"{self.bits} bits"
        return "off" if self.off else self.grid or str(self.calibrator)


_ACTIONS = f"{' | '.join(c.usage for c in CALIBRATORS.values())} | x FACTOR | BITS bits | {' | '.join(GRIDS)} | off"


def _parse_action(sites: str, action: str) -> dict[str, Any]:
    words = action.split()
    try:
        if words == ["off"]:
            return {"off": True}
        if action in GRIDS:
            return {"grid": action}
        if len(words) == 2 and words[0] == "x":
            return {"factor": float(words[1])}
        if len(words) == 2 and words[1] in ("bits", "bit"):
            return {"bits": int(words[0])}
        return {"calibrator": Calibration.parse(action)}
    except ValueError:
        raise InputError(f"rule of {sites}: {action!r} is not one of {_ACTIONS}") from None


def require_sites(rules: Iterable[Rule], depth: int | None = None) -> None:
    """InputError naming the first rule whose pattern matches no site of a model of `depth` blocks (None: of any)."""
    keys = list(sites_of_blocks(_ANY_DEPTH if depth is None else depth))
    for rule in rules:
        if not any(map(rule.matches, keys)):
            blocks = "" if depth is None else f" of the {depth} blocks"
            raise InputError(
                f"rule {str(rule)!r}: its pattern matches no site{blocks}; sites are named as {local_name(keys[0])!r}, "
                f"patterns as '*.ffn.fc1.*' or {', '.join(SITE_GROUPS)}"
            )


# What can be done to the weights: {field of a setting: {technique: whether it takes a strength}}.
TECHNIQUES: dict[str, dict[str, bool]] = {
    "transforms": {name: row.takes_strength for name, row in TRANSFORMS.items()},
    "corrections": dict.fromkeys(CORRECTIONS, False),
}


@dataclass(frozen=True)
class Technique:
    """A named transform or correction with its strength."""

    name: str
    strength: float = 1.0

    @staticmethod
    def parse(value: Any, field: str) -> Technique:
        """From `name` or `name strength`; InputError, with the field of a setting, for what is not known there."""
        if isinstance(value, Technique):
            return value
        known = TECHNIQUES[field]
        name, _, strength = value.partition(" ") if isinstance(value, str) else ("", "", "")
        if field == "corrections" and name in RETIRED:
            return Technique(name)
        if name not in known:
            raise InputError(f"{field}: {value!r} is not one of {', '.join(known)}")
        if strength and not known[name]:
            raise InputError(f"{field}: {name} takes no strength, got {value!r}")
        try:
            number = float(strength or 1)
        except ValueError:
            raise InputError(f"{field}: {name}: strength: expected a number, got {strength!r}") from None
        if not is_number(number, -2, 2):
            raise InputError(f"{field}: {name}: strength: expected a number in [-2, 2], got {strength!r}")
        return Technique(name, number)

    def __str__(self) -> str:
        return self.name if self.strength == 1 else f"{self.name} {self.strength!r}"


def techniques(field: str, values: Any) -> tuple[Technique, ...]:
    """Of a field, from their texts: in the order in which they are done, each once."""
    found = [Technique.parse(value, field) for value in _sequence(field, values)]
    names = [technique.name for technique in found]
    if len(set(names)) < len(names):
        raise InputError(f"{field}: {', '.join(names)}: one is named twice")
    order = [*TECHNIQUES[field], *RETIRED]
    return tuple(sorted(found, key=lambda technique: order.index(technique.name)))


@dataclass(frozen=True)
class Setting(Config):
    """One candidate: everything that turns calibration statistics into a plan. Texts are parsed where it is built.

    Attributes:
        mode: which sites are quantized, along which axis, fused or not: a key of `sites.MODES`.
        calibrator: of activations, e.g. `percentile 99.99`.
        num_batches, batch_size: calibration batches, and images in each.
        weight_bits, act_bits: 2 to 8.
        weights: calibrator of weights.
        rules: for single sites, in order; of one kind the last one holds.
        transforms, corrections: by name, with strengths.
    """

    mode: str = "ft2"
    calibrator: Calibration = _PERCENTILE
    num_batches: int = 10
    batch_size: int = 8
    weight_bits: int = 8
    act_bits: int = 8
    weights: Calibration = _MAX
    rules: tuple[Rule, ...] = ()
    transforms: tuple[Technique, ...] = ()
    corrections: tuple[Technique, ...] = ()

    def __post_init__(self) -> None:
        require_choice("quant mode", self.mode, MODES)
        require_int("number of calibration batches", self.num_batches, 1)
        require_int("images of a calibration batch", self.batch_size, 1)
        require_int("weight bits", self.weight_bits, MIN_BITS, MAX_BITS)
        require_int("activation bits", self.act_bits, MIN_BITS, MAX_BITS)
        self._set("calibrator", Calibration.parse(self.calibrator))
        self._set("weights", _of_weights(self.weights))
        self._set("rules", tuple(map(Rule.parse, _sequence("rules", self.rules))))
        for name in TECHNIQUES:
            self._set(name, techniques(name, getattr(self, name)))

    def require_images(self) -> None:
        """InputError where a correction needs more calibration images than it has."""
        images = self.num_batches * self.batch_size
        if images < FEWEST_TO_LEARN and any(correction.name == LEARN for correction in self.corrections):
            raise InputError(
                f"correction {LEARN}: {self.num_batches} calibration batches of {self.batch_size} images; "
                f"expected at least {FEWEST_TO_LEARN} images"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: calibrators, rules and techniques as texts."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        texts = {name: [str(item) for item in values[name]] for name in ("rules", "transforms", "corrections")}
        return {**values, "calibrator": str(self.calibrator), "weights": str(self.weights), **texts}

    @property
    def calibrations(self) -> tuple[Calibration, ...]:
        """Every calibrator of activations that it names."""
        return (self.calibrator, *(rule.calibrator for rule in self.rules if rule.calibrator is not None))

    @property
    def calibrations_of_weights(self) -> tuple[Calibration, ...]:
        """Every calibrator that weights may have."""
        rules = (rule.calibrator for rule in self.rules if rule.calibrator is not None)
        return (self.weights, *(calibration for calibration in rules if calibration.row.of_weights))

    @property
    def label(self) -> str:
        """Short name for tables, e.g. `ft2 percentile 99.99 n=10 w8a8`."""
        own = [] if self.weights == _MAX else [f"weights={self.weights}"]
        own += [str(item) for item in (*self.rules, *self.transforms, *self.corrections)]
        if len(own) > _MOST_SHOWN:
            own = [*own[: _MOST_SHOWN - 1], f"{len(own) - _MOST_SHOWN + 1} more"]
        tail = "".join(f" {text}," for text in own).rstrip(",")
        bits = f"w{self.weight_bits}a{self.act_bits}"
        return f"{self.mode} {self.calibrator.short} n={self.num_batches} {bits}{tail}"


def _of_weights(value: Any) -> Calibration:
    calibration = Calibration.parse(value, "calibrator of weights")
    require_choice("calibrator of weights", calibration.name, weight_calibrators())
    return calibration


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise InputError(f"{name}: expected a list, got {value!r}")
    return tuple(value)


def read_setting(values: Any, format_number: int, batch_size: int = 8) -> Setting:
    """The setting that a file of this format holds. `batch_size` is for format 1, which kept it elsewhere.

    Raises InputError for anything missing, unknown or impossible.
    """
    if format_number > 1:
        return Setting.from_dict(values, complete=True)
    old = _Format1.from_dict(values, complete=True)
    percentile = () if old.percentile is None else (old.percentile,)
    own = {name: getattr(old, name) for name in SITE_GROUPS}
    return Setting(
        mode=old.mode,
        calibrator=Calibration(old.calibrator, percentile),
        num_batches=old.num_batches,
        batch_size=batch_size,
        weight_bits=old.weight_bits,
        act_bits=old.act_bits,
        weights=Calibration.parse(old.weights),
        rules=tuple(Rule(name, Calibration.parse(text)) for name, text in own.items() if text is not None),
    )


@dataclass(frozen=True)
class _Format1(Config):
    """A setting as files of format 1 have it."""

    mode: str
    calibrator: str
    percentile: float | None
    num_batches: int
    weight_bits: int
    act_bits: int
    attention_probabilities: str | None
    gelu_output: str | None
    gemm_outputs: str | None
    weights: str


def rules_of(columns: Mapping[str, str | None]) -> tuple[Rule, ...]:
    """Rules from {site pattern: action, or None for no rule}."""
    return tuple(Rule.parse((sites, action)) for sites, action in columns.items() if action is not None)
