"""FasterTransformer's names: order written down by hand, values against the rows they came from."""

from __future__ import annotations

import io

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitq_ray.base.config import InputError
from vitq_ray.models.fastertransformer import from_fastertransformer, to_fastertransformer
from vitq_ray.models.geometry import Geometry, build_model

PLAIN = Geometry("x", 8, 32, 2, 4, 48, img_size=16, num_classes=5)
HYBRID = Geometry("x", 8, 32, 1, 4, 48, img_size=16, num_classes=5, hybrid_stages=(2, 1), hybrid_widths=(32, 128, 256))


def random_state(model: VisionTransformer) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}


def with_bias(*modules: str) -> list[str]:
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def layer(index: int) -> list[str]:
    prefix = f"transformer.encoder.layer.{index}"
    names = ("attention_norm", "ffn_norm", "ffn.fc1", "ffn.fc2")
    names += ("attn.query", "attn.key", "attn.value", "attn.out")
    return with_bias(*(f"{prefix}.{name}" for name in names))


EMBEDDINGS = "transformer.embeddings"
START = [f"{EMBEDDINGS}.position_embeddings", f"{EMBEDDINGS}.cls_token"]
PATCHES = with_bias(f"{EMBEDDINGS}.patch_embeddings")
END = with_bias("transformer.encoder.encoder_norm", "head")


def test_names_and_order_of_a_plain_model() -> None:
    state = to_fastertransformer(random_state(build_model(PLAIN)), PLAIN)
    assert list(state) == [*START, *PATCHES, *layer(0), *layer(1), *END]


def unit(block: int, index: int) -> list[str]:
    """One bottleneck in the order in which jeonsworld's module registers its layers."""
    prefix = f"{EMBEDDINGS}.hybrid_model.body.block{block}.unit{index}"
    names = [name for i in (1, 2, 3) for name in [*with_bias(f"{prefix}.gn{i}"), f"{prefix}.conv{i}.weight"]]
    projection = [f"{prefix}.downsample.weight", *with_bias(f"{prefix}.gn_proj")]
    return names + (projection if index == 1 else [])


def test_names_and_order_of_a_hybrid() -> None:
    root = f"{EMBEDDINGS}.hybrid_model.root"
    stem = [f"{root}.conv.weight", *with_bias(f"{root}.gn")]
    state = to_fastertransformer(random_state(build_model(HYBRID)), HYBRID)
    units = unit(1, 1) + unit(1, 2) + unit(2, 1)
    assert list(state) == [*START, *stem, *units, *PATCHES, *layer(0), *END]


def test_query_key_and_value_are_rows_of_qkv() -> None:
    state = random_state(build_model(PLAIN))
    renamed = to_fastertransformer(state, PLAIN)
    for start, part in zip((0, 32, 64), ("query", "key", "value"), strict=True):
        for kind in ("weight", "bias"):
            rows = state[f"blocks.1.attn.qkv.{kind}"][start : start + 32]
            assert torch.equal(renamed[f"transformer.encoder.layer.1.attn.{part}.{kind}"], rows)
    assert renamed["transformer.encoder.layer.0.ffn.fc1.weight"] is state["blocks.0.mlp.fc1.weight"]


def test_a_third_of_qkv_saves_only_its_own_bytes() -> None:
    state = to_fastertransformer(random_state(build_model(PLAIN)), PLAIN)
    query = state["transformer.encoder.layer.0.attn.query.weight"]
    assert query.untyped_storage().nbytes() == 32 * 32 * 4


@pytest.mark.parametrize("geometry", [PLAIN, HYBRID])
def test_round_trip_through_a_file_is_exact(geometry: Geometry) -> None:
    state = random_state(build_model(geometry))
    state["pos_embed"][0, 0, 0] = -0.0
    buffer = io.BytesIO()
    torch.save(to_fastertransformer(state, geometry), buffer)
    buffer.seek(0)
    restored = from_fastertransformer(torch.load(buffer, weights_only=True), geometry)
    assert set(restored) == set(state)
    for name, tensor in state.items():
        assert torch.equal(restored[name].view(torch.int32), tensor.view(torch.int32)), name


def test_what_the_scheme_does_not_know_comes_last_under_timm() -> None:
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=1.5, num_classes=5,
        init_values=1.0, qk_norm=True, reg_tokens=1, qkv_bias=False,
    )  # fmt: skip
    state = random_state(model)
    renamed = to_fastertransformer(state, PLAIN)
    others = [name for name in renamed if name.startswith("timm.")]
    assert others == list(renamed)[-len(others) :]
    assert others[:2] == ["timm.reg_token", "timm.blocks.0.attn.q_norm.weight"]
    assert "timm.blocks.1.ls2.gamma" in others
    assert "transformer.encoder.layer.0.attn.query.bias" not in renamed
    restored = from_fastertransformer(renamed, PLAIN)
    assert {name: id(t) for name, t in restored.items() if "qkv" not in name} == {
        name: id(t) for name, t in state.items() if "qkv" not in name
    }
    assert torch.equal(restored["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


def test_pre_logits_keeps_its_name() -> None:
    geometry = Geometry("x", 8, 32, 1, 4, 48, img_size=16, num_classes=5, pre_logits=24)
    renamed = to_fastertransformer(random_state(build_model(geometry)), geometry)
    assert list(renamed)[-2:] == with_bias("timm.fc_norm.pre_logits")


def test_amax_is_ignored() -> None:
    renamed = to_fastertransformer(random_state(build_model(PLAIN)), PLAIN)
    amax = {"transformer.encoder.layer.0.attn.query._input_quantizer._amax": torch.tensor(1.0)}
    assert from_fastertransformer(renamed | amax, PLAIN).keys() == from_fastertransformer(renamed, PLAIN).keys()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "classifier.weight",
            torch.zeros(1),
            r"1 of \d+ weights have no place in the model, first 'classifier.wei",
        ),
        (
            "transformer.encoder.layer.2.ffn_norm.bias",
            torch.zeros(32),
            r"first 'transformer.encoder.layer.2.ffn_n",
        ),
        ("timm.head.weight", torch.zeros(5, 32), "first 'timm.head.weight'"),
        (
            "transformer.encoder.layer.1.attn.key.bias",
            None,
            r"1.attn.key.bias' is missing; expected .*query.bias",
        ),
        (
            "transformer.encoder.layer.1.attn.value.weight",
            torch.zeros(8, 32),
            r"1.attn.value.weight' has shape \(8, 32\), expected \(32, 32\)",
        ),
    ],
)
def test_bad_states(name: str, value: Tensor | None, message: str) -> None:
    renamed = to_fastertransformer(random_state(build_model(PLAIN)), PLAIN)
    if value is None:
        del renamed[name]
    else:
        renamed[name] = value
    with pytest.raises(InputError, match=message):
        from_fastertransformer(renamed, PLAIN)
