"""The network of SEA that draws attention maps of a fixed width, in linear time; see `sea`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.recurrences import RecurrentState, linear_attention, recurrence
from chronotope.recurrences.features import Random

SPLIT = 2
"""Columns of the map that the last convolution makes of one column."""
INNER = 4
"""Channels of the convolutions for each head."""
REACH = 4
"""Rows before a row that one causal convolution sees: 3 taps, 2 rows apart."""


@dataclass(frozen=True)
class EstimatorState(Carried):
    """The sums of the Performer, and the last rows that went into each convolution, zeros where there were none."""

    past: RecurrentState
    tails: tuple[Float[Tensor, "b c rows width"], ...]
    time: int


class Estimator(nn.Module):
    """Logits [B, H, N, w] and two scalars [B, H, N, 2] for each query.

    Args:
        heads, head_dim: H and D.
        width: w, an even number.
        length: tokens of the longest sequence where attention is causal; None: it is not.
        seed: of the random features, D log D of them.
    """

    def __init__(self, heads: int, head_dim: int, width: int, length: int | None, seed: int = 0):
        super().__init__()
        if width < SPLIT or width % SPLIT:
            raise ChronotopeError(f"SEA: width={width} is not a multiple of {SPLIT}.")
        d, columns, channels = head_dim, width // SPLIT, INNER * heads
        self.heads, self.length, self.columns = heads, length, columns
        self.features = Random(d, max(1, int(d * math.log(d))), seed)
        self.place = None if length is None else nn.Parameter(torch.randn(length, d))
        self.encode = nn.Sequential(nn.Linear(3 * d, 2 * d), nn.LayerNorm(2 * d), nn.GELU())
        self.scales = nn.Linear(2 * d, 2)
        self.rows = nn.Linear(2 * d, INNER * columns)
        self.enter, self.leave = nn.LayerNorm(columns), nn.LayerNorm(width)
        step = 1 if length is None else REACH // 2
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, dilation=step) for _ in range(2))
        self.spread = nn.Conv2d(channels, SPLIT * heads, 1)

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        state: EstimatorState | None = None,
        lengths: Int64[Tensor, "b"] | None = None,
    ) -> tuple[Float[Tensor, "b h n width"], Float[Tensor, "b h n two"], EstimatorState]:
        """state: what came before, where causal. lengths: real tokens of each sequence, where not."""
        n = q.shape[2]
        state = self.init_state(len(q)) if state is None else state
        real = None if lengths is None else torch.arange(n, device=q.device) < lengths[:, None]
        code = self._places(v, lengths, state.time)
        seen = self.features(q), self.features(k), torch.cat((code.expand(v.shape).to(v), v), -1)
        past = state.past
        if self.length is None:
            context = linear_attention(*seen, keep=real)
        else:
            context, past = recurrence(*seen, normalize=True, state=past)
        found = self.encode(torch.cat((context, v), -1))
        # Rows are queries, columns are parts of the sequence, channels are heads.
        x = self.enter(self.rows(found).unflatten(3, (INNER, self.columns))).transpose(2, 3).flatten(1, 2)
        tails = []
        for convolution, tail in zip(self.convolutions, state.tails, strict=True):
            x, tail = self._convolve(convolution, x if real is None else x * real[:, None, :, None], tail)
            tails.append(tail)
        x = self.spread(x).unflatten(1, (self.heads, SPLIT)).movedim(2, -1).flatten(3)
        return self.leave(x), self.scales(found), EstimatorState(past, tuple(tails), state.time + n)

    def init_state(self, batch: int) -> EstimatorState:
        """Nothing seen."""
        weight = self.rows.weight
        d = weight.shape[1] // 2
        dtype = torch.promote_types(weight.dtype, torch.float32)
        memory = weight.new_zeros(batch, self.heads, self.features.size(d), 2 * d, dtype=dtype)
        rows = REACH if self.length is not None else 1
        tail = weight.new_zeros(batch, INNER * self.heads, rows, self.columns)
        return EstimatorState(RecurrentState(memory, memory[..., 0].clone()), (tail, tail), 0)

    def _convolve(self, convolution: nn.Module, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """relu of a convolution over the rows before, or on both sides where attention is not causal."""
        side = 1 if self.length is None else REACH // 2
        given = torch.cat((tail.to(x), x), 2)
        out = convolution(F.pad(given, (side, side, 0, 1 if self.length is None else 0)))
        return out.relu(), given[:, :, given.shape[2] - tail.shape[2] :].clone()

    def _places(self, v: Tensor, lengths: Tensor | None, time: int) -> Float[Tensor, "some 1 n d"]:
        """The code of each place."""
        n, d = v.shape[2:]
        if self.place is not None:
            if time + n > len(self.place):
                raise ChronotopeError(f"SEA: token {time + n} of at most length={len(self.place)}; give a larger one.")
            return self.place[time : time + n][None, None]
        ends = torch.full((1,), n, device=v.device) if lengths is None else lengths
        at = torch.arange(n, device=v.device) * ((d - 1) / (ends[:, None] - 1).clamp(min=1))
        return (1 - (at[..., None] - torch.arange(d, device=v.device)).abs()).clamp(min=0)[:, None]
