r"""VDT: a video denoiser that attends over time, then within frames; what is known of a clip enters it clean.

$$
x \mathrel{+}= W A_t(\mathrm{LN}(x)), \qquad
x \mathrel{+}= g_1\, A_s((1 + s_1) \overline{x} + b_1), \qquad
x \mathrel{+}= g_2\, \mathrm{MLP}((1 + s_2) \overline{x} + b_2)
$$

A_t attends over the frames of a place, A_s over the places of a frame; (b, s, g) = W' silu(time + label), 0 at first,
and the bar is a LayerNorm without weights. Only A_s and the MLP know how noisy the clip is. Tokens are patches of a
frame plus fixed sines of its place and of its time. A clip of one frame is an image: no A_t and no code of time, so
that the model is the image denoiser DiT.

$$ \mathrm{input} = M \cdot \mathrm{noisy} + (1 - M) \cdot \mathrm{clean} $$

M is 1 where something is to be made: prediction, interpolation, completion and generation from nothing are one task
with different M, drawn by `SpaceTimeMask`; any number of clean frames may be given.

Sizes: clips [B, T, C, H, W], M [B, T, H, W], t [B] -> [B, T, C, H, W]. T N^2 + N T^2 pairs for N patches, not (T N)^2.
Published: latents of an autoencoder, patch 2, width 1152, depth 28, 16 heads, 16 frames; small: 384, 12, 6.

    >>> model = VDT(channels=4, dim=64, depth=2, heads=4)
    >>> clips = torch.randn(2, 16, 4, 8, 8)
    >>> mask = SpaceTimeMask(Grid(t=16, h=8, w=8))(2, "predict")
    >>> model(clips, torch.tensor([3.0, 900.0]), clips, mask).shape
    torch.Size([2, 16, 4, 8, 8])

Trained by `ddpm_loss`, whose loss is taken on M alone, and sampled by `ddim_sample`, of `chronotope.models.diffusion`,
both with `mask=M[:, :, None]`. `order="st"` is attention within frames first. No streaming: a frame sees all others.

Left out: the autoencoder, learned variances (the released code predicts them), the released initialisation of weights.
The released code draws one M for a whole batch, here each clip has its own; its sampler of spatial masks masks nothing
where the run of masked frames ends with the clip, here it does. Its GELU is the tanh approximation.

Checked beside the released code (RERV/VDT, commit cdbad2b; weights and codes copied, 3 blocks of width 32, 5 frames of
8 x 8): outputs of up to 10.7 differ by 6.2e-6 at most where its GELU is made exact, by 8.9e-4 as it is.

Paper: Haoyu Lu, Guoxing Yang, Nanyi Fei, Yuqi Huo, Zhiwu Lu, Ping Luo, Mingyu Ding, "VDT: General-purpose Video
Diffusion Transformers via Mask Modeling", 2023, arXiv 2305.13311.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import (
    Attention,
    FeedForward,
    LabelEmbedding,
    Modulation,
    PatchEmbed,
    Sinusoidal,
    TimeEmbedding,
    Unpatch,
)
from chronotope.nn.mixer import Context, Whole
from chronotope.papers.registry import paper
from chronotope.papers.spacetime.vdt_masks import SpaceTimeMask
from chronotope.patterns import along
from chronotope.saving import Saved

__all__ = ["VDT", "SpaceTimeMask", "VDTBlock"]


class VDTBlock(Whole):
    """The block, on Grid(t, h, w). `context` [B, C], or [B, T, C] for each frame: what steers it.

    order: "ts", time first, or "st".
    """

    why = "a frame sees those after it"

    def __init__(self, dim: int, heads: int, order: str = "ts", mlp_ratio: float | int = 4.0):
        super().__init__()
        if order not in ("ts", "st"):
            raise ChronotopeError(f"VDTBlock(order={order!r}): expected 'ts' (time first) or 'st'.")
        self.dim, self.order = dim, order
        self.time = Attention(dim, heads, where=along("t"), biases=True)
        self.space = Attention(dim, heads, where=along("h", "w"), biases=True)
        self.time_norm, self.join = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.mlp = FeedForward(dim, "gelu", mlp_ratio, biases=True)
        self.steer = nn.ModuleList([Modulation(dim), Modulation(dim)])

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All frames at once."""
        if not isinstance(context, Tensor):
            raise ChronotopeError("VDTBlock: give context=condition, [B, C] or [B, T, C], without a grid.")
        for kind in self.order:
            if kind == "s":
                x = self.steer[0](x, context, lambda y: self.space(y, grid))
            elif grid.sizes["t"] > 1:
                x = x + self.join(self.time(self.time_norm(x), grid))
        return self.steer[1](x, context, self.mlp)  # type: ignore[no-any-return]


@paper(
    system=5,
    name="VDT",
    family="spacetime",
    claim="a video denoiser of attention over time and within frames; masks make prediction, interpolation and "
    "generation one task",
    evidence=["tests/papers/spacetime/test_vdt.py"],
)
class VDT(Saved):
    """What is noise in a clip.

    Args:
        channels, patch: of a frame; pixels of a patch on each side.
        dim, depth, heads, mlp_ratio, order: of the blocks.
        classes: number of labels; 0: there are none. A label is dropped in training with probability 0.1.
    """

    def __init__(
        self,
        channels: int = 4,
        patch: int = 2,
        dim: int = 1152,
        depth: int = 28,
        heads: int = 16,
        classes: int = 0,
        mlp_ratio: float = 4.0,
        order: str = "ts",
    ):
        super().__init__()
        self.embed, self.leave = PatchEmbed(dim, patch, channels), Unpatch(dim, patch, channels)
        self.place, self.moment = Sinusoidal(dim, ("h", "w")), Sinusoidal(dim, ("t",))
        self.time, self.label = TimeEmbedding(dim), LabelEmbedding(dim, classes)
        self.blocks = nn.ModuleList(VDTBlock(dim, heads, order, mlp_ratio) for _ in range(depth))
        self.last = Modulation(dim, gate=False)
        nn.init.zeros_(self.leave.project.weight)
        nn.init.zeros_(self.leave.project.bias)

    def forward(
        self,
        noisy: Float[Tensor, "b t c height width"],
        t: Float[Tensor, "b"],
        clean: Float[Tensor, "b t c height width"] | None = None,
        mask: Bool[Tensor, "b t height width"] | None = None,
        label: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b t c height width"]:
        """The noise. Where the mask is 0, `clean` takes the place of `noisy`; label None: of no class."""
        if (clean is None) != (mask is None):
            raise ChronotopeError("VDT: give clean and mask together, or neither.")
        if clean is not None and mask is not None:
            noisy = torch.where(mask[:, :, None], noisy, clean)
        x, grid = self.embed(noisy)
        x = self.place(x, grid)
        x = self.moment(x, grid) if grid.sizes["t"] > 1 else x
        none = torch.full((len(x),), self.label.none, device=x.device)
        condition = self.time(t) + self.label(none if label is None else label)
        for block in self.blocks:
            x = block(x, grid, condition)
        return self.leave(self.last(x, condition, lambda y: y), grid)
