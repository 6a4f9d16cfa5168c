from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import make_setting, tiny_vit
from vitq_ray.base.config import InputError
from vitq_ray.calibration.scales import apply_setting
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import collect_statistics
from vitq_ray.models.checkpoint import Sidecar, load_calibrated, save_calibrated, sidecar_fingerprint
from vitq_ray.models.geometry import geometry_of
from vitq_ray.models.load import HALF, LoadedModel
from vitq_ray.models.weights import weights_fingerprint
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.sites import MODES
from vitq_ray.quant.vit import apply_plan, quantize_vit, sites_of

LAYER = "transformer.encoder.layer.0."


def calibrated(images: Tensor, setting: Setting, **overrides: object) -> tuple[torch.nn.Module, Plan, Sidecar]:
    """A quantized tiny ViT, its plan and its sidecar."""
    model = tiny_vit(**overrides)
    geometry, fingerprint = geometry_of(model), weights_fingerprint(model.state_dict())
    quantize_vit(model)
    plan = apply_setting(model, collect_statistics(model, [(0, images)], [1]), setting)
    loaded = LoadedModel(model, geometry, HALF, HALF, "bilinear", fingerprint)
    return model, plan, Sidecar.of(loaded, setting, plan, "data", 42, None, {}, {}, {"vitq_ray": "0.1.0"})


@pytest.fixture
def saved(tmp_path: Path, images: Tensor) -> Path:
    model, plan, sidecar = calibrated(images, make_setting(num_batches=1))
    return save_calibrated(tmp_path, "tiny", model, plan, sidecar)


def logits(model: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", MODES)
def test_read_back_gives_bit_identical_logits(mode: str, bits: int, tmp_path: Path, images: Tensor) -> None:
    setting = make_setting(mode, "percentile 99.9", 1, bits)
    model, plan, sidecar = calibrated(images, setting)
    path = save_calibrated(tmp_path, "tiny", model, plan, sidecar)
    back = load_calibrated(str(path))
    assert torch.equal(logits(back.loaded.model, images), logits(model, images))
    assert dataclasses.replace(back.sidecar, checkpoint_fingerprint="", sidecar_fingerprint="") == sidecar
    states = [[(k, q.state, q.bits, q.axis) for k, _, q in sites_of(m)] for m in (model, back.loaded.model)]
    assert states[0] == states[1]


@pytest.mark.parametrize("variant", [{"qk_norm": True}, {"init_values": 0.1}, {"qkv_bias": False}])
def test_parameters_without_a_fastertransformer_name(
    variant: dict[str, object], tmp_path: Path, images: Tensor
) -> None:
    """These come from timm's registry in real life; the geometry of a bare model cannot say so."""
    model, plan, sidecar = calibrated(images, make_setting(num_batches=1), **variant)
    path = save_calibrated(tmp_path, "tiny", model, plan, sidecar)
    state = torch.load(path, weights_only=True)
    kept = [key for key in state if key.startswith("timm.")]
    own = {"qk_norm": "attn.q_norm", "init_values": "ls1.gamma"}
    for option, name in own.items():
        assert any(name in key for key in kept) == (option in variant)


def test_names_and_order(saved: Path) -> None:
    """The order in which FasterTransformer's loader consumes weights (DESIGN section 4)."""
    state = torch.load(saved, weights_only=True)
    keys = list(state)
    weights = [key for key in keys if not key.endswith("_amax")]
    assert keys[: len(weights)] == weights, "weights first"
    modules = ["attention_norm", "ffn_norm", "ffn.fc1", "ffn.fc2", "attn.query", "attn.key", "attn.value", "attn.out"]
    expected = ["transformer.embeddings.position_embeddings", "transformer.embeddings.cls_token"]
    expected += [f"transformer.embeddings.patch_embeddings.{x}" for x in ("weight", "bias")]
    for layer in range(2):
        expected += [f"transformer.encoder.layer.{layer}.{m}.{x}" for m in modules for x in ("weight", "bias")]
    expected += ["transformer.encoder.encoder_norm.weight", "transformer.encoder.encoder_norm.bias"]
    assert weights == [*expected, "head.weight", "head.bias"]
    assert len(keys) - len(weights) == 2 * 29
    assert state[f"{LAYER}attn.softmax_input_quantizer._amax"].shape == ()


def test_query_key_value_are_the_thirds_of_qkv(saved: Path) -> None:
    state = torch.load(saved, weights_only=True)
    qkv = tiny_vit().blocks[0].attn.qkv
    for part, weight in zip(("query", "key", "value"), qkv.weight.chunk(3), strict=True):
        stored = state[f"{LAYER}attn.{part}.weight"]
        assert torch.equal(stored, weight)
        assert stored.untyped_storage().nbytes() == weight.numel() * 4, "a view would save all of qkv three times"


def test_every_site_is_saved_also_those_left_out(tmp_path: Path, images: Tensor) -> None:
    model, plan, sidecar = calibrated(images, make_setting("ft1", num_batches=1))
    state = torch.load(save_calibrated(tmp_path, "tiny", model, plan, sidecar), weights_only=True)
    assert state[f"{LAYER}layernorm_input1_quantizer._amax"] > 0
    assert state[f"{LAYER}ffn.fc1._weight_quantizer._amax"].shape == (128, 1)


def test_half_written_files_never_appear(tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan, sidecar = calibrated(images, make_setting(num_batches=1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitq_ray.base.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_calibrated(tmp_path, "tiny", model, plan, sidecar)
    assert list(tmp_path.iterdir()) == []


def test_changed_weights_are_saved_and_known_again(tmp_path: Path, images: Tensor) -> None:
    """What raced is what is saved: the plan of the file has the key of the plan that was saved."""
    model, plan, sidecar = calibrated(images, make_setting(num_batches=1))
    changed = dataclasses.replace(
        plan, weights={"blocks.1.mlp.fc2.bias": torch.arange(32.0), "head.bias": torch.ones(7)}
    )
    said = dataclasses.replace(sidecar, changed_weights=tuple(changed.weights))
    with pytest.raises(ValueError, match=r"does not follow this plan: blocks\.1\.mlp\.fc2\.bias has other values"):
        save_calibrated(tmp_path, "tiny", model, changed, said)
    apply_plan(model, changed)
    back = load_calibrated(str(save_calibrated(tmp_path, "tiny", model, changed, said)))
    assert back.plan.key == changed.key != plan.key
    assert torch.equal(logits(back.loaded.model, images), logits(model, images))
    apply_plan(model, plan)
    again = load_calibrated(str(save_calibrated(tmp_path, "other", model, plan, sidecar)))
    assert torch.equal(again.loaded.model.head.bias, tiny_vit().head.bias), "of a plan without changes: as they were"


def test_a_plan_that_the_model_does_not_follow_is_not_saved(tmp_path: Path, images: Tensor) -> None:
    model, plan, sidecar = calibrated(images, make_setting(num_batches=1))
    other = plan.after_training({key: amax * 2 for key, amax in plan.amax.items()})
    with pytest.raises(ValueError, match=r"does not follow this plan: .* has another amax"):
        save_calibrated(tmp_path, "tiny", model, other, sidecar)
    assert list(tmp_path.iterdir()) == []


def edit_state(path: Path, **changes: object) -> None:
    state = torch.load(path, weights_only=True)
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    torch.save(state, path)


AMAX = f"{LAYER}ffn.fc1._input_quantizer._amax"
BAD_STATES = {
    "missing weight": ({"head.bias": None}, "head.bias"),
    "extra weight": ({f"{LAYER}attn.gate.weight": torch.ones(2)}, r"attn\.gate\.weight"),
    "misshapen weight": ({"head.bias": torch.ones(9)}, r"head\.bias"),
    "NaN weight": ({"head.bias": torch.full((7,), float("nan"))}, "'head.bias' has NaN or infinite"),
    "missing amax": ({AMAX: None}, r"ffn\.fc1\._input_quantizer\._amax is missing"),
    "extra amax": ({"transformer.encoder.layer.9.x._amax": torch.ones(())}, r"layer\.9\.x\._amax"),
    "misshapen amax": ({AMAX: torch.ones(3)}, r"has shape \(3,\), torch.float32, its mode needs \(\)"),
    "NaN amax": ({AMAX: torch.tensor(float("nan"))}, "_amax' has NaN or infinite"),
    "negative amax": ({AMAX: torch.tensor(-1.0)}, "_amax has negative values"),
    "per-row amax in ft2": ({f"{LAYER}ffn.fc1._weight_quantizer._amax": torch.ones(128, 1)}, r"needs \(\)"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_state(case: str, saved: Path) -> None:
    changes, message = BAD_STATES[case]
    edit_state(saved, **changes)
    with pytest.raises(InputError, match=message):
        load_calibrated(str(saved))


def edit_sidecar(path: Path, **changes: object) -> None:
    """As if it had been written so: its own fingerprint fits."""
    sidecar = path.with_suffix(".json")
    values = json.loads(sidecar.read_text()) | changes
    sidecar.write_text(json.dumps(values | {"sidecar_fingerprint": sidecar_fingerprint(values)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 9}, "written by vitq_ray 0.1.0 in format 9; this version reads formats up to 3"),
        ({"colour": "blue"}, "unknown key 'colour'"),
        ({"setting": make_setting().to_dict() | {"mode": "ft7"}}, "'ft7' is not one of"),
        ({"geometry": {}}, "missing key"),
        ({"mean": 3}, "not a sidecar"),
    ],
)
def test_bad_sidecar(changes: dict[str, object], message: str, saved: Path) -> None:
    edit_sidecar(saved, **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_calibrated(str(saved))
    assert "tiny_calib.json" in str(caught.value)


@pytest.mark.parametrize("key", ["mode", "weight_bits", "act_bits", "calibrator"])
def test_sidecar_without_part_of_its_setting(key: str, saved: Path) -> None:
    """Defaults are for command lines: a checkpoint must not be run at bits that nobody wrote down."""
    setting = json.loads(saved.with_suffix(".json").read_text())["setting"]
    del setting[key]
    edit_sidecar(saved, setting=setting)
    with pytest.raises(InputError, match=f"Setting: missing key '{key}'"):
        load_calibrated(str(saved))


@pytest.mark.parametrize("change", ["weights", "mode"])
def test_checkpoint_and_sidecar_belong_together(change: str, saved: Path) -> None:
    if change == "weights":
        state = torch.load(saved, weights_only=True)
        edit_state(saved, **{"head.bias": state["head.bias"] + 1})
    else:
        setting = json.loads(saved.with_suffix(".json").read_text())["setting"]
        edit_sidecar(saved, setting=setting | {"mode": "trt"})
    with pytest.raises(InputError, match=r"is not the checkpoint that .* describes"):
        load_calibrated(str(saved))


def test_sidecar_of_another_model(saved: Path) -> None:
    geometry = json.loads(saved.with_suffix(".json").read_text())["geometry"]
    edit_sidecar(saved, geometry=geometry | {"depth": 3})
    with pytest.raises(InputError, match=r"tiny_calib\.json: .* geometry: depth 3, but the checkpoint has 2"):
        load_calibrated(str(saved))


def test_sidecar_missing(saved: Path) -> None:
    saved.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"tiny_calib\.json: not found; .* needs its JSON sidecar"):
        load_calibrated(str(saved))


def test_sidecar_that_is_not_json(saved: Path) -> None:
    saved.with_suffix(".json").write_text("{")
    with pytest.raises(InputError, match="not a sidecar"):
        load_calibrated(str(saved))


def test_pickle_is_never_executed(saved: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "executed",))

    saved.write_bytes(pickle.dumps({"head.weight": Bomb()}))
    with pytest.raises(InputError, match="pickle"):
        load_calibrated(str(saved))
    assert not (tmp_path / "executed").exists()
