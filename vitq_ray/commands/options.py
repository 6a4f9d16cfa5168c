"""The options of every command: each is declared here once, see `declare`.

The docstring of a command's class is its help; `{command}` stands for what the user typed to run it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vitq_ray.base.config import InputError
from vitq_ray.calibration.calibrators import CALIBRATORS, Parameter, weight_calibrators
from vitq_ray.calibration.corrections import CORRECTIONS
from vitq_ray.calibration.setting import Calibration, Rule, Setting, techniques
from vitq_ray.calibration.transforms import ALL_TRANSFORMS, TRANSFORMS
from vitq_ray.commands.declare import Choice, Flag, Kind, Name, Number, Options, Place, Text, option, with_rows
from vitq_ray.data.folders import CLASS_ORDERS
from vitq_ray.data.loader import ON_BAD_IMAGE
from vitq_ray.engines.execute import AUTO as AUTO_ENGINE
from vitq_ray.engines.execute import ENGINES
from vitq_ray.engines.runtimes import RUNTIMES
from vitq_ray.engines.targets import TARGETS
from vitq_ray.measure.racing import FIDELITY, OBJECTIVES
from vitq_ray.models.geometry import AUTO
from vitq_ray.qat.recipe import MOST_SEED, RECIPE_OPTIONS, RecipeOption
from vitq_ray.quant.plan import MAX_BITS, MIN_BITS
from vitq_ray.quant.sites import MODES
from vitq_ray.run.outlets import require_target
from vitq_ray.search.proposals import DEFAULT_SAMPLES, SEARCH_ALGORITHMS
from vitq_ray.search.site_effects import KINDS, WHOLE
from vitq_ray.search.space import MOST_SETTINGS

MOST_SELECTION_IMAGES = 10_000  # by default: they are kept decoded
DEFAULT_SPACE = "ptq"
MOST_THREADS, MOST_WORKERS = 1024, 10_000
MOST_GIGABYTES = 100_000
AUTO_SHARE = "auto"
PART_KINDS = tuple(kind for kind in KINDS if kind != WHOLE)
_INPUT = Place(uri=True)
_SEED = Number(int, 0, MOST_SEED)
_THREADS, _WORKERS = Number(int, 1, MOST_THREADS), Number(int, 1, MOST_WORKERS)
_BATCH_HELP = "images per evaluation batch; default: as many as stay in the caches, at most 100"
_MODE = Choice(tuple(MODES), {"1": "ft1", "2": "ft2"})  # the old toolkit's names


def _engine() -> Any:
    return option(Choice(ENGINES), AUTO_ENGINE, "what runs quantized models; auto: the faster one that is exact here")


def _names(table: Iterable[str]) -> str:
    """`a, b or c`."""
    *others, last = table
    return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """model and images"""

    pretrained_dir: str | None = option(
        _INPUT, None, "checkpoint file: .npz, .pth, .safetensors, or *_calib.pth (path or URI)", "--pretrained_dir"
    )
    data_path: str | None = option(
        _INPUT,
        None,
        "folder with train.zip, val.zip and their maps, or with train/ and val/; or of images without labels: a zip "
        "without its map, or files without class folders (then only KL to the float model and agreement are told)",
    )
    model_type: str = option(Name(), AUTO, "ViT-B_16, …, a timm name, or auto: read it from the file", "--model_type")
    img_size: int | None = option(
        Number(int, 1, 4096), None, "pixels; default: the model type's, with auto the file's", "--img_size"
    )
    heads: int | None = option(Number(int, 1), None, "attention heads, where with auto the file does not tell them")
    crop_pct: float | None = option(
        Number(float, 0.01, 1), None, "crop the centre of evaluation images, by timm's rule"
    )
    class_order: str | None = option(
        Choice(CLASS_ORDERS), None, "number class folders by name as text, or by the number that they are named by"
    )
    on_bad_image: str = option(Choice(ON_BAD_IMAGE), "error", "what to do with a broken image")
    use_gpu: bool = option(Flag(), False, "run the model on the first GPU")


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(Options):
    """reading images in this process"""

    decode_threads: int = option(_THREADS, 2, "threads that decode images")


def parameters() -> dict[str, Parameter]:
    """{option: the number of a calibrator that it gives}."""
    return {p.name: p for row in CALIBRATORS.values() for p in row.parameters}


@dataclass(frozen=True)
class CalibratorNumber:
    """A number of a calibrator: its row knows what is allowed and what is meant."""

    row: Parameter
    shown: str | None = ""

    def read(self, value: Any) -> float:
        number = Number(float, self.row.low, self.row.high).read(value)
        self.row.require_meant(number)
        return number


def _parameter_rows() -> dict[str, Any]:
    return {
        name: option(CalibratorNumber(p), None, f"in [{p.low:g}, {p.high:g}]; default: {p.default:g}")
        for name, p in parameters().items()
    }


@dataclass(frozen=True, kw_only=True)
@with_rows(_parameter_rows())
class SettingOptions(Options):
    """one quantization setting, and what is drawn for it; the numbers of calibrators are rows of `CALIBRATORS`"""

    seed: int = option(_SEED, 42, "seed of every random choice")
    quant_mode: str = option(_MODE, "ft2", _names(MODES))
    calibrator: str = option(Choice(tuple(CALIBRATORS)), "percentile", "how amax is chosen")
    num_calib_batch: int = option(Number(int, 1), 10, "number of calibration batches")
    calib_batchsz: int = option(Number(int, 1), 8, "images per calibration batch")
    wprec: int = option(Number(int, MIN_BITS, MAX_BITS), 8, "bits of weights")
    aprec: int = option(Number(int, MIN_BITS, MAX_BITS), 8, "bits of activations")
    weight_calibrator: str = option(Choice(weight_calibrators()), "max", "how amax of weights is chosen")
    transforms: str | None = option(
        Text(),
        None,
        f"exact changes of the weights, with commas: {', '.join(TRANSFORMS)}; all: {', '.join(ALL_TRANSFORMS)}",
    )
    corrections: str | None = option(
        Text(), None, f"changes that undo a part of the error, with commas: {', '.join(CORRECTIONS)}"
    )
    rules: str | None = option(Text(), None, "rules for single sites, with semicolons: 'pattern -> action; …'")

    @property
    def setting(self) -> Setting:
        """The setting that these options describe; a calibrator's numbers are by default those of its row."""
        row = CALIBRATORS[self.calibrator]
        given = {p.name: getattr(self, p.name) for p in row.parameters}
        values = tuple(p.default if given[p.name] is None else given[p.name] for p in row.parameters)
        transforms = ALL_TRANSFORMS if self.transforms == "all" else _listed(self.transforms, ",")
        return Setting(
            mode=self.quant_mode,
            calibrator=Calibration(self.calibrator, values),
            num_batches=self.num_calib_batch,
            batch_size=self.calib_batchsz,
            weight_bits=self.wprec,
            act_bits=self.aprec,
            weights=Calibration(self.weight_calibrator),
            rules=tuple(map(Rule.parse, _listed(self.rules, ";"))),
            transforms=techniques("transforms", transforms),
            corrections=techniques("corrections", _listed(self.corrections, ",")),
        )


def _listed(text: str | None, separator: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(separator) if word.strip())


@dataclass(frozen=True)
class Targets:
    """Outlets, each an option of its own on a command line."""

    shown: str = "{mlflow:URI,tensorboard,wandb:PROJECT}"
    repeated: bool = True

    def read(self, value: Any) -> tuple[str, ...]:
        texts = tuple(map(Text().read, value if isinstance(value, list | tuple) else (value,)))
        for text in texts:
            require_target(text)
        return tuple(dict.fromkeys(texts))


@dataclass(frozen=True, kw_only=True)
class OutletOptions(Options):
    """where a run is shown, beside its folder"""

    log_to: tuple[str, ...] | None = option(
        Targets(), None, "tell it parameters, metrics, and result.json as they come; may be given several times"
    )


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(Options):
    """several workers instead of this process; their results do not depend on how many they are"""

    num_workers: int | None = option(_WORKERS, None, "compute on N Ray workers; default: in this process")
    threads_per_worker: int = option(_THREADS, 1, "threads of one such worker")
    ray_address: str | None = option(
        Text(), None, "host:port of a Ray cluster, or auto; default: start Ray on this machine"
    )


@dataclass(frozen=True, kw_only=True)
class RayOptions(Options):
    """Ray"""

    ray_address: str | None = option(
        Text(), None, "host:port of a Ray cluster, or auto; default: start Ray on this machine"
    )
    dashboard: bool = option(Flag(negation=True), True, "serve Ray's dashboard")


@dataclass(frozen=True, kw_only=True)
class OneSettingOptions(ModelOptions, DecodeOptions, SettingOptions):
    """what calibrating one setting needs"""


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(OneSettingOptions, WorkerOptions, OutletOptions):
    """Calibrate one INT8 setting, evaluate it on all of val, and write the calibrated checkpoint.

        {command}                                          # the bundled sample
        {command} --pretrained_dir ViT-B_16.npz --data-path /data/imagenet --model_type ViT-B_16 \\
            --img_size 384 --num-calib-batch 20 --calib-batchsz 8 --quant-mode ft2 --calibrator percentile \\
            --percentile 99.99 --calib-output-path runs/vit

    Calibration images are drawn by --seed (a search draws its own by --split-seed).
    Writes `<name>_calib.pth`, its sidecar `<name>_calib.json`, and `result.json`.
    """

    calib_split: str | None = option(Choice(("train", "val")), None, "images to calibrate on; default: train if there")
    calib_order: str = option(Choice(("shuffled", "map")), "shuffled", "which images of the split")
    batch_size: int | None = option(Number(int, 1), None, _BATCH_HELP)
    engine: str = _engine()
    fidelity: bool = option(
        Flag(),
        False,
        "run the float model on val, too, and tell KL and agreement: about as long again; always so without labels",
    )
    calib_output_path: str = option(Place(), "runs/calib", "folder for checkpoint and results")
    calib: bool = option(Flag(), False, "accepted for the old toolkit's command lines")
    name: str | None = option(Text(), None, "name of the experiment, kept in result.json")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions, DecodeOptions, WorkerOptions, OutletOptions):
    """Evaluate a float or a calibrated checkpoint on all of val, in map order.

        {command}                                                         # the bundled sample, float
        {command} --pretrained_dir runs/calib/vit_calib.pth --data-path /data/imagenet

    Bits and mode of a calibrated checkpoint come from its sidecar, and options that say otherwise are refused. One of
    the old toolkit, without a sidecar, needs --quant-mode, --wprec and --aprec. An ONNX file, of `export` or of another
    program, runs in ONNX Runtime or with `--engine openvino` in OpenVINO. Writes `result.json`, and with
    `--save-logits` the arrays `logits` (N, classes), `labels` and `sample_id`.
    """

    batch_size: int | None = option(Number(int, 1), None, _BATCH_HELP)
    engine: str = option(
        Choice((*ENGINES, *RUNTIMES)),
        AUTO_ENGINE,
        "what runs quantized models; auto: the faster one that is exact here, or ort",
    )
    quant_mode: str | None = option(_MODE, None, "mode of a calibrated checkpoint, if it has no sidecar")
    wprec: int | None = option(Number(int, MIN_BITS, MAX_BITS), None, "bits of its weights, if it has no sidecar")
    aprec: int | None = option(Number(int, MIN_BITS, MAX_BITS), None, "bits of its activations, if it has no sidecar")
    reference: str | None = option(
        _INPUT, None, "float checkpoint to compare with: KL and agreement; needed where val has no labels"
    )
    limit: int | None = option(Number(int, 1), None, "evaluate only the first N images of val")
    save_logits: str | None = option(Place(), None, "file (.npz) for the logits of every image")
    output: str = option(Place(), "runs/evaluate", "folder for result.json")


@dataclass(frozen=True)
class Sizes:
    """Batch sizes, such as `1,8`."""

    shown: str | None = ""

    def read(self, value: Any) -> tuple[int, ...]:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else (value,)
        return tuple(int(_WORKERS.read(part)) for part in parts)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ModelOptions, DecodeOptions):
    """Write a calibrated or trained model as an ONNX file that a runtime executes in INT8, and verify it on val.

        {command} --target ort --run runs/search                            # the best of a finished search or training
        {command} --target openvino --pretrained_dir runs/calib/vit_calib.pth --data-path /data/imagenet

    Q/DQ stand at exactly the sites of the checkpoint's plan; calibrate with --quant-mode ort, openvino or tensorrt to
    have those that the target computes in integers. The file is run in ONNX Runtime, with its integer kernels and
    without, and for openvino in OpenVINO, beside the plan as it is executed here. Writes the file, verification.json
    and result.json.
    """

    target: str = option(Choice(tuple(TARGETS)), "ort", "the runtime that the file is for")
    run: str | None = option(Place(), None, "folder of a finished search or training, in place of a checkpoint")
    limit: int = option(Number(int, 1), 512, "verify on the first N images of val")
    float16: bool = option(Flag(), False, "all that is not an integer in 16 bits")
    unsigned_weights: bool = option(
        Flag(), False, "weights as uint8 around 128: the same integers, which do not saturate on CPUs without VNNI"
    )
    reduce_range: bool = option(Flag(), False, "weights of 7 bits, which do not saturate there either")
    force: bool = option(Flag(), False, "export what the target has no integer kernels for, too")
    latency: tuple[int, ...] | None = option(Sizes(), None, "measure ms per image at batch sizes such as 1,8")
    output: str = option(Place(), "runs/export", "folder for the file")


@dataclass(frozen=True)
class Kinds:
    """Kinds of parts of a plan, such as `family,block`."""

    shown: str | None = ""

    def read(self, value: Any) -> str:
        names = Text().read(value).split(",")
        unknown = [name for name in names if name not in PART_KINDS]
        if unknown:
            raise InputError(f"{unknown[0]!r} is not one of {', '.join(PART_KINDS)}")
        return ",".join(names)


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(OneSettingOptions):
    """Say what each site, family of sites and block costs: KL to the float model where it alone is quantized.

        {command}                                                        # the bundled sample, calibrated first
        {command} --run runs/search                                      # the best of a finished search or training
        {command} --pretrained_dir runs/calib/vit_calib.pth --data-path /data/imagenet
        {command} --resume runs/sensitivity                              # go on after an interruption

    A float checkpoint is calibrated first, with the setting that --quant-mode, --calibrator, … describe. Predictions
    come from gradients of a few calibration images. Writes run.json, trials.jsonl, sensitivity.json and result.json;
    with --run also sensitivity.json of that run.
    """

    run: str | None = option(Place(), None, "folder of a finished search or training, in place of a checkpoint")
    images: int = option(Number(int, 2), 32, "images of val, drawn by --seed, that parts are measured on")
    parts: str = option(Kinds(), ",".join(PART_KINDS), "what is measured, with commas")
    engine: str = _engine()
    output: str | None = option(Place(), None, "folder of the run; default: a new one under runs/")
    resume: str | None = option(Place(), None, "folder of an interrupted run to go on with")


@dataclass(frozen=True)
class Share:
    """A share from 0 to 1, or `auto`."""

    shown: str | None = ""

    def read(self, value: Any) -> float | str:
        if value == AUTO_SHARE:
            return AUTO_SHARE
        try:
            return Number(float, 0, 1).read(value)
        except InputError as error:
            expected = str(error).rpartition(", got ")[0]
            raise InputError(f"{expected}, or {AUTO_SHARE}, got {value!r}") from None


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """Draw what a run found as one page, report.html in its folder: a file that needs no network.

        {command} runs/search                             # also of a run that was killed, or is still at work
        {command} runs/search --table                     # and every candidate as candidates.csv and candidates.parquet

    It is drawn from the folder alone. Searches, trainings and calibrations write it at their end themselves.
    """

    run: str | None = option(Place(), None, "folder of a search, a training, a calibration, …", "DIR")
    table: bool = option(
        Flag(), False, "also write every candidate with every field, as candidates.csv and candidates.parquet"
    )


@dataclass(frozen=True, kw_only=True)
class TuneOptions(ModelOptions, SettingOptions, RayOptions, OutletOptions):
    """Find the best calibration setting of a search space: one float pass, then a race of all settings under Ray Tune.

        {command}                                     # the bundled sample
        {command} --pretrained_dir ViT-B_16.npz --data-path /data/imagenet --model_type ViT-B_16 \\
            --select-images 5000 --search-space calib --output runs/search
        {command} --resume runs/search                # go on after a kill, with the options of before

    Calibration images come from train, drawn by --split-seed; val is halved: settings are compared on one half
    (selection), and the winner is reported on the other (report), which no decision has seen. Settings are compared by
    KL to the float model, which also images without labels tell. Writes run.json, statistics.npz, trials.jsonl,
    optuna-journal.log, correct.parquet, result.json and best/ into the output folder.
    """

    max_trials_in_flight: int | None = option(_WORKERS, None, "trials at once; default: as many as fit")
    threads_per_trial: int = option(_THREADS, 1, "CPUs of one trial or worker")
    gpus_per_trial: float | None = option(
        Number(float, 0, MOST_THREADS), None, "GPUs of one trial; default: 1 with --use-gpu, else 0"
    )
    num_workers: int = option(_WORKERS, 1, "workers that collect calibration statistics")
    object_store_memory: float | None = option(
        Number(float, 0.1, MOST_GIGABYTES), None, "GB a node keeps decoded images in"
    )
    search_space: str = option(Place(), DEFAULT_SPACE, "Python file that defines SPACE, or the name of a bundled one")
    search_alg: str = option(Choice(SEARCH_ALGORITHMS), "grid", "which settings of the space are tried")
    num_samples: int | None = option(
        Number(int, 1, MOST_SETTINGS), None, f"settings that random or optuna try; default: {DEFAULT_SAMPLES}"
    )
    select_images: int | None = option(
        Number(int, 1), None, f"images to compare settings on; default: half of val, at most {MOST_SELECTION_IMAGES}"
    )
    batch_size: int | None = option(Number(int, 1), None, _BATCH_HELP)
    engine: str = _engine()
    chunk_images: int | None = option(
        Number(int, 1),
        None,
        "images between two looks; default: a 25th of all, by fidelity fewer before the first ones",
    )
    objective: str = option(
        Choice(tuple(OBJECTIVES)),
        FIDELITY,
        "what is best: the least mean KL to the float model (it needs few images and no labels), or the largest top-1",
    )
    alpha: float = option(Number(float, 1e-9, 0.999), 0.05, "chance of losing the best (racing.py)")
    tie_margin: float = option(Number(float, 0, 0.5), 0.005, "top-1 not worth telling apart, a fraction")
    from_run: str | None = option(
        Place(), None, "folder of a finished search: try its best and tied settings instead of the space's"
    )
    target: str | None = option(
        _MODE,
        None,
        "search this mode, such as that of the runtime that the winner is for, in place of the space's modes",
    )
    latency: tuple[int, ...] | None = option(
        Sizes(),
        None,
        "measure ms per image of float and winner on this machine, at batch sizes such as 1,8; where the winner's mode "
        "is that of a runtime, also as a file there",
    )
    refine: bool = option(
        Flag(), False, "go on from the best setting: scales and calibrators of families of sites, then of single sites"
    )
    int8_share: float | str | None = option(
        Share(),
        None,
        "leave in float what costs most, so that this share of the blocks' multiply-accumulates stays in integers; "
        "auto: the largest of eight shares, 1 to 0.7, that meets --target-drop",
    )
    target_drop: float = option(
        Number(float, -100, 100),
        0.5,
        "points below float that need no QAT, or with --int8-share auto no more in float",
    )
    split_seed: int = option(_SEED, 0, "seed of the three splits")
    min_float_top1: float | None = option(Number(float, 0, 1), None, "refuse to search below this float top-1")
    output: str | None = option(Place(), None, "folder of the run; default: a new one under runs/")
    resume: str | None = option(Place(), None, "folder of a run to go on with; other options are those of before")


@dataclass(frozen=True)
class WorkerRange:
    """A number of workers, or a range of them such as `2-8`."""

    shown: str | None = ""

    def read(self, value: Any) -> int | str:
        low, dash, high = value.partition("-") if isinstance(value, str) else (value, "", value)
        try:
            counts = [int(_WORKERS.read(text)) for text in (low, high if dash else low)]
        except InputError as error:
            expected = str(error).rpartition(", got ")[0]
            raise InputError(f"{expected}, or a range such as 2-8, got {value!r}") from None
        if counts[0] > counts[1]:
            raise InputError(f"expected a range such as 2-8, got {value!r}")
        return counts[0] if counts[0] == counts[1] else f"{counts[0]}-{counts[1]}"


@dataclass(frozen=True)
class Recipe:
    """A number of a recipe: its row knows what is allowed."""

    row: RecipeOption
    shown: str | None = ""

    def read(self, value: Any) -> Any:
        if isinstance(value, str):
            with suppress(ValueError):  # the row says what it expected
                value = self.row.kind(value)
        self.row.check(value)
        return value


def _recipe_rows() -> dict[str, Any]:
    """{option: field} of what the command line can say of a recipe."""
    rows = {row.argument: row for row in RECIPE_OPTIONS if row.argument is not None}
    return {name: option(_kind_of(row), row.default, row.help) for name, row in rows.items()}


def _kind_of(row: RecipeOption) -> Kind:
    if row.kind is bool:
        return Flag()
    return Choice(row.choices) if row.choices else Recipe(row)


@dataclass(frozen=True, kw_only=True)
@with_rows(_recipe_rows())
class RecipeOptions(Options):
    """what is trained: the rows of `qat.recipe.RECIPE_OPTIONS`"""

    def recipe_values(self) -> dict[str, Any]:
        """{name of a recipe option: value}."""
        return {row.name: getattr(self, row.argument) for row in RECIPE_OPTIONS if row.argument is not None}


@dataclass(frozen=True, kw_only=True)
class TrainOptions(OneSettingOptions, RecipeOptions, RayOptions, OutletOptions):
    """Train a calibrated model with its quantizers on, taught by the float model; keep the best epoch.

        {command}                                            # the bundled sample, calibrated first
        {command} --pretrained_dir runs/vit/ViT-B_16_calib.pth --data-path /data/imagenet --distill \\
            --teacher ViT-B_16.npz --model_type ViT-B_16 --num-workers 4 --use-gpu --output runs/vit-qat
        {command} --resume runs/vit-qat                      # go on after an interruption

    A float checkpoint is calibrated first, with the setting that --quant-mode, --calibrator, … describe, on images
    drawn by --seed. The best epoch is chosen on one half of val (selection); float, PTQ and QAT are reported on the
    other (report). With the bundled sample distillation is on, otherwise with --distill; its teacher is --teacher, or
    the checkpoint itself with its quantizers off. The defaults are the published recipe: SGD, momentum 0.9, dropout
    0.1, training images augmented.

    Writes run.json, steps.jsonl, epochs.jsonl, state.pt, result.json, `<name>_qat.pth` and its sidecar.
    """

    split_seed: int = option(_SEED, 0, "seed of the halves of val")
    distill: bool | None = option(Flag(negation=True), None, "learn from the float model too")
    teacher: str | None = option(
        _INPUT, None, "float checkpoint of the teacher; default: this checkpoint, quantizers off"
    )
    batch_size: int = option(Number(int, 1), 32, "images per worker and forward pass")
    accumulate: int = option(Number(int, 1), 1, "forward passes per step")
    global_batch_size: int | None = option(Number(int, 1), None, "images per step; overrides --batch-size")
    num_workers: int | str = option(
        WorkerRange(), 1, "processes that train together; 2-8: as many of them as the cluster has room for at the time"
    )
    max_failures: int = option(Number(int, 0, MOST_WORKERS), 3, "restarts after a lost worker")
    checkpoint_steps: int | None = option(Number(int, 1), None, "write the state every so many steps, too")
    output: str | None = option(Place(), None, "folder of the run; default: a new one under runs/")
    resume: str | None = option(Place(), None, "folder of an interrupted run to go on with")
    train: bool = option(Flag(), False, "accepted for the old toolkit's command lines")
    name: str | None = option(Text(), None, "name of the experiment, kept in result.json")

    @property
    def workers(self) -> tuple[int, int]:
        """At least and at most so many; a step is shared out to the latter."""
        low, _, high = str(self.num_workers).partition("-")
        return int(low), int(high or low)
