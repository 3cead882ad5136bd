"""SpectFormer: early layers mix tokens by a learned gate on frequencies, later ones by attention.

    gate       y = irfft(W * rfft(x)) over the axes of the grid, channel by channel; W complex, learned, free of x
    spectral   x + MLP(LN(gate(LN(x)))), one residual for both
    attention  x + MHA(LN(x)), then x + MLP(LN(x))

The gate is a circular convolution of each channel with the kernel irfft(W), as large as the grid, in O(N log N). W has
the size of the grid: `resized` interpolates the kernel, so that every frequency in cycles per map keeps its response.
Published: 4 spectral and 8 attention layers on 14 x 14 patches, then the mean over tokens; W normal, deviation 0.02.

`CausalGate` is an extension: circular over space, one-sided over the first axis, whose kernel K reaches T slices back,

    Y_t = sum_{s < T} K_s * X_{t-s},  X_t = rfft over space of slice t

at once by zeros up to twice the length, step by step from the last T - 1 spectra.

Sizes: x [B, N, C] -> [B, N, C]; W [a, b / 2 + 1, C] on a grid a x b; axes that the gate's grid lacks are batch.

    >>> model = spectformer(32, Grid(h=8, w=7), heads=4, spectral=1, attention=2)
    >>> model(torch.randn(2, 56, 32), Grid(h=8, w=7)).shape
    torch.Size([2, 56, 32])

Left out: patches, learned positions (here rotary ones in the attention layers) and head of the vanilla model; the
hierarchical one (convolutional stem, MLP with a depth-wise convolution, class attention, token labelling), in whose
spectral blocks gate and MLP have a residual each; ImageNet-1K. Masks: zero what is padding, which is not the same.

Paper: Patro, Namboodiri and Agneeswaran 2023, "SpectFormer: Frequency and Attention is what you need in a Vision
Transformer", arXiv 2304.06446.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.attention import Attention
from chronotope.nn.block import Block, Stack
from chronotope.nn.feedforward import FeedForward
from chronotope.nn.mixer import Context, Mixer, State, require_slice, require_tokens
from chronotope.papers.registry import paper
from chronotope.position import Rope

STD = 0.02


class SpectralGate(Mixer):
    """y = irfft(W * rfft(x)) over the axes of `over`; axes that x has besides are batch.

    Args:
        dim: channels of x.
        over: the axes and sizes of the maps that are convolved, such as Grid(h=14, w=14).
    """

    def __init__(self, dim: int, over: Grid):
        super().__init__()
        self.dim, self.over = dim, over
        self.weight = nn.Parameter(STD * torch.randn(*_half(over.shape), dim, 2))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """Every map of the grid, whole. Raises ChronotopeError where its size is another: use `resized`."""
        _require(self, x, grid, context)
        sizes = {axis: grid.sizes.get(axis) for axis in self.over.axes}
        if sizes != self.over.sizes:
            raise ChronotopeError(f"SpectralGate over {self.over!r} got {grid!r}; make one by resized(Grid(...)).")
        axes = tuple(1 + grid.axes.index(axis) for axis in self.over.axes)
        maps = x.unflatten(1, grid.shape).movedim(axes, tuple(range(-1 - len(axes), -1)))
        spectrum = _spectrum(maps, self.over) * _complex(self.weight)
        out = _maps(spectrum, self.over).movedim(tuple(range(-1 - len(axes), -1)), axes)
        return out.flatten(1, -2).to(x.dtype)

    def kernel(self) -> Float[Tensor, "*sizes c"]:
        """The kernel of the circular convolution, on the grid."""
        dims = tuple(range(len(self.over.shape)))
        return torch.fft.irfftn(_complex(self.weight), s=self.over.shape, dim=dims)

    @torch.no_grad()
    def resized(self, over: Grid) -> SpectralGate:
        """The gate for maps of another size, same axes: its kernel interpolated trigonometrically."""
        if over.axes != self.over.axes:
            raise ChronotopeError(f"resized({over!r}): the axes must be {', '.join(self.over.axes)}, in this order.")
        spectrum = torch.fft.fftn(self.kernel(), dim=tuple(range(len(over.shape))))
        for dim, size in enumerate(over.shape):
            spectrum = _with_size(spectrum, dim, size)
        gate = SpectralGate(self.dim, over).to(self.weight)
        last = len(over.shape) - 1
        gate.weight.copy_(torch.view_as_real(spectrum.narrow(last, 0, over.shape[-1] // 2 + 1)))
        return gate

    def init_state(self, batch: int, grid: Grid) -> State:
        """Raises ChronotopeError where the gate is over the axis that streams; else slices do not meet."""
        require_slice(grid)
        if grid.axes[0] in self.over.axes:
            raise ChronotopeError(
                f"SpectralGate over {self.over!r} cannot be stepped along {grid.axes[0]!r}: the convolution is "
                "circular on it. Use a CausalGate, or a gate over the other axes."
            )
        return SliceState(grid)

    def step(self, x: Float[Tensor, "b s c"], state: SliceState) -> tuple[Float[Tensor, "b s c"], State]:
        """The next slice, on its own."""
        return self(x, state.grid), state


@dataclass(frozen=True)
class SliceState(Carried):
    """Nothing is carried but the grid of a slice."""

    grid: Grid


@dataclass(frozen=True)
class GateState(Carried):
    """The spectra of the last T - 1 slices, real and imaginary parts; zeros where there were none."""

    past: Float[Tensor, "b t *half c two"]
    grid: Grid


class CausalGate(Mixer):
    """Y_t = sum_{s < T} K_s * X_{t-s}, X the spectra of slices: circular over space, causal on the first axis.

    Args:
        dim: channels of x.
        over: the first axis, whose size is the T slices that the kernel reaches, and all others; clips may be longer.
    """

    def __init__(self, dim: int, over: Grid):
        super().__init__()
        self.dim, self.over = dim, over
        # A sequence without space is a map of one place.
        self.space = Grid(**dict(list(over.sizes.items())[1:])) if len(over.axes) > 1 else Grid(one=1)
        self.weight = nn.Parameter(STD * torch.randn(over.shape[0], *_half(self.space.shape), dim, 2))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All slices at once."""
        _require(self, x, grid, context)
        self._check(grid)
        slices = _spectrum(x.unflatten(1, (grid.shape[0], *self.space.shape)), self.space)
        length = grid.shape[0] + self.over.shape[0]
        kernel = torch.fft.fft(_complex(self.weight), n=length, dim=0)
        mixed = torch.fft.ifft(torch.fft.fft(slices, n=length, dim=1) * kernel, dim=1)[:, : grid.shape[0]]
        return _maps(mixed, self.space).flatten(1, -2).to(x.dtype)

    def init_state(self, batch: int, grid: Grid) -> GateState:
        """Zeros before the first slice."""
        require_slice(grid)
        self._check(grid)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        past = self.weight.new_zeros(batch, self.over.shape[0] - 1, *self.weight.shape[1:], dtype=dtype)
        return GateState(past, grid)

    def step(self, x: Float[Tensor, "b s c"], state: GateState) -> tuple[Float[Tensor, "b s c"], GateState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        own = _spectrum(x.unflatten(1, (1, *self.space.shape)), self.space)
        past = torch.cat((torch.view_as_complex(state.past), own), 1)
        mixed = (past * _complex(self.weight).flip(0)).sum(1)
        return _maps(mixed, self.space).flatten(1, -2).to(x.dtype), GateState(
            torch.view_as_real(past[:, 1:]).clone(), state.grid
        )

    def _check(self, grid: Grid) -> None:
        if grid.axes != self.over.axes or grid.shape[1:] != self.over.shape[1:]:
            raise ChronotopeError(f"CausalGate over {self.over!r} got {grid!r}; only the first axis may have any size.")


class SpectralBlock(Mixer):
    """x + MLP(LN(gate(LN(x)))): one residual around gate and feed-forward."""

    def __init__(self, gate: SpectralGate | CausalGate, mlp_ratio: float | int = 4.0):
        super().__init__()
        self.dim, self.gate = gate.dim, gate
        self.gate_norm, self.mlp_norm = nn.LayerNorm(gate.dim), nn.LayerNorm(gate.dim)
        self.mlp = FeedForward(gate.dim, "gelu", mlp_ratio)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once."""
        return x + self.mlp(self.mlp_norm(self.gate(self.gate_norm(x), grid)))

    def init_state(self, batch: int, grid: Grid) -> State:
        """The state of the gate."""
        return self.gate.init_state(batch, grid)

    def step(self, x: Float[Tensor, "b s c"], state: Any) -> tuple[Float[Tensor, "b s c"], State]:
        """The next slice."""
        mixed, state = self.gate.step(self.gate_norm(x), state)
        return x + self.mlp(self.mlp_norm(mixed)), state


@paper(
    system=208,
    name="SpectFormer",
    family="linear",
    claim="learned gates on the frequencies of a map in early layers, attention in later ones",
    evidence=["tests/papers/linear/test_spectformer.py"],
    missing="the hybrid above all-spectral layers: on pictures of texture and relation 99.65% against 99.78%, and "
    "attention alone 66.2% (mean of three seeds, equal parameters); on a harder relation 48% against 83% (one seed)",
)
def spectformer(
    dim: int, over: Grid, heads: int = 4, spectral: int = 4, attention: int = 8, mlp_ratio: float | int = 4.0
) -> Stack:
    """Spectral layers, then attention layers over all tokens.

    Args:
        dim, heads: channels, and heads of the attention layers.
        over: the grid of tokens, such as Grid(h=14, w=14).
        spectral, attention: numbers of layers of each kind.
        mlp_ratio: hidden channels of the feed-forwards over dim.
    """
    early = [SpectralBlock(SpectralGate(dim, over), mlp_ratio) for _ in range(spectral)]
    rope = Rope(over.axes)
    late = [Block([Attention(dim, heads, position=rope)], mlp="gelu", mlp_ratio=mlp_ratio) for _ in range(attention)]
    return Stack([*early, *late])


def _require(gate: SpectralGate | CausalGate, x: Tensor, grid: Grid, context: Context | None) -> None:
    if context is not None:
        raise ChronotopeError(f"{type(gate).__name__} takes no context.")
    if grid.prefix:
        raise ChronotopeError(f"{type(gate).__name__} got {grid!r}: prefix tokens have no place in a convolution.")
    require_tokens(x, grid, gate.dim, "x")


def _half(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the spectrum of a real map."""
    return (*shape[:-1], shape[-1] // 2 + 1)


def _complex(weight: Float[Tensor, "... two"]) -> Tensor:
    return torch.view_as_complex(weight.to(torch.promote_types(weight.dtype, torch.float32)))


def _spectrum(maps: Float[Tensor, "... c"], over: Grid) -> Tensor:
    dims = tuple(range(-1 - len(over.shape), -1))
    return torch.fft.rfftn(maps.to(torch.promote_types(maps.dtype, torch.float32)), dim=dims, norm="ortho")


def _maps(spectrum: Tensor, over: Grid) -> Float[Tensor, "... c"]:
    dims = tuple(range(-1 - len(over.shape), -1))
    return torch.fft.irfftn(spectrum, s=over.shape, dim=dims, norm="ortho")


def _with_size(spectrum: Tensor, dim: int, size: int) -> Tensor:
    """The frequencies of an axis of another size: those that both have; 0 for those that are new."""
    old = spectrum.shape[dim]
    cycles = torch.fft.fftfreq(size, 1 / size, device=spectrum.device).round().long()
    # The highest frequency of an even axis stands for both of its signs.
    mirrored = torch.where(2 * cycles == -size, -cycles, cycles)
    both = (spectrum.index_select(dim, cycles % old) + spectrum.index_select(dim, mirrored % old)) / 2
    known = (2 * cycles.abs() <= old).view(-1, *[1] * (spectrum.ndim - dim - 1))
    return torch.where(known, both, 0.0)
