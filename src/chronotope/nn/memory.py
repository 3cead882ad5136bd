"""A deep memory as a layer: projections, gates, and a small network for each head that learns as tokens come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.memories import Gates, Memory, MemoryState, Mlp, Momentum, Normalized, Residual, begin, memorize, recall
from chronotope.nn.convolution import ConvState, ShortConv
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens


class MemoryGates(nn.Module):
    """x -> Gates: rate * sigmoid(W x + b), logs of sigmoid(W x + b), threshold softplus(W x + b).

    With momentum the rate is multiplied by 1 - momentum: all that a token adds in time is then at most its own rate,
    and momentum does not make the descent diverge.

    Args:
        dim, heads: channels of x, heads of the memory.
        memory: it has the gates that its parts take.
        channels: None: one number for each head and token; else one for each of so many channels, the threshold not.
        rank: None: one matrix for all gates; else two, with so many channels between.
        rate: the largest step of the inner descent, or the largest share where the optimizer is `Normalized`.
        threshold: that of a Huber loss at the start.
    """

    # At the start: half of the largest step, 0.01 % forgotten by every token, half of past surprise goes on.
    BIAS: ClassVar[dict[str, float]] = {"rate": 0.0, "decay": 9.0, "momentum": 0.0}

    def __init__(
        self,
        dim: int,
        heads: int,
        memory: Memory,
        *,
        channels: int | None = None,
        rank: int | None = None,
        rate: float | int = 1.0,
        threshold: float | int = 1.0,
    ):
        super().__init__()
        self.heads, self.rate = heads, rate
        taken = {
            "rate": True,
            "decay": memory.retention.decays,
            "momentum": memory.optimizer.momentum,
            "threshold": memory.loss.has_threshold,
        }
        self.sizes = {
            name: heads * (channels if channels and name != "threshold" else 1) for name in taken if taken[name]
        }
        total = sum(self.sizes.values())
        last = nn.Linear(dim if rank is None else rank, total)
        start = self.BIAS | {"threshold": threshold + math.log(-math.expm1(-threshold))}
        with torch.no_grad():
            for part, name in zip(last.bias.split(list(self.sizes.values())), self.sizes, strict=True):
                part.fill_(start[name])
        self.project = last if rank is None else nn.Sequential(nn.Linear(dim, rank, bias=False), last)

    def forward(self, x: Float[Tensor, "b n c"]) -> Gates:
        """The gates of every token."""
        parts = dict(zip(self.sizes, self.project(x).split(list(self.sizes.values()), -1), strict=True))
        found = {}
        for name, part in parts.items():
            part = part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            part = part[..., 0] if part.shape[-1] == 1 else part
            if name == "rate":
                found[name] = self.rate * part.sigmoid()
            else:
                found[name] = F.softplus(part) if name == "threshold" else F.logsigmoid(part)
        if "momentum" in found:
            found["rate"] = -torch.expm1(found["momentum"]) * found["rate"]
        return Gates(**found)


@dataclass(frozen=True)
class DeepMemoryState(Carried):
    """What the networks have learned so far, and the last tokens before the convolution."""

    memory: MemoryState
    conv: ConvState | None
    grid: Grid


class DeepMemory(Mixer):
    """y = W_o norm(memorize(q, k, v)) * silu(W_g x); [q, k, v] = silu(conv(W x)), q and k of length 1.

    Args:
        dim: channels of x.
        heads: heads, each with a network of its own, whose weights at the start are learned. The last layer begins
            as zeros: what is read is what has been written, and no noise; not so inside a `Residual`.
        memory: the four choices; None: an MLP of two layers, L2 loss, decay, momentum, as in Titans, and normalized
            rates, which are not.
        gates: a module x -> Gates; None: `MemoryGates` with a rate of at most 1 / (4 chunk), or of 2 / chunk where
            the optimizer is `Normalized`. All tokens of a chunk pull at the same weights, so with keys that are alike
            a larger rate may diverge.
        chunk, truncate: as for `memorize`.
        head_dim: default dim / heads.
        conv: tokens that the convolution sees; None: no convolution.
        gate: whether the output is gated.

    Stepping over slices equals `forward`, whatever the slice and the chunk; a step costs the same at any time.

    Example:
        >>> layer = DeepMemory(64, 4, chunk=16)
        >>> layer(torch.randn(1, 4 * 8 * 8, 64), Grid(t=4, h=8, w=8)).shape
        torch.Size([1, 256, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        memory: Memory | None = None,
        gates: nn.Module | None = None,
        chunk: int = 64,
        truncate: int | None = None,
        head_dim: int | None = None,
        conv: int | None = 4,
        gate: bool = True,
    ):
        super().__init__()
        if heads < 1 or (head_dim is None and dim % heads):
            raise ChronotopeError(f"DeepMemory: dim={dim} is not a multiple of heads={heads}; give head_dim.")
        self.dim, self.heads, self.chunk, self.truncate = dim, heads, chunk, truncate
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.memory = Memory(learner=Mlp(2), optimizer=Normalized(Momentum())) if memory is None else memory
        largest = min(1.0, 2 / chunk) if self.memory.optimizer.normalizes else 0.25 / chunk
        self.gates = MemoryGates(dim, heads, self.memory, rate=largest) if gates is None else gates
        inner = heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.conv = None if conv is None else ShortConv(3 * inner, conv)
        self.weights = nn.ParameterList(self.memory.learner.weights(heads, self.head_dim, self.head_dim))
        # LN inside a residual would blow the first gradients up: what it norms would be 0.
        if not isinstance(self.memory.learner, Residual):
            nn.init.zeros_(self.weights[-1])
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.gate = nn.Linear(dim, inner, bias=False) if gate else None
        self.out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once, each reading what those before it have taught. Takes no context."""
        if context is not None:
            raise ChronotopeError("DeepMemory takes no context: its keys are learned in the order of its queries.")
        require_tokens(x, grid, self.dim, "x")
        state = self.init_state(x.shape[0], grid.replace(prefix=0, **{grid.axes[0]: 1}))
        return self._mix(x, state)[0]

    def init_state(self, batch: int, grid: Grid) -> DeepMemoryState:
        """The learned weights, for all of the batch."""
        require_slice(grid)
        exact = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in self.weights]
        conv = None if self.conv is None else self.conv.init_state(batch, grid)
        return DeepMemoryState(begin(self.memory, exact, batch), conv, grid)

    def step(self, x: Float[Tensor, "b s c"], state: DeepMemoryState) -> tuple[Float[Tensor, "b s c"], DeepMemoryState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        return self._mix(x, state)

    def recall(self, x: Float[Tensor, "b s c"], state: DeepMemoryState) -> Float[Tensor, "b s c"]:
        """What these tokens would read if they came next and taught nothing."""
        q = self._project(x, state.conv)[0][0]
        return self._finish(recall(q, self.memory, state.memory), x)

    def _mix(self, x: Tensor, state: DeepMemoryState) -> tuple[Tensor, DeepMemoryState]:
        (q, k, v), conv = self._project(x, state.conv)
        out, after = memorize(
            q, k, v, self.memory, self.gates(x), state=state.memory, chunk=self.chunk, truncate=self.truncate
        )
        return self._finish(out, x), DeepMemoryState(after, conv, state.grid)

    def _project(self, x: Tensor, conv: ConvState | None) -> tuple[tuple[Tensor, Tensor, Tensor], ConvState | None]:
        """q, k, v [B, H, N, D]."""
        qkv = self.qkv(x)
        if self.conv is not None and conv is not None:
            grid = conv.grid
            # All tokens as one slice: the convolution goes in the order of the grid, whatever its axes.
            qkv, after = self.conv.step(qkv, ConvState(conv.tail, Grid(n=x.shape[1])))
            conv = ConvState(after.tail, grid)
        q, k, v = F.silu(qkv).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (F.normalize(q, dim=-1).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype), v), conv

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        out = self.norm(out.to(self.norm.weight.dtype)).transpose(1, 2).flatten(2)
        if self.gate is not None:
            out = out * F.silu(self.gate(x))
        return self.out(out)  # type: ignore[no-any-return]
