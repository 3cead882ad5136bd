r"""PredFormer: the coming frames from those seen, in one shot, by attention over time and over space in any order.

$$
z = E\,\mathrm{patches}(x) + P, \quad
z \leftarrow z + A_l(\mathrm{LN}(z)), \quad
z \leftarrow z + W_2(\mathrm{SiLU}(W_g\,\mathrm{LN}(z)) \odot W_1\,\mathrm{LN}(z)) \quad (l = 1 \dots L), \qquad
\hat x = \mathrm{unpatch}(W\,\mathrm{LN}(z))
$$

A_l, without biases, is one of three: S looks at the tokens of its own frame, T at those of its own place, F at all. A
plan is a row of these: "full" F..F, "fac-st" S..ST..T, "fac-ts" T..TS..S, and the interleaved ones, "ts", "st", "tst",
"sts", "tsst", "stts", or any other word of S, T and F, said over and over. All plans have the same parameters. P: sines
and cosines of the number of the token, counted through all frames,

$$
P_{p, 2i} = \sin(p / 10000^{2i / d}), \qquad P_{p, 2i + 1} = \cos(p / 10000^{2i / d})
$$

The T frames seen give the T frames that follow; taught by the mean squared error.

Sizes: x [B, T, C, H, W] -> the same. N patches: S and T take O(T N^2 + N T^2) pairs, F O((T N)^2). Published for Moving
MNIST: patch 8, width 256, 8 heads, 24 blocks of the plan "tsst", inner width 4 times that of the model.

    >>> model = PredFormer("tsst", blocks=4, patch=4, dim=32, heads=2)
    >>> model(torch.rand(2, 5, 1, 16, 24)).shape
    torch.Size([2, 5, 1, 16, 24])

Options: `post_norm` ends each block with one more LayerNorm, as the released code does; `drop_path`; `causal` lets no
token look at later frames. "divided" is not of the paper: blocks of T, then S, then one feed-forward, twice as wide.

Found here, on digits of 7 x 7 pixels in 16 x 16, 167 thousand parameters, 1,000 steps of 8 clips, 3 seeds: the squared
error of a frame is 4.83 for "tsst", 4.87 divided, 5.04 for "fac-st", 5.19 for "full", where the mean frame has 5.77. A
ConvLSTM of that size is ahead of all of them after so short a training, at 3.96: the published lead over convolutional
forecasters is not shown.

Left out: more frames out than in (the released code runs on what it said). Departing from the released code, the
matrices of blocks have no biases. With those at 0, as they start there, two quadruplets of it (yyyujintang/PredFormer
at b73c7ae, plan "tsst") and of this page with `post_norm` differ by 4e-6 in outputs of up to 8.6.

Paper: Yujin Tang, Lu Qi, Fei Xie, Xiangtai Li, Chao Ma, Ming-Hsuan Yang, "PredFormer: Transformers Are Effective
Spatial-Temporal Predictive Learners", 2024, arXiv 2410.04733 (later "Video Prediction Transformers without Recurrence
or Convolution").
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.attention import Attention
from chronotope.nn.block import Block, Stack
from chronotope.nn.mixer import Context, Mixer
from chronotope.nn.patches import PatchEmbed, Unpatch
from chronotope.nn.positions import Sinusoidal
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, along, full
from chronotope.patterns import causal as in_order
from chronotope.saving import Saved

LETTERS = {"S": along("h", "w"), "T": along("t"), "F": full()}


def words_of(name: str, blocks: int) -> list[str]:
    """The attentions of each block, a letter for each: "tsst" of 8 blocks is T, S, S, T, T, S, S, T."""
    half, odd = divmod(blocks, 2)
    halved = {"fac-st": ["S"] * half + ["T"] * half, "fac-ts": ["T"] * half + ["S"] * half, "divided": ["TS"] * half}
    word = "F" if name == "full" else name.upper()
    if name in halved and blocks > 0 and not odd:
        return halved[name]
    if name in halved or blocks < 1 or not word or not set(word) <= set(LETTERS) or blocks % len(word):
        raise ChronotopeError(
            f"plan {name!r} of {blocks} blocks: expected full, fac-st, fac-ts, divided, or a word of s, t and f, and a "
            "number of blocks that is a multiple of its length (of 2 for fac-st, fac-ts and divided)."
        )
    return list(word) * (blocks // len(word))


class PostNorm(Mixer):
    """LN(mixer(x))."""

    def __init__(self, mixer: Mixer, dim: int):
        super().__init__()
        self.mixer, self.norm, self.dim = mixer, nn.LayerNorm(dim), dim

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once."""
        return self.norm(self.mixer(x, grid, context))

    def init_state(self, batch: int, grid: Grid) -> Any:
        """The state of the mixer."""
        return self.mixer.init_state(batch, grid)

    def step(self, x: Float[Tensor, "b s c"], state: Any) -> tuple[Float[Tensor, "b s c"], Any]:
        """The next slice through the mixer."""
        y, after = self.mixer.step(x, state)
        return self.norm(y), after


def gated(
    words: list[str],
    dim: int,
    heads: int,
    ratio: float | int = 4,
    *,
    post_norm: bool = False,
    drop_path: float | int = 0.0,
    within: Pattern | None = None,
) -> Stack:
    """Gated transformer blocks, one for each word, and a LayerNorm; `within` joins the patterns of all."""
    blocks: list[Mixer] = []
    for word in words:
        looks = [LETTERS[letter] if within is None else LETTERS[letter] & within for letter in word]
        mixers = [Attention(dim, heads, where=where) for where in looks]
        # A SwiGLU takes two thirds of the ratio that it is given; a block of two attentions has twice the width.
        block = Block(mixers, dim, "swiglu", 1.5 * ratio * len(word), drop_path=drop_path)
        blocks.append(PostNorm(block, dim) if post_norm else block)
    return Stack(blocks, dim)


@paper(
    system=6,
    name="PredFormer",
    family="spacetime",
    claim="frames from frames in one shot: gated blocks that look over time, over space or over both, in any order",
    evidence=["tests/papers/spacetime/test_predformer.py", "tests/tasks/test_moving_digits.py"],
)
class PredFormer(Saved):
    """The model.

    Args:
        plan: of attentions, as above. blocks: how many.
        patch, channels: pixels of a patch on each side, channels of a frame.
        dim, heads, ratio: of the blocks; `ratio`: inner channels of the feed-forward over dim.
        post_norm, drop_path, causal: as above.
    """

    def __init__(
        self,
        plan: str = "tsst",
        blocks: int = 24,
        patch: int = 8,
        channels: int = 1,
        dim: int = 256,
        heads: int = 8,
        ratio: float = 4.0,
        post_norm: bool = False,
        drop_path: float = 0.0,
        causal: bool = False,
    ):
        super().__init__()
        self.embed, self.head = PatchEmbed(dim, patch, channels), Unpatch(dim, patch, channels)
        self.stack = gated(
            words_of(plan, blocks), dim, heads, ratio, post_norm=post_norm, drop_path=drop_path,
            within=in_order("t") if causal else None,
        )  # fmt: skip
        self.place = Sinusoidal(dim, "n")
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, clips: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t c h w"]:
        """As many frames as are given: those that follow."""
        x, grid = self.embed(clips)
        return self.head(self.stack(self.place(x, Grid(n=grid.size)), grid), grid)

    def loss(self, clips: Float[Tensor, "b t c h w"], future: Float[Tensor, "b t c h w"]) -> Float[Tensor, ""]:
        """Mean squared error."""
        return F.mse_loss(self(clips), future)
