"""ARFlow: softmax attention within an image, a gated linear state from image to image.

A sequence of S noisy images, the noisier first, is S chunks of n tokens. With gates g <= 0 for each head and token, and
c(i) the chunk of token i:

    out_i = softmax(q_i K_c^T / sqrt(D)) V_c  +  exp(sum of g from the chunk's first token to i) q_i S_c
    S_0 = 0,   S_{c+1} = exp(mean of g over chunk c) S_c + K_c^T V_c / sqrt(D)

so an image sees itself in both directions and those before it through a state [D, E] per head. Nothing is forgotten
inside K^T V, and the second summand is not normalised. `decay="sum"` takes the sum of g in place of the mean,
`query_decay=False` drops the factor of q, and g may have a value for each key channel. g = logsigmoid(W (x + c)) / 16,
c being the condition (time and class) of the image.

The flow model around it is in `arflow_flow.py`: in training the S images are different ones of a class at times
t_1 <= ... <= t_S; in sampling every step is the next chunk, and what is kept from step to step is the state.

Sizes: q, k [B, H, N, D], v [B, H, N, E], g [B, H, N] or [B, H, N, D] on a grid whose first axis counts the chunks,
N = S n; work O(N n (D + E) + N D E); state [B, H, D, E]. Published: width 1152, 28 layers, 16 heads, patches of 2,
S = 5, 250 steps.

    >>> layer = HybridAttention(64, 4)
    >>> layer(torch.randn(2, 5 * 8 * 8, 64), Grid(t=5, h=8, w=8)).shape
    torch.Size([2, 320, 64])

Left out: the learned variance (the released code predicts it and drops it), classifier-free guidance (ask twice, with
the label `classes` for none), the latent autoencoder, ImageNet. The gate's mean from chunk to chunk beside its running
sum inside a chunk, and RMS norms of q, k, v over all heads together, are as in the released code (TheFllood/ARFlow).

Paper: Hui et al. 2025, "ARFlow: Autoregressive Flow with Hybrid Linear Attention", arXiv 2501.16085.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Mixer
from chronotope.nn.mixer import Context, require_slice, require_tokens
from chronotope.papers.registry import paper
from chronotope.patterns import along
from chronotope.recurrences import RecurrentState
from chronotope.recurrences.scans import linear_recurrence

DECAYS = ("mean", "sum")


def chunk_hybrid(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    gate: Float[Tensor, "b h n"] | Float[Tensor, "b h n d"],
    *,
    grid: Grid,
    state: RecurrentState | None = None,
    decay: str = "mean",
    query_decay: bool = True,
) -> tuple[Float[Tensor, "b h n e"], RecurrentState]:
    """Attention within the chunks, which are the slices of the grid's first axis, and the state between them.

    Returns the output and the state after the last chunk, float32 (float64 for float64 inputs).
    """
    if len(grid.axes) < 2 or grid.prefix or decay not in DECAYS:
        raise ChronotopeError(
            f"chunk_hybrid on {grid!r} with decay={decay!r}: expected an axis of chunks, axes within a chunk, no "
            f"prefix, and one of {', '.join(DECAYS)}."
        )
    within = attention(q, k, v, grid=grid, where=along(*grid.axes[1:]))
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.to(dtype).unflatten(2, (grid.shape[0], -1)) for x in (q, k, v))
    gates = (gate if gate.ndim == 4 else gate[..., None]).to(dtype).unflatten(2, (grid.shape[0], -1))
    written = (keys * q.shape[3] ** -0.5).transpose(-1, -2) @ values
    before = torch.zeros_like(written[:, :, 0]) if state is None else state.memory.to(dtype)
    keep = (gates.mean(3) if decay == "mean" else gates.sum(3)).exp()[..., None]
    after = linear_recurrence(keep, written, before, dim=2)
    seen = torch.cat((before[:, :, None], after[:, :, :-1]), 2)
    read = queries * gates.cumsum(3).exp() if query_decay else queries
    return within + (read @ seen).flatten(2, 3).to(within.dtype), RecurrentState(after[:, :, -1].clone())


@dataclass(frozen=True)
class HybridState(Carried):
    """What the images so far have written. grid: one image."""

    past: RecurrentState
    grid: Grid


@paper(
    system=166,
    name="ARFlow",
    family="linear",
    claim="a flow over a sequence of noisy images: softmax within an image, a gated linear state of constant size "
    "between images",
    evidence=["tests/papers/linear/test_arflow.py"],
)
class HybridAttention(Mixer):
    """y = W_o (silu(W_g x) * norm(chunk_hybrid(norm(W_q x), norm(W_k x), norm(W_v x), g))); slices are chunks.

    `context` [B, N, C], or [B, S, C] with one vector for each of the S slices, is the condition added to x in the gate
    g = logsigmoid(W (x + context)) / 16. decay, query_decay: as for `chunk_hybrid`.
    """

    TEMPERATURE = 16

    def __init__(self, dim: int, heads: int, decay: str = "mean", query_decay: bool = True):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ChronotopeError(f"HybridAttention: dim={dim} is not a multiple of heads={heads}.")
        self.dim, self.heads, self.decay, self.query_decay = dim, heads, decay, query_decay
        self.qkv, self.swish = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate, self.out = nn.Linear(dim, heads, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All images at once."""
        require_tokens(x, grid, self.dim, "x")
        return self._mix(x, grid, context, None)[0]

    def init_state(self, batch: int, grid: Grid) -> HybridState:
        """Nothing written."""
        require_slice(grid)
        weight, size = self.out.weight, self.dim // self.heads
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return HybridState(RecurrentState(weight.new_zeros(batch, self.heads, size, size, dtype=dtype)), grid)

    def step(
        self, x: Float[Tensor, "b s c"], state: HybridState, context: Tensor | None = None
    ) -> tuple[Float[Tensor, "b s c"], HybridState]:
        """The next image."""
        require_tokens(x, state.grid, self.dim, "x")
        y, past = self._mix(x, state.grid, context, state.past)
        return y, HybridState(past, state.grid)

    def _mix(
        self, x: Tensor, grid: Grid, context: Context | None, past: RecurrentState | None
    ) -> tuple[Tensor, RecurrentState]:
        if isinstance(context, tuple):
            raise ChronotopeError(
                "HybridAttention: context is the condition of x's own tokens; give it without a grid."
            )
        steered = x if context is None else x + context.repeat_interleave(x.shape[1] // context.shape[1], 1)
        q, k, v = (
            F.rms_norm(part, (self.dim,), eps=1e-6).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        gate = F.logsigmoid(self.gate(steered)).transpose(1, 2) / self.TEMPERATURE
        out, past = chunk_hybrid(
            q, k, v, gate, grid=grid, state=past, decay=self.decay, query_decay=self.query_decay
        )  # fmt: skip
        out = F.rms_norm(out, out.shape[-1:], eps=1e-6).transpose(1, 2).flatten(2)
        return self.out(F.silu(self.swish(x)) * out), past
