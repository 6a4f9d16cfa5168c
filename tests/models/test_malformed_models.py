"""Tables of what can be wrong with a checkpoint or its sidecar: one line that names it, or the right number.

Each row: what is done to a good file, and a part of the InputError that must come; or, in `GOOD`, nothing but the
logits of the model that was saved.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.conftest import make_setting, tiny_vit
from vitq_ray.base.config import InputError
from vitq_ray.calibration.scales import apply_setting
from vitq_ray.calibration.statistics import collect_statistics
from vitq_ray.models.checkpoint import (
    ByHand,
    CalibratedModel,
    Sidecar,
    load_calibrated,
    open_checkpoint,
    save_calibrated,
    sidecar_fingerprint,
)
from vitq_ray.models.fastertransformer import to_fastertransformer
from vitq_ray.models.geometry import geometry_of
from vitq_ray.models.google import google_arrays
from vitq_ray.models.load import HALF, LoadedModel, load_model
from vitq_ray.models.weights import weights_fingerprint
from vitq_ray.quant.vit import quantize_vit

State = dict[str, Any]
HEADS = 4
BLOCK = "Transformer/encoderblock_1"
LAYER = "transformer.encoder.layer.0."
AMAX = f"{LAYER}ffn.fc1._input_quantizer._amax"


def torch_bytes(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def npz_bytes(arrays: State) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def zip_bytes(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


def flipped(data: bytes, at: float) -> bytes:
    """One bit is another, at this share of the file."""
    place = int(at * len(data))
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


@dataclass(frozen=True)
class Made:
    """Good files of one tiny model, and what it says to some images."""

    google: State
    timm: State
    ft: State
    images: Tensor
    logits: Tensor
    calibrated: Path
    calibrated_logits: Tensor


@torch.inference_mode()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def calibrate(folder: Path, model: VisionTransformer, images: Tensor, mode: str = "ft2") -> tuple[Path, Tensor]:
    """A calibrated checkpoint with its sidecar, and its logits."""
    geometry, fingerprint = geometry_of(model), weights_fingerprint(model.state_dict())
    quantize_vit(model)
    setting = make_setting(mode, num_batches=1)
    plan = apply_setting(model, collect_statistics(model, [(0, images)], [1]), setting)
    loaded = LoadedModel(model, geometry, HALF, HALF, "bilinear", fingerprint)
    sidecar = Sidecar.of(loaded, setting, plan, "data", 42, None, {"batches": 1}, {"top1": 0.5}, {"vitq_ray": "0.2.0"})
    return save_calibrated(folder, "tiny", model, plan, sidecar), logits_of(model, images)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    model = tiny_vit()
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    google, logits = google_arrays(model), logits_of(model, images)
    path, quantized = calibrate(tmp_path_factory.mktemp("calibrated"), model, images)
    return Made(google, state, to_fastertransformer(state, geometry_of(tiny_vit())), images, logits, path, quantized)


def refused(message: str, path: Path, work: Callable[[], Any]) -> None:
    """One readable line that names the file and says this."""
    with pytest.raises(InputError, match=message) as caught:
        work()
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 900 + len(str(path))


# ---- Google's arrays -----------------------------------------------------------------------------------------------


def put(name: str, value: Any) -> Callable[[State], Any]:
    return lambda state: state.__setitem__(name, value)


def poison(name: str, value: float) -> Callable[[State], Any]:
    def change(state: State) -> None:
        state[name] = state[name].copy() if isinstance(state[name], np.ndarray) else state[name].clone()
        state[name].reshape(-1)[1] = value

    return change


def drop(*names: str) -> Callable[[State], Any]:
    return lambda state: [state.pop(name) for name in names]


def rename(old: str, new: str) -> Callable[[State], Any]:
    return lambda state: state.__setitem__(new, state.pop(old))


POSITIONS = "Transformer/posembed_input/pos_embedding"
GOOGLE_ROWS: dict[str, tuple[Callable[[State], Any], str]] = {
    "no class token": (drop("cls"), "1 of 40 arrays are missing, first 'cls'"),
    "no kernel": (drop("embedding/kernel"), "array 'embedding/kernel' is missing"),
    "no head": (drop("head/kernel", "head/bias"), "has no classifier"),
    "no head bias": (drop("head/bias"), "missing, first 'head/bias'"),
    "no positions": (drop(POSITIONS), "pos_embedding' is missing"),
    "no norm": (drop(f"{BLOCK}/LayerNorm_2/scale"), "first 'Transformer/encoderblock_1/LayerNorm_2/scale'"),
    "nothing": (lambda state: state.clear(), "an archive of 0 files without arrays"),
    "extra": (put("more", np.zeros(2)), "have no place in the model, first 'more'"),
    "an empty array": (
        put("cls", np.zeros((1, 1, 0), np.float32)),
        r"'cls' has shape \(1, 1, 0\), expected \(1, 1, 32\)",
    ),
    "no axes": (put("embedding/kernel", np.float32(1)), r"has shape \(\), expected 4 axes"),
    "width 0": (put("embedding/kernel", np.zeros((8, 8, 3, 0), np.float32)), "width: expected an integer from 1"),
    "patch 0": (put("embedding/kernel", np.zeros((0, 0, 3, 32), np.float32)), "patch_size: expected an integer from 1"),
    "one channel": (
        put("embedding/kernel", np.zeros((8, 8, 1, 32), np.float32)),
        r"has shape \(8, 8, 1, 32\), expected",
    ),
    "oblong patches": (put("embedding/kernel", np.zeros((8, 4, 3, 32), np.float32)), "shape"),
    "other width in a block": (put(f"{BLOCK}/LayerNorm_0/bias", np.zeros(31, np.float32)), r"has shape \(31,\)"),
    "no square": (put(POSITIONS, np.zeros((1, 4, 32), np.float32)), "positions of 3 patches found, expected a square"),
    "only a class position": (put(POSITIONS, np.zeros((1, 1, 32), np.float32)), "positions of 0 patches found"),
    "flat positions": (put(POSITIONS, np.zeros((5, 32), np.float32)), r"has shape \(5, 32\), expected 3 axes"),
    "NaN": (poison("head/kernel", np.nan), "'head/kernel' has NaN or infinite values"),
    "infinite": (poison(f"{BLOCK}/MlpBlock_3/Dense_0/bias", np.inf), "Dense_0/bias' has NaN or infinite"),
    "beyond float32": (put("cls", np.full((1, 1, 32), 1e300)), "'cls' has NaN or infinite values"),
    "integers": (put("cls", np.zeros((1, 1, 32), np.int64)), "'cls' has dtype torch.int64, expected torch.float32"),
    "booleans": (put("head/bias", np.zeros(7, bool)), "'head/bias' has dtype torch.bool"),
    "complex": (put("cls", np.zeros((1, 1, 32), np.complex64)), "'cls' has dtype complex64, expected numbers"),
    "text": (put("cls", np.array(["a"])), "'cls' has dtype <U1, expected numbers"),
    "dates": (put("cls", np.array(["2020-01-01"], "M8[D]")), "expected numbers"),
    "records": (put("cls", np.zeros(1, [("a", "f4")])), "expected numbers"),
    "objects": (put("cls", np.array([{}], dtype=object)), "holds a pickled object, which is never executed"),
    "an optimizer": (put("opt/step", np.zeros(1)), "a training checkpoint with optimizer state"),
    "big_vision": (put("params/img/cls", np.zeros(1)), "a big_vision checkpoint"),
    "a ResNet": (put("conv_root/kernel", np.zeros((7, 7, 3, 64), np.float32)), "hybrid: expected stages"),
    "heads that do not fit": (
        put(f"{BLOCK.replace('1', '0')}/MultiHeadDotProductAttention_1/query/kernel", np.zeros((32, 5, 6), np.float32)),
        "heads: 5 does not divide the width 32",
    ),
}


@pytest.mark.parametrize("row", GOOGLE_ROWS)
def test_google_arrays(row: str, made: Made, tmp_path: Path) -> None:
    change, message = GOOGLE_ROWS[row]
    arrays = dict(made.google)
    change(arrays)
    path = tmp_path / "vit.npz"
    path.write_bytes(npz_bytes(arrays))
    refused(message, path, lambda: load_model("auto", path))


# ---- state dicts ---------------------------------------------------------------------------------------------------


def with_arrays(**arrays: Any) -> Callable[[State], Any]:
    """`head__bias=` stands for `head.bias`; what warns when it is made is made late."""
    made_late = {name.replace("__", "."): value for name, value in arrays.items()}
    return lambda state: (
        state | {n: v() if callable(v) and not isinstance(v, Tensor) else v for n, v in made_late.items()}
    )


def nested(**entries: Any) -> Callable[[State], Any]:
    """`...` stands for the weights."""
    return lambda state: {name: state if value is ... else value for name, value in entries.items()}


OTHERS = {"cls_token": torch.zeros(1, 1, 32)}
STATE_ROWS: dict[str, tuple[Callable[[State], Any], str]] = {
    "sparse": (with_arrays(head__weight=torch.eye(7, 32).to_sparse()), "'head.weight' is a sparse tensor"),
    "compressed": (
        with_arrays(head__weight=lambda: torch.eye(7, 32).to_sparse_csr()),
        "'head.weight' is a sparse tensor",
    ),
    "meta": (
        with_arrays(head__bias=torch.empty(7, device="meta")),
        r"'head.bias' is a meta \(it has no values\) tensor",
    ),
    "quantized": (
        with_arrays(head__bias=lambda: torch.quantize_per_tensor(torch.ones(7), 0.1, 0, torch.qint8)),
        "'head.bias' is a quantized tensor",
    ),
    "terabytes by stride 0": (
        with_arrays(head__weight=torch.zeros(1).expand(2**40)),
        r"'head.weight' repeats its elements \(strides \(0,\)\): 4.398 TB, the file has ",
    ),
    "terabytes by stride 0, integers": (
        with_arrays(more=torch.zeros(1, dtype=torch.int64).expand(2**40)),
        "'more' repeats its elements",
    ),
    "complex": (with_arrays(head__bias=torch.zeros(7, dtype=torch.complex64)), "'head.bias' has dtype torch.complex64"),
    "integers": (with_arrays(head__bias=torch.zeros(7, dtype=torch.int32)), "'head.bias' has dtype torch.int32"),
    "NaN": (with_arrays(head__bias=torch.full((7,), torch.nan)), "'head.bias' has NaN or infinite values"),
    "no classifier": (lambda state: {k: v for k, v in state.items() if "head" not in k}, "has no classifier"),
    "LayerScale": (
        with_arrays(blocks__0__ls1__gamma=torch.ones(32)),
        "no place in the model, first 'blocks.0.ls1.gamma'",
    ),
    "flat registers": (with_arrays(reg_token=torch.zeros(4)), r"'reg_token' has shape \(4,\), expected 3 axes"),
    "CLIP": (
        with_arrays(norm_pre__weight=torch.ones(32)),
        "'norm_pre.weight'; auto reads only the plain layout, others need",
    ),
    "no blocks": (
        lambda state: {k: v for k, v in state.items() if "blocks" not in k},
        "blocks.0.mlp.fc1.weight' is miss",
    ),
    "a lost block": (
        lambda state: {k: v for k, v in state.items() if "blocks.0.norm" not in k},
        "'blocks.0.norm1.weight'",
    ),
    "flat positions": (with_arrays(pos_embed=torch.zeros(5, 32)), r"'pos_embed' has shape \(5, 32\), expected 3 axes"),
    "two unknown sets": (
        nested(student=..., teacher=OTHERS),
        "holds several sets of weights, 'student', 'teacher'; expec",
    ),
    "a number among arrays": (lambda state: {**state, "lr": 0.1}, "'lr' is a float, expected a named tensor"),
    "a name that is a number": (lambda state: {**state, 3: torch.zeros(1)}, "3 is a Tensor, expected a named tensor"),
    "an empty set": (nested(state_dict={}, epoch=1), "array 'patch_embed.proj.weight' is missing; 0 found"),
    "a list": (lambda state: list(state.values()), "holds a list, expected a state_dict"),
    "a tensor": (lambda state: state["cls_token"], "holds a Tensor, expected a state_dict"),
    "nothing": (lambda state: None, "holds a NoneType, expected a state_dict"),
    "only an optimizer": (nested(optimizer={"state": {}}, epoch=2), "'optimizer' is a dict, expected a named tensor"),
    "argparse.Namespace": (
        nested(model=..., args=argparse.Namespace(lr=1)),
        r"pickled object \(argparse.Namespace\), which is never executed; .* is converted once by: .*'model'",
    ),
    "a NumPy number": (nested(model=..., metric=np.float64(81.5)), "holds a pickled object .* is converted once by"),
    "a module": (lambda state: nn.Linear(2, 2), r"pickled object \(torch.nn.modules.linear.Linear\)"),
    "transformers": (
        with_arrays(vit__encoder__layer__0__x=torch.ones(1)),
        "a checkpoint of Hugging Face's transformers",
    ),
    "torchvision": (with_arrays(encoder__layers__encoder_layer_0__x=torch.ones(1)), "a checkpoint of torchvision"),
    "OpenCLIP": (with_arrays(visual__proj=torch.ones(1)), "a checkpoint of OpenCLIP"),
    "with scales": (lambda state: {AMAX: torch.ones(())}, r"a calibrated checkpoint \(it has scales"),
}


@pytest.mark.filterwarnings("ignore")  # of PyTorch, about sparse and quantized tensors
@pytest.mark.parametrize("row", STATE_ROWS)
def test_state_dicts(row: str, made: Made, tmp_path: Path) -> None:
    change, message = STATE_ROWS[row]
    path = tmp_path / "vit.pth"
    path.write_bytes(torch_bytes(change(dict(made.timm))))
    refused(message, path, lambda: load_model("auto", path, heads=HEADS))


VIT_PYTORCH_ROWS: dict[str, tuple[Callable[[State], Any], dict[str, Any], str]] = {
    "heads unknown": (lambda s: None, {}, "cannot read the heads of float weights under ViT-pytorch's names"),
    "heads that do not divide": (lambda s: None, {"heads": 5}, "heads: 5 does not divide the width 32"),
    "heads of a name": (
        lambda s: None,
        {"heads": 5, "model_type": "ViT-B_16"},
        "heads: 5 given, but .* has 12 as ViT-B_16",
    ),
    "another name": (lambda s: None, {"model_type": "ViT-B_16"}, "another architecture, patch kernel 8, width 32"),
    "no value": (drop(f"{LAYER}attn.value.weight"), {"heads": 4}, "'.*attn.value.weight' is missing; expected"),
    "no norm": (drop(f"{LAYER}ffn_norm.bias"), {"heads": 4}, "1 of 32 arrays are missing, first 'blocks.0.norm2.bias'"),
    "no head": (drop("head.weight", "head.bias"), {"heads": 4}, "has no classifier"),
    "extra": (
        put(f"{LAYER}attn.gate.weight", torch.ones(1)),
        {"heads": 4},
        "no place in the model, first '.*attn.gate",
    ),
}


@pytest.mark.parametrize("row", VIT_PYTORCH_ROWS)
def test_vit_pytorch_arrays(row: str, made: Made, tmp_path: Path) -> None:
    change, options, message = VIT_PYTORCH_ROWS[row]
    state = dict(made.ft)
    change(state)
    path = tmp_path / "vit.bin"
    torch.save(state, path)
    with pytest.raises(InputError, match=message):
        load_model(options.get("model_type", "auto"), path, heads=options.get("heads"))


# ---- bytes ---------------------------------------------------------------------------------------------------------


BYTES_ROWS: dict[str, tuple[Callable[[Made], bytes], str]] = {
    "empty": (lambda made: b"", "not a checkpoint"),
    "one byte": (lambda made: b"P", "not a checkpoint"),
    "text": (lambda made: b"version https://git-lfs.github.com/spec/v1\n", "not a checkpoint .*starts with b'version "),
    "a web page": (lambda made: b"<!DOCTYPE html><html>", "not a checkpoint"),
    "JSON": (lambda made: b'{"model": {}}', "not a checkpoint"),
    "one array": (lambda made: npz_bytes({"a": np.zeros(3)})[30:], "not a checkpoint|truncated or damaged"),
    "an empty zip": (lambda made: zip_bytes(), "an archive of 0 files without arrays"),
    "a zip of text": (lambda made: zip_bytes(a__txt=b"hello"), "an archive of 1 files without arrays"),
    "only the zip's signature": (lambda made: b"PK\x03\x04", "truncated or damaged"),
    "half a .pth": (lambda made: torch_bytes(made.timm)[:9000], "truncated or damaged"),
    "a .pth without its end": (lambda made: torch_bytes(made.timm)[:-1], "truncated or damaged"),
    "a flipped bit in a .pth": (lambda made: flipped(torch_bytes(made.timm), 0.5), "damaged: the checksum of"),
    "a flipped bit in an .npz": (lambda made: flipped(npz_bytes(made.google), 0.5), "truncated or damaged .*CRC"),
    "half an .npz": (lambda made: npz_bytes(made.google)[:9000], "truncated or damaged"),
    "half a .safetensors": (lambda made: safetensors.torch.save(made.timm)[:9000], "truncated or damaged"),
    "a header of terabytes": (lambda made: (2**40).to_bytes(8, "little") + b"{" + bytes(99), "truncated or damaged"),
    "an old .pth cut short": (
        lambda made: torch_bytes(made.timm, _use_new_zipfile_serialization=False)[:9000],
        "truncated or damaged|pickle",
    ),
    "a pickle": (lambda made: pickle.dumps({"a": np.zeros(3)}), "holds a pickled object"),
    "a pickle of a set": (lambda made: pickle.dumps({1, 2}), "pickle|truncated|expected a state_dict"),
    "a member that is no array": (lambda made: zip_bytes(a__npy=b"hello"), "truncated or damaged|pickle|not an array"),
}


@pytest.mark.parametrize("row", BYTES_ROWS)
def test_bytes(row: str, made: Made, tmp_path: Path) -> None:
    make, message = BYTES_ROWS[row]
    path = tmp_path / "file"
    path.write_bytes(make(made))
    refused(message, path, lambda: load_model("auto", path, heads=HEADS))


def test_an_archive_larger_than_memory_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "zeros.npz"
    np.savez_compressed(path, a=np.zeros(10**6))
    monkeypatch.setattr("vitq_ray.models.weights.machine_memory", lambda: 10**6)
    refused("unpacks to 8 MB, this machine has 1 MB", path, lambda: load_model("auto", path))
    monkeypatch.setattr("vitq_ray.base.files.machine_memory", lambda: 1000)
    refused("has .* kB, at most 1 kB can be read; expected a checkpoint", path, lambda: load_model("auto", path))


# ---- right numbers -------------------------------------------------------------------------------------------------


def prefixed(prefix: str) -> Callable[[State], Any]:
    return lambda state: {"state_dict": {prefix + name: tensor for name, tensor in state.items()}, "epoch": 3}


def shared_memory(state: State) -> State:
    """All weights are views of one piece of memory, and the class token repeats itself."""
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    return {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}


GOOD: dict[str, Callable[[State], Any]] = {
    **{f"prefix {p}": prefixed(p) for p in ("model.", "_orig_mod.module.", "module._orig_mod.", "module.module.")},
    "Lightning around torch.compile": prefixed("model._orig_mod."),
    "DeiT": nested(model=..., epoch=300),
    "timm": nested(state_dict=..., arch="no_such_model", epoch=9),
    "one set of another name": nested(weights=..., step=1),
    "average of timm": nested(state_dict=OTHERS, state_dict_ema=..., optimizer={"state": {0: {"m": 1}}}),
    "average of DeiT": nested(model=OTHERS, model_ema=...),
    "an average that is empty": nested(model=..., model_ema=None),
    "views of one memory": shared_memory,
    "transposed in memory": lambda state: {k: v.T.contiguous().T if v.ndim == 2 else v for k, v in state.items()},
    "float64": lambda state: {k: v.double() for k, v in state.items()},
    "parameters": lambda state: {k: nn.Parameter(v) for k, v in state.items()},
    "random state beside": lambda state: {"model": state, "rng_state": torch.get_rng_state()},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", GOOD)
def test_right_numbers(row: str, made: Made, tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    torch.save(GOOD[row](dict(made.timm)), path)
    assert torch.equal(logits_of(load_model("auto", path, heads=HEADS).model, made.images), made.logits)


def test_elements_that_repeat_are_read_where_they_are_few(made: Made, tmp_path: Path) -> None:
    torch.save(made.timm | {"head.bias": torch.full((1,), 0.25).expand(7)}, tmp_path / "vit.pth")
    head = load_model("auto", tmp_path / "vit.pth", heads=HEADS).model.head
    assert torch.equal(head.bias, torch.full((7,), 0.25))


def test_several_sets_are_named(made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "vit.pth"
    torch.save({"state_dict": OTHERS, "state_dict_ema": made.timm}, path)
    load_model("auto", path, heads=HEADS)
    assert (
        "holds several sets of weights, 'state_dict', 'state_dict_ema'; taken is the running average 'state_dict_ema', "
        "as timm does (another: torch.save(torch.load('IN')['state_dict'], 'OUT'))"
    ) in caplog.text


def test_what_training_keeps_beside_weights_is_no_set_of_them(
    made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": made.timm, "scaler": {"scale": torch.ones(1)}}, tmp_path / "vit.pth")
    load_model("auto", tmp_path / "vit.pth", heads=HEADS)
    assert "several sets" not in caplog.text


def test_float_weights_under_vit_pytorchs_names(made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "fashion_checkpoint.bin"
    torch.save(made.ft, path)
    opened = open_checkpoint(str(path), "auto", None, heads=HEADS)
    assert isinstance(opened, LoadedModel)
    assert torch.equal(logits_of(opened.model, made.images), made.logits)
    assert (opened.mean, opened.std, opened.interpolation) == (HALF, HALF, "bilinear")
    assert caplog.text == ""
    larger, google = load_model("auto", path, 32, heads=HEADS), tmp_path / "vit.npz"
    np.savez(google, **made.google)
    assert torch.equal(larger.model.pos_embed, load_model("auto", google, 32).model.pos_embed)


@pytest.mark.parametrize("fc_norm", [False, True])
def test_average_pooling_with_fc_norm(fc_norm: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As MAE fine-tunes: the norm behind the mean of the patches, none before."""
    model = tiny_vit(global_pool="avg" if fc_norm else "token")
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = logits_of(model, images)
    assert ("fc_norm.weight" in model.state_dict()) == fc_norm
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    loaded = load_model("auto", tmp_path / "mae.pth", heads=HEADS)
    assert loaded.geometry.pool == ("avg" if fc_norm else None)
    assert torch.equal(logits_of(loaded.model, images), expected)
    mean = "0.485 0.456 0.406" if fc_norm else "0.5 0.5 0.5"
    assert f"a timm file of unknown family: mean {mean}, std " in caplog.text
    path, quantized = calibrate(tmp_path, loaded.model, images)
    assert torch.equal(logits_of(load_calibrated(str(path)).loaded.model, images), quantized)


# ---- calibrated checkpoints ----------------------------------------------------------------------------------------


CALIBRATED_ROWS: dict[str, tuple[Callable[[State], Any], str]] = {
    "no amax": (drop(AMAX), "ffn.fc1._input_quantizer._amax is missing"),
    "an amax too many": (put("transformer.encoder.layer.9.x._amax", torch.ones(())), "belongs to no quantizer"),
    "amax of another shape": (put(AMAX, torch.ones(3)), r"has shape \(3,\), torch.float32, its mode needs \(\)"),
    "amax of integers": (put(AMAX, torch.ones((), dtype=torch.int64)), "torch.int64, its mode needs"),
    "NaN amax": (put(AMAX, torch.tensor(torch.nan)), "has NaN or infinite"),
    "negative amax": (put(AMAX, torch.tensor(-1.0)), "has negative values"),
    "another amax": (put(AMAX, torch.tensor(1.5)), "is not the checkpoint that .* describes"),
    "sparse amax": (put(AMAX, torch.ones(1).to_sparse()), "is a sparse tensor"),
    "rows in ft2": (put(f"{LAYER}ffn.fc1._weight_quantizer._amax", torch.ones(128, 1)), r"needs \(\)"),
    "no weight": (drop("head.bias"), "weight head.bias is missing"),
    "no head": (drop("head.weight", "head.bias"), "has no classifier"),
    "a weight too many": (put(f"{LAYER}attn.gate.weight", torch.ones(2)), "attn.gate.weight"),
    "a weight of integers": (put("head.bias", torch.ones(7, dtype=torch.int64)), "head.bias has shape and dtype"),
    "a weight of another shape": (put("head.bias", torch.ones(9)), "head.bias has shape and dtype"),
    "more classes": (put("head.weight", torch.ones(9, 32)), "geometry: num_classes 7, but the checkpoint has 9"),
    "a block more": (
        put("transformer.encoder.layer.2.ffn.fc1.weight", torch.ones(2)),
        "depth 2, but the checkpoint has 3",
    ),
    "scales only": (
        lambda s: [s.pop(k) for k in list(s) if not k.endswith("_amax")],
        "patch_embeddings.weight' is missing",
    ),
    "weights changed": (
        poison("head.bias", 9.0),
        "is not the checkpoint that .* describes; one of the two was changed",
    ),
}


def copy_of(made: Made, folder: Path) -> Path:
    for suffix in (".pth", ".json"):
        (folder / f"tiny_calib{suffix}").write_bytes(made.calibrated.with_suffix(suffix).read_bytes())
    return folder / "tiny_calib.pth"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", CALIBRATED_ROWS)
def test_calibrated_state(row: str, made: Made, tmp_path: Path) -> None:
    change, message = CALIBRATED_ROWS[row]
    path = copy_of(made, tmp_path)
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(InputError, match=message):
        load_calibrated(str(path))


def test_a_float_file_is_not_a_calibrated_one(made: Made, tmp_path: Path) -> None:
    torch.save(made.timm, tmp_path / "vit.pth")
    refused("not a calibrated checkpoint", tmp_path, lambda: load_calibrated(str(tmp_path / "vit.pth")))


def within(path: str, value: Any) -> Callable[[Any], Any]:
    """Set `a.b.c` of a JSON object; `...` takes it away."""

    def change(values: Any) -> Any:
        *outer, last = path.split("|")
        inner = values
        for name in outer:
            inner = inner[name]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
        return values

    return change


SITE = f"{LAYER}ffn.fc1._input_quantizer"
SIDECAR_ROWS: dict[str, tuple[Callable[[Any], Any], str]] = {
    **{
        f"no {key}": (within(key, ...), f"missing key '{key}'")
        for key in ("mean", "seed", "changed_weights", "versions")
    },
    "no setting": (within("setting", ...), "missing key"),
    "no geometry": (within("geometry", ...), "expected a dictionary, got None"),
    "no sites": (within("sites", ...), "sites: .* is missing of a model of 2 blocks"),
    "no width": (within("geometry|width", ...), "Geometry: missing key 'width'"),
    "unknown key": (within("colour", "blue"), "unknown key 'colour'"),
    "unknown geometry": (within("geometry|colour", "blue"), "unknown key 'colour'"),
    "later format": (within("format", 9), "written by vitq_ray 0.2.0 in format 9; this version reads formats up to 3"),
    "format as text": (within("format", "3"), "format '3', expected a number from 1 to 3"),
    "a billion blocks": (within("geometry|depth", 10**9), "depth: expected an integer from 1 to 1000, got 1000000000"),
    "a thousand blocks": (within("geometry|depth", 1000), "geometry: depth 1000, but the checkpoint has 2"),
    "no block": (within("geometry|depth", 0), "depth: expected an integer from 1"),
    "blocks as text": (within("geometry|depth", "2"), "Geometry: depth: expected int, got '2'"),
    "half a block": (within("geometry|depth", 2.5), "Geometry: depth: expected int, got 2.5"),
    "a trillion classes": (
        within("geometry|num_classes", 10**12),
        "num_classes: expected an integer from 1 to 16777216",
    ),
    "ten million classes": (within("geometry|num_classes", 10**7), "num_classes 10000000, but the checkpoint has 7"),
    "width 2**40": (within("geometry|width", 2**40), "width: expected an integer from 1 to 65536"),
    "wider": (within("geometry|width", 64), "geometry: width 64, but the checkpoint has 32"),
    "wider MLP": (within("geometry|mlp_width", 10**6), "mlp_width 1000000, but the checkpoint has 128"),
    "heads": (within("geometry|heads", 3), "heads: 3 does not divide the width 32"),
    "other heads": (within("geometry|heads", 8), "is not the checkpoint that .* describes"),
    "images of a million pixels": (within("geometry|img_size", 10**6), "img_size: expected an integer from 1 to 65536"),
    "images of 4096": (within("geometry|img_size", 4096), "weight pos_embed has shape and dtype"),
    "patches": (within("geometry|patch_size", 4), "patch_kernel 4, but the checkpoint has 8"),
    "ResNet of a billion units": (
        lambda v: within("geometry|hybrid_widths", [64, 256])(within("geometry|hybrid_stages", [10**9])(v)),
        "units of a hybrid stage: expected an integer from 1 to 1000",
    ),
    "ResNet": (
        lambda v: within("geometry|hybrid_widths", [64, 256])(within("geometry|hybrid_stages", [3])(v)),
        r"patch_kernel 2, but the checkpoint has 8",
    ),
    "a ResNet of text": (within("geometry|hybrid_stages", "abc"), "hybrid_stages: expected .*got 'abc'"),
    "prefix tokens": (within("geometry|num_prefix_tokens", -1), "num_prefix_tokens: expected an integer from 0"),
    "pooling": (within("geometry|pool", "max"), "pool: 'max' is not one of None, avg"),
    "average pooling": (within("geometry|pool", "avg"), "weight fc_norm.bias is missing"),
    "timm's": (
        within("geometry|timm_name", "vit_tiny_patch16_224"),
        "patch_size 8 is not that of timm's vit_tiny_patch16",
    ),
    "timm's, unknown": (within("geometry|timm_name", "no_such_model"), "'no_such_model' is neither auto"),
    "timm's, auto": (within("geometry|timm_name", "auto"), "is not that of timm's auto"),
    "timm's, a number": (within("geometry|timm_name", 3), "timm_name: expected .*got 3"),
    "two means": (within("mean", [0.5, 0.5]), "mean, std: expected three numbers"),
    "means as text": (within("mean", "abc"), "mean: expected .*got 'abc'"),
    "NaN mean": (within("mean", [float("nan"), 0.5, 0.5]), "mean: expected"),
    "std 0": (within("std", [0, 0.5, 0.5]), "std > 0"),
    "interpolation": (within("interpolation", "cubic"), "interpolation: 'cubic' is not one of nearest"),
    "crop": (within("crop_pct", 7), r"crop_pct: expected a number in \(0, 1\], got 7"),
    "crop as text": (within("crop_pct", "0.9"), "crop_pct: expected .*got '0.9'"),
    "another std": (within("std", [0.25, 0.5, 0.5]), "is not the checkpoint that .* describes"),
    "mode": (within("setting|mode", "ft7"), "'ft7' is not one of ft1"),
    "another mode": (within("setting|mode", "trt"), "is not the checkpoint that .* describes"),
    "no mode": (within("setting|mode", ...), "Setting: missing key 'mode'"),
    "bits": (within("setting|weight_bits", 64), "weight bits: expected an integer from 2 to 8, got 64"),
    "calibrator": (within("setting|calibrator", "magic"), "calibrator: 'magic' is not one of"),
    "rules": (within("setting|rules", ["x"]), "rule: 'x' is not of the form"),
    "rules as a number": (within("setting|rules", 7), "rules: expected .*got 7"),
    "a site lost": (within(f"sites|{SITE}", ...), "ffn.fc1._input_quantizer is missing of a model of 2 blocks"),
    "a site too many": (within("sites|x", {}), "missing key|x is not a site"),
    "bits of a site": (within(f"sites|{SITE}|bits", 99), "bits: expected an integer from 2 to 8, got 99"),
    "axis of a site": (within(f"sites|{SITE}|axis", 7), "axis: 7 is not one of None, 0"),
    "a site's bits as text": (within(f"sites|{SITE}|bits", "8"), "SiteRule: bits: expected int, got '8'"),
    "on as a number": (within(f"sites|{SITE}|on", 1), "SiteRule: on: expected bool, got 1"),
    "zero point": (within(f"sites|{SITE}|zero_point", 10**9), "zero point: expected an integer from"),
    "a site off": (within(f"sites|{SITE}|on", False), "is not the checkpoint that .* describes"),
    "sites as a list": (within("sites", []), "not a sidecar of this checkpoint"),
    "sites as text": (within("sites", "abc"), "not a sidecar of this checkpoint"),
    "unknown weight changed": (within("changed_weights", ["nothing"]), "has no weight nothing, which"),
    "changed weights as a number": (within("changed_weights", 3), "changed_weights: expected .*got 3"),
    "changed weights as numbers": (within("changed_weights", [3]), "changed_weights: expected"),
    "accuracy as a list": (within("accuracy", []), "accuracy: expected"),
    "calibration as text": (within("calibration", "x"), "calibration: expected"),
    "split seed as text": (within("calibration|split_seed", "x"), "calibration: split_seed: expected an integer >= 0"),
    "seed as text": (within("seed", "42"), "seed: expected int, got '42'"),
    "fingerprint as a number": (within("weights_fingerprint", 7), "weights_fingerprint: expected str, got 7"),
    "no fingerprint": (within("checkpoint_fingerprint", ""), "is not the checkpoint that .* describes"),
    "a list": (lambda values: [values], "not a sidecar of a calibrated checkpoint: a list"),
    "null": (lambda values: None, "not a sidecar of a calibrated checkpoint: a NoneType"),
    "a number": (lambda values: 3, "not a sidecar of a calibrated checkpoint: a int"),
    "an empty object": (lambda values: {}, "not a sidecar of this checkpoint"),
}


def write_sidecar(path: Path, values: Any) -> None:
    """As if this program had written it: its own fingerprint fits."""
    if isinstance(values, dict):
        values = values | {"sidecar_fingerprint": sidecar_fingerprint(values)}
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("row", SIDECAR_ROWS)
def test_sidecar(row: str, made: Made, tmp_path: Path) -> None:
    change, message = SIDECAR_ROWS[row]
    path = copy_of(made, tmp_path)
    sidecar = path.with_suffix(".json")
    write_sidecar(sidecar, change(json.loads(sidecar.read_text())))
    refused(message, tmp_path, lambda: load_calibrated(str(path)))


SIDECAR_BYTES_ROWS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a sidecar of a calibrated checkpoint"),
    "half": (lambda data: data[: len(data) // 2], "not a sidecar of a calibrated checkpoint"),
    "without its end": (lambda data: data[:-3], "not a sidecar of a calibrated checkpoint"),
    "zeros": (lambda data: bytes(len(data)), "not a sidecar of a calibrated checkpoint"),
    "not UTF-8": (lambda data: b'{"a": "\xff"}', "not a sidecar of a calibrated checkpoint"),
    "twice": (lambda data: data + data, "not a sidecar of a calibrated checkpoint"),
    "deep": (lambda data: b"[" * 100_000, "not a sidecar of a calibrated checkpoint"),
    "accuracy changed": (lambda data: data.replace(b"0.5\n", b"0.9\n"), "its fingerprint .* was changed or damaged"),
    "data changed": (lambda data: data.replace(b'"data"', b'"dbta"'), "its fingerprint .* was changed or damaged"),
    "the checkpoint itself": (lambda data: torch_bytes({}), "not a sidecar of a calibrated checkpoint"),
}


@pytest.mark.parametrize("row", SIDECAR_BYTES_ROWS)
def test_sidecar_bytes(row: str, made: Made, tmp_path: Path) -> None:
    change, message = SIDECAR_BYTES_ROWS[row]
    path = copy_of(made, tmp_path)
    sidecar = path.with_suffix(".json")
    data = sidecar.read_bytes()
    assert change(data) != data
    sidecar.write_bytes(change(data))
    refused(message, sidecar, lambda: load_calibrated(str(path)))


def test_a_sidecar_of_gigabytes_is_not_read(made: Made, tmp_path: Path) -> None:
    path = copy_of(made, tmp_path)
    with path.with_suffix(".json").open("r+b") as stream:
        stream.truncate(2**33)  # sparse: it takes no disk
    refused("has 8.59 GB, at most 67.11 MB can be read", path.with_suffix(".json"), lambda: load_calibrated(str(path)))


def test_a_sidecar_of_format_2_is_read(made: Made, tmp_path: Path) -> None:
    """It knows no pooling, and has no fingerprint of its own."""
    path = copy_of(made, tmp_path)
    sidecar = path.with_suffix(".json")
    values = json.loads(sidecar.read_text())
    del values["sidecar_fingerprint"], values["geometry"]["pool"]
    said = {key: values[key] for key in ("mean", "std", "interpolation", "crop_pct", "setting", "geometry", "sites")}
    state = torch.load(path, weights_only=True)
    text = json.dumps(said, sort_keys=True) + weights_fingerprint(state)
    values |= {"format": 2, "checkpoint_fingerprint": hashlib.sha256(text.encode()).hexdigest()}
    sidecar.write_text(json.dumps(values))
    assert torch.equal(logits_of(load_calibrated(str(path)).loaded.model, made.images), made.calibrated_logits)


@pytest.mark.parametrize("mode", ["ft1", "ft2", "ft3", "trt"])
def test_calibrated_by_another_program(mode: str, made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The old toolkit wrote no sidecar: mode and bits given by hand say what its scales are for."""
    path, expected = calibrate(tmp_path, tiny_vit(), made.images, mode)
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"tiny_calib.json: not found; .* --quant-mode, --wprec and --aprec"):
        load_calibrated(str(path))
    with caplog.at_level(logging.WARNING):
        opened = open_checkpoint(str(path), "auto", None, HEADS, make_setting(mode))
    assert isinstance(opened, CalibratedModel)
    assert torch.equal(logits_of(opened.loaded.model, made.images), expected)
    assert opened.sidecar.label == f"{mode} w8a8, scales of the file"
    assert f"no sidecar: taken as {mode}, weights of 8 bits, activations of 8 bits, as given; mean 0.5" in caplog.text


BY_HAND_ROWS: dict[str, tuple[ByHand, str]] = {
    "another mode": (
        ByHand(make_setting("ft1"), heads=HEADS),
        r"has shape \(\), torch.float32, its mode needs \(128, 1\)",
    ),
    "another model": (ByHand(make_setting("ft2"), "ViT-B_16"), "another architecture"),
    "no heads": (ByHand(make_setting("ft2")), "cannot read the heads"),
    "another size": (ByHand(make_setting("ft2"), img_size=24, heads=HEADS), "weight pos_embed has shape"),
    "zero points": (ByHand(make_setting("ort"), heads=HEADS), "no sidecar, which holds the zero points of mode ort"),
}


@pytest.mark.parametrize("row", BY_HAND_ROWS)
def test_by_hand(row: str, made: Made, tmp_path: Path) -> None:
    by_hand, message = BY_HAND_ROWS[row]
    path = copy_of(made, tmp_path)
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=message):
        load_calibrated(str(path), by_hand)


# ---- anything ------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(values: Any, above: str = "") -> list[str]:
    """Every place of a JSON object, as `within` takes it."""
    found = []
    for key, value in values.items():
        found += [above + key, *(places(value, f"{above}{key}|") if isinstance(value, dict) else ())]
    return found


def refused_or_right(made: Made, path: Path) -> None:
    try:
        model = load_calibrated(str(path)).loaded.model
    except InputError as error:
        line = str(error)
    else:
        line = "fine"
        assert torch.equal(logits_of(model, made.images), made.calibrated_logits)
    assert re.fullmatch(r"[^\n]{1,900}", line)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_value_anywhere_in_a_sidecar(made: Made, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = copy_of(made, tmp_path_factory.mktemp("fuzz"))
    values = json.loads(path.with_suffix(".json").read_text())
    top = [key for key in values if key != "sites"] + [f"sites|{SITE}"]
    place = data.draw(st.sampled_from([p for p in places(values) if p.startswith(tuple(top))]))
    write_sidecar(path.with_suffix(".json"), within(place, data.draw(JSON | st.just(...)))(values))
    refused_or_right(made, path)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_damage_to_the_bytes_of_a_sidecar(made: Made, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = copy_of(made, tmp_path_factory.mktemp("fuzz"))
    sidecar = path.with_suffix(".json")
    text = sidecar.read_bytes()
    start = data.draw(st.integers(0, len(text) - 1))
    end = start + data.draw(st.sampled_from([0, 1, 1, 1, 2, 40, len(text)]))
    sidecar.write_bytes(text[:start] + data.draw(st.binary(max_size=3)) + text[end:])
    refused_or_right(made, path)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_any_damage_to_a_calibrated_checkpoint(
    made: Made, tmp_path_factory: pytest.TempPathFactory, share: float, bit: int, cut: bool
) -> None:
    path = copy_of(made, tmp_path_factory.mktemp("fuzz"))
    data = bytearray(path.read_bytes())
    place = int(share * len(data))
    data[place] ^= 1 << bit
    path.write_bytes(data[:place] if cut else data)
    refused_or_right(made, path)
