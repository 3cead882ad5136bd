r"""Music Transformer: queries meet learned vectors of relative places, without a vector for each pair of tokens.

$$
y_i = \sum_{j \le i} \mathrm{softmax}_j\Big(\tfrac{1}{\sqrt d}\, (q_i \cdot k_j + S_{ij})\Big) v_j, \qquad
S_{ij} = q_i \cdot e_{j - i}
$$

e_0 ... e_{-(n-1)} are learned for each head; the last one is for all places further back. S comes from Q E^T, whose row
i holds q_i . e at column j - i: read with rows one number shorter, every value stands at column j. The paper pads
Q E^T, reshapes it and drops a row; here the same memory is read with another stride, a chunk of queries at a time, and
chunks are computed again in the backward pass: neither [N, N, d] nor [N, N] is held (`ct.nn.RelativeAttention`).

Local variant: the sequence is cut in blocks, and a query sees those up to it in its own block and the one before:
two lattices of blocks of twice the size, half a block apart, and causal. Blocks out of sight are not computed.

Several axes: vectors add up, S_ij = q_i . (e^t + e^v), for the time steps and voices of a chorale; `ct.models.Events`
with position="relative" is the model, `chronotope train chorales` its training.

Sizes: x [B, N, C] -> [B, N, C]; vectors [heads, length, d].

    >>> layer = music_attention(dim=32, heads=2, length=64)
    >>> layer(torch.randn(1, 100, 32), ct.Grid(n=100)).shape
    torch.Size([1, 100, 32])

Left out: relative pitch, a vector for each difference of two notes, since it is no place on the grid; the encoder of
the accompaniment model; recordings of piano playing.

Paper: Huang, Vaswani, Uszkoreit, Shazeer, Simon, Hawthorne, Dai, Hoffman, Dinculescu, Eck 2018, "Music Transformer",
arXiv 1809.04281.
"""

from __future__ import annotations

from chronotope.nn import RelativeAttention
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, blocks, causal


def two_blocks(size: int, axis: str = "n") -> Pattern:
    """A query sees the tokens up to it of its own block of `size` and of the block before."""
    wide = {axis: 2 * size}
    return (blocks(shift=None, **wide) | blocks(shift={axis: size}, **wide)) & causal()


@paper(
    system=119,
    name="Music Transformer",
    family="position",
    claim="queries meet learned vectors of relative places, in memory linear in length",
    evidence=[
        "tests/papers/position/test_music_transformer.py",
        "tests/nn/test_relative_attention.py",
        "tests/tasks/test_chorales.py",
    ],
    missing="(e) a transposed motif: 0.59 of notes right at 512 after 1,500 steps at 256, where 0.90 is asked",
)
def music_attention(
    dim: int, heads: int, length: int, block: int | None = None, axis: str = "n", shared: bool = False
) -> RelativeAttention:
    """A causal layer.

    Args:
        length: distances with a vector of their own, 0 to length - 1; those beyond take the last.
        block: size of the blocks of the local variant; None: everything before is seen.
        axis: on which distance is measured.
        shared: one table for all heads.
    """
    where = causal() if block is None else two_blocks(block, axis)
    return RelativeAttention(dim, heads, {axis: (length - 1, 0)}, where=where, shared=shared)
