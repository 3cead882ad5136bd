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
from chronotope.recurrences.features import FeatureMap, Position, Random

SPLIT = 2
"""Columns of the map that the last convolution makes of one column."""
INNER = 2 * SPLIT
"""Channels of the convolutions for each head: two signs of each of the columns."""
NOISE = 0.1
"""The part of torch's random weights that is kept where the network begins as a known map."""
LEAST = 1e-3
"""What is added to each feature, so that no query is without keys."""
REACH = 4
"""Rows before a row that one causal convolution sees: 3 taps, 2 rows apart."""


@dataclass(frozen=True)
class EstimatorState(Carried):
    """The sums of the Performer, and the last rows that went into each convolution, zeros where there were none."""

    past: RecurrentState
    tails: tuple[Float[Tensor, "b c rows width"], ...]
    time: int


class RandomRelu(FeatureMap):
    """phi(x) = relu(W x / D^(1/4)) + 0.001: the generalised attention of Performers, with the W of `Random`.

    phi(q) . phi(k) estimates |q| |k| times a function of their angle, and its error does not grow as exp(|q|^2) does.
    """

    weight: Tensor

    def __init__(self, d: int, features: int, seed: int = 0):
        super().__init__()
        self.register_buffer("weight", Random(d, features, seed).weight)

    def forward(self, x: Float[Tensor, "b h n d"], position: Position = None) -> Float[Tensor, "b h n f"]:
        """Positive features."""
        return F.relu(x / x.shape[-1] ** 0.25 @ self.weight.to(x.dtype).T) + LEAST

    def size(self, d: int) -> int:
        """The number of rows of W."""
        return len(self.weight)


KERNELS = {"relu": RandomRelu, "exp": Random}


class Estimator(nn.Module):
    """Logits [B, H, N, w] and two scalars [B, H, N, 2] for each query.

    Args:
        heads, head_dim: H and D.
        width: w, an even number.
        length: tokens of the longest sequence where attention is causal; None: it is not.
        seed: of the random features, D log D of them.
        code: channels of the code of place, which are hats where attention is not causal; None: D.
        kernel: of the Performer, "relu" or "exp".
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        width: int,
        length: int | None,
        seed: int = 0,
        code: int | None = None,
        kernel: str = "relu",
    ):
        super().__init__()
        if width < SPLIT or width % SPLIT:
            raise ChronotopeError(f"SEA: width={width} is not a multiple of {SPLIT}.")
        if kernel not in KERNELS:
            raise ChronotopeError(f"SEA: kernel={kernel!r}: expected one of {', '.join(KERNELS)}.")
        if code is not None and code < 1:
            raise ChronotopeError(f"SEA: code={code}: expected at least 1 channel, or None.")
        d, columns, channels = head_dim, width // SPLIT, INNER * heads
        self.heads, self.head_dim, self.length, self.columns = heads, d, length, columns
        self.code = d if code is None else code
        self.features = KERNELS[kernel](d, max(1, int(d * math.log(d))), seed)
        self.place = None if length is None else nn.Parameter(torch.randn(length, self.code))
        hidden = 2 * self.code
        first = nn.Linear(self.code + 2 * d, hidden)
        self.encode = nn.Sequential(first, nn.LayerNorm(hidden), nn.GELU())
        self.scales = nn.Linear(hidden, 2)
        self.rows = nn.Linear(hidden, INNER * columns)
        causal = length is not None
        self.enter, self.leave = (nn.LayerNorm(size) if causal else nn.Identity() for size in (columns, width))
        step = REACH // 2 if causal else 1
        convolutions = [nn.Conv2d(channels, channels, 3, dilation=step) for _ in range(2)]
        self.convolutions = nn.ModuleList(convolutions)
        self.spread = nn.Conv2d(channels, SPLIT * heads, 1)
        if not causal:
            self._begin_at_the_context(first, convolutions)

    @torch.no_grad()
    def _begin_at_the_context(self, first: nn.Linear, convolutions: list[nn.Conv2d]) -> None:
        """The first map is the context of the code of place, stretched to w cells, and a little noise.

        A sign and its opposite pass gelu and relu, gelu(x) - gelu(-x) = x and relu(x) - relu(-x) = x. From weights that
        are noise alone the network has to learn anew for each cell which place it stands for.
        """
        layers: list[nn.Linear | nn.Conv2d] = [first, self.rows, *convolutions, self.spread]
        for layer in layers:
            layer.weight.mul_(NOISE)
            if layer.bias is not None:
                layer.bias.zero_()
        code, eye = self.code, torch.eye(self.code)
        first.weight[:, :code] += torch.cat((eye, -eye))
        cells = hats(torch.linspace(0, code - 1, SPLIT * self.columns), code)
        # Channels are the even and the odd cells, and then the same with the other sign.
        cells = cells.unflatten(0, (self.columns, SPLIT)).transpose(0, 1).flatten(0, 1)
        cells = torch.cat((cells, -cells))
        self.rows.weight += torch.cat((cells, -cells), 1)
        for convolution in convolutions:
            convolution.weight[:, :, 1, 1] += torch.eye(INNER * self.heads)
        ones = torch.eye(SPLIT * self.heads).unflatten(1, (self.heads, SPLIT))
        self.spread.weight[:, :, 0, 0] += torch.cat((ones, -ones), 2).flatten(1)

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
        seen = self.features(q), self.features(k), torch.cat((code.expand(*v.shape[:3], self.code).to(v), v), -1)
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
        weight, d = self.rows.weight, self.head_dim
        dtype = torch.promote_types(weight.dtype, torch.float32)
        memory = weight.new_zeros(batch, self.heads, self.features.size(d), self.code + d, dtype=dtype)
        rows = REACH if self.length is not None else 1
        tail = weight.new_zeros(batch, INNER * self.heads, rows, self.columns)
        return EstimatorState(RecurrentState(memory, memory[..., 0].clone()), (tail, tail), 0)

    def _convolve(self, convolution: nn.Module, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """relu of a convolution over the rows before, or on both sides where attention is not causal."""
        side = 1 if self.length is None else REACH // 2
        given = torch.cat((tail.to(x), x), 2)
        out = convolution(F.pad(given, (side, side, 0, 1 if self.length is None else 0)))
        return out.relu(), given[:, :, given.shape[2] - tail.shape[2] :].clone()

    def _places(self, v: Tensor, lengths: Tensor | None, time: int) -> Float[Tensor, "some 1 n code"]:
        """The code of each place."""
        n = v.shape[2]
        if self.place is not None:
            if time + n > len(self.place):
                raise ChronotopeError(f"SEA: token {time + n} of at most length={len(self.place)}; give a larger one.")
            return self.place[time : time + n][None, None]
        ends = torch.full((1,), n, device=v.device) if lengths is None else lengths
        at = torch.arange(n, device=v.device) * ((self.code - 1) / (ends[:, None] - 1).clamp(min=1))
        # Times their number: attention to all tokens alike then gives about 1 in each channel, however many there are.
        return self.code * hats(at, self.code)[:, None]


def hats(at: Float[Tensor, "*places"], code: int) -> Float[Tensor, "*places code"]:
    """The identity of size `code`, its rows sampled at places between 0 and code - 1."""
    return (1 - (at[..., None] - torch.arange(code, device=at.device)).abs()).clamp(min=0)
