"""The commands with checkpoints that other programs wrote, dead models, sizes beyond memory: all in this process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vitq_ray
from tests.conftest import Project, tiny_vit
from vitq_ray.commands.calibrate import CalibrateResult
from vitq_ray.commands.inputs import require_as_calibrated
from vitq_ray.commands.options import EvaluateOptions
from vitq_ray.models.checkpoint import Sidecar
from vitq_ray.models.fastertransformer import to_fastertransformer
from vitq_ray.models.geometry import geometry_of, named_geometry
from vitq_ray.models.load import HALF
from vitq_ray.quant.plan import rules_of_mode
from vitq_ray.quant.sites import MODES

BY_HAND = {"quant_mode": "ft2", "wprec": 8, "aprec": 8, "heads": 4}


@pytest.fixture
def calibrated(project: Project, tmp_path: Path) -> CalibrateResult:
    path = str(tmp_path / "calib")
    return vitq_ray.calibrate(
        pretrained_dir=project.checkpoint, data_path=str(project.folder), num_calib_batch=2, calib_output_path=path
    )


def test_a_calibrated_checkpoint_without_sidecar(calibrated: CalibrateResult, project: Project, tmp_path: Path) -> None:
    """As the old toolkit leaves it: evaluated, and trained further."""
    calibrated.checkpoint.with_suffix(".json").unlink()
    options = {"pretrained_dir": str(calibrated.checkpoint), "data_path": str(project.folder)}
    with pytest.raises(vitq_ray.InputError, match=r"vit_calib\.json: not found; .* --quant-mode, --wprec and --aprec"):
        vitq_ray.evaluate(**options, output=str(tmp_path / "e"), quant_mode="ft2")
    found = vitq_ray.evaluate(**options, **BY_HAND, output=str(tmp_path / "e"))
    assert found.what == "ft2 w8a8, scales of the file"
    assert found.evaluation.top1_correct == calibrated.evaluation.top1_correct
    written = json.loads((tmp_path / "e" / "result.json").read_text())
    assert (written["setting"], written["calibration"]) == (None, {"by": "another program"})
    trained = vitq_ray.train(**options, **BY_HAND, output=str(tmp_path / "q"), num_epochs=1, dashboard=False)
    assert trained.counts["ptq"]["val"].top1_correct == calibrated.evaluation.top1_correct
    again = vitq_ray.train(resume=str(tmp_path / "q")).result  # nobody says it again
    assert again == {**trained.result, "run": again["run"]}
    assert vitq_ray.load_calibrated(str(trained.checkpoint)).sidecar.calibration["by"] == "another program"


def test_float_weights_of_vit_pytorch(project: Project, tmp_path: Path) -> None:
    model = tiny_vit()
    with np.load(project.checkpoint) as file:
        model.head.bias.data = torch.from_numpy(file["head/bias"])
    torch.save(to_fastertransformer(model.state_dict(), geometry_of(model)), tmp_path / "vit.bin")
    options = {"data_path": str(project.folder), "output": str(tmp_path / "e")}
    ours = vitq_ray.evaluate(pretrained_dir=str(tmp_path / "vit.bin"), heads=4, **options)
    assert ours.what == "float"
    half = [0.5, 0.5, 0.5]
    assert ours.result["images_as"] == {"mean": half, "std": half, "interpolation": "bilinear", "crop_pct": None}
    assert ours.evaluation.top1 == 1  # the labels are what this model says
    with pytest.raises(vitq_ray.InputError, match=r"wprec: 8 given, but .* is a float checkpoint; calibrate it first"):
        vitq_ray.evaluate(pretrained_dir=str(tmp_path / "vit.bin"), heads=4, wprec=8, **options)


@pytest.mark.parametrize("mode", ["ft1", "ft2"])
def test_a_pruned_model_is_calibrated(mode: str, project: Project, tmp_path: Path) -> None:
    """ft1 leaves the dead tensors out, ft2 has one of them on."""
    with np.load(project.checkpoint) as file:
        arrays = {name: file[name] for name in file.files}
    for part in ("kernel", "bias"):
        arrays[f"Transformer/encoderblock_1/MultiHeadDotProductAttention_1/out/{part}"][:] = 0
    np.savez(tmp_path / "pruned.npz", **arrays)
    options = {"pretrained_dir": str(tmp_path / "pruned.npz"), "data_path": str(project.folder), "quant_mode": mode}
    found = vitq_ray.calibrate(**options, num_calib_batch=2, calib_output_path=str(tmp_path / "c"))
    layer = "transformer.encoder.layer.1."
    dead = ("attn.out._weight_quantizer", "attn.out._aftergemm_quantizer", "add1_local_input_quantizer")
    assert found.result["degenerate_sites"] == [layer + name for name in dead]
    again = vitq_ray.evaluate(
        pretrained_dir=str(found.checkpoint), data_path=str(project.folder), output=str(tmp_path / "e")
    )
    assert again.evaluation.top1_correct == found.evaluation.top1_correct


def test_images_beyond_memory_are_refused_before_they_are_tried(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4096 pixels are 262,144 tokens of 8 x 8: with this model 2 TB of scores for one image."""
    options = {"pretrained_dir": project.checkpoint, "data_path": str(project.folder), "img_size": 4096}
    monkeypatch.setattr("vitq_ray.commands.inputs.machine_memory", lambda: 10**10)
    what = "img_size: 4096 makes 262145 tokens, and a batch of {} images needs at least {}; this machine has 10 GB"
    with pytest.raises(vitq_ray.InputError, match=what.format(8, "17.59 TB")):
        vitq_ray.calibrate(**options, num_calib_batch=1, calib_output_path=str(tmp_path / "c"))
    with pytest.raises(vitq_ray.InputError, match=what.format(22, "11.44 GB")):
        vitq_ray.evaluate(**options, batch_size=64, output=str(tmp_path / "e"))
    monkeypatch.setattr("vitq_ray.models.load.machine_memory", lambda: 10**7)
    with pytest.raises(
        vitq_ray.InputError, match="img_size: 4096 makes 262145 tokens, whose position embeddings alone"
    ):
        vitq_ray.evaluate(**options, output=str(tmp_path / "e"))


def test_a_model_type_whose_images_are_prepared_otherwise() -> None:
    """DeiT has the arrays of Google's ViT-Ti: mean and std tell them apart."""
    name = "deit_tiny_patch16_224"
    geometry = named_geometry(name)
    assert geometry is not None
    rules = dict(rules_of_mode(MODES["ft2"], 8, 8, geometry.depth))
    sidecar = Sidecar(vitq_ray.Setting(), geometry, HALF, HALF, "bicubic", "", "", 0, rules)
    require_as_calibrated(EvaluateOptions.of({"model_type": "vit_tiny_patch16_224"}), sidecar)
    with pytest.raises(
        vitq_ray.InputError, match=rf"model_type {name}: its mean: \(0\.485, 0\.456, 0\.406\) given, but"
    ):
        require_as_calibrated(EvaluateOptions.of({"model_type": name}), sidecar)
    with pytest.raises(vitq_ray.InputError, match="heads: 5 given, but None was calibrated with 3"):
        require_as_calibrated(EvaluateOptions.of({"heads": 5}), sidecar)
