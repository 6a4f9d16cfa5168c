"""From a checkpoint to a verified file, and back into `evaluate`; bad inputs; checkpoints for FasterTransformer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import vitq_ray
from tests.conftest import FT_MODES, Project, load_script, make_project, scalars
from tests.engines.test_onnx import hand_made
from vitq_ray.base.config import InputError
from vitq_ray.commands.export import NUDGED, ORT_FLOAT, PLAN, notes_of_file, remarks
from vitq_ray.commands.options import ExportOptions
from vitq_ray.measure.comparison import Comparison
from vitq_ray.run.results import read_result

LAYER = "transformer.encoder.layer."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, str]:
    """A project, and a checkpoint calibrated for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "project").mkdir()
    project = make_project(folder / "project")
    return project, calibrated(project, folder / "calib", "ort")


def calibrated(project: Project, folder: Path, mode: str, **options: object) -> str:
    data = {"pretrained_dir": project.checkpoint, "data_path": str(project.folder)}
    few = {"num_calib_batch": 2, "calib_batchsz": 4, "calibrator": "max", "engine": "fake"}
    made = vitq_ray.calibrate(quant_mode=mode, calib_output_path=str(folder), **data, **few, **options)
    return str(made.checkpoint)


def test_written_verified_and_evaluated(made: tuple[Project, str], tmp_path: Path) -> None:
    project, checkpoint = made
    data = str(project.folder)
    result = vitq_ray.export(
        pretrained_dir=checkpoint, data_path=data, output=str(tmp_path / "e"), unsigned_weights=True, latency="1,2"
    )
    assert result.file.name == "vit_calib_ort.onnx"
    found = json.loads((tmp_path / "e" / "verification.json").read_text())
    assert found == json.loads(json.dumps(result.verification))
    variants = found["variants"]
    ours = {"plan", "plan, input nudged", "plan, symmetric"}
    assert set(variants) == {"float", *ours, "ort", "ort, Q/DQ in float"}
    for name in ("ort", "ort, Q/DQ in float"):
        assert variants[name]["images"] == 22
        assert variants[name]["to_plan"]["agreement"] == 1
        assert variants[name]["to_plan"]["largest"] < 0.1
    assert variants["ort"]["integer_products"] == 16
    assert set(variants["ort"]["float_products"]) == {"patch_embed", "head.matmul"}
    assert 0 < variants["plan"]["to_float"]["kl"] < variants["plan, symmetric"]["to_float"]["kl"] < 0.1
    assert found["bytes"] == result.file.stat().st_size
    assert {(row["variant"], row["batch"]) for row in found["latency"]} == {
        (v, b) for v in ("float", "plan", "ort", "ort, Q/DQ in float") for b in (1, 2)
    }
    assert all(row["ms_per_image"] > 0 for row in found["latency"])
    assert read_result(tmp_path / "e")["top1_correct"] == variants["ort"]["top1_correct"]

    options = {"data_path": data, "log_to": "tensorboard"}
    again = vitq_ray.evaluate(
        pretrained_dir=str(result.file), output=str(tmp_path / "v"), save_logits=str(tmp_path / "l.npz"), **options
    )
    (top1,) = scalars(tmp_path / "v" / "tensorboard")["top1"].values()
    assert top1 == pytest.approx(again.evaluation.top1)
    assert again.evaluation.top1_correct == variants["ort"]["top1_correct"]
    assert read_result(tmp_path / "v")["engine"] == {"name": "ort"}
    here = vitq_ray.evaluate(
        pretrained_dir=checkpoint, data_path=data, output=str(tmp_path / "w"), save_logits=str(tmp_path / "h.npz")
    )
    assert here.result["images_as"] == again.result["images_as"]
    logits = [np.load(tmp_path / name)["logits"] for name in ("l.npz", "h.npz")]
    assert np.abs(logits[0] - logits[1]).max() < 0.1
    with pytest.raises(InputError, match=r"img_size: 32 given, but .*\.onnx takes 16"):
        vitq_ray.evaluate(pretrained_dir=str(result.file), data_path=data, img_size=32)
    for name, value in (("crop_pct", 0.9), ("model_type", "ViT-B_16")):
        with pytest.raises(InputError, match=rf"{name}: {value} given, but .*\.onnx takes "):
            vitq_ray.evaluate(pretrained_dir=str(result.file), data_path=data, **{name: value})
    with pytest.raises(InputError, match=r"wprec: 4 given, but an ONNX file says it"):
        vitq_ray.evaluate(pretrained_dir=str(result.file), data_path=data, wprec=4)


@pytest.mark.parametrize(
    ("target", "options"),
    [("openvino", {}), ("tensorrt", {}), ("ort", {"float16": True}), ("tensorrt", {"float16": True})],
)
def test_every_target(target: str, options: dict[str, bool], made: tuple[Project, str], tmp_path: Path) -> None:
    """`reduce_range`: no kernel saturates, on any CPU."""
    if target == "openvino":
        pytest.importorskip("openvino", reason="no OpenVINO")
    project, _ = made
    rules = "*.attn.matmul_* -> off" if target == "tensorrt" else None  # heads of 8
    checkpoint = calibrated(project, tmp_path / "calib", target, rules=rules)
    result = vitq_ray.export(
        pretrained_dir=checkpoint,
        data_path=str(project.folder),
        target=target,
        output=str(tmp_path / "e"),
        reduce_range=True,
        **options,
    )
    own = "openvino" if target == "openvino" else "ort"
    found, variants = result.verification, result.verification["variants"]
    assert (own in variants, "openvino" in variants) == (True, target == "openvino")
    assert variants[own]["to_plan"]["agreement"] >= (0.9 if options else 1)
    assert variants[own]["to_plan"]["largest"] < (0.5 if options else 0.1)
    assert found["target"] == target
    assert read_result(tmp_path / "e")["top1_correct"] == variants[own]["top1_correct"]
    assert bool(found["conditions"]) == (target == "tensorrt")
    notes = [
        "tensorrt: no engine was built here; what was run is the file in ONNX Runtime",
        "tensorrt: not met: TensorRT fuses attention with heads of 16, 32 or 64, here 8",
    ]
    assert [note for note in found["notes"] if note.startswith("tensorrt: ")] == (notes if rules else [])
    kinds = {row.data_type for row in onnx.load(result.file).graph.initializer}
    assert (onnx.TensorProto.FLOAT16 in kinds, onnx.TensorProto.FLOAT in kinds) == (
        (True, False) if options else (False, True)
    )
    again = vitq_ray.evaluate(
        pretrained_dir=str(result.file), data_path=str(project.folder), engine=own, output=str(tmp_path / "v")
    )
    assert again.evaluation.top1_correct == variants[own]["top1_correct"]
    assert read_result(tmp_path / "v")["engine"] == {"name": own}


def compared(**kl: float) -> dict[str, Comparison]:
    names = {"plan": PLAN, "exact": ORT_FLOAT, "nudged": NUDGED}
    return {names.get(name, name): Comparison(1.0, value, 0.0) for name, value in kl.items()}


def agreeing(**agreement: float) -> dict[str, Comparison]:
    return {name: dataclasses.replace(c, agreement=c.kl) for name, c in compared(**agreement).items()}


@pytest.mark.parametrize(
    ("to_float", "to_plan", "has_vnni", "options", "notes"),
    [
        (compared(ort=0.1, exact=0.1), agreeing(ort=0.995, nudged=1.0), False, {}, []),
        (
            compared(ort=0.1, exact=0.1),
            agreeing(ort=0.99, nudged=0.98),
            False,
            {},
            ["ort: gives another class than the plan here for 1.00 % of the images; so does the plan itself for 2.00"],
        ),
        (
            compared(ort=0.2, exact=0.1),
            agreeing(ort=1.0, nudged=1.0),
            False,
            {},
            ["ort: KL to float 0.2000 with integer kernels, 0.1000 in ONNX Runtime without; they may saturate"],
        ),
        (compared(ort=0.2, exact=0.1), agreeing(ort=1.0, nudged=1.0), True, {}, []),
        (compared(ort=0.2, exact=0.1), agreeing(ort=1.0, nudged=1.0), False, {"unsigned_weights": True}, []),
        (
            compared(ort=0.2, exact=0.1),
            agreeing(ort=1.0, nudged=1.0),
            False,
            {"target": "tensorrt"},
            ["ort: KL to float 0.2000 with integer kernels"],
        ),
        (compared(ort=0.104, exact=0.1), agreeing(ort=1.0, nudged=1.0), False, {}, []),
        (
            compared(openvino=0.2, ort=0.1, exact=0.1),
            agreeing(openvino=1.0, ort=1.0, nudged=1.0),
            False,
            {},
            ["openvino: KL to float 0.2000 with integer kernels"],
        ),
    ],
)
def test_what_a_reader_must_know(
    to_float: dict[str, Comparison],
    to_plan: dict[str, Comparison],
    has_vnni: bool,
    options: dict[str, Any],
    notes: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vitq_ray.commands.export.HAS_VNNI", has_vnni)
    found = remarks(ExportOptions.of(options), to_float, to_plan)
    assert len(found) == len(notes)
    for text, start in zip(found, notes, strict=True):
        assert text.startswith(start)
        if "saturate" in text:
            offers = "reduce_range" if options.get("target") == "tensorrt" else "unsigned_weights or reduce_range"
            assert text.endswith(f"files that do not: with {offers}")


@pytest.mark.parametrize("ratio", [0.3, 0.31])
def test_a_large_file_is_said(ratio: float, tmp_path: Path) -> None:
    job: Any = SimpleNamespace(
        calibrated=SimpleNamespace(sidecar=SimpleNamespace(setting=SimpleNamespace(corrections=("round",)))),
        target=SimpleNamespace(name="ort"),
    )
    corrected, *others = notes_of_file(job, tmp_path, ratio)
    assert corrected.startswith("float: these weights have corrections (round)")
    large = "size: 31.00 % of the float weights; what is not a weight of a block stays in float"
    assert others == ([large] if ratio > 0.3 else [])


def test_a_file_of_another_program(made: tuple[Project, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    project, _ = made
    path = hand_made(tmp_path / "theirs.onnx", batch=4)
    with pytest.raises(InputError, match=r"_map\.txt.*label"):  # three classes, the labels have seven
        vitq_ray.evaluate(pretrained_dir=path, data_path=str(project.folder), output=str(tmp_path))
    folder = tmp_path / "three"
    (folder / "val").mkdir(parents=True)
    for number, row in enumerate(("red", "green", "blue")):
        (folder / "val" / f"{number}_{row}").mkdir()
        pixels = np.zeros((20, 20, 3), np.uint8)
        pixels[..., number] = 255
        from tests.conftest import encode_png

        for copy in (1, 2):
            (folder / "val" / f"{number}_{row}" / f"{copy}.png").write_bytes(encode_png(pixels // copy))
    found = vitq_ray.evaluate(pretrained_dir=path, data_path=str(folder), output=str(tmp_path / "out"))
    assert (found.evaluation.images, found.evaluation.top1_correct) == (6, 6)
    assert "does not say how its images are prepared: mean 0.5, std 0.5, bilinear assumed" in caplog.text


def test_bad_inputs_are_one_line(made: tuple[Project, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project, checkpoint = made
    export, evaluate = load_script("export"), load_script("evaluate")
    data = ["--data-path", str(project.folder), "--output", str(tmp_path / "out")]
    four = calibrated(project, tmp_path / "four", "ort", wprec=4)
    dead = tmp_path / "broken.onnx"
    dead.write_bytes(b"not a model")
    for script, options, message in (
        (export, [], "--pretrained_dir: needed, a calibrated checkpoint, or a finished run"),
        (export, ["--pretrained_dir", checkpoint], "--data-path: needed"),
        (export, ["--pretrained_dir", four, *data], ": not 8 bits; --force exports it all the same"),
        (export, ["--pretrained_dir", project.checkpoint, *data], "not a calibrated checkpoint"),
        (export, ["--pretrained_dir", checkpoint, *data, "--target", "tensorrt"], "signed integers without zero point"),
        (export, ["--pretrained_dir", checkpoint, *data, "--img_size", "32"], "--img_size: 32 given, but"),
        (export, ["--run", str(tmp_path), *data], "result.json"),
        (export, ["--pretrained_dir", checkpoint, *data, "--latency", "1,0"], "--latency: expected an integer"),
        (evaluate, ["--pretrained_dir", str(dead), *data], "not an ONNX file"),
        (evaluate, ["--pretrained_dir", checkpoint, *data, "--engine", "ort"], "--engine: ort runs ONNX files, got"),
        (evaluate, ["--pretrained_dir", str(dead), *data, "--engine", "int8"], "--engine: int8 runs checkpoints"),
    ):
        assert script.main(options) == 2, message
        err = capsys.readouterr().err
        assert message in err
        assert len(err.strip().splitlines()) == 1, err


def test_what_is_forced_is_said(made: tuple[Project, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    project, _ = made
    checkpoint = calibrated(project, tmp_path / "ft2", "ft2", aprec=6)
    result = vitq_ray.export(
        pretrained_dir=checkpoint, data_path=str(project.folder), output=str(tmp_path / "e"), force=True, limit=8
    )
    assert "ort fuses no quantizer there; exported all the same" in caplog.text
    assert result.verification["variants"]["ort, Q/DQ in float"]["to_plan"]["largest"] < 0.05
    assert onnx.load(result.file).graph.input[0].name == "images"


def test_the_best_of_a_run(made: tuple[Project, str], tmp_path: Path) -> None:
    """As a search leaves it: result.json, and the checkpoint in best/."""
    _, checkpoint = made
    run = tmp_path / "run"
    shutil.copytree(Path(checkpoint).parent, run / "best")
    shutil.move(run / "best" / "result.json", run / "result.json")
    result = vitq_ray.export(run=str(run), output=str(tmp_path / "e"), reduce_range=True, limit=8)
    assert result.verification["images"] == 8
    levels = [
        onnx.numpy_helper.to_array(r) for r in onnx.load(result.file).graph.initializer if r.name.endswith("levels")
    ]
    assert max(abs(level).max() for level in levels) == 63


# Checkpoints for FasterTransformer ----------------------------------------------------------------------------------

GEMMS = ("ffn.fc1", "ffn.fc2", "attn.query", "attn.key", "attn.value", "attn.out")
OTHERS = (
    *(f"attn.matmul_{name}_input" for name in "qkva"),
    *("attn.softmax_input", "layernorm_input1", "add1_local_input", "add1_residual_input"),
    *("layernorm_input2", "add2_local_input", "add2_residual_input"),
)


def weight_names(depth: int) -> list[str]:
    """In the order in which the engine's loader takes them, written out."""
    names = ["transformer.embeddings.position_embeddings", "transformer.embeddings.cls_token"]
    modules = ["transformer.embeddings.patch_embeddings"]
    for index in range(depth):
        own = ("attention_norm", "ffn_norm", "ffn.fc1", "ffn.fc2", "attn.query", "attn.key", "attn.value", "attn.out")
        modules += [f"{LAYER}{index}.{name}" for name in own]
    modules += ["transformer.encoder.encoder_norm", "head"]
    return names + [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def weight_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Of the tiny model: width 32, MLP 128, 4 patches of 8 x 8 and the class token, 7 classes."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embeddings.position_embeddings": (1, 5, 32),
        "transformer.embeddings.cls_token": (1, 1, 32),
        "transformer.embeddings.patch_embeddings.weight": (32, 3, 8, 8),
        "transformer.embeddings.patch_embeddings.bias": (32,),
        "transformer.encoder.encoder_norm.weight": (32,),
        "transformer.encoder.encoder_norm.bias": (32,),
        "head.weight": (7, 32),
        "head.bias": (7,),
    }
    layers = {"attention_norm": (32,), "ffn_norm": (32,), "ffn.fc1": (128, 32), "ffn.fc2": (32, 128)}
    layers |= {f"attn.{name}": (32, 32) for name in ("query", "key", "value", "out")}
    for index in range(depth):
        for name, shape in layers.items():
            shapes |= {f"{LAYER}{index}.{name}.weight": shape, f"{LAYER}{index}.{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("mode", FT_MODES)
def test_a_checkpoint_for_fastertransformer(mode: str, made: tuple[Project, str], tmp_path: Path) -> None:
    """Keys, order, shapes, and what holds between the scales."""
    project, _ = made
    path = Path(calibrated(project, tmp_path, mode))
    state = torch.load(path, weights_only=True)
    weights = [key for key in state if not key.endswith("_amax")]
    assert {key: tuple(state[key].shape) for key in weights} == weight_shapes(2)
    assert weights == weight_names(2)
    assert list(state)[: len(weights)] == weights
    sites = {
        f"{LAYER}{i}.{g}._{part}_quantizer" for i in (0, 1) for g in GEMMS for part in ("input", "weight", "aftergemm")
    }
    sites |= {f"{LAYER}{i}.{name}_quantizer" for i in (0, 1) for name in OTHERS}
    assert {key.removesuffix("._amax") for key in state if key.endswith("_amax")} == sites
    assert len(sites) == 58
    for i in (0, 1):
        amax = {
            key.removeprefix(f"{LAYER}{i}."): state[f"{key}._amax"] for key in sites if key.startswith(f"{LAYER}{i}.")
        }
        for name, value in amax.items():
            rows = state[f"{LAYER}{i}.{name.split('._')[0]}.weight"].shape[0] if "_weight_" in name else 0
            assert value.shape == ((rows, 1) if rows and mode == "ft1" else ())
            assert value.dtype == torch.float32
        for gemm in GEMMS:
            magnitude = state[f"{LAYER}{i}.{gemm}.weight"].abs()
            expected = magnitude.amax(1, keepdim=True) if mode == "ft1" else magnitude.max()
            if mode != "ft1" and gemm in GEMMS[2:5]:
                expected = max(state[f"{LAYER}{i}.{g}.weight"].abs().max() for g in GEMMS[2:5])
            assert torch.equal(amax[f"{gemm}._weight_quantizer"], expected)
        same = [[f"attn.{g}._input_quantizer" for g in ("query", "key", "value")]]
        same += [[f"layernorm_input{n}_quantizer", f"add{n}_residual_input_quantizer"] for n in (1, 2)]
        fused = [[f"attn.{g}._aftergemm_quantizer" for g in ("query", "key", "value")]]
        fused += [[f"attn.matmul_{name}_input_quantizer" for name in "qkv"]]
        for names in (*same, *fused):
            is_one = len({float(amax[name]) for name in names}) == 1
            assert is_one == (names in same or mode != "ft1"), names
        assert 0 < float(amax["attn.matmul_a_input_quantizer"]) <= 1
