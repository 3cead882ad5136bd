"""SEA: a small network draws the attention map in linear time; exact attention looks where the map is bright.

    c_i = Performer(q, k, [p ; v])_i,   t_i = gelu(norm(W [c_i ; v_i])),   e = CNN(W_r t)     [N, w] for each head
    softmax(e_i): the map estimated, cell m standing for the keys j of the T_i that i may see with
        floor((j + 1/2) w / T_i) = m
    keys_i: those of the best cells of all H heads of query i together, until they hold k H keys
    y_i = s1_i s0_i softmax(q_i K^T / sqrt(D) over keys_i) V + (1 - s1_i) v_avg,   [s0_i, s1_i] = sigmoid(W_s t_i)

p_j is a code of place, E numbers: hats over the sequence, or learned vectors where attention is causal. v_avg: the mean
of the values so far; not causal: the mean by the map's column means. Distilled from a teacher's maps and outputs
(`distil`).

Sizes: x [B, N, C]; work O(N (E (w + E) + k D + features (D + E))); a map of N x N exists in the distillation alone.

    >>> layer = SEA(64, 4, width=32, keep=8, causal=True)
    >>> grid = ct.Grid(n=100)
    >>> x = torch.randn(2, 100, 64)
    >>> layer(x, grid).shape, layer.look(x, grid).logits.shape
    (torch.Size([2, 100, 64]), torch.Size([2, 4, 100, 32]))

Left out: LoRA on q, k and v (they may simply learn); perplexity and memory of OPT-1.3B are not shown. Cells differ by
one key in size where T_i / w is no integer: they are taken until half a cell is lacking, which is the authors' number
round(H k w / T_i) where it is one; cells without keys (T_i < w) do not compete. A cell is the least that is kept, so
that keys grow with T beyond T = H k w. The authors' CNN has w / 2 columns and 4 channels for each head (causal: w / 4
and 2) and is stretched to w; here its last convolution has a channel for each column. Not causal, they halve its rows.

Not as the authors, and needed to find sharp keys in a few hundred steps (numbers: the test of the distillation):
- `code`: theirs is D; the context tells no more than E places apart, so that E = w sees single cells.
- `kernel`: theirs is "relu" where causal and "exp" where not. The error of exp features grows as exp(|q|^2).
- Not causal, hats are E times as high, and the first map is the context of the code, stretched, and a little noise.

Paper: Lee et al. 2023, "SEA: Sparse Linear Attention with Estimated Attention Mask", arXiv 2310.01777 (ICLR 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens
from chronotope.papers.registry import paper
from chronotope.papers.routing.sea_estimator import Estimator, EstimatorState
from chronotope.position import Rope
from chronotope.routing.cells import expand, keep_cells, keys_of
from chronotope.routing.gathered import gathered

UNSEEN = -1e9
"""The score of a key that is not visible: products with a weight of 0 are 0."""


class Look(NamedTuple):
    """What a layer saw: outputs of the heads, logits of the estimated map, and the keys looked at (-1: none)."""

    out: Float[Tensor, "b h n d"]
    logits: Float[Tensor, "b h n width"]
    keys: Int64[Tensor, "b h n most"]
    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b h nk d"]
    visible: Int64[Tensor, "some n"]


@dataclass(frozen=True)
class SeaState(Carried):
    """What the estimator carries, the sum of all values, and keys and values so far, [B, H, time * slice, D]."""

    past: EstimatorState
    total: Float[Tensor, "b h d"]
    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n d"]
    time: int
    grid: Grid


@paper(
    system=79,
    name="SEA",
    family="routing",
    claim="a linear estimate of the attention map picks the keys of exact sparse attention, distilled from a teacher",
    evidence=["tests/papers/routing/test_sea.py", "tests/papers/routing/test_sea_distilled.py"],
    missing="the toy distillation agrees with its teacher (top 8: 0.75, 0.70) and beats the Performer at one rate of "
    "the teacher's weights only, one seed; not shown where causal",
)
class SEA(Mixer):
    """y = W_o [s1 s0 sparse(q, k, v) + (1 - s1) v_avg].

    Args:
        dim, heads: channels and heads; `qkv` and `out` have the shapes of those of `ct.nn.Attention(dim, heads)`.
        width: cells of the map, an even number.
        keep: keys of each query and head in the mean.
        causal: whether tokens see those before them only, in the order of the grid.
        together: whose cells compete, see `keep_cells`; causal: "query" or "heads".
        length: tokens of the longest sequence, where causal.
        position: a `ct.Rope` on q and k, or None.
        seed: of the Performer's features.
        code: E, the channels of the code of place; None: D.
        kernel: features of the Performer, "relu" or "exp".
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        width: int = 128,
        keep: int = 64,
        causal: bool = False,
        together: str = "heads",
        length: int = 2048,
        position: Rope | None = None,
        seed: int = 0,
        code: int | None = None,
        kernel: str = "relu",
    ):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ChronotopeError(f"SEA: dim={dim} is not a multiple of heads={heads}.")
        if causal and together not in ("query", "heads"):
            raise ChronotopeError(f"SEA: together={together!r} lets later queries take the keys of earlier ones.")
        self.dim, self.heads, self.keep, self.causal, self.together = dim, heads, keep, causal, together
        self.position = position
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.estimate = Estimator(heads, dim // heads, width, length if causal else None, seed, code, kernel)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("SEA takes no context: its estimator reads queries and keys of one sequence.")
        return self.out(self.look(x, grid).out.transpose(1, 2).flatten(2))

    def look(self, x: Float[Tensor, "b n c"], grid: Grid, lengths: Int64[Tensor, "b"] | None = None) -> Look:
        """Outputs of the heads and how they came about. lengths: real tokens of each sequence, where not causal."""
        require_tokens(x, grid, self.dim, "x")
        q, k, v = self._project(x, grid, 0)
        n = grid.size
        if self.causal:
            if lengths is not None:
                raise ChronotopeError("SEA: causal attention never sees the padding behind a sequence; no lengths.")
            logits, scales, _ = self.estimate(q, k, v)
            visible = torch.arange(1, n + 1, device=x.device)[None]
            mean = v.cumsum(2) / visible[..., None].to(v)
        else:
            logits, scales, _ = self.estimate(q, k, v, lengths=lengths)
            full = torch.full((1,), n, device=x.device) if lengths is None else lengths
            visible = full[:, None].expand(-1, n)
            real = (torch.arange(n, device=x.device) < full[:, None])[:, None, :, None]
            v = torch.where(real, v, 0.0)
            columns = torch.where(real, logits.softmax(-1), 0.0).sum(2, keepdim=True)
            weights = expand(columns, visible[:, :1], n, 0.0)
            mean = weights / weights.sum(-1, keepdim=True) @ v
        index = keys_of(keep_cells(logits.log_softmax(-1), visible, self.keep, self.together), visible)
        return Look(self._mix(q, k, v, index, scales, mean), logits, index, q, k, visible)

    def distil(
        self, look: Look, truth: Float[Tensor, "b h n nk"], out: Float[Tensor, "b h n d"] | None = None
    ) -> Float[Tensor, ""]:
        """0.1 KL + MSE of the estimated map and of the layer's own dense map, to the teacher's, + MSE of outputs.

        KL is the mean over queries and heads where causal, else the mean over queries of its sum over heads, as theirs.
        """
        keys, part = truth.shape[3], 0.1 if self.causal else 0.1 * self.heads
        estimated = expand(look.logits, look.visible, keys, UNSEEN)
        own = look.q @ look.k.transpose(-1, -2) / math.sqrt(look.q.shape[3])
        own = own.masked_fill(torch.arange(keys, device=own.device) >= look.visible[:, None, :, None], UNSEEN)
        loss = look.out.new_zeros(()) if out is None else F.mse_loss(look.out, out)
        for scores in (estimated, own):
            log = scores.log_softmax(-1)
            loss = loss + part * F.kl_div(log.flatten(0, 2), truth.flatten(0, 2), reduction="batchmean")
            loss = loss + F.mse_loss(log.exp(), truth)
        return loss

    def init_state(self, batch: int, grid: Grid) -> SeaState:
        """Nothing seen. Raises ChronotopeError unless causal."""
        require_slice(grid)
        if not self.causal:
            raise ChronotopeError("SEA cannot be stepped: with causal=False every token looks ahead.")
        empty = self.qkv.weight.new_zeros(batch, self.heads, 0, self.dim // self.heads)
        return SeaState(self.estimate.init_state(batch), empty.sum(2), empty, empty, 0, grid)

    def step(self, x: Float[Tensor, "b s c"], state: SeaState) -> tuple[Float[Tensor, "b s c"], SeaState]:
        """The next slice; its tokens see those before them."""
        require_tokens(x, state.grid, self.dim, "x")
        q, k, v = self._project(x, state.grid, state.time)
        logits, scales, past = self.estimate(q, k, v, state.past)
        visible = torch.arange(1, q.shape[2] + 1, device=x.device)[None] + state.k.shape[2]
        total = state.total[:, :, None] + v.cumsum(2)
        keys, values = torch.cat((state.k, k), 2), torch.cat((state.v, v), 2)
        index = keys_of(keep_cells(logits.log_softmax(-1), visible, self.keep, self.together), visible)
        out = self._mix(q, keys, values, index, scales, total / visible[..., None].to(v))
        state = replace(state, past=past, total=total[:, :, -1], k=keys, v=values, time=state.time + 1)
        return self.out(out.transpose(1, 2).flatten(2)), state

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, index: Tensor, scales: Tensor, mean: Tensor) -> Tensor:
        row, whole = scales.sigmoid().split(1, -1)
        return whole * row * gathered(q, k, v, index)[0] + (1 - whole) * mean

    def _project(self, x: Tensor, grid: Grid, time: int) -> tuple[Tensor, Tensor, Tensor]:
        qk, v = self.qkv(x).unflatten(2, (3 * self.heads, -1)).transpose(1, 2).tensor_split((2 * self.heads,), 1)
        if self.position is not None:
            streams = time > 0 and grid.axes[0] in self.position.axes
            qk = self.position(qk, grid, offset={grid.axes[0]: time} if streams else None)
        q, k = qk.chunk(2, 1)
        return q, k, v
