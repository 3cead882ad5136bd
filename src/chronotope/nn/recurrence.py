"""A recurrence as a layer: projections, feature map, decay, delta rule; at once or slice by slice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens
from chronotope.recurrences import RecurrentState, recurrence
from chronotope.recurrences.features import FeatureMap, Identity

PER = ("head", "token", "channel")


class Decay(nn.Module):
    """Log-decays <= 0, learned.

    per "head": -exp(a), one number for each head, from slow to fast; "token": logsigmoid(W x + b) / 16 for each head;
    "channel": the same for each key channel (Yang et al. 2024, Gated Linear Attention, arXiv 2312.06635).
    """

    TEMPERATURE = 16

    def __init__(self, dim: int, heads: int, per: str = "token", head_dim: int | None = None):
        super().__init__()
        if per not in PER:
            raise ChronotopeError(f"Decay(per={per!r}): one of {', '.join(PER)}.")
        self.per, self.heads = per, heads
        if per == "head":
            # Half of what is written is left after 2^1 to 2^8 tokens.
            self.rate = nn.Parameter((torch.tensor(2.0).log() * 2 ** -torch.linspace(1, 8, heads)).log())
        else:
            size = heads if per == "token" else heads * (dim // heads if head_dim is None else head_dim)
            self.gate = nn.Linear(dim, size)

    def forward(
        self, x: Float[Tensor, "b n c"]
    ) -> Float[Tensor, "h"] | Float[Tensor, "b h n"] | Float[Tensor, "b h n d"]:
        """The decay of every token, in a form that `ct.recurrence` takes."""
        if self.per == "head":
            return -self.rate.exp()
        decay = F.logsigmoid(self.gate(x)) / self.TEMPERATURE
        if self.per == "token":
            return decay.transpose(1, 2)  # type: ignore[no-any-return]
        return decay.unflatten(2, (self.heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class RecurrenceState(Carried):
    """What has been written by the slices so far. `time`: how many slices there were."""

    past: RecurrentState
    time: int
    grid: Grid


class Recurrence(Mixer):
    """y = W_o norm(recurrence(phi(W_q x), phi(W_k x), W_v x)) * silu(W_g x): linear attention with a state.

    Args:
        dim: channels of x.
        heads: heads, each with a state [features, value_dim].
        decay: a `Decay`, or fixed log-decays [H]; None: nothing is forgotten.
        delta: the delta rule: keys have length 1, and a learned share of the difference is written
            (Yang et al. 2024, arXiv 2406.06484; with a decay for each token 2412.06464).
        features: a feature map of `ct.features` on queries and keys; None: none.
        normalize: divide by the sum of weights, for positive features; else each head is normed (RMS).
        along: None: one sequence of all tokens in grid order; the name of an axis: one sequence along it for each
            place on the others.
        head_dim, value_dim: sizes of a head; default dim / heads.
        gate: whether the output is gated.
        chunk, backend: as for `ct.recurrence`.

    Example:
        >>> layer = Recurrence(64, 4, decay=Decay(64, 4), along="t")
        >>> layer(torch.randn(1, 4 * 8 * 8, 64), Grid(t=4, h=8, w=8)).shape
        torch.Size([1, 256, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        decay: Decay | Tensor | None = None,
        delta: bool = False,
        features: FeatureMap | None = None,
        normalize: bool = False,
        along: str | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        gate: bool = True,
        chunk: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        if heads < 1 or (dim % heads and (head_dim is None or value_dim is None)):
            raise ChronotopeError(f"Recurrence: dim={dim} is not a multiple of heads={heads}; give both head sizes.")
        self.dim, self.heads, self.along, self.normalize = dim, heads, along, normalize
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.value_dim = dim // heads if value_dim is None else value_dim
        self.chunk, self.backend = chunk, backend
        self.features = Identity() if features is None else features
        if isinstance(decay, Tensor):
            self.register_buffer("fixed", decay)
        self.decay = decay if isinstance(decay, Decay) else None
        self.qk = nn.Linear(dim, 2 * heads * self.head_dim, bias=False)
        self.value = nn.Linear(dim, heads * self.value_dim, bias=False)
        self.beta = nn.Linear(dim, heads) if delta else None
        self.norm = None if normalize else nn.RMSNorm(self.value_dim, eps=1e-6)
        self.gate = nn.Linear(dim, heads * self.value_dim, bias=False) if gate else None
        self.out = nn.Linear(heads * self.value_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once, each seeing those before it. Takes no context."""
        if context is not None:
            raise ChronotopeError("Recurrence takes no context: its keys are written in the order of its queries.")
        require_tokens(x, grid, self.dim, "x")
        return self._mix(x, grid, None, 0)[0]

    def init_state(self, batch: int, grid: Grid) -> RecurrenceState:
        """Nothing written. With `along` another axis than the first, slices do not meet, and nothing is carried."""
        require_slice(grid)
        heads = self.heads if self._place(grid) is None else self.heads * (grid.size // grid.sizes[str(self.along)])
        size = self.features.size(self.head_dim)
        weight = self.value.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        memory = weight.new_zeros(batch, heads, size, self.value_dim, dtype=dtype)
        return RecurrenceState(RecurrentState(memory, memory[..., 0].clone() if self.normalize else None), 0, grid)

    def step(self, x: Float[Tensor, "b s c"], state: RecurrenceState) -> tuple[Float[Tensor, "b s c"], RecurrenceState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        carries = self.along in (None, state.grid.axes[0])
        y, past = self._mix(x, state.grid, state.past if carries else None, state.time if carries else 0)
        return y, RecurrenceState(past if carries else state.past, state.time + 1, state.grid)

    def _mix(self, x: Tensor, grid: Grid, past: RecurrentState | None, time: int) -> tuple[Tensor, RecurrentState]:
        order = self._order(grid, time, x.device)
        heads = (part.transpose(1, 2) for part in self.qk(x).unflatten(2, (2, self.heads, -1)).unbind(2))
        q, k = (self._sequences(self.features(part, order).transpose(1, 2), grid) for part in heads)
        v = self._sequences(self.value(x).unflatten(2, (self.heads, -1)), grid)
        beta = None
        if self.beta is not None:
            k = F.normalize(k, dim=-1)
            beta = self._sequences(self.beta(x)[..., None], grid)[..., 0].sigmoid()
        out, past = recurrence(
            q, k, v, decay=self._decay(x, grid), beta=beta, normalize=self.normalize, state=past, chunk=self.chunk,
            scale=1.0 if self.normalize else self.head_dim**-0.5, backend=self.backend,
        )  # fmt: skip
        out = self._tokens(out if self.norm is None else self.norm(out), grid)
        if self.gate is not None:
            out = out * F.silu(self.gate(x))
        return self.out(out), past

    def _decay(self, x: Tensor, grid: Grid) -> Tensor | None:
        if self.decay is None:
            fixed: Tensor | None = getattr(self, "fixed", None)
            decay = fixed
        else:
            decay = self.decay(x)
        if decay is None or self._place(grid) is None:
            return decay
        if decay.ndim == 1:
            return decay.repeat_interleave(grid.size // grid.sizes[str(self.along)])
        tokens = decay.transpose(1, 2)
        return self._sequences(tokens, grid) if tokens.ndim == 4 else self._sequences(tokens[..., None], grid)[..., 0]

    def _place(self, grid: Grid) -> int | None:
        """Which axis the sequences go along; None: all tokens are one."""
        if self.along is None:
            return None
        if self.along not in grid.axes or grid.prefix:
            raise ChronotopeError(f"Recurrence(along={self.along!r}) needs that axis and no prefix, got {grid!r}.")
        return grid.axes.index(self.along)

    def _order(self, grid: Grid, time: int, device: torch.device) -> Int64[Tensor, "n"]:
        """Where each token is in its sequence, `time` slices being before these."""
        place = self._place(grid)
        if place is None:
            return torch.arange(grid.size, device=device) + time * grid.size
        return grid.coords(device)[:, place] + (time if place == 0 else 0)

    def _sequences(self, x: Float[Tensor, "b n h d"], grid: Grid) -> Float[Tensor, "b heads length d"]:
        """Places count as heads, so that the batch stays in front of every state."""
        place = self._place(grid)
        if place is None:
            return x.transpose(1, 2)
        return x.unflatten(1, grid.shape).movedim(-2, 1).movedim(2 + place, -2).flatten(1, -3)

    def _tokens(self, x: Float[Tensor, "b heads length d"], grid: Grid) -> Float[Tensor, "b n c"]:
        place = self._place(grid)
        if place is None:
            return x.transpose(1, 2).flatten(2)
        others = [size for axis, size in grid.sizes.items() if axis != self.along]
        x = x.unflatten(1, (self.heads, *others)).movedim(-2, 2 + place).movedim(1, -2)
        return x.flatten(1, -3).flatten(2)
