"""MossFormer: gated single-head attention, squared ReLU within chunks plus linear attention over the whole sequence.

    W = blockdiag(relu(Q_q K_q^T / P)^2) + Q_l K_l^T / N,     V' = W V,   U' = W U
    y = x + ConvM((U' * V) * sigmoid(V' * U))

over chunks of P tokens and N tokens in all (those that `keep` marks, where it is given). V, U and a Z of size D come
from ConvM modules of x, half of whose channels are taken from the token before; Q_q, Q_l, K_q, K_l are Z times a scale
plus an offset, each its own, rotated (first 32 channels). ConvM: norm, linear, SiLU, plus a depth-wise convolution of
itself. Causal: weights within a chunk are masked, the linear part reads sum K_l^T [V, U] / P of the chunks before, and
convolutions look back.

Sizes: q, k [B, N, D], values [B, N, E]; work O(N P (D + E) + N D E); any N, the last chunk may be partial. State:
[D, 4 C] for a width C, the tokens of the current chunk, and the tails of the convolutions. Published: P = 256, D = 128,
V and U each of 2 C channels, convolutions of 17 tokens; 24 blocks between a convolution of 512 filters (16 samples,
stride 8) and its transpose, which `mossformer_separator.py` has.

    >>> layer = GatedSingleHead(64, chunk=128)
    >>> layer(torch.randn(2, 500, 64), Grid(n=500)).shape
    torch.Size([2, 500, 64])

Left out: dropout, the WSJ0 and WHAM! corpora. Details are those of the authors' MossFormer2 code, without its FSMN
branch. Its convolutions look ahead in causal mode too, and with a mask it divides by the padded length.

Paper: Zhao and Ma 2023, "MossFormer: Pushing the Performance Limit of Monaural Speech Separation using Gated
Single-Head Transformer with Convolution-Augmented Joint Self-Attentions", arXiv 2302.11824.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Mixer
from chronotope.nn.convolution import ConvState, ShortConv
from chronotope.nn.mixer import Context, require_slice, require_tokens
from chronotope.papers.registry import paper
from chronotope.position import Rope
from chronotope.recurrences import linear_attention

Projected = tuple[Tensor, Tensor, Tensor, Tensor]
"""Q_q, K_q, Q_l, K_l [B, N, D]."""


@dataclass(frozen=True)
class JointState(Carried):
    """memory [B, D, E]: sum K_l^T V / P over the chunks that are full; and the keys and values of the current one."""

    memory: Float[Tensor, "b d e"]
    near: Float[Tensor, "b r d"]
    far: Float[Tensor, "b r d"]
    values: Float[Tensor, "b r e"]


def joint_attention(
    projected: Projected,
    values: Float[Tensor, "b n e"],
    *,
    chunk: int = 256,
    causal: bool = False,
    keep: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b n e"]:
    """W times the values; V and U together are one tensor of values. `keep`: false where a token is padding.

    Raises ChronotopeError where the chunk is not positive.
    """
    if chunk < 1:
        raise ChronotopeError(f"joint_attention(chunk={chunk}): expected at least 1 token.")
    near_q, near_k, far_q, far_k = projected
    if keep is not None:
        near_k, far_k, values = (torch.where(keep[..., None], x, 0.0) for x in (near_k, far_k, values))
    if causal:
        batch, _, d = near_k.shape
        empty = JointState(values.new_zeros(batch, d, values.shape[2]), *(x[:, :0] for x in (near_k, far_k, values)))
        return causal_joint((near_q, near_k, far_q, far_k), values, empty, chunk)[0]
    n = torch.full((len(values),), values.shape[1]) if keep is None else keep.sum(1).clamp(min=1)
    far = linear_attention(far_q[:, None], far_k[:, None], values[:, None], normalize=False, causal=False)[:, 0]
    within = _within(_chunks(near_q, chunk), _chunks(near_k, chunk), _chunks(values, chunk), False)
    return within.flatten(1, 2)[:, : values.shape[1]] + far / n.to(values)[:, None, None]


def causal_joint(
    projected: Projected, values: Float[Tensor, "b n e"], state: JointState, chunk: int
) -> tuple[Float[Tensor, "b n e"], JointState]:
    """The next tokens after those of the state, any number of them."""
    begun = state.near.shape[1]
    near_q, near_k, far_q, far_k = projected
    near_k, far_k, values = (
        torch.cat(pair, 1) for pair in ((state.near, near_k), (state.far, far_k), (state.values, values))
    )
    near_q, far_q = (F.pad(x, (0, 0, begun, 0)) for x in (near_q, far_q))
    n = values.shape[1]
    parts = [_chunks(x, chunk) for x in (near_q, near_k, far_q, far_k, values)]
    written = parts[3].transpose(-1, -2) @ parts[4] / chunk
    after = state.memory[:, None] + written.cumsum(1)
    before = torch.cat((state.memory[:, None], after[:, :-1]), 1)
    out = _within(parts[0], parts[1], parts[4], True) + parts[2] @ before
    full = n // chunk
    memory = after[:, full - 1].clone() if full else state.memory
    left = (x[:, full * chunk :].clone() for x in (near_k, far_k, values))
    return out.flatten(1, 2)[:, begun:n], JointState(memory, *left)


def _within(
    q: Float[Tensor, "b m p d"], k: Float[Tensor, "b m p d"], v: Float[Tensor, "b m p e"], causal: bool
) -> Float[Tensor, "b m p e"]:
    weights = F.relu(q @ k.transpose(-1, -2) / q.shape[2]).square()
    return (weights.tril() if causal else weights) @ v


def _chunks(x: Float[Tensor, "b n d"], chunk: int) -> Float[Tensor, "b m p d"]:
    """Zeros fill the last chunk: a key of 0 has weight 0."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % chunk)).unflatten(1, (-1, chunk))


class ScaleNorm(nn.Module):
    """g x / max(rms(x), 1e-5), one learned g. Outputs of the gate are tiny at first: a larger floor would hide them."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(()))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Each token on its own."""
        return self.g * x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5).clamp(min=1e-5)


class ConvM(nn.Module):
    """y + conv(y), y = silu(W norm(x) + b): centred over `width` tokens, or over those before."""

    def __init__(self, dim: int, out: int, width: int, causal: bool):
        super().__init__()
        self.enter = nn.Sequential(ScaleNorm(), nn.Linear(dim, out), nn.SiLU())
        self.back = ShortConv(out, width) if causal else None
        self.conv = None if causal else nn.Conv1d(out, out, width, padding=width // 2, groups=out)

    def forward(
        self, x: Float[Tensor, "b n c"], state: ConvState | None = None
    ) -> tuple[Float[Tensor, "b n o"], ConvState | None]:
        """All tokens, or the next ones after a state; and the state after them, where there was one."""
        y = self.enter(x)
        if self.conv is not None:
            return y + self.conv(y.transpose(1, 2)).transpose(1, 2), None
        assert self.back is not None
        if state is None:
            return y + self.back(y, Grid(n=y.shape[1])), None
        more, state = self.back.step(y, state)
        return y + more, state


@dataclass(frozen=True)
class GatedState(Carried):
    """The joint attention so far, the tails of three convolutions, the last token, and how many there were."""

    joint: JointState
    tails: tuple[ConvState | None, ...]
    last: Float[Tensor, "b one c"]
    time: int
    grid: Grid


@paper(
    system=137,
    name="MossFormer",
    family="linear",
    claim="gated single-head attention: squared ReLU weights within chunks plus linear ones over the whole sequence",
    evidence=["tests/papers/linear/test_mossformer.py"],
)
class GatedSingleHead(Mixer):
    """The block above, its residual included, over the tokens of any grid in their order.

    Args:
        dim: channels of x.
        qk_dim: D.
        expansion: channels of V and U together over dim, an even number of them.
        chunk: P.
        causal: whether a token sees those before it only; then the layer can be stepped.
        width: tokens of a convolution, odd.
    """

    ROTATED = 32

    def __init__(
        self, dim: int, qk_dim: int = 128, expansion: int = 4, chunk: int = 256, causal: bool = False, width: int = 17
    ):
        super().__init__()
        if dim * expansion % 2 or width % 2 == 0:
            raise ChronotopeError(
                f"GatedSingleHead(dim={dim}, expansion={expansion}, width={width}): dim * expansion must be even, "
                "width odd."
            )
        self.dim, self.chunk, self.causal, self.values = dim, chunk, causal, dim * expansion
        self.hidden = ConvM(dim, dim * expansion, width, causal)
        self.shared = ConvM(dim, qk_dim, width, causal)
        self.leave = ConvM(dim * expansion // 2, dim, width, causal)
        self.scales, self.offsets = nn.Parameter(0.02 * torch.randn(4, qk_dim)), nn.Parameter(torch.zeros(4, qk_dim))
        self.position = Rope("n", share={"n": min(1, self.ROTATED / qk_dim)})
        self.gate = nn.Sigmoid()

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("GatedSingleHead takes no context.")
        require_tokens(x, grid, self.dim, "x")
        shifted = self._shifted(x, torch.zeros_like(x[:, :1]))
        values, _ = self.hidden(shifted)
        projected = self._project(self.shared(shifted)[0], 0)
        mixed = joint_attention(projected, values, chunk=self.chunk, causal=self.causal)
        return x + self.leave(self._gated(mixed, values))[0]

    def init_state(self, batch: int, grid: Grid) -> GatedState:
        """Nothing seen. Raises ChronotopeError unless the layer is causal."""
        require_slice(grid)
        if not self.causal:
            raise ChronotopeError("GatedSingleHead(causal=False) sees what comes later: it cannot be stepped.")
        modules = (self.hidden, self.shared, self.leave)
        tails = tuple(module.back.init_state(batch, grid) for module in modules if module.back is not None)
        d = self.scales.shape[1]
        empty = (self.scales.new_zeros(batch, 0, size) for size in (d, d, self.values))
        joint = JointState(self.scales.new_zeros(batch, d, self.values), *empty)
        return GatedState(joint, tails, self.scales.new_zeros(batch, 1, self.dim), 0, grid)

    def step(self, x: Float[Tensor, "b s c"], state: GatedState) -> tuple[Float[Tensor, "b s c"], GatedState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        shifted = self._shifted(x, state.last)
        values, first = self.hidden(shifted, state.tails[0])
        shared, second = self.shared(shifted, state.tails[1])
        mixed, joint = causal_joint(self._project(shared, state.time), values, state.joint, self.chunk)
        y, third = self.leave(self._gated(mixed, values), state.tails[2])
        after = GatedState(joint, (first, second, third), x[:, -1:].clone(), state.time + x.shape[1], state.grid)
        return x + y, after

    def _shifted(self, x: Tensor, last: Tensor) -> Tensor:
        """The first half of the channels from the token before."""
        half = -(-self.dim // 2)
        return torch.cat((torch.cat((last[..., :half], x[:, :-1, :half]), 1), x[..., half:]), -1)

    def _project(self, z: Float[Tensor, "b n d"], time: int) -> Projected:
        """Q_q, K_q, Q_l, K_l of tokens that begin at `time`."""
        four = z[:, None] * self.scales[:, None] + self.offsets[:, None]
        near_q, far_q, near_k, far_k = self.position(four, Grid(n=z.shape[1]), offset={"n": time}).unbind(1)
        return near_q, near_k, far_q, far_k

    def _gated(self, mixed: Tensor, values: Tensor) -> Tensor:
        (v, u), (over_v, over_u) = values.chunk(2, -1), mixed.chunk(2, -1)
        return (over_u * v) * self.gate(over_v * u)  # type: ignore[no-any-return]
