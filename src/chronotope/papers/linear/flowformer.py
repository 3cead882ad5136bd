"""Flow-Attention: linear attention in which sources compete and sinks are allocated, by conservation of flow.

With q, k the sigmoid of queries and keys, N sinks (queries) and M sources (keys):

    I_i = q_i . sum_j k_j          incoming flow       O_j = k_j . sum_i q_i          outgoing flow
    I'_i = q_i . sum_j k_j / O_j   of conserved sources  O'_j = k_j . sum_i q_i / I_i   to conserved sinks
    out_i = sigmoid(I'_i N / M) sum_j (q_i . k_j / I_i) c_j v_j,    c_j = M softmax_j(O'_j)

sum_i I'_i = M and sum_j O'_j = N: what one conserves, the other competes for. The causal form has running sums in all
places, 1 / I_i and 1 / O_i times the count n_i = i + 1, I' and O' over n_i, allocation sigmoid(I'_i), and c_i = n_i
exp(O'_i) / sum_{j <= i} exp(O'_j). It is strictly causal, and an approximation: a source sees the sinks up to it only.

Sizes: q [B, H, N, D], k [B, H, M, D], v [B, H, M, Dv] -> [B, H, N, Dv], work O((N + M) D Dv). Causal: state
H (4 D + D Dv + 1) numbers.

    >>> layer = FlowAttention(32, heads=4)
    >>> layer(torch.randn(2, 4 * 6 * 6, 32), Grid(t=4, h=6, w=6)).shape
    torch.Size([2, 144, 32])

`clamp=True`, as the released code has it, holds O' in -1..1 before the softmax. O' is N / M on average, so in
self-attention about half of the sources are held at 1, and their competition is flat; the paper's formula, and the
default here, has none. As in that code, 1e-6 is added to both sides of the products with a sum.

Left out: dropout (0.05 on the output), masks in the causal form (padding at the end needs none).

Paper: Wu, Wu, Xu, Wang and Long 2022, "Flowformer: Linearizing Transformers with Conservation Flows", arXiv 2202.06258.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens
from chronotope.papers.registry import paper
from chronotope.recurrences import RecurrentState, linear_attention, recurrence

EPS = 1e-6


def flow_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    *,
    clamp: bool = False,
    sinks: Bool[Tensor, "b n"] | None = None,
    sources: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h n dv"]:
    """Every sink sees every source. q, k before the sigmoid; sinks, sources: False leaves a token out."""
    kept_q, kept_k = (_kept(x, keep) for x, keep in ((q, sinks), (k, sources)))
    dtype, exact = v.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k = (torch.where(keep, x.to(exact).sigmoid(), 0.0) for x, keep in ((q, kept_q), (k, kept_k)))
    n, m = kept_q.sum(2), kept_k.sum(2)
    incoming, _, to_sinks, to_sources = flows(q, k)
    if clamp:
        to_sources = to_sources.clamp(-1, 1)
    competition = m * to_sources.masked_fill(~kept_k[..., 0], -torch.inf).softmax(-1)
    values = torch.where(kept_k, v * competition[..., None], 0.0)
    out = linear_attention(q / incoming[..., None], k, values, normalize=False)
    return ((to_sinks * n / m).sigmoid()[..., None] * out).to(dtype)


def flows(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]
) -> tuple[Float[Tensor, "b h n"], Float[Tensor, "b h m"], Float[Tensor, "b h n"], Float[Tensor, "b h m"]]:
    """I, O, I' and O' of q, k >= 0."""
    incoming, outgoing = _flow(q, k.sum(2)), _flow(k, q.sum(2))
    to_sinks = _flow(q, (k / outgoing[..., None]).sum(2))
    return incoming, outgoing, to_sinks, _flow(k, (q / incoming[..., None]).sum(2))


def _kept(x: Tensor, keep: Tensor | None) -> Bool[Tensor, "b one n one"]:
    kept = torch.ones_like(x[:, 0, :, 0], dtype=torch.bool) if keep is None else keep
    return kept[:, None, :, None]


def _flow(x: Float[Tensor, "b h n d"], total: Float[Tensor, "b h d"]) -> Float[Tensor, "b h n"]:
    return torch.einsum("bhnd,bhd->bhn", x + EPS, total + EPS)


@dataclass(frozen=True)
class FlowState(Carried):
    """Running sums: of k, q, k / O, q / I; the log of that of exp(O'); that of k^T c v; how many tokens there were."""

    keys: RecurrentState
    queries: RecurrentState
    keys_out: RecurrentState
    queries_in: RecurrentState
    log_total: Float[Tensor, "b h"]
    values: RecurrentState
    count: int
    grid: Grid | None = None


def causal_flow_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    *,
    clamp: bool = False,
    state: FlowState | None = None,
) -> tuple[Float[Tensor, "b h n dv"], FlowState]:
    """Every sink sees the sources up to it; goes on from `state`."""
    dtype, exact = v.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(exact).sigmoid(), k.to(exact).sigmoid(), v.to(exact)
    start = 0 if state is None else state.count
    n = torch.arange(start + 1, start + q.shape[2] + 1, device=q.device, dtype=q.dtype)
    incoming, keys = _running(q, k, None if state is None else state.keys)
    outgoing, queries = _running(k, q, None if state is None else state.queries)
    incoming, outgoing = incoming / n, outgoing / n
    to_sinks, keys_out = _running(q, k / outgoing[..., None], None if state is None else state.keys_out)
    to_sources, queries_in = _running(k, q / incoming[..., None], None if state is None else state.queries_in)
    to_sources = to_sources / n
    if clamp:
        to_sources = to_sources.clamp(-1, 1)
    log_total = to_sources.logcumsumexp(-1)
    if state is not None:
        log_total = torch.logaddexp(log_total, state.log_total[..., None].to(log_total.dtype))
    competition = n * (to_sources - log_total).exp()
    out, values = recurrence(
        q / (incoming * n)[..., None], k, v * competition[..., None], state=None if state is None else state.values
    )
    after = FlowState(keys, queries, keys_out, queries_in, log_total[..., -1], values, start + q.shape[2])
    return ((to_sinks / n).sigmoid()[..., None] * out).to(dtype), after


def _running(
    x: Float[Tensor, "b h n d"], summed: Float[Tensor, "b h n d"], state: RecurrentState | None
) -> tuple[Float[Tensor, "b h n"], RecurrentState]:
    """x_i . sum_{j <= i} of what is summed: a recurrence whose values are 1."""
    flow, state = recurrence(x + EPS, summed, torch.ones_like(x[..., :1]), state=state)
    return flow[..., 0] + EPS * (x + EPS).sum(-1), state


@paper(
    system=129,
    name="Flowformer",
    family="linear",
    claim="linear attention with competition of sources and allocation of sinks, from conservation of flow",
    evidence=["tests/papers/linear/test_flowformer.py"],
    missing="copying a marked value, the loss is below that of elu + 1 without the clamp only, and no fewer sources "
    "are attended to: 28 on average over three seeds, with elu + 1 24",
)
class FlowAttention(Mixer):
    """y = W_o flow_attention(W_q x, W_k x, W_v x), over the context where there is one.

    Args:
        dim: channels of x.
        heads: a divisor of dim.
        causal: each token sees those up to it in the order of the grid; only then can it be stepped.
        clamp: whether O' is held in -1..1.
    """

    def __init__(self, dim: int, heads: int, *, causal: bool = False, clamp: bool = False):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ChronotopeError(f"FlowAttention: dim={dim} is not a multiple of heads={heads}.")
        self.dim, self.heads, self.causal, self.clamp = dim, heads, causal, clamp
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. The causal form takes no context."""
        if self.causal and context is not None:
            raise ChronotopeError("FlowAttention(causal=True) takes no context: sinks and sources run side by side.")
        source, key_grid = context if isinstance(context, tuple) else (x if context is None else context, grid)
        require_tokens(x, grid, self.dim, "x")
        require_tokens(source, key_grid, self.dim, "context")
        q, k, v = self._heads(x, source)
        out = (
            causal_flow_attention(q, k, v, clamp=self.clamp)[0]
            if self.causal
            else flow_attention(q, k, v, clamp=self.clamp)
        )
        return self.out(out.transpose(1, 2).flatten(2))

    def init_state(self, batch: int, grid: Grid) -> FlowState:
        """No flow. Raises ChronotopeError where every sink sees every source."""
        require_slice(grid)
        if not self.causal:
            raise ChronotopeError(
                "FlowAttention(causal=False) cannot be stepped: every token sees those to come. Use causal=True."
            )
        weight, size = self.q.weight, self.dim // self.heads
        dtype = torch.promote_types(weight.dtype, torch.float32)
        zero = weight.new_zeros(batch, self.heads, size, size, dtype=dtype)
        none, log_total = RecurrentState(zero[..., :1].clone()), torch.full_like(zero[..., 0, 0], -torch.inf)
        return FlowState(none, none, none, none, log_total, RecurrentState(zero), 0, grid)

    def step(self, x: Float[Tensor, "b s c"], state: FlowState) -> tuple[Float[Tensor, "b s c"], FlowState]:
        """The next slice."""
        assert state.grid is not None
        require_tokens(x, state.grid, self.dim, "x")
        out, after = causal_flow_attention(*self._heads(x, x), clamp=self.clamp, state=state)
        return self.out(out.transpose(1, 2).flatten(2)), replace(after, grid=state.grid)

    def _heads(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), *self.kv(source).chunk(2, -1)))
        return q, k, v
