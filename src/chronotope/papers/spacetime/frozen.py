r"""Frozen in Time: one encoder for pictures and clips, which starts as that of pictures; and text beside it.

$$
t = x + A_t(\mathrm{LN}_3(x)), \quad y = x + A_s(\mathrm{LN}_1(t)), \quad z = y + \mathrm{MLP}(\mathrm{LN}_2(y))
$$

A_t attends over the frames of a place, A_s over the places of a frame; in both, every patch also sees the class token,
and the class token sees everything. The residual of A_s is x and not t (`residual="timesformer"`: t). Tokens start as

$$ x_{f,s} = W p_{f,s} + P_s + T_f, \qquad x_{cls} = c + P_{cls} $$

with P of places and T of frames learned, so that a clip of any F <= frames works, and a picture is a clip of one frame.
At first A_t adds nothing. `time_init="values"` is the published start: its query, key and value weights 0, those of its
output 1. But what such an output adds is equal in all channels, which every LayerNorm after it takes out again, so that
no gradient but rounding reaches the values. The default `time_init="output"` has an output of 0 instead, whose gradient
is not. The embedding is W' LN(x_cls); clips and texts meet in

$$
\ell = -\frac1B \sum_i \Big(\log \frac{e^{v_i \cdot c_i / \tau}}{\sum_j e^{v_i \cdot c_j / \tau}}
+ \log \frac{e^{v_i \cdot c_i / \tau}}{\sum_j e^{v_j \cdot c_i / \tau}}\Big), \qquad |v| = |c| = 1, \quad \tau = 0.05
$$

Sizes: clips [B, F, C, H, W] -> [B, size]. F S (F + S + 2) pairs of patches, and those of the class token, for (F S)^2.

    >>> model = FrozenInTime(places=(4, 4), patch=4, channels=3, dim=32, heads=2, layers=2, frames=8, size=16)
    >>> model(torch.rand(2, 5, 3, 16, 16)).shape
    torch.Size([2, 16])

`longer(frames)` is the same model for longer clips, its table of frames extended by zeros or by interpolation.

Left out: the text encoder (DistilBERT, any module that makes [B, size] takes its place), the curriculum from 1 to 4
frames (which `longer` serves), weights. The names of a ViT in timm are mapped by `vit_weights`.

Checked beside the authors' code (commit e1f13e1, weights copied, 2 layers of width 32, 3 of 4 frames): features of the
class token differ by 1.6e-7 at most, 5.6e-16 in float64.

Paper: Max Bain, Arsha Nagrani, Gul Varol, Andrew Zisserman, "Frozen in Time: A Joint Video and Image Encoder for
End-to-End Retrieval", 2021, arXiv 2104.00650.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.attention import Attention
from chronotope.nn.feedforward import FeedForward
from chronotope.nn.mixer import Context, Whole
from chronotope.nn.patches import PatchEmbed
from chronotope.papers.registry import paper
from chronotope.patterns import along
from chronotope.saving import Saved

Start = Literal["output", "values", "random"]
TEMPERATURE = 0.05
EPS = 1e-6  # of the norms of a ViT


class FrozenBlock(Whole):
    """z of the formula, on Grid(t, h, w, prefix=1)."""

    why = "a frame sees those after it"

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        residual: Literal["frozen", "timesformer"] = "frozen",
        time_init: Start = "output",
        mlp_ratio: float | int = 4.0,
    ):
        super().__init__()
        self.dim, self.residual = dim, residual
        self.time = Attention(dim, heads, where=along("t"), biases=True)
        self.space = Attention(dim, heads, where=along("h", "w"), biases=True)
        self.time_norm, self.space_norm, self.mlp_norm = (nn.LayerNorm(dim, eps=EPS) for _ in range(3))
        self.mlp = FeedForward(dim, "gelu", mlp_ratio, biases=True)
        if time_init == "values":
            for values, start in ((self.time.qkv, 0.0), (self.time.out, 1.0)):
                nn.init.constant_(values.weight, start)
                nn.init.zeros_(values.bias)
        elif time_init == "output":
            nn.init.zeros_(self.time.out.weight)
            nn.init.zeros_(self.time.out.bias)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All frames at once. Takes no context."""
        t = x + self.time(self.time_norm(x), grid)
        x = (x if self.residual == "frozen" else t) + self.space(self.space_norm(t), grid)
        return x + self.mlp(self.mlp_norm(x))


@paper(
    system=75,
    name="Frozen in Time",
    family="spacetime",
    claim="one encoder for clips and pictures; attention over time starts by adding nothing",
    evidence=["tests/papers/spacetime/test_frozen.py"],
    missing="with the published start no gradient reaches attention over time, since LayerNorm takes out what is equal "
    "in all channels: the default starts otherwise",
)
class FrozenInTime(Saved):
    """Embeddings of clips [B, F, C, H, W], F from 1 to `frames`.

    Args:
        places: patches of a frame, (h, w).
        patch, channels: pixels of a patch on each side, channels of a frame.
        dim, heads, layers: of the blocks.
        frames: the longest clip.
        size: channels of an embedding.
        residual, time_init: as for `FrozenBlock`.
    """

    def __init__(
        self,
        places: tuple[int, int] | list[int] = (14, 14),
        patch: int = 16,
        channels: int = 3,
        dim: int = 768,
        heads: int = 12,
        layers: int = 12,
        frames: int = 4,
        size: int = 256,
        residual: Literal["frozen", "timesformer"] = "frozen",
        time_init: Start = "output",
    ):
        super().__init__()
        self.embed = PatchEmbed(dim, patch, channels)
        self.shape = tuple(places)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.place = nn.Parameter(torch.zeros(1 + places[0] * places[1], dim))
        self.frame = nn.Parameter(torch.zeros(frames, dim))
        for table in (self.cls, self.place):
            nn.init.trunc_normal_(table, std=0.02)
        self.blocks = nn.ModuleList(
            FrozenBlock(dim, heads, residual=residual, time_init=time_init) for _ in range(layers)
        )
        self.norm, self.project = nn.LayerNorm(dim, eps=EPS), nn.Linear(dim, size)

    def forward(self, clips: Float[Tensor, "b f c height width"]) -> Float[Tensor, "b size"]:
        """W' of the class token."""
        return self.project(self.tokens(clips)[0][:, 0])

    def tokens(self, clips: Float[Tensor, "b f c height width"]) -> tuple[Float[Tensor, "b n dim"], Grid]:
        """The class token and the patches, after all blocks and the norm, and their grid."""
        x, grid = self.embed(clips)
        if grid.shape[1:] != self.shape or grid.shape[0] > len(self.frame):
            raise ChronotopeError(
                f"clips of shape {list(clips.shape)} have {grid!r}; expected {len(self.frame)} frames or fewer of "
                f"{self.shape} patches; `longer(frames)` is a model for longer clips."
            )
        code = self.place[1:] + self.frame[: grid.shape[0], None]
        cls = (self.cls + self.place[0]).expand(len(x), -1, -1)
        x, grid = (
            torch.cat((cls, x + code.flatten(0, 1)), 1),
            Grid(t=grid.shape[0], h=grid.shape[1], w=grid.shape[2], prefix=1),
        )
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x), grid

    def longer(self, frames: int, how: Literal["zeros", "interpolate"] = "zeros") -> FrozenInTime:
        """The same weights for clips of up to `frames` frames. Raises ChronotopeError where that is not longer."""
        now = len(self.frame)
        if frames < now:
            raise ChronotopeError(f"longer({frames}): this model takes {now} frames already; give {now} or more.")
        table = F.pad(self.frame.detach(), (0, 0, 0, frames - now))
        if how == "interpolate":
            table = F.interpolate(self.frame.detach().T[None], frames, mode="linear", align_corners=True)[0].T
        model = FrozenInTime(**{**self.config, "frames": frames}).to(table)
        model.load_state_dict({**self.state_dict(), "frame": table})
        return model.train(self.training)


def retrieval_loss(
    clips: Float[Tensor, "b size"], texts: Float[Tensor, "b size"], temperature: float = TEMPERATURE
) -> Float[Tensor, ""]:
    """The loss of the formula: each clip finds its text, and each text its clip, among those of the batch."""
    scores = similarity(clips, texts) / temperature
    own = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)


def similarity(clips: Float[Tensor, "b size"], texts: Float[Tensor, "n size"]) -> Float[Tensor, "b n"]:
    """Cosines of all pairs."""
    return F.normalize(clips, dim=1) @ F.normalize(texts, dim=1).T


VIT = {
    r"patch_embed\.proj\.weight": "embed.project.weight",
    r"patch_embed\.proj\.bias": "embed.project.bias",
    r"cls_token": "cls",
    r"pos_embed": "place",
    r"temporal_embed": "frame",
    r"norm\.(\w+)": r"norm.\1",
    r"blocks\.(\d+)\.attn\.(qkv|proj)\.(\w+)": r"blocks.\1.space.\2.\3",
    r"blocks\.(\d+)\.timeattn\.(qkv|proj)\.(\w+)": r"blocks.\1.time.\2.\3",
    r"blocks\.(\d+)\.norm1\.(\w+)": r"blocks.\1.space_norm.\2",
    r"blocks\.(\d+)\.norm2\.(\w+)": r"blocks.\1.mlp_norm.\2",
    r"blocks\.(\d+)\.norm3\.(\w+)": r"blocks.\1.time_norm.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(\w+)": r"blocks.\1.mlp.enter.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(\w+)": r"blocks.\1.mlp.leave.\2",
}
"""Names of timm's ViT, and of the authors' model, and ours."""


def vit_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a ViT of timm, or of the authors, by our names, for `load_state_dict(..., strict=False)`.

    Heads of theirs are left out. Raises ChronotopeError for any other name that has no place here.
    """
    out = {}
    for name, value in weights.items():
        if name.startswith(("head.", "pre_logits.", "fc_norm.")):
            continue
        found = next((re.sub(old, new, name) for old, new in VIT.items() if re.fullmatch(old, name)), None)
        if found is None:
            raise ChronotopeError(
                f"vit_weights: {name!r} has no place in this model; expected the names of timm's ViT."
            )
        value = value.flatten(1) if name == "patch_embed.proj.weight" else value
        out[found.replace(".proj.", ".out.")] = value[0] if name in ("pos_embed", "temporal_embed") else value
    return out
