"""How much of the blocks' work a plan leaves to integers: their matrix products, and the sites that decide about each.

    product = 4 linear layers (query, key and value read one tensor), q·kᵀ, p·v          per block
    it runs in integers where the quantizers of both of its operands are on

Legend: N tokens, C width, D attention width (heads times head width), F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from vitq_ray.quant.plan import Plan
from vitq_ray.quant.sites import GEMMS, site_key
from vitq_ray.quant.vit import quant_blocks, site_weights

SCORES, MIXED = "attn.scores", "attn.mixed"  # q·kᵀ and p·v, which have no layer that names them
_OPERANDS = {
    **{gemm: (f"{gemm}._input_quantizer", f"{gemm}._weight_quantizer") for gemm in GEMMS},
    SCORES: ("attn.matmul_q_input_quantizer", "attn.matmul_k_input_quantizer"),
    MIXED: ("attn.matmul_a_input_quantizer", "attn.matmul_v_input_quantizer"),
}


@dataclass(frozen=True)
class Product:
    """One matrix product of a block.

    Attributes:
        block: its index.
        name: `ffn.fc1`, …, `attn.scores`, `attn.mixed`.
        macs: multiply-accumulates of one image.
    """

    block: int
    name: str
    macs: int

    @property
    def operands(self) -> tuple[str, str]:
        """Full names of the two sites that must be on."""
        left, right = _OPERANDS[self.name]
        return site_key(self.block, left), site_key(self.block, right)

    def in_integers(self, plan: Plan) -> bool:
        return all(plan.sites[key].rule.on for key in self.operands)


def products_of(model: nn.Module) -> list[Product]:
    """Of all blocks of a model from `quantize_vit`, in order."""
    patches: int = model.patch_embed.num_patches  # type: ignore[union-attr, assignment]
    tokens = patches + int(getattr(model, "num_prefix_tokens", 0))
    weights, found = site_weights(model), []
    for index, block in enumerate(quant_blocks(model)):
        for gemm in GEMMS:
            found.append(Product(index, gemm, tokens * weights[site_key(index, f"{gemm}._weight_quantizer")].numel()))
        attention = tokens**2 * block.attn.num_heads * block.attn.head_dim
        found += [Product(index, SCORES, attention), Product(index, MIXED, attention)]
    return found


def integer_share(products: Iterable[Product], plan: Plan) -> float:
    """The share of the blocks' multiply-accumulates that run in integers, in [0, 1]."""
    products = list(products)
    return sum(p.macs for p in products if p.in_integers(plan)) / sum(p.macs for p in products)
