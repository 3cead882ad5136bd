r"""Motion2VecSets: a moving shape as a set of latent vectors for each frame, all denoised together.

One set says what the shape of the first frame is, and one for each frame how it is deformed there. A block of the
denoiser, each step after a LayerNorm without weights that the noise level scales and shifts (written N):

$$
x \mathrel{+}= A_m(N x), \quad x \mathrel{+}= A(N x,\, \mathrm{shape}), \quad
x \mathrel{+}= A(N x,\, \mathrm{seen}_t), \quad x \mathrel{+}= A_t(N x), \quad x \mathrel{+}= \mathrm{MLP}(N x)
$$

A_m attends over the M latents of a frame, A_t over the frames of a latent, the two between over the latents of the
shape and over what is observed of the frame: one set, where it is known which points became which, else two, of the
first frame and of frame t. No step knows the number of a frame or of a latent: permuted ones have permuted outputs.
One block joins all latents of all frames, by A_m and then A_t.

Sizes: x [B, T, M, C], shape [B, M', C'], observations [B, T, K, dim] -> [B, T, M, C]. T M^2 + M T^2 pairs for the
attentions of x to itself, not (T M)^2. Published: dim 512 in 8 heads, depth 12, M = 512 with C = 32 and C' = 8, 17
frames, 5 of them in training.

    >>> model = LatentSetDenoiser(channels=4, shape_channels=3, dim=32, depth=2, heads=2)
    >>> x, shape = torch.randn(2, 5, 16, 4), torch.randn(2, 16, 3)
    >>> seen = [torch.randn(2, 5, 10, 32), torch.randn(2, 5, 7, 32)]
    >>> model(x, torch.zeros(2), shape, seen, known=torch.rand(2, 5) < 0.5).shape
    torch.Size([2, 5, 16, 4])

Training and sampling (`chronotope.models.diffusion`): `edm_loss(lambda x, s: model(x, s, shape, seen), sets, scale=1)`
and `heun_sample(..., scale=1)`, whose other defaults are the published ones. `SetEncoder` makes observations and sets
out of points, `SetDecoder` answers for any point: `motion2vecsets_points`. No streaming: a frame sees all others.

`known` (not in the paper) says of which frames something is observed; the others get nothing from that step.

Left out: the denoiser of the first frame's shape set (the same block with one source, without A_t), the Gaussian
between encoder and sets, meshes, data, weights. MLPs gate by SiLU, those of the released code by GELU; it has no biases
in W_q, W_k and W_v, and modulation does not begin with 0 there.

Checked beside the released code (VVeiCao/Motion2VecSets, commit c4838d8; weights copied, our MLP in both, 3 blocks of
width 32, 5 frames of 12 latents, one and two observations): outputs of up to 17.3 differ by 5.1e-6 at most where
LayerNorm has its epsilon of 1e-5, by 1.1e-3 with ours of 1e-6; those of the encoder of points by 1.8e-7.

Paper: Wei Cao, Chang Luo, Biao Zhang, Matthias Niessner, Jiapeng Tang, "Motion2VecSets: 4D Latent Vector Set Diffusion
for Non-rigid Shape Reconstruction and Tracking", 2024, arXiv 2401.06614.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, DropBranch, FeedForward, Modulation, TimeEmbedding
from chronotope.papers.registry import paper
from chronotope.papers.spacetime.motion2vecsets_points import SetDecoder, SetEncoder, farthest_points
from chronotope.patterns import along
from chronotope.saving import Saved

__all__ = ["InterleavedLatentBlock", "LatentSetDenoiser", "SetDecoder", "SetEncoder", "farthest_points"]

Source = tuple[Tensor, Grid]


class InterleavedLatentBlock(nn.Module):
    """The block, on Grid(t, m), with any number of other sets to look at.

    Args:
        sources: how many: the shape and one or two observations.
        over_time: whether frames are joined; without, it is the block for the set of one frame, run on each.
        drop_path: of each step.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        sources: int = 3,
        *,
        over_time: bool = True,
        mlp_ratio: float | int = 4.0,
        drop_path: float | int = 0.1,
    ):
        super().__init__()
        self.dim = dim
        self.within = Attention(dim, heads, where=along("m"), biases=True)
        # A source with frames is seen by the same frame, as m is the only axis on which places may differ.
        self.looks = nn.ModuleList(Attention(dim, heads, where=along("m"), biases=True) for _ in range(sources))
        self.time = Attention(dim, heads, where=along("t"), biases=True) if over_time else None
        self.mlp = FeedForward(dim, "swiglu", 1.5 * mlp_ratio, biases=True)  # of mlp_ratio * dim hidden channels
        steps = 2 + sources + over_time
        self.steer, self.drop = (
            nn.ModuleList(Modulation(dim, gate=False) for _ in range(steps)),
            DropBranch(0, drop_path),
        )

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        grid: Grid,
        condition: Float[Tensor, "b c"],
        sources: Sequence[Source] = (),
        known: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """All frames at once. `sources`: tokens with their grid, Grid(m=K), or Grid(t=T, m=K) for each frame."""
        if len(sources) != len(self.looks) or grid.axes != ("t", "m") or grid.prefix:
            raise ChronotopeError(
                f"InterleavedLatentBlock on {grid!r} with {len(sources)} sources; expected axes t, m and "
                f"{len(self.looks)} sources."
            )
        steps: list[Callable[[Tensor], Tensor]] = [lambda y: self.within(y, grid)]
        steps += [self._look(layer, source, grid, known) for layer, source in zip(self.looks, sources, strict=True)]
        if self.time is not None:
            steps.append(lambda y: self.time(y, grid))  # type: ignore[misc]
        for steer, step in zip(self.steer, [*steps, self.mlp], strict=True):
            x = x + self.drop(steer(x, condition, step))
        return x

    @staticmethod
    def _look(layer: nn.Module, source: Source, grid: Grid, known: Tensor | None) -> Callable[[Tensor], Tensor]:
        if known is None or "t" not in source[1].axes:
            return lambda y: layer(y, grid, source)
        told = known.repeat_interleave(grid.sizes["m"], 1)[..., None]
        return lambda y: torch.where(told, layer(y, grid, source), 0.0)


@paper(
    system=4,
    name="Motion2VecSets",
    family="spacetime",
    claim="latent sets of all frames denoised together; attention within frames and along latents, T M^2 + M T^2 pairs",
    evidence=["tests/papers/spacetime/test_motion2vecsets.py"],
)
class LatentSetDenoiser(Saved):
    """What `edm_denoise` asks of a model, for the sets of all frames.

    Args:
        channels, shape_channels: of a latent of x, and of the shape.
        streams: sets of observations for each frame, 1 or 2.
        dim, depth, heads, mlp_ratio, drop_path, over_time: of the blocks.
    """

    def __init__(
        self,
        channels: int = 32,
        shape_channels: int = 8,
        streams: int = 2,
        dim: int = 512,
        depth: int = 12,
        heads: int = 8,
        mlp_ratio: float | int = 4.0,
        drop_path: float | int = 0.1,
        over_time: bool = True,
    ):
        super().__init__()
        self.enter = nn.Linear(channels, dim, bias=False)
        self.shape, self.noise = nn.Linear(shape_channels, dim, bias=False), TimeEmbedding(dim)
        self.blocks = nn.ModuleList(
            InterleavedLatentBlock(
                dim, heads, 1 + streams, over_time=over_time, mlp_ratio=mlp_ratio, drop_path=drop_path
            )
            for _ in range(depth)
        )
        self.norm, self.leave = nn.LayerNorm(dim), nn.Linear(dim, channels, bias=False)
        nn.init.zeros_(self.leave.weight)

    def forward(
        self,
        x: Float[Tensor, "b t m c"],
        noise: Float[Tensor, "b"],
        shape: Float[Tensor, "b k d"],
        seen: Sequence[Float[Tensor, "b t ..."]],
        known: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t m c"]:
        """`seen`: a set [B, T, K, dim] for each stream; `known`: of which frames."""
        grid = Grid(t=x.shape[1], m=x.shape[2])
        sources = [(self.shape(shape), Grid(m=shape.shape[1]))]
        sources += [(one.flatten(1, 2), Grid(t=one.shape[1], m=one.shape[2])) for one in seen]
        y, condition = self.enter(x.flatten(1, 2)), self.noise(noise)
        for block in self.blocks:
            y = block(y, grid, condition, sources, known)
        return self.leave(self.norm(y)).view_as(x)  # type: ignore[no-any-return]
