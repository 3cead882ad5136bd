"""Diagonal state spaces: x' = rate x + input, held over a step and run along the tokens.

The eigenvalues of a real system come in conjugate pairs: one of each pair is kept, and outputs are 2 Re(C x).
Sources: Gu et al. 2020 (HiPPO, arXiv 2008.07669), Gu et al. 2022 (S4D, arXiv 2206.11893), Smith et al. 2022 (S5,
arXiv 2208.04933), Gu and Dao 2023 (Mamba, arXiv 2312.00752).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from chronotope.errors import ChronotopeError
from chronotope.recurrences.scans import linear_recurrence


def hippo_legs(n: int) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n"]]:
    """A [n, n] and B [n] of HiPPO-LegS, float64: the state holds the past's coefficients in Legendre polynomials.

    A_ij = -sqrt(2i + 1) sqrt(2j + 1) for i > j, -(i + 1) for i = j, 0 else; B_i = sqrt(2i + 1).
    """
    root = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()
    a = -torch.outer(root, root).tril(-1) - torch.diag(torch.arange(1, n + 1, dtype=torch.float64))
    return a, root


def legs_diagonal(n: int) -> tuple[Complex[Tensor, "n"], Complex[Tensor, "n n"]]:
    """Eigenvalues and eigenvectors V of A + P P^T, A that of `hippo_legs` and P_i = sqrt(i + 1/2); complex128.

    This part of A is normal: V is unitary, all real parts are -1/2. In order of the imaginary part, so that the last
    n/2 are one of each conjugate pair for even n.
    """
    a, b = hippo_legs(n)
    normal = a + torch.outer(b, b) / 2
    skew = normal + 0.5 * torch.eye(n, dtype=torch.float64)
    frequency, vectors = torch.linalg.eigh(-1j * skew)
    return torch.complex(torch.full_like(frequency, -0.5), frequency), vectors


def s4d_lin(n: int) -> Complex[Tensor, "n"]:
    """-1/2 + i pi j for j < n, one of each conjugate pair; complex128."""
    j = torch.arange(n, dtype=torch.float64)
    return torch.complex(torch.full_like(j, -0.5), math.pi * j)


def pairs(states: int) -> int:
    """How many complex numbers keep a real state of this size: one of each conjugate pair of eigenvalues."""
    if states < 2 or states % 2:
        raise ChronotopeError(f"states={states}: expected an even number; they are kept as conjugate pairs.")
    return states // 2


def conjugate_start(
    states: int, inputs: int, outputs: int, blocks: int = 1
) -> tuple[Complex[Tensor, "s"], Complex[Tensor, "s inputs"], Complex[Tensor, "outputs s"]]:
    """Rates, V^-1 B and C V at the start of an S5, for random B and C and A of HiPPO-LegS blocks; complex128.

    One of each conjugate pair is kept: `states` / 2 of them.
    """
    half = pairs(states)
    if blocks < 1 or half % blocks:
        raise ChronotopeError(f"blocks={blocks} do not divide {half} pairs of states.")
    rate, vectors = legs_diagonal(states // blocks)
    rate, vectors = rate[half // blocks :], vectors[:, half // blocks :]
    write = torch.randn(blocks, states // blocks, inputs, dtype=torch.float64) * inputs**-0.5
    read = torch.randn(blocks, outputs, states // blocks, dtype=torch.float64) * states**-0.5
    full = vectors.to(torch.complex128)
    return (
        rate.repeat(blocks),
        (full.mH @ write.to(full.dtype)).flatten(0, 1),
        (read.to(full.dtype) @ full).movedim(0, 1).flatten(1),
    )


def zero_order_hold(rate: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """(a, gain) with x(t + step) = a x(t) + gain u for x' = rate x + u and u held still over the step.

    a = exp(rate step), gain = (a - 1) / rate, which is `step` at rate 0. Broadcasts.
    """
    moved = rate * step
    still = rate == 0
    gain = torch.where(still, step.to(moved.dtype), torch.expm1(moved) / torch.where(still, 1.0, rate))
    return moved.exp(), gain


def kernel(rate: Complex[Tensor, "c s"], weight: Complex[Tensor, "c s"], n: int) -> Float[Tensor, "c n"]:
    """2 Re sum_s weight_s exp(rate_s t) for t < n: what an impulse at time 0 leaves in each channel.

    `rate` is per token (rate times step). The powers are split in two factors of about sqrt(n) each, so that nothing
    has the size c s n.
    """
    size = max(1, math.isqrt(n))
    real = rate.real
    fine, coarse = (torch.arange(k, device=rate.device, dtype=real.dtype) for k in (size, -(-n // size)))
    low = (rate[..., None] * fine).exp()
    high = (rate[..., None] * (size * coarse)).exp() * weight[..., None]
    return 2 * (high.transpose(-1, -2) @ low).real.flatten(-2)[..., :n]


def convolve(x: Float[Tensor, "b n c"], kernel: Float[Tensor, "c n"]) -> Float[Tensor, "b n c"]:
    """y_t = sum_{i <= t} kernel_i x_{t-i} in each channel, by the Fourier transform: O(N log N)."""
    n = x.shape[1]
    product = torch.fft.rfft(x, 2 * n, dim=1) * torch.fft.rfft(kernel, 2 * n).transpose(0, 1)
    return torch.fft.irfft(product, 2 * n, dim=1)[:, :n]


def diagonal_scan(
    x: Float[Tensor, "b n c"],
    a: Complex[Tensor, "c s"],
    weight: Complex[Tensor, "c s"],
    initial: Complex[Tensor, "b c s"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "b n c"], Complex[Tensor, "b c s"]]:
    """h_t = a h_{t-1} + x_t, y_t = 2 Re(weight . h_t) for every channel: `convolve` with `kernel`, and the state.

    `chunk`: as in `selective_scan`. Returns (y, state after the last token).
    """
    state = a.new_zeros(x.shape[0], *a.shape) if initial is None else initial
    return _in_chunks(_held, (x,), (a, weight), state, chunk)


def _held(x: Tensor, a: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    states = linear_recurrence(a[None, None], x[..., None].expand(*x.shape, a.shape[1]), state)
    return 2 * torch.einsum("bncs,cs->bnc", states, weight).real, _last(states)


def selective_scan(
    x: Float[Tensor, "b n c"],
    step: Float[Tensor, "b n c"],
    rate: Float[Tensor, "c s"],
    write: Float[Tensor, "b n s"],
    read: Float[Tensor, "b n s"],
    initial: Float[Tensor, "b c s"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b c s"]]:
    """h_t = exp(step_t rate) h_{t-1} + step_t x_t write_t, y_t = h_t . read_t, for every channel and state of its own.

    Args:
        x, step: of each token and channel; step > 0.
        rate: < 0, of each channel and state.
        write, read: of each token, the same for all channels.
        initial: the state before the first token; default 0.
        chunk: tokens scanned together. The states of one chunk are in memory at a time, for the gradient too, which
            works them out again.

    Returns (y, state after the last token).
    """
    state = x.new_zeros(x.shape[0], *rate.shape) if initial is None else initial
    return _in_chunks(_selected, (x, step, write, read), (rate,), state, chunk)


def _selected(
    x: Tensor, step: Tensor, write: Tensor, read: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    decay = (step[..., None] * rate).exp()
    states = linear_recurrence(decay, (step * x)[..., None] * write[:, :, None], state)
    return torch.einsum("bncs,bns->bnc", states, read), _last(states)


def _last(states: Tensor) -> Tensor:
    """A copy, so that the other states can be freed."""
    return states[:, -1].clone()


def _in_chunks(
    piece: Callable[..., tuple[Tensor, Tensor]],
    tokens: tuple[Tensor, ...],
    fixed: tuple[Tensor, ...],
    state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """`piece` on chunks of the tokens, each with the state that the one before left."""
    if chunk < 1:
        raise ChronotopeError(f"chunk={chunk}: expected at least 1 token.")
    out = []
    for parts in zip(*(x.split(chunk, 1) for x in tokens), strict=True):
        given = [*parts, *fixed, state]
        if torch.is_grad_enabled():
            y, state = checkpoint(piece, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = piece(*given)
        out.append(y)
    return torch.cat(out, 1), state
