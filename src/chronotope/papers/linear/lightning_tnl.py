"""TransNormerLLM (TNL) with Lightning Attention: decays by head and layer, a low-rank gate, constant cost per token.

    x = x + A_l(norm(x)),    x = x + W_3 (W_1 x * W_2 x)
    A_l(x) = W_o (norm(lightning(silu(W_q x), silu(W_k x), silu(W_v x), lambda_l)) * sigmoid(U_2 U_1 x))
    lambda_lh = exp(-2^(-8 h / H) (1 - l / (L - 1) + 1e-5)),    h = 1..H, l = 0..L-1

Upper layers forget less, the last one hardly at all. Only the first turns queries and keys by learned angles (LRPE).
S_t = lambda S_{t-1} + k_t^T v_t is kept in the decayed form, so that lambda^(-t) never appears, which overflows.

Sizes: ids [B, N] -> logits [B, N, vocab]; U_1 from dim to dim / heads; a state [B, H, D, D] for each layer, D = dim /
heads (2 D x D in the first, whose LRPE gives a cosine and a sine of each channel); O(N dim (dim + chunk)) work.

    >>> model = tnl(vocab=64, dim=64, heads=4, layers=2)
    >>> model(torch.randint(64, (1, 300))).shape
    torch.Size([1, 300, 64])

Left out: the cache interface of transformers (`init_state` and `step` do its work here), training at scale. The
released example of the layer norms by LayerNorm, with weights, where the paper has SimpleRMSNorm: `norm=` takes either.

Paper: Qin et al. 2024, "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
arXiv 2405.17381.
"""

from __future__ import annotations

from torch import nn

from chronotope.papers.linear.lightning import CHUNK
from chronotope.papers.linear.transnormer_blocks import (
    GatedLinearAttention,
    LanguageModel,
    TransNormerBlock,
    released_slopes,
)
from chronotope.papers.registry import paper


def tnl_attention(
    dim: int, heads: int, layer: int, layers: int, *, norm: nn.Module | None = None, chunk: int = CHUNK
) -> GatedLinearAttention:
    """A_l for l = `layer` of `layers`, counted from 0."""
    gate = nn.Sequential(
        nn.Linear(dim, dim // heads, bias=False), nn.Linear(dim // heads, dim, bias=False), nn.Sigmoid()
    )
    return GatedLinearAttention(
        dim, released_slopes(heads, layers)[layer], gate, lrpe=layer == 0, value=nn.SiLU(), norm=norm, chunk=chunk
    )


def tnl_block(dim: int, heads: int, layer: int, layers: int, hidden: int) -> TransNormerBlock:
    """The attention of this layer, then the channel mixer with `hidden` channels."""
    return TransNormerBlock(tnl_attention(dim, heads, layer, layers), dim, hidden)


@paper(
    system=23,
    name="Lightning Attention / TransNormerLLM",
    family="linear",
    claim="a language model of decayed linear attention: constant cost per token at any length, a state of fixed size",
    evidence=["tests/papers/linear/test_lightning_tnl.py"],
)
def tnl(vocab: int, dim: int, heads: int, layers: int, hidden: int | None = None) -> LanguageModel:
    """A TNL language model.

    Args:
        vocab: number of tokens.
        dim, heads, layers: channels, heads of each layer, blocks.
        hidden: channels of the channel mixer; default 8 / 3 dim.
    """
    hidden = 8 * dim // 3 if hidden is None else hidden
    return LanguageModel(vocab, dim, [tnl_block(dim, heads, layer, layers, hidden) for layer in range(layers)])
