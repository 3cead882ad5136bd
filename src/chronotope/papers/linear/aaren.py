"""Aaren: softmax attention of a learned query over all prefixes of a sequence.

For a query q that does not depend on the tokens, with s_i = scale * q . k_i, the output of position t is

    o_t = sum_{i <= t} exp(s_i) v_i / sum_{i <= t} exp(s_i) = w_t / u_t

where (m, u, w) = (max s_i, sum exp(s_i - m), sum exp(s_i - m) v_i) is a state of constant size, and joining two of them
is associative (`softmax_prefix`): one scan gives all prefixes in O(N) work and ceil(log2 N) levels up and down, and a
new token is joined in O(1). A layer has one learned query for each head; blocks of it are stacked as usual.

Sizes: q [H, D] or [B, H, D], k [B, H, N, D], v [B, H, N, Dv] -> out [B, H, N, Dv]; state m, u [B, H], w [B, H, Dv].

    >>> out, state = prefix_attention(torch.randn(4, 16), torch.randn(2, 4, 100, 16), torch.randn(2, 4, 100, 16))
    >>> out.shape, state.values.shape
    (torch.Size([2, 4, 100, 16]), torch.Size([2, 4, 16]))
    >>> Aaren(64, 4)(torch.randn(2, 4 * 8 * 8, 64), Grid(t=4, h=8, w=8)).shape
    torch.Size([2, 256, 64])

Left out: the comparison with transformers on 38 data sets. A layer cannot look up by the current token: its query is
the same for all tokens.

Paper: Feng et al. 2024, "Attention as an RNN", arXiv 2405.13956.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens
from chronotope.papers.registry import paper
from chronotope.recurrences.scans import Elements, scan, softmax_prefix


@dataclass(frozen=True)
class SoftmaxState(Carried):
    """Sums over the tokens so far: exp(top) total = sum exp(s), exp(top) values = sum exp(s) v.

    Where there was no token, top is -inf and the others are 0.
    """

    top: Float[Tensor, "b h"]
    total: Float[Tensor, "b h"]
    values: Float[Tensor, "b h d"]


def merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """The state of the tokens of both."""
    return SoftmaxState(*softmax_prefix((a.top, a.total, a.values), (b.top, b.total, b.values)))


def prefix_attention(
    q: Float[Tensor, "h d"] | Float[Tensor, "b h d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    *,
    scale: float | int | None = None,
    keep: Bool[Tensor, "b n"] | None = None,
    state: SoftmaxState | None = None,
    block: int | None = None,
) -> tuple[Float[Tensor, "b h n dv"], SoftmaxState]:
    """Attention of q over the first t tokens, for every t.

    Args:
        scale: of the scores; default 1 / sqrt(D).
        keep: False leaves a token out; where no token is left the output is 0.
        state: what came before: the state that a former call returned.
        block: tokens scanned together; None: all. 1 is the recurrence, token by token.

    Returns out in v's dtype, and the state after the last token, float32 at least.
    """
    if block is not None and block < 1:
        raise ChronotopeError(f"prefix_attention(block={block}): expected at least 1 token.")
    dtype = torch.promote_types(q.dtype, torch.float32)
    if keep is not None:  # chosen and not multiplied: what is left out may be infinite
        k, v = (torch.where(keep[:, None, :, None], x, 0.0) for x in (k, v))
    query = q.to(dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (k.to(dtype) @ query[..., None])[..., 0]
    u, w = torch.ones_like(scores), v.to(dtype)
    if keep is not None:
        scores, u = scores.masked_fill(~keep[:, None], -torch.inf), u * keep[:, None]
    before = _nothing(w) if state is None else state
    out = []
    n = scores.shape[2]
    for start in range(0, n, block or max(n, 1)):
        piece = tuple(x[:, :, start : start + (block or n)] for x in (scores, u, w))
        y, before = _prefixes(piece, before)
        out.append(y)
    return (torch.cat(out, 2) if out else w).to(v.dtype), before


def _prefixes(elements: Elements, before: SoftmaxState) -> tuple[Tensor, SoftmaxState]:
    """Outputs of all prefixes of the elements, which come after `before`; the state after them."""
    past = (before.top[..., None], before.total[..., None], before.values[..., None, :])
    first = softmax_prefix(past, tuple(x[:, :, :1] for x in elements))
    elements = tuple(torch.cat((x, y[:, :, 1:]), 2) for x, y in zip(first, elements, strict=True))
    m, u, w = scan(softmax_prefix, elements, dim=2)
    seen = u > 0
    out = torch.where(seen[..., None], w / torch.where(seen, u, 1.0)[..., None], 0.0)
    return out, SoftmaxState(*(x[:, :, -1].clone() for x in (m, u, w)))


def _nothing(w: Float[Tensor, "b h n d"]) -> SoftmaxState:
    zero = w.new_zeros(*w.shape[:2], w.shape[3])
    return SoftmaxState(torch.full_like(zero[..., 0], -torch.inf), zero[..., 0].clone(), zero)


@dataclass(frozen=True)
class AarenState(Carried):
    """The sums of the tokens so far. grid: one slice."""

    past: SoftmaxState
    grid: Grid


@paper(
    system=52,
    name="Aaren",
    family="linear",
    claim="softmax attention of a learned query over every prefix: a parallel scan in training, O(1) memory in steps",
    evidence=["tests/papers/linear/test_aaren.py", "tests/recurrences/test_scans.py"],
)
class Aaren(Mixer):
    """y = W_o prefix_attention(q, W_k x, W_v x) with one learned query q for each head, in the order of the grid.

    block: as for `prefix_attention`.
    """

    def __init__(self, dim: int, heads: int, block: int | None = None):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ChronotopeError(f"Aaren: dim={dim} is not a multiple of heads={heads}.")
        self.dim, self.heads, self.block = dim, heads, block
        self.query = nn.Parameter(torch.randn(heads, dim // heads))
        self.kv, self.out = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("Aaren takes no context: its query is not a function of the tokens.")
        require_tokens(x, grid, self.dim, "x")
        return self._mix(x, None)[0]

    def init_state(self, batch: int, grid: Grid) -> AarenState:
        """No token seen."""
        require_slice(grid)
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        return AarenState(_nothing(self.query.to(dtype).new_zeros(batch, self.heads, 1, self.query.shape[1])), grid)

    def step(self, x: Float[Tensor, "b s c"], state: AarenState) -> tuple[Float[Tensor, "b s c"], AarenState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        y, past = self._mix(x, state.past)
        return y, AarenState(past, state.grid)

    def _mix(self, x: Tensor, before: SoftmaxState | None) -> tuple[Tensor, SoftmaxState]:
        k, v = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out, after = prefix_attention(self.query, k, v, state=before, block=self.block)
        return self.out(out.transpose(1, 2).flatten(2)), after
