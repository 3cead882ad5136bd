"""A state space over feature maps: convolutions in and out, one scan over time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.conv_lstm import require_maps
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens
from chronotope.recurrences.scans import linear_recurrence
from chronotope.recurrences.spaces import conjugate_start, pairs, zero_order_hold

CLIP = -1e-4


def conv_recurrence(
    u: Float[Tensor, "b t c h w"],
    a: Complex[Tensor, "p"],
    write: Complex[Tensor, "p c k1 k2"],
    read: Complex[Tensor, "o p k3 k4"],
    *,
    state: Complex[Tensor, "b p h w"] | None = None,
    starts: Bool[Tensor, "b t"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "b t o h w"], Complex[Tensor, "b p h w"]]:
    """x_t = a x_{t-1} + write * u_t, y_t = 2 Re(read * x_t), * being a convolution of the same size, odd kernels.

    Args:
        state: x_0; default 0.
        starts: the state before this frame is forgotten.
        chunk: frames scanned together; None: all, 1: step by step.

    Returns (y, state after the last frame).
    """
    if any(kernel.shape[i] % 2 == 0 for kernel in (write, read) for i in (2, 3)) or (chunk is not None and chunk < 1):
        raise ChronotopeError(
            f"conv_recurrence: kernels {list(write.shape[2:])} and {list(read.shape[2:])}, chunk={chunk}: expected odd "
            "kernels and at least 1 frame."
        )
    batch, frames, _, *size = u.shape
    # Real convolutions with twice the channels: real parts first, then imaginary ones.
    inward, outward = torch.cat((write.real, write.imag)), torch.cat((read.real, -read.imag), 1)
    factor = a[:, None, None] if starts is None else torch.where(starts[:, :, None, None, None], 0, a[:, None, None])
    out, after = [], u.new_zeros(batch, len(a), *size, dtype=a.dtype) if state is None else state
    for part in torch.arange(frames).split(chunk or frames):
        own = slice(int(part[0]), int(part[-1]) + 1)
        added = torch.complex(*_frames(u[:, own], inward).chunk(2, 2))
        here = factor[None, None] if starts is None else factor[:, own]
        states = linear_recurrence(here, added, after)
        # A copy, so that the other states can be freed.
        after = states[:, -1].clone()
        out.append(2 * _frames(torch.cat((states.real, states.imag), 2), outward))
    return torch.cat(out, 1), after


def _frames(x: Float[Tensor, "b t c h w"], kernel: Float[Tensor, "o c k1 k2"]) -> Float[Tensor, "b t o h w"]:
    return F.conv2d(x.flatten(0, 1), kernel, padding="same").unflatten(0, x.shape[:2])


@dataclass(frozen=True)
class ConvSpaceState(Carried):
    """What the frames so far have left, [B, P, H, W]. grid: one frame."""

    hidden: Complex[Tensor, "b p h w"]
    grid: Grid


class ConvSpace(Mixer):
    """y_t = 2 Re(C * h_t) + D * x_t, h_t = A h_{t-1} + B * x_t: one diagonal state space at every place of a map.

    `*` is a convolution over a frame, with zeros around it; A has one complex number for each channel of the state, so
    that all states come from one scan over time. Rates and B, C start as in `S5`, from the diagonal part of HiPPO-LegS;
    each channel is held over a step of its own, and real parts of rates are at most -1e-4. Linear: wrap it in `Block`.

    Args:
        dim: channels of x.
        states: real size of the state of each place, even: states / 2 complex numbers.
        kernels: sizes of B, C and D, odd.
        blocks: HiPPO-LegS matrices side by side.
        steps: the range of initial step sizes.
        chunk: frames scanned together; None: all.

    Source: Smith et al. 2023, "Convolutional State Space Models for Long-Range Spatiotemporal Modeling", arXiv
    2310.19694.

    Example:
        >>> ConvSpace(32, states=16)(torch.randn(2, 5 * 8 * 6, 32), Grid(t=5, h=8, w=6)).shape
        torch.Size([2, 240, 32])
    """

    def __init__(
        self,
        dim: int,
        states: int = 64,
        kernels: tuple[int, int, int] = (3, 3, 3),
        *,
        blocks: int = 1,
        steps: tuple[float, float] = (1e-3, 1e-1),
        chunk: int | None = None,
    ):
        super().__init__()
        if any(size < 1 or size % 2 == 0 for size in kernels):
            raise ChronotopeError(f"ConvSpace(kernels={kernels}): expected odd sizes.")
        self.dim, self.states, self.chunk = dim, pairs(states), chunk
        k_in, k_out, k_skip = kernels
        rate, write, read = conjugate_start(states, dim * k_in**2, dim * k_out**2, blocks)
        # He's scale for both kernels, as the paper's code has it.
        write = 2**0.5 * write.unflatten(1, (dim, k_in, k_in))
        read = 2**0.5 / k_out * read.unflatten(0, (dim, k_out, k_out)).permute(0, 3, 1, 2)
        self.rate, self.write, self.read = (nn.Parameter(_parts(x)) for x in (rate, write, read))
        self.log_step = nn.Parameter(torch.empty(self.states).uniform_(*(math.log(step) for step in steps)))
        self.skip = nn.Conv2d(dim, dim, k_skip, padding="same", bias=False)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All frames at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("ConvSpace takes no context: its state is written in the order of the frames.")
        return self._over(x, grid, None)[0]

    def init_state(self, batch: int, grid: Grid) -> ConvSpaceState:
        """Zeros."""
        require_slice(grid)
        require_maps(grid)
        dtype = torch.promote_types(self.rate.dtype, torch.float32).to_complex()
        return ConvSpaceState(
            torch.zeros(batch, self.states, *grid.shape[1:], dtype=dtype, device=self.rate.device), grid
        )

    def step(self, x: Float[Tensor, "b s c"], state: ConvSpaceState) -> tuple[Float[Tensor, "b s c"], ConvSpaceState]:
        """The next frame."""
        y, hidden = self._over(x, state.grid, state.hidden)
        return y, ConvSpaceState(hidden, state.grid)

    def maps(
        self, u: Float[Tensor, "b t c h w"], state: Tensor | None = None, starts: Tensor | None = None
    ) -> tuple[Float[Tensor, "b t c h w"], Complex[Tensor, "b p h w"]]:
        """(y, state after the last frame) of feature maps. state, starts: as for `conv_recurrence`."""
        dtype = torch.promote_types(u.dtype, torch.float32)
        rate, write, read = (
            torch.view_as_complex(x.to(dtype).contiguous()) for x in (self.rate, self.write, self.read)
        )
        rate = torch.complex(rate.real.clamp(max=CLIP), rate.imag)
        a, gain = zero_order_hold(rate, self.log_step.to(dtype).exp())
        before = None if state is None else state.to(a.dtype)
        y, after = conv_recurrence(
            u.to(dtype), a, gain[:, None, None, None] * write, read, state=before, starts=starts, chunk=self.chunk
        )
        return y.to(u.dtype) + _frames(u, self.skip.weight), after

    def _over(self, x: Tensor, grid: Grid, before: Tensor | None) -> tuple[Tensor, Tensor]:
        require_tokens(x, grid, self.dim, "x")
        require_maps(grid)
        y, after = self.maps(x.unflatten(1, grid.shape).movedim(-1, 2), before)
        return y.movedim(2, -1).flatten(1, 3), after


def _parts(x: Complex[Tensor, "*s"]) -> Float[Tensor, "*s 2"]:
    return torch.view_as_real(x.to(torch.complex64).resolve_conj()).clone()
