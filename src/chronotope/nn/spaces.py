"""State spaces as layers: S4D, S5, Mamba, Mamba-2. Tokens are one sequence, in the order of the grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.convolution import ConvState, ShortConv
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens
from chronotope.recurrences.recurrence import recurrence
from chronotope.recurrences.scans import linear_recurrence
from chronotope.recurrences.spaces import (
    conjugate_start,
    convolve,
    diagonal_scan,
    kernel,
    legs_diagonal,
    pairs,
    s4d_lin,
    selective_scan,
    zero_order_hold,
)
from chronotope.recurrences.state import RecurrentState


@dataclass(frozen=True)
class SpaceState(Carried):
    """What the tokens so far have left: a state, and where there is a short convolution, the last tokens."""

    hidden: Tensor | RecurrentState
    conv: ConvState | None
    grid: Grid


class S4D(Mixer):
    """y = GLU(W gelu(C h + D x)), h' = A h + x: one diagonal state space for each channel, held over learned steps.

    Args:
        dim: channels of x.
        states: real size of a channel's state, even: states / 2 complex numbers.
        init: "lin" for A = -1/2 + i pi j, "legs" for the diagonal part of HiPPO-LegS.
        by: "convolution" (Fourier transform) or "scan": the same in other time and memory. `step` always scans.
        steps: the range of initial step sizes.

    Source: Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models", arXiv
    2206.11893.

    Example:
        >>> S4D(32)(torch.randn(2, 3 * 5, 32), Grid(t=3, h=5)).shape
        torch.Size([2, 15, 32])
    """

    def __init__(
        self,
        dim: int,
        states: int = 64,
        *,
        init: str = "lin",
        by: str = "convolution",
        steps: tuple[float, float] = (1e-3, 1e-1),
    ):
        super().__init__()
        if init not in ("lin", "legs") or by not in ("convolution", "scan"):
            raise ChronotopeError(f"S4D(init={init!r}, by={by!r}): init is lin or legs, by is convolution or scan.")
        self.dim, self.states, self.by = dim, pairs(states), by
        rate = s4d_lin(self.states) if init == "lin" else legs_diagonal(states)[0][self.states :]
        self.rate = Rate(rate.expand(dim, -1))
        self.read = nn.Parameter(torch.randn(dim, self.states, 2) * 0.5**0.5)
        self.log_step = nn.Parameter(_log_steps(dim, steps))
        self.skip = nn.Parameter(torch.randn(dim))
        self.out = nn.Linear(dim, 2 * dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once, each seeing those before it. Takes no context."""
        _require(self, x, grid, context)
        if self.by == "scan":
            return self._scanned(x, None)[0]
        u = x.to(_real(x))
        moved, weight = self._held(u.dtype)
        return self._mixed(u, convolve(u, kernel(moved, weight, u.shape[1])), x.dtype)

    def init_state(self, batch: int, grid: Grid) -> SpaceState:
        """Zeros [B, C, states / 2], complex."""
        require_slice(grid)
        return SpaceState(_zeros(self.skip, batch, self.dim, self.states), None, grid)

    def step(self, x: Float[Tensor, "b s c"], state: SpaceState) -> tuple[Float[Tensor, "b s c"], SpaceState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        assert isinstance(state.hidden, Tensor)
        y, hidden = self._scanned(x, state.hidden)
        return y, SpaceState(hidden, None, state.grid)

    def _scanned(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        u = x.to(_real(x))
        moved, weight = self._held(u.dtype)
        y, hidden = diagonal_scan(u, moved.exp(), weight, None if before is None else before.to(moved.dtype))
        return self._mixed(u, y, x.dtype), hidden

    def _held(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """rate times step, and what is read times what a step of input adds."""
        rate, step = self.rate(dtype), self.log_step.to(dtype).exp()[:, None]
        return rate * step, zero_order_hold(rate, step)[1] * _complex(self.read, dtype)

    def _mixed(self, u: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        return F.glu(self.out(F.gelu(y + self.skip * u).to(dtype)))


class S5(Mixer):
    """y = z * sigmoid(W z), z = gelu(C h + D x), h' = A h + B x: one diagonal state space for all channels together.

    Args:
        dim: channels of x.
        states: real size of the state, even: states / 2 complex numbers.
        blocks: A starts as this many HiPPO-LegS matrices (their normal part) side by side.
        steps: the range of initial step sizes, one for each complex number of the state.

    Source: Smith et al. 2022, "Simplified State Space Layers for Sequence Modeling", arXiv 2208.04933.

    Example:
        >>> S5(32)(torch.randn(2, 3 * 5, 32), Grid(t=3, h=5)).shape
        torch.Size([2, 15, 32])
    """

    def __init__(self, dim: int, states: int = 64, *, blocks: int = 1, steps: tuple[float, float] = (1e-3, 1e-1)):
        super().__init__()
        self.dim, self.states = dim, pairs(states)
        rate, write, read = conjugate_start(states, dim, dim, blocks)
        self.rate = Rate(rate)
        self.write, self.read = (nn.Parameter(torch.view_as_real(x.to(torch.complex64))) for x in (write, read))
        self.log_step = nn.Parameter(_log_steps(self.states, steps))
        self.skip = nn.Parameter(torch.randn(dim))
        self.gate = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once, each seeing those before it. Takes no context."""
        _require(self, x, grid, context)
        return self._mix(x, None)[0]

    def init_state(self, batch: int, grid: Grid) -> SpaceState:
        """Zeros [B, states / 2], complex."""
        require_slice(grid)
        return SpaceState(_zeros(self.skip, batch, self.states), None, grid)

    def step(self, x: Float[Tensor, "b s c"], state: SpaceState) -> tuple[Float[Tensor, "b s c"], SpaceState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        assert isinstance(state.hidden, Tensor)
        y, hidden = self._mix(x, state.hidden)
        return y, SpaceState(hidden, None, state.grid)

    def _mix(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        u = x.to(_real(x))
        a, gain = zero_order_hold(self.rate(u.dtype), self.log_step.to(u.dtype).exp())
        write, read = (_complex(pair, u.dtype) for pair in (self.write, self.read))
        added = u.to(a.dtype) @ (gain[:, None] * write).T
        hidden = linear_recurrence(a[None, None], added, None if before is None else before.to(a.dtype))
        y = 2 * (hidden @ read.T).real + self.skip * u
        z = F.gelu(y).to(x.dtype)
        return z * self.gate(z).sigmoid(), hidden[:, -1].clone()


class Mamba(Mixer):
    """y = W_o (selective_scan(u, ...) + D u) * silu(W_z x), u = silu(conv(W_u x)); steps, writes and reads come from u.

    The state space is `selective_scan`: its input is held as step * write, as in the code that the authors released
    and in Mamba-2; the paper's formula holds it exactly, which differs by a factor 1 + O(step).

    Args:
        dim: channels of x.
        states: numbers in the state of each inner channel.
        expand: inner channels over dim.
        width: tokens that the convolution sees.
        rank: of the step sizes' projection; default dim / 16, rounded up.
        chunk: tokens scanned together; it changes memory and not meaning.

    Source: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752.

    Example:
        >>> Mamba(32)(torch.randn(2, 3 * 5, 32), Grid(t=3, h=5)).shape
        torch.Size([2, 15, 32])
    """

    def __init__(
        self, dim: int, states: int = 16, *, expand: int = 2, width: int = 4, rank: int | None = None, chunk: int = 64
    ):
        super().__init__()
        inner, rank = expand * dim, -(-dim // 16) if rank is None else rank
        self.dim, self.sizes, self.chunk = dim, (rank, states, states), chunk
        self.enter = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = ShortConv(inner, width)
        self.choose = nn.Linear(inner, sum(self.sizes), bias=False)
        self.step_size = nn.Linear(rank, inner)
        nn.init.uniform_(self.step_size.weight, -(rank**-0.5), rank**-0.5)
        self.step_size.bias.data = _step_bias(inner)
        self.log_rate = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once, each seeing those before it. Takes no context."""
        _require(self, x, grid, context)
        u, z = self.enter(x).chunk(2, -1)
        return self._mix(self.conv(u, grid), z, None)[0]

    def init_state(self, batch: int, grid: Grid) -> SpaceState:
        """Zeros [B, inner, states], and for the convolution."""
        dtype = _real(self.skip)
        hidden = self.skip.new_zeros(batch, *self.log_rate.shape, dtype=dtype)
        return SpaceState(hidden, self.conv.init_state(batch, grid), grid)

    def step(self, x: Float[Tensor, "b s c"], state: SpaceState) -> tuple[Float[Tensor, "b s c"], SpaceState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        assert isinstance(state.hidden, Tensor) and state.conv is not None
        u, z = self.enter(x).chunk(2, -1)
        u, conv = self.conv.step(u, state.conv)
        y, hidden = self._mix(u, z, state.hidden)
        return y, SpaceState(hidden, conv, state.grid)

    def _mix(self, u: Tensor, z: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        u = F.silu(u)
        low, write, read = self.choose(u).split(self.sizes, -1)
        dtype = _real(u)
        step = F.softplus(self.step_size(low).to(dtype))
        rate = -self.log_rate.to(dtype).exp()
        before = None if before is None else before.to(dtype)
        y, hidden = selective_scan(u.to(dtype), step, rate, write.to(dtype), read.to(dtype), before, self.chunk)
        return self.out((y.to(u.dtype) + self.skip * u) * F.silu(z)), hidden


class Mamba2(Mixer):
    """y = W_o norm((recurrence(C, B, dt u, decay=dt A) + D u) * silu(W_z x)), (u, B, C) = silu(conv(W x)).

    Each head has one decay, so that the state space is `ct.recurrence` with reads C as queries, writes B as keys and
    dt u as values ("state space duality").

    Args:
        dim: channels of x.
        states: numbers in the state of each inner channel.
        head_dim: inner channels of a head.
        groups: heads in a group share B and C.
        expand: inner channels over dim.
        width: tokens that the convolution sees.
        chunk, backend: as for `ct.recurrence`.

    Source: Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060.

    Example:
        >>> Mamba2(32)(torch.randn(2, 3 * 5, 32), Grid(t=3, h=5)).shape
        torch.Size([2, 15, 32])
    """

    def __init__(
        self,
        dim: int,
        states: int = 128,
        *,
        head_dim: int = 64,
        groups: int = 1,
        expand: int = 2,
        width: int = 4,
        chunk: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        inner = expand * dim
        heads = inner // head_dim
        if inner % head_dim or groups < 1 or heads % groups:
            raise ChronotopeError(
                f"Mamba2: {inner} inner channels (expand * dim), head_dim={head_dim}, groups={groups}: heads must "
                "divide the channels, and groups the heads."
            )
        self.dim, self.heads, self.groups, self.states = dim, heads, groups, states
        self.chunk, self.backend = chunk, backend
        self.sizes = (inner, inner + 2 * groups * states, heads)
        self.enter = nn.Linear(dim, sum(self.sizes), bias=False)
        self.conv = ShortConv(self.sizes[1], width)
        self.step_bias = nn.Parameter(_step_bias(heads))
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once, each seeing those before it. Takes no context."""
        _require(self, x, grid, context)
        z, u, step = self.enter(x).split(self.sizes, -1)
        return self._mix(self.conv(u, grid), z, step, None)[0]

    def init_state(self, batch: int, grid: Grid) -> SpaceState:
        """Zeros [B, H, states, head_dim], and for the convolution."""
        shape = (batch, self.heads, self.states, self.sizes[0] // self.heads)
        memory = self.skip.new_zeros(shape, dtype=_real(self.skip))
        return SpaceState(RecurrentState(memory), self.conv.init_state(batch, grid), grid)

    def step(self, x: Float[Tensor, "b s c"], state: SpaceState) -> tuple[Float[Tensor, "b s c"], SpaceState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        assert isinstance(state.hidden, RecurrentState) and state.conv is not None
        z, u, step = self.enter(x).split(self.sizes, -1)
        u, conv = self.conv.step(u, state.conv)
        y, hidden = self._mix(u, z, step, state.hidden)
        return y, SpaceState(hidden, conv, state.grid)

    def _mix(self, u: Tensor, z: Tensor, step: Tensor, before: RecurrentState | None) -> tuple[Tensor, RecurrentState]:
        shared = self.groups * self.states
        v, k, q = F.silu(u).split((self.sizes[0], shared, shared), -1)
        q, k = (
            x.unflatten(2, (self.groups, -1)).transpose(1, 2).repeat_interleave(self.heads // self.groups, 1)
            for x in (q, k)
        )
        v = v.unflatten(2, (self.heads, -1)).transpose(1, 2)
        dtype = _real(u)
        held = F.softplus(step.to(dtype) + self.step_bias.to(dtype)).transpose(1, 2)
        decay = -self.log_rate.to(dtype).exp()[:, None] * held
        values = (held[..., None] * v).to(v.dtype)
        out, after = recurrence(q, k, values, decay=decay, state=before, chunk=self.chunk, backend=self.backend)
        out = (out + self.skip[:, None, None] * v).transpose(1, 2).flatten(2)
        return self.out(self.norm(out * F.silu(z))), after


class Rate(nn.Module):
    """Complex rates whose real parts stay negative: -exp(a) + i b, with a and b learned."""

    def __init__(self, start: Complex[Tensor, "*c s"]):
        super().__init__()
        self.log_real = nn.Parameter((-start.real).log().float())
        self.imaginary = nn.Parameter(start.imag.float().clone())

    def forward(self, dtype: torch.dtype) -> Complex[Tensor, "*c s"]:
        """The rates, with parts of this dtype."""
        return torch.complex(-self.log_real.to(dtype).exp(), self.imaginary.to(dtype))


def _log_steps(n: int, steps: tuple[float, float]) -> Tensor:
    """Spread evenly on a logarithmic scale, at random."""
    return torch.empty(n).uniform_(math.log(steps[0]), math.log(steps[1]))


def _step_bias(n: int, steps: tuple[float, float] = (1e-3, 1e-1)) -> Tensor:
    """Whose softplus is spread evenly on a logarithmic scale."""
    step = _log_steps(n, steps).exp()
    return step + (-torch.expm1(-step)).log()


def _real(x: Tensor) -> torch.dtype:
    """States are summed in float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def _complex(pair: Float[Tensor, "*s 2"], dtype: torch.dtype) -> Complex[Tensor, "*s"]:
    return torch.view_as_complex(pair.to(dtype).contiguous())


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=_real(like).to_complex(), device=like.device)


def _require(layer: S4D | S5 | Mamba | Mamba2, x: Tensor, grid: Grid, context: Context | None) -> None:
    if context is not None:
        raise ChronotopeError(f"{type(layer).__name__} takes no context: its state is written in the order of x.")
    require_tokens(x, grid, layer.dim, "x")
