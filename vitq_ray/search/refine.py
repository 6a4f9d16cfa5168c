"""Refinement: coordinate steps from the best setting of a search, raced like all others. No Ray.

    source of settings ──► its best ──► every family alone: scale x 0.8, x 1.25, another calibrator
                       ──► the steps that gained, together ──► single sites of most loss ──► those that gained, together

A step is a rule behind those of the best setting. What gains is judged on the images that both have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from vitq_ray.base.config import InputError
from vitq_ray.calibration.calibrators import Calibration
from vitq_ray.calibration.setting import Rule, Setting
from vitq_ray.search.proposals import Proposals, Round

# Sites that take a step together: one tensor's, or those that share a scale in some mode.
FAMILIES = (
    "attn.query._input_quantizer",
    "attn.[qkv]*._weight_quantizer",
    "attn.[qkv]*._aftergemm_quantizer",
    "attn.matmul_[qkv]_input_quantizer",
    "attn.softmax_input_quantizer",
    "attn.matmul_a_input_quantizer",
    *(f"{layer}._{what}_quantizer" for layer in ("attn.out", "ffn.fc1", "ffn.fc2") for what in ("input", "weight")),
    *(f"{layer}._aftergemm_quantizer" for layer in ("attn.out", "ffn.fc1", "ffn.fc2")),
    "layernorm_input[12]_quantizer",
    "add[12]_local_input_quantizer",
    "add[12]_residual_input_quantizer",
)
_FACTORS = ("x 0.8", "x 1.25")
_LEAST_SHARE = 0.01  # of the forecast loss that a family must have to be worth a step
_SITES = 12  # that are looked at singly

Losses = Callable[[Setting], Mapping[str, float]]  # {full name of a site that is on: what it is forecast to lose}
Step = tuple[str, Setting]  # (pattern of the sites, setting that takes it)


def most_steps(calibrations: int) -> int:
    """Settings that a refinement tries at most, with so many calibrators in the space."""
    together = 3
    return len(FAMILIES) * (len(_FACTORS) + calibrations) + _SITES * len(_FACTORS) + 2 * together


class Refinement:
    """A source of settings that goes on from the best of another one."""

    def __init__(
        self,
        source: Proposals,
        losses: Losses,
        calibrations: Iterable[Calibration],
        depth: int,
        require: Callable[[Setting], None],
    ) -> None:
        """`require` raises InputError for a setting that is not possible; `calibrations` are those of the space."""
        self._source, self._losses, self._require, self._depth = source, losses, require, depth
        self._calibrations = tuple(dict.fromkeys(calibrations))
        self._base: Setting | None = None  # that steps are taken from
        self._seen: set[Setting] = set()
        self._refines = False  # the source has no more
        self._steps: list[Step] = []  # of the last round
        self._gained: list[tuple[float, Rule]] = []
        self._left = [self._families, self._together, self._sites, self._together]

    def next_round(self) -> list[Setting]:
        settings = [] if self._refines else self._fresh(self._source.next_round())
        self._refines = self._refines or not settings
        while not settings and self._left and self._base is not None:
            settings = self._fresh(self._left.pop(0)(self._base))
        return settings

    def tell(self, told: Round) -> None:
        """What the last round came to; see `Proposals`."""
        if not self._refines:
            self._source.tell(told)
        gains: dict[str, tuple[float, Rule]] = {}
        for pattern, setting in self._steps:
            assert self._base is not None
            gain = told.gain(setting, self._base)
            if gain > max(0.0, gains.get(pattern, (0.0, None))[0]):
                gains[pattern] = gain, setting.rules[-1]
        self._gained = sorted(gains.values(), key=lambda row: -row[0])
        self._base = told.best

    def _fresh(self, settings: Iterable[Setting]) -> list[Setting]:
        fresh = [setting for setting in dict.fromkeys(settings) if setting not in self._seen]
        self._seen.update(fresh)
        return fresh

    # The rounds of steps ------------------------------------------------------------------------------------------

    def _families(self, best: Setting) -> list[Setting]:
        losses = self._losses(best)
        least, patterns = _LEAST_SHARE * sum(losses.values()), []
        for family in FAMILIES:
            probe = Rule.parse((f"*.{family}", "x 1"))
            if sum(loss for key, loss in losses.items() if probe.matches(key)) > least:
                patterns.append(f"*.{family}")
        others = [str(c) for c in self._calibrations if c != best.calibrator]
        return self._take(best, patterns, (*_FACTORS, *others))

    def _sites(self, best: Setting) -> list[Setting]:
        losses = self._losses(best)
        groups = [f"{block}.{family}" for block in range(self._depth) for family in FAMILIES]
        of_group = {}
        for pattern in groups:
            probe = Rule.parse((pattern, "x 1"))
            of_group[pattern] = sum(loss for key, loss in losses.items() if probe.matches(key))
        worst = sorted(groups, key=lambda pattern: -of_group[pattern])[:_SITES]
        return self._take(best, [pattern for pattern in worst if of_group[pattern] > 0], _FACTORS)

    def _take(self, best: Setting, patterns: Iterable[str], actions: Iterable[str]) -> list[Setting]:
        self._steps = []
        for pattern in patterns:
            for action in actions:
                setting = replace(best, rules=(*best.rules, Rule.parse((pattern, action))))
                try:
                    self._require(setting)
                except InputError:  # a calibrator that these sites cannot have
                    continue
                self._steps.append((pattern, setting))
        return [setting for _, setting in self._steps]

    def _together(self, best: Setting) -> list[Setting]:
        """The steps that gained: all of them, the better half, the first; `best` may have taken one already."""
        rules = [rule for _, rule in self._gained if rule not in best.rules]
        self._gained = []
        counts = dict.fromkeys((len(rules), -(-len(rules) // 2), 1))
        self._steps = []
        return [replace(best, rules=(*best.rules, *rules[:count])) for count in counts if count]
