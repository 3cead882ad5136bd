"""LightNet: linear attention whose decay is additive, so that one pass over the cells of any grid is enough.

    z_t = log(exp(z_{t-1}) + exp(k_t)),  S_t = exp(z_{t-1} - z_t) S_{t-1} + exp(k_t - z_t)^T v_t,  o_t = q_t S_t

channel by channel of k: a key's weight is its share of the sum so far, S_t = softmax_{s <= t}(k)^T V. That is
`ct.recurrence` with the decay z_{t-1} - z_t. Over all tokens, o = q (softmax(k)^T V): the order of the cells does not
matter, and no scan from several corners is needed.

    y = W_o (RMSNorm(o) * silu(U_2 U_1 x)),    q = silu(W_q x)

MD-LRPE gives each of m axes 1/m of a head's channels and turns pair i of n of head h of H by the angle
x * base^(-(h + i / n) / H) at coordinate x. Keys are turned after they are weighed. The two channels of a pair decay
differently, so the causal form turns pairs (c, 0) instead, [c cos, c sin]: a channel twice, with one decay.

Sizes: q, k [B, H, N, D], v [B, H, N, Dv]; a state of S [B, H, D, Dv] and z [B, H, D]; O(N D Dv) work.

    >>> layer = LightNet(64, 4, axes=("h", "w"))
    >>> layer(torch.randn(1, 16 * 16, 64), Grid(h=16, w=16)).shape
    torch.Size([1, 256, 64])

Left out: MD-TPE, a second code at the bottom of the network, the sum over the axes of a decayed recurrence along each;
the short convolutions that a maintained re-implementation may put on q, k and v. Code of the first author starts from
z_0 = 0, one more token of weight 1 that holds nothing; here nothing came before, z_0 = -inf, and weights add up to 1.

Paper: Qin et al. 2024, "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
arXiv 2405.21022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens
from chronotope.papers.registry import paper
from chronotope.position import Rope
from chronotope.recurrences import RecurrentState, linear_attention, recurrence

NOTHING = -1e30
"""A key of no weight. Finite, so that the difference of two of them is 0 and not NaN."""


@dataclass(frozen=True)
class AdditiveState(Carried):
    """S_t, and z_t in float64."""

    past: RecurrentState
    total: Float[Tensor, "b h d"]


def additive_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    *,
    turn: Callable[[Tensor], Tensor] | None = None,
    state: AdditiveState | None = None,
    keep: Bool[Tensor, "b n"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "b h n dv"], AdditiveState]:
    """o_t = q_t softmax_{s <= t}(k)^T V.

    Args:
        q, k, v: queries, keys before the softmax, values.
        turn: a position code on queries and weighed keys, [.., D] -> [.., D], or [.., 2 D] with each channel twice.
        state: what a former call returned; None: nothing came before.
        keep: False leaves a key out.
        chunk: as for `ct.recurrence`.
    """
    scores, v = _masked(k, v, keep)
    # In float64: z grows by 1 / t, which float32 loses in long sequences.
    begin = torch.full_like(scores[:, :, :1], NOTHING) if state is None else state.total[:, :, None]
    total = torch.cat((begin, scores), 2).logcumsumexp(2)
    weight = (scores - total[:, :, 1:]).exp().to(k.dtype)
    decay = (total[:, :, :-1] - total[:, :, 1:]).clamp(max=0).to(torch.promote_types(k.dtype, torch.float32))
    if turn is not None:
        q, weight = turn(q), turn(weight)
        decay = decay.repeat(1, 1, 1, q.shape[-1] // k.shape[-1])
    out, past = recurrence(q, weight, v, decay=decay, state=None if state is None else state.past, chunk=chunk)
    return out, AdditiveState(past, total[:, :, -1])


def shared_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    *,
    turn: Callable[[Tensor], Tensor] | None = None,
    keep: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h n dv"]:
    """o = q softmax(k)^T V, the softmax over all tokens, channel by channel."""
    scores, v = _masked(k, v, keep)
    weight = scores.softmax(2).to(k.dtype)
    if turn is not None:
        q, weight = turn(q), turn(weight)
    return linear_attention(q, weight, v, normalize=False)


def _masked(k: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys in float64 and values, of what is left out without weight."""
    scores = k.double()
    if keep is None:
        return scores, v
    keep = keep[:, None, :, None]
    return torch.where(keep, scores, NOTHING), torch.where(keep, v, 0.0)


class MdLrpe:
    """x turned by the angles of the axes, each head at a speed of its own.

    Args:
        axes: names of the axes.
        heads, size: heads, and channels of one.
        base: of the angles.
        double: [x cos, x sin], 2 D channels; else pairs of channels are turned.
    """

    def __init__(self, axes: tuple[str, ...], heads: int, size: int, base: float | int = 10000.0, double: bool = False):
        pairs, count = size if double else size // 2, len(axes)
        if pairs < count:
            raise ChronotopeError(f"MD-LRPE: heads of {size} channels have {pairs} pairs for {count} axes {axes!r}.")
        self.heads, self.base, self.double = heads, float(base), double
        share = {axis: (pairs // count + (i < pairs % count)) / pairs for i, axis in enumerate(axes)}
        self.rope = Rope(axes, self.base ** (1 / heads), share)

    def __call__(self, x: Float[Tensor, "b h n d"], grid: Grid, time: int = 0) -> Float[Tensor, "b h n f"]:
        """x turned; `time` is the place of the first slice on the first axis."""
        places = self.rope.coords(grid, device=x.device)
        first = grid.axes[0]
        if time and first in self.rope.axes:
            places[:, self.rope.axes.index(first)] += time
        speed = self.base ** (-torch.arange(self.heads, dtype=places.dtype, device=x.device) / self.heads)
        x = torch.cat((x, torch.zeros_like(x)), -1) if self.double else x
        # Heads go where Rope has the batch, which may have places of its own.
        return self.rope(x.transpose(0, 1), grid, coords=speed[:, None, None] * places).transpose(0, 1)


@dataclass(frozen=True)
class LightNetState(Carried):
    """What the slices so far have written. `time`: how many there were; `grid`: of one."""

    past: AdditiveState
    time: int
    grid: Grid


@paper(
    system=86,
    name="LightNet",
    family="linear",
    claim="linear attention with an additive decay: any grid in one scan, a key's weight being its share of the sum",
    evidence=["tests/papers/linear/test_lightnet.py"],
)
class LightNet(Mixer):
    """y = W_o (RMSNorm(o) * silu(U_2 U_1 x)), o the additive attention of silu(W_q x), W_k x, W_v x.

    Args:
        dim: channels of x.
        heads: heads, dividing dim.
        causal: tokens see those before them in grid order, and the layer streams; else all see all.
        axes: those of the position code MD-LRPE; empty: none.
        rank: channels between the two matrices of the gate; default dim / heads.
        base: of the angles.
        chunk: as for `ct.recurrence`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        axes: tuple[str, ...] = (),
        rank: int | None = None,
        base: float | int = 10000.0,
        chunk: int | None = None,
    ):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ChronotopeError(f"LightNet: dim={dim} is not a multiple of heads={heads}; give other sizes.")
        self.dim, self.heads, self.causal, self.chunk = dim, heads, causal, chunk
        self.position = MdLrpe(axes, heads, dim // heads, base, double=causal) if axes else None
        rank = dim // heads if rank is None else rank
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.gate = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False), nn.SiLU())
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("LightNet takes no context: its keys are the tokens themselves.")
        require_tokens(x, grid, self.dim, "x")
        q, k, v = self._project(x)
        if self.causal:
            return self._leave(x, additive_attention(q, k, v, turn=self._turn(grid), chunk=self.chunk)[0])
        return self._leave(x, shared_attention(q, k, v, turn=self._turn(grid)))

    def init_state(self, batch: int, grid: Grid) -> LightNetState:
        """Nothing written. Raises ChronotopeError where tokens see later ones."""
        require_slice(grid)
        if not self.causal:
            raise ChronotopeError("LightNet(causal=False) cannot be stepped: tokens see later slices.")
        weight, size = self.out.weight, self.dim // self.heads
        total = weight.new_full((batch, self.heads, size), NOTHING, dtype=torch.float64)
        features = size if self.position is None else 2 * size
        dtype = torch.promote_types(weight.dtype, torch.float32)
        memory = weight.new_zeros(batch, self.heads, features, size, dtype=dtype)
        return LightNetState(AdditiveState(RecurrentState(memory), total), 0, grid)

    def step(self, x: Float[Tensor, "b s c"], state: LightNetState) -> tuple[Float[Tensor, "b s c"], LightNetState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        turn = self._turn(state.grid, state.time)
        out, past = additive_attention(*self._project(x), turn=turn, state=state.past, chunk=self.chunk)
        return self._leave(x, out), replace(state, past=past, time=state.time + 1)

    def _turn(self, grid: Grid, time: int = 0) -> Callable[[Tensor], Tensor] | None:
        position = self.position
        return None if position is None else lambda x: position(x, grid, time)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        return F.silu(q), k, v

    def _leave(self, x: Tensor, out: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
        return self.out(self.norm(out.transpose(1, 2).flatten(2)) * self.gate(x))  # type: ignore[no-any-return]
