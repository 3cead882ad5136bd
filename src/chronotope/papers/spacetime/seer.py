r"""Seer: an image denoiser made to predict video from text: windows that look back in time, an instruction per frame.

After each (frozen) block of the image denoiser, which sees frames one by one, stands a new layer

$$
h = W_{in} \mathrm{LN}\, x, \quad h \mathrel{+}= A(\mathrm{LN}\, h), \quad h \mathrel{+}= \mathrm{MLP}(\mathrm{LN}\, h)
\text{ (not on given frames)}, \quad x \mathrel{+}= W_{out} h
$$

W_out = 0 at first. A attends within windows of w x w places over all frames so far, rotary in the order of tokens: a
token sees its window in earlier frames and, by `order`, those before it in its own frame ("token", as in the released
code) or all of that frame's ("frame"). w = 8 on maps of 32 rows or more, else 4; up to 4 rows, the whole map.

The first 1 or 2 frames are given: they enter clean, the others noisy (`mask` of `chronotope.models.diffusion`).

`TextDecomposer` makes of a sentence [B, L, D] one for each frame, [B, T L, D] on Grid(t=T, n=L): learned queries of
T x L places, through layers of attention within a frame, over the sentence, and over earlier frames at the same place
in the sentence. It is taught first to repeat the sentence for every frame.

Sizes: x [B, T h w, C] on Grid(t, h, w) -> same. About (T w^2)^2 / 2 pairs in each of (h / w)^2 windows. Published: 12
or 16 frames of 256 x 256 in latents, 8 layers of 8 heads in the decomposer, sentences of 77 tokens of 768 channels.

    >>> grid, words = Grid(t=4, h=8, w=8), torch.randn(2, 5, 32)
    >>> instructions = TextDecomposer(32, heads=4, frames=4, words=5, layers=2)(words)
    >>> layer = SeerLayer(32, heads=2, base=frame_block(32, heads=2))
    >>> layer(torch.randn(2, grid.size, 32), grid, instructions, given=1).shape
    torch.Size([2, 256, 32])

Frames come one at a time too: `step` keeps keys and values, and equals the whole.

Left out: the U-Net around the layers, its autoencoder, CLIP, weights. In the released code the layer begins with a
GroupNorm over all frames at once, by which later frames reach earlier ones; here each token is normed alone. Its MLP is
gated by GELU, here by SiLU. Its mask runs only in the fused kernel of xformers.

Checked beside the released code (seervideodiffusion/SeerVideoLDM, commit f403332; weights copied, our MLP in both,
torch's causal attention for that of xformers, maps of 4, 8 and 32 rows, none or one frame given): outputs of its block
over time of up to 5.6 differ by 1.4e-6 at most.

Paper: Xianfan Gu, Chuan Wen, Weirui Ye, Jiaming Song, Yang Gao, "Seer: Language Instructed Video Prediction with
Latent Diffusion Models", 2023, arXiv 2303.14897.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.attention import attention
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, AttentionState, Block, Cross, FeedForward, Mixer, Stack
from chronotope.nn.mixer import Context, require_slice, require_tokens
from chronotope.nn.stepping import attend_slice
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, along, blocks, causal
from chronotope.position import Rope

ROTATED = 32  # channels of a head, at most


def window_causal(window: int | None, order: str = "token") -> Pattern:
    """Same window of h and w (None: the whole map), and not after: in the order of tokens, or of frames."""
    if order not in ("token", "frame"):
        raise ChronotopeError(f"window_causal(order={order!r}): expected 'token' or 'frame'.")
    before = causal("t", "h", "w") if order == "token" else causal("t")
    return before if window is None else blocks(h=window, w=window) & before


def published_window(grid: Grid) -> Pattern:
    """The pattern at the window that a map of this height has."""
    height = grid.sizes["h"]
    return window_causal(None if height <= 4 else 8 if height >= 32 else 4)


class WindowAttention(Mixer):
    """A: attention under `window_causal`, rotary in the order of all tokens. window "published": by the height."""

    def __init__(self, dim: int, heads: int, window: int | str | None = "published", order: str = "token"):
        super().__init__()
        if isinstance(window, str) and (window, order) != ("published", "token"):
            raise ChronotopeError(
                f"WindowAttention(window={window!r}, order={order!r}): expected a size, None for the whole map, or "
                "'published' with order='token'."
            )
        self.dim, self.window, self.order = dim, window, order
        # Projections know the tokens as one sequence, which their code counts; the pattern knows their places.
        rope = Rope("n", share={"n": min(1.0, ROTATED * heads / dim)})
        self.inner = Attention(dim, heads, position=rope)

    def where(self, grid: Grid) -> Pattern:
        """Who sees whom on this grid."""
        return published_window(grid) if isinstance(self.window, str) else window_causal(self.window, self.order)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All frames at once. Takes no context."""
        require_tokens(x, grid, self.dim, "x")
        q, k, v = self.inner.project(x, Grid(n=x.shape[1]))
        return self._leave(attention(q, k, v, grid=grid, where=self.where(grid)))

    def init_state(self, batch: int, grid: Grid) -> AttentionState:
        """No keys and values yet."""
        require_slice(grid)
        empty = self.inner.qkv.weight.new_empty(batch, self.inner.kv_heads, 0, self.inner.head_dim)
        return AttentionState(empty, empty, 0, grid, self.where(grid))

    def step(self, x: Float[Tensor, "b s c"], state: AttentionState) -> tuple[Float[Tensor, "b s c"], AttentionState]:
        """The next frame."""
        size, time = state.grid.size, state.time
        q, k, v = self.inner.project(x, Grid(n=size), time=time * size)
        k, v = torch.cat((state.k.to(k.dtype), k), 2), torch.cat((state.v.to(v.dtype), v), 2)
        y = attend_slice(q, k, v, time, state.grid, state.where, None, None)
        return self._leave(y), replace(state, k=k, v=v, time=time + 1)

    def _leave(self, y: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
        return self.inner.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SeerState(Carried):
    """Keys and values of the frames so far; how many frames are given in all."""

    past: AttentionState
    given: int


@paper(
    system=82,
    name="Seer",
    family="spacetime",
    claim="windows that look back over frames, zero at first, in a frozen image denoiser; text taken apart by frame",
    evidence=["tests/papers/spacetime/test_seer.py"],
    missing="half of the error with one text for all frames, by text for each frame: a toy square gave 0.84 of it",
    menu=published_window,
)
class SeerLayer(Mixer):
    """The new layer, after `base`, a block that sees frames one by one; on Grid(t, h, w).

    Args:
        dim, heads, window, order: of x, of the attention; as for `WindowAttention`.
        base: a mixer, frozen here, that is given the `context`: text of each frame (`TextDecomposer`), or of all.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int | str | None = "published",
        order: str = "token",
        base: Mixer | None = None,
        mlp_ratio: float | int = 4.0,
    ):
        super().__init__()
        self.dim, self.base = dim, None if base is None else base.requires_grad_(False)
        self.enter, self.leave = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attention, self.mlp = WindowAttention(dim, heads, window, order), FeedForward(dim, "swiglu", mlp_ratio)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None, given: int = 0
    ) -> Float[Tensor, "b n c"]:
        """All frames at once, the first `given` of which are given."""
        x = x if self.base is None else self.base(x, grid, context)
        h = self.enter(self.norms[0](x))
        return x + self._feed(h + self.attention(self.norms[1](h), grid), given * grid.size // grid.sizes["t"])

    def init_state(self, batch: int, grid: Grid, given: int = 0) -> SeerState:
        """No frame has come; the first `given` will be given ones."""
        return SeerState(self.attention.init_state(batch, grid), given)

    def step(
        self, x: Float[Tensor, "b s c"], state: SeerState, context: Context | None = None
    ) -> tuple[Float[Tensor, "b s c"], SeerState]:
        """The next frame; `context`: the text of this frame with its grid, Grid(t=1, n=L) or Grid(n=L)."""
        x = x if self.base is None else self.base(x, state.past.grid, context)
        h = self.enter(self.norms[0](x))
        y, past = self.attention.step(self.norms[1](h), state.past)
        skipped = x.shape[1] if state.past.time < state.given else 0
        return x + self._feed(h + y, skipped), replace(state, past=past)

    def _feed(self, h: Tensor, skipped: int) -> Tensor:
        later = h[:, skipped:]
        fed = later + self.mlp(self.norms[2](later)) if later.shape[1] else later
        return self.leave(torch.cat((h[:, :skipped], fed), 1))  # type: ignore[no-any-return]


def frame_block(dim: int, heads: int) -> Block:
    """A block of an image denoiser: attention within a frame, and over the text of that frame, or of all."""
    return Block(
        [Attention(dim, heads, where=along("h", "w")), Cross(Attention(dim, heads, where=along("h", "w", "n")))]
    )


class TextDecomposer(nn.Module):
    """Sentences [B, L, D] -> the instruction of each frame [B, T L, D], and Grid(t=T, n=L).

    Args:
        dim, heads, layers: of the sentence, of the attentions, pairs of blocks.
        frames, words: T, and the longest L.
    """

    def __init__(self, dim: int = 768, heads: int = 8, frames: int = 16, words: int = 77, layers: int = 8):
        super().__init__()
        self.frames = frames
        self.query, self.place = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(frames, words, dim))
        pairs = []
        for _ in range(layers):
            pairs.append(Block([Attention(dim, heads, where=along("n")), Cross(Attention(dim, heads))]))
            rope = Rope("t", share={"t": min(1.0, ROTATED * heads / dim)})
            pairs.append(Block([Attention(dim, heads, where=along("t") & causal("t"), position=rope)]))
        self.stack = Stack(pairs, dim)

    def forward(self, text: Float[Tensor, "b words d"]) -> tuple[Float[Tensor, "b n d"], Grid]:
        """The instructions, and where they are."""
        if text.shape[1] > self.place.shape[1]:
            raise ChronotopeError(
                f"TextDecomposer: a sentence of {text.shape[1]} words; it has places for {self.place.shape[1]}."
            )
        grid = Grid(t=self.frames, n=text.shape[1])
        start = (self.query + self.place[:, : text.shape[1]]).flatten(0, 1).expand(len(text), -1, -1)
        return self.stack(start, grid, (text, Grid(word=text.shape[1]))), grid


def repetition_loss(decomposer: TextDecomposer, text: Float[Tensor, "b words d"]) -> Float[Tensor, ""]:
    """How far the instructions are from the sentence itself for every frame: what the decomposer is taught first."""
    found, grid = decomposer(text)
    return (found.unflatten(1, grid.shape) - text[:, None]).square().mean()
