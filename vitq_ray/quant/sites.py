"""What is quantized where: the quantizer sites of a block, and the modes, both as tables.

A site is a place in a block that can quantize a tensor; its name is the one FasterTransformer's checkpoints use.
Several sites may see one tensor (the input of query, key and value), so statistics belong to tensors, scales to
sites. A mode switches families of sites off, chooses the weight axis, and says whether query, key and value share
their scales. Every site is calibrated and saved in every mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

LAYER_PREFIX = "transformer.encoder.layer."
WEIGHT = "weight"  # the one family whose tensors are parameters, not activations
PROBABILITIES = "probabilities"  # the one that is never negative
SIGNED, UNSIGNED, ASYMMETRIC = GRIDS = ("signed", "unsigned", "asymmetric")  # the latter: unsigned with a zero point


@dataclass(frozen=True)
class Site:
    """One quantizer of a block.

    Attributes:
        name: FasterTransformer name below `transformer.encoder.layer.{i}.`.
        tensor: name of the site at which its tensor is observed; equal for sites that see the same tensor.
        family: what the modes switch.
    """

    name: str
    tensor: str
    family: str


@dataclass(frozen=True)
class Mode:
    """One row of the table of modes.

    Attributes:
        weight_axis: 0 for one scale per output channel, None for one per weight tensor.
        fuse_qkv: query, key and value share the maximum of their three amax values.
        left_out: families that stay in floating point.
        unsigned: families whose integers are [0, 255]: tensors that are never negative.
        asymmetric: families whose integers are [0, 255] with a zero point.
    """

    name: str
    weight_axis: int | None
    fuse_qkv: bool
    left_out: frozenset[str]
    unsigned: frozenset[str] = frozenset()
    asymmetric: frozenset[str] = frozenset()

    def quantizes(self, site: Site) -> bool:
        return site.family not in self.left_out

    def grid(self, site: Site) -> str:
        """One of `GRIDS`."""
        if site.family in self.asymmetric:
            return ASYMMETRIC
        return UNSIGNED if site.family in self.unsigned else SIGNED


GEMMS = ("ffn.fc1", "ffn.fc2", "attn.query", "attn.key", "attn.value", "attn.out")
_QKV_INPUT = "attn.query._input_quantizer"
FC2_INPUT, ATTENTION_PROBABILITIES = "ffn.fc2._input_quantizer", "attn.matmul_a_input_quantizer"


def _gemm_sites(gemm: str) -> tuple[Site, ...]:
    input_site = f"{gemm}._input_quantizer"
    tensor = _QKV_INPUT if gemm in ("attn.key", "attn.value") else input_site
    return (
        Site(input_site, tensor, "input"),
        Site(f"{gemm}._weight_quantizer", f"{gemm}._weight_quantizer", WEIGHT),
        Site(f"{gemm}._aftergemm_quantizer", f"{gemm}._aftergemm_quantizer", "aftergemm"),
    )


def _activation_site(name: str, family: str, tensor: str | None = None) -> Site:
    return Site(f"{name}_quantizer", f"{tensor or name}_quantizer", family)


SITES: tuple[Site, ...] = (
    *(site for gemm in GEMMS for site in _gemm_sites(gemm)),
    _activation_site("attn.matmul_q_input", "matmul"),
    _activation_site("attn.matmul_k_input", "matmul"),
    _activation_site("attn.matmul_v_input", "matmul"),
    _activation_site("attn.matmul_a_input", PROBABILITIES),
    _activation_site("attn.softmax_input", "softmax_input"),
    _activation_site("layernorm_input1", "layernorm_input"),
    _activation_site("add1_local_input", "local"),
    _activation_site("add1_residual_input", "residual", tensor="layernorm_input1"),
    _activation_site("layernorm_input2", "layernorm_input"),
    _activation_site("add2_local_input", "local"),
    _activation_site("add2_residual_input", "residual", tensor="layernorm_input2"),
)

# Sites whose amax values are replaced by their maximum in modes that fuse query, key and value.
FUSED_GROUPS: tuple[tuple[str, ...], ...] = (
    tuple(f"attn.{name}._weight_quantizer" for name in ("query", "key", "value")),
    tuple(f"attn.{name}._aftergemm_quantizer" for name in ("query", "key", "value")),
    tuple(f"attn.matmul_{name}_input_quantizer" for name in "qkv"),
)

# Sites that are one quantizer under several names: what is done to one is done to all.
SHARED_SITES: tuple[tuple[str, ...], ...] = (
    tuple(f"attn.{name}._input_quantizer" for name in ("query", "key", "value")),
)

FAMILIES = frozenset(site.family for site in SITES)

# ft1 to ft3 and trt are those of FasterTransformer, of 2021. ort, openvino and tensorrt are runtimes of today: what is
# quantized there is what an exported file has, see `engines.targets`.
_INT32_OUT = frozenset({"layernorm_input", "residual", "local", "softmax_input", "aftergemm"})
_U8 = {"unsigned": frozenset({PROBABILITIES}), "asymmetric": frozenset({"input"})}
MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("ft1", 0, False, _INT32_OUT),
        Mode("ft2", None, True, frozenset({"layernorm_input", "residual", "local"})),
        Mode("ft3", None, True, frozenset({"layernorm_input", "local"})),
        Mode("trt", None, True, frozenset({"layernorm_input", "softmax_input", "aftergemm"})),
        Mode("ort", 0, False, _INT32_OUT, **_U8),
        Mode("openvino", 0, False, _INT32_OUT, **_U8),
        Mode("tensorrt", 0, False, _INT32_OUT - {"residual"}),
    )
}


def site_key(block: int, name: str) -> str:
    """Full FasterTransformer name of a site, without the `._amax` of its buffer."""
    return f"{LAYER_PREFIX}{block}.{name}"


@cache
def sites_of_blocks(depth: int) -> dict[str, Site]:
    """{full FasterTransformer name: site} of a model of `depth` blocks, block by block."""
    return {site_key(index, site.name): site for index in range(depth) for site in SITES}


def local_name(key: str) -> str:
    """`0.attn.query._input_quantizer` of a full name: block index and site, which rules' patterns match."""
    return key.removeprefix(LAYER_PREFIX)


def observed_tensors() -> tuple[str, ...]:
    """Names of the distinct activation tensors of a block, in site order."""
    return tuple(dict.fromkeys(site.tensor for site in SITES if site.family != WEIGHT))
