"""ResidualViT: one frame in N + 1 through a frozen image encoder in full, the others with few patches and a token more.

With E the encoder of a set of tokens, T the tokens of a frame, R what keeps a share 1 - p of them, A a linear map:

    I-frame, t = 0, N + 1, ...    f_t     = E(T_t)
    P-frame, k = 1 .. N           f_t+k   = E([A(f_t), R(T_t+k)])

E is the same in both and never trained; patches that are kept keep their position code; they are chosen before the
first block, after which attention is dense over what is left. Only A learns, from E's own features of the P-frames:
matched with texts, they shall say what the full ones say (`distillation_loss`).

With r the cost of a P-frame over that of an I-frame, about 1 - p, a frame costs (1 + N r) / (N + 1) of the full one.

Sizes: video [B, T, C, H, W] -> [B, T, D]; A: D -> dim of the tokens; kept: max(1, round((1 - p) n)) of n patches.

    >>> vit = ViT((32, 32), patch=4, dim=64, depth=2, heads=4, out=32)
    >>> encoder = DenseVideoEncoder(vit, between=2, drop=0.85)
    >>> video = torch.rand(2, 7, 3, 32, 32)
    >>> encoder(video).shape, sum(p.requires_grad for p in encoder.parameters())
    (torch.Size([2, 7, 32]), 2)
    >>> feature, state = encoder.step(video[:, 0])
    >>> feature, state = encoder.step(video[:, 1], state)
    >>> feature.shape
    torch.Size([2, 32])

Any encoder will do that has `tokens(frames, keep)` and `encode(tokens)`, as `ViT` has, and says `patch`, `dim`, `out`.

Measured (an encoder of 32 x 32 pixels, a shape that walks past a still one, N = 2, p = 0.85, 300 steps for A; cosine
of P-features with full ones): motion 0.89, without the residual token 0.67; random 0.77, without it 0.23; f_t itself
0.84. A wants to learn from such patches as it is used with: taught at random and asked by motion it gives 0.75. Six
layers of 196 patches: r = 0.139 and 0.426 of the work; on one core a clip takes 2.2 to 2.8 times less time, frame by
frame 1.6 to 2.1 times less.

Motion is the difference in grey from the frame before, which needs no codec. The released code (Soldelli/residualvit at
f07a70c0) sums motion vectors over each patch, and learns from patches dropped at random, p = 0.85, N = 3. With equal
weights and equal patches, uniform or by motion, its features and these differ by at most 1e-6 in float32, 2e-15 in
float64; its centre is another, being off by part of a row. Left out: merging of tokens and frames of lower resolution
in place of R; CLIP, grounding, localisation and audio description.

Paper: Soldan, Caba Heilbron, Ghanem, Sivic, Russell 2025, "ResidualViT for Efficient Temporally Dense Video Encoding",
arXiv 2509.13255.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, Block, PatchEmbed, Stack
from chronotope.papers.registry import paper
from chronotope.papers.stream.ttf_vla import patch_change

Frames = Float[Tensor, "b c height width"]
Features = Float[Tensor, "b out"]


@runtime_checkable
class Selector(Protocol):
    """Which patches of a P-frame are kept: their numbers [M, keep], in any order."""

    def __call__(
        self,
        frames: Float[Tensor, "m c height width"],
        before: Float[Tensor, "m c height width"],
        number: Int64[Tensor, "m"],
        patch: int,
        keep: int,
    ) -> Int64[Tensor, "m keep"]:
        """`before`: the frame before each; `number`: how many frames of its video came before it."""
        ...


def motion(frames: Tensor, before: Tensor, number: Tensor, patch: int, keep: int) -> Tensor:
    """The patches that changed most; those that changed as much, in an order that is drawn once and scattered."""
    change = patch_change(frames, before, patch)
    order = torch.randperm(change.shape[1], generator=torch.Generator().manual_seed(0)).to(frames.device)
    return order[change[:, order].argsort(dim=1, descending=True, stable=True)[:, :keep]]


def uniform(frames: Tensor, before: Tensor, number: Tensor, patch: int, keep: int) -> Tensor:
    """Patches at equal steps along the rows of the frame."""
    last = math.prod(_cells(frames, patch)) - 1
    return (torch.arange(keep, device=frames.device) * last // max(keep - 1, 1)).expand(len(frames), -1)


def center(frames: Tensor, before: Tensor, number: Tensor, patch: int, keep: int) -> Tensor:
    """The patches nearest to the centre of the frame."""
    cells = Grid(h=frames.shape[2] // patch, w=frames.shape[3] // patch)
    far = cells.coords(frames.device) - torch.tensor(cells.shape, device=frames.device) / 2 + 0.5
    return far.square().sum(1).argsort(stable=True)[:keep].expand(len(frames), -1)


@dataclass(frozen=True)
class Random:
    """Patches at random. seed: the frame's number decides, whatever comes before or beside it; None: drawn anew."""

    seed: int | None = None

    def __call__(self, frames: Tensor, before: Tensor, number: Tensor, patch: int, keep: int) -> Tensor:
        cells = math.prod(_cells(frames, patch))
        if self.seed is None:
            return torch.rand(len(frames), cells, device=frames.device).argsort(dim=1)[:, :keep]
        drawn = {}
        for n in number.unique().tolist():
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + n)
            drawn[n] = torch.randperm(cells, generator=rng)[:keep]
        return torch.stack([drawn[n] for n in number.tolist()]).to(frames.device)


SELECTORS: dict[str, Selector] = {"motion": motion, "random": Random(), "uniform": uniform, "center": center}


class ViT(nn.Module):
    """f = W norm(blocks(norm([class, tokens])))[class]: the form of CLIP's image encoder, of any set of patches.

    size: (H, W) of a frame. patch: pixels along a side of a patch. out: D, features of a frame; default `dim`.
    """

    def __init__(
        self,
        size: tuple[int, int],
        patch: int = 16,
        dim: int = 192,
        depth: int = 6,
        heads: int = 3,
        out: int | None = None,
        channels: int = 3,
    ):
        super().__init__()
        self.patch, self.dim, self.out = patch, dim, dim if out is None else out
        self.embed = PatchEmbed(dim, patch, channels)
        cells = self.embed.grid(torch.empty(1, 1, channels, *size)).size
        self.first = nn.Parameter(torch.randn(dim) / math.sqrt(dim))
        self.place = nn.Parameter(torch.randn(cells, dim) / math.sqrt(dim))
        self.enter = nn.LayerNorm(dim)
        self.blocks = Stack([Block([Attention(dim, heads)], mlp="gelu") for _ in range(depth)])
        self.leave = nn.Linear(dim, self.out, bias=False)

    def tokens(self, frames: Frames, keep: Int64[Tensor, "b m"] | None = None) -> Float[Tensor, "b n dim"]:
        """The patches of frames, or those of these numbers, with their position code."""
        h, w = self.embed.grid(frames[:, None]).shape[1:]
        x = frames.unflatten(3, (w, -1)).unflatten(2, (h, -1)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        if keep is None:
            return self.embed.project(x) + self.place
        return self.embed.project(x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))) + self.place[keep]

    def encode(self, tokens: Float[Tensor, "b m dim"]) -> Features:
        """The feature of some tokens; their order does not matter."""
        x = torch.cat((self.first.expand(len(tokens), 1, -1), tokens), 1)
        return self.leave(self.blocks(self.enter(x), Grid(n=x.shape[1]))[:, 0])

    def forward(self, frames: Frames) -> Features:
        """The features of whole frames."""
        return self.encode(self.tokens(frames))


@dataclass(frozen=True)
class DenseVideoState(Carried):
    """The feature of the last I-frame, the last frame, and how many frames there were."""

    feature: Float[Tensor, "b out"]
    frame: Frames
    count: int


@paper(
    system=203,
    name="ResidualViT",
    family="stream",
    claim="dense frame features: between full frames, few moving patches and a learned token of the last full feature",
    evidence=["tests/papers/stream/test_residual_vit.py"],
)
class DenseVideoEncoder(nn.Module):
    """Features of every frame, one in N + 1 in full. The encoder given is frozen: its weights get no gradient.

    Args:
        vit: what has `tokens`, `encode`, `patch`, `dim` and `out`, such as a `ViT`.
        between: N, P-frames after each I-frame.
        drop: p, the share of patches that a P-frame drops.
        selector: which are kept: "motion", "random", "uniform", "center", or a `Selector`.
        residual: makes the map A from (D, dim), the only thing to train; None: no residual token.
    """

    def __init__(
        self,
        vit: nn.Module,
        between: int = 2,
        drop: float | int = 0.85,
        selector: str | Selector = "motion",
        residual: Callable[[int, int], nn.Module] | None = nn.Linear,
    ):
        super().__init__()
        if between < 0 or not 0 <= drop < 1:
            raise ChronotopeError(f"between={between}, drop={drop}: expected between from 0 on and 0 <= drop < 1.")
        if isinstance(selector, str) and selector not in SELECTORS:
            raise ChronotopeError(f"selector={selector!r}: expected one of {', '.join(SELECTORS)}, or a Selector.")
        self.vit, self.between, self.drop = vit.requires_grad_(False), between, drop
        self.selector = SELECTORS[selector] if isinstance(selector, str) else selector
        self.residual = None if residual is None else residual(vit.out, vit.dim)  # type: ignore[arg-type]

    def forward(self, video: Float[Tensor, "b t c height width"]) -> Float[Tensor, "b t out"]:
        """The features of a video, whose first frame is an I-frame."""
        b, t = video.shape[:2]
        if t == 0:
            raise ChronotopeError(f"video of shape {list(video.shape)}: expected at least one frame.")
        every = self.between + 1
        full = self._full(video[:, ::every].flatten(0, 1)).unflatten(0, (b, -1))
        features = full.repeat_interleave(every, 1)[:, :t]
        number = torch.arange(t, device=video.device)
        late = number[number % every > 0]
        if not len(late):
            return features
        frames, before, last = (x.flatten(0, 1) for x in (video[:, late], video[:, late - 1], features[:, late]))
        return features.index_copy(1, late, self._partial(frames, before, last, late.repeat(b)).unflatten(0, (b, -1)))

    def step(self, frame: Frames, state: DenseVideoState | None = None) -> tuple[Features, DenseVideoState]:
        """The feature of the next frame, and the state after it; state None: it is the first."""
        count = 0 if state is None else state.count
        if state is None or count % (self.between + 1) == 0:
            feature = last = self._full(frame)
        else:
            last = state.feature
            number = torch.full((len(frame),), count, device=frame.device)
            feature = self._partial(frame, state.frame, last, number)
        # A copy: the caller may write its next frame over this one.
        return feature, DenseVideoState(last, frame.clone(), count + 1)

    @torch.no_grad()
    def _full(self, frames: Tensor) -> Tensor:
        return self.vit.encode(self.vit.tokens(frames))  # type: ignore[operator, no-any-return]

    def _partial(self, frames: Tensor, before: Tensor, last: Tensor, number: Tensor) -> Tensor:
        with torch.no_grad():
            patch = int(self.vit.patch)  # type: ignore[arg-type]
            keep = max(1, round((1 - self.drop) * math.prod(_cells(frames, patch))))
            tokens = self.vit.tokens(frames, self.selector(frames, before, number, patch, keep))  # type: ignore[operator]
        if self.residual is not None:
            tokens = torch.cat((self.residual(last)[:, None], tokens), 1)
        return self.vit.encode(tokens)  # type: ignore[operator, no-any-return]


def distillation_loss(
    student: Float[Tensor, "m out"],
    teacher: Float[Tensor, "m out"],
    texts: Float[Tensor, "k out"],
    scale: float = 100.0,
) -> Float[Tensor, ""]:
    """Cross-entropy between what the features of frames say about texts, by their cosines: softmax(scale cos)."""
    student, teacher, texts = (F.normalize(x, dim=1) for x in (student, teacher, texts))
    return F.cross_entropy(scale * student @ texts.T, (scale * teacher @ texts.T).softmax(1))


def _cells(frames: Tensor, patch: int) -> tuple[int, int]:
    return frames.shape[2] // patch, frames.shape[3] // patch
