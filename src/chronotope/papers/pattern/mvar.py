"""MVAR: next-scale generation in which a scale looks at the scale before it, and a place at its neighbourhood.

    p(r_1 .. r_L) = p(r_1) prod_l p(r_l | r_{l-1})
    f_l = up(f_{l-1}) + codebook[token_l]              the state that a scale hands on, [B, h_l * w_l, features]
    x_l = embed(up(f_{l-1})) + place + scale           input of scale l; scale 1 starts from the class
    S_i = [q_i . k_eta(1), .., q_i . k_eta(k)]         the k places nearest to i on the grid of the scale

Tokens of scale l attend to places that carry r_{l-1} only, so scales are independent items of training, nothing is
cached in sampling, and the scores are sum_l N_l min(k, N_l) in place of (sum_l N_l)^2. The neighbourhood is
window(edge="shift"), dense where the scale is no larger; class conditioning (adaLN) and MLP are those of VAR.

Sizes: levels: sides of the square maps; tokens of level l [B, N_l] int64, features [B, N_l, F], logits [B, N_l, V].

    model = ScaleMarkovAR(torch.randn(16, 4), levels=(1, 2, 3, 4), window=3, classes=10)
    states = model.sample(torch.tensor([3, 7]))       # one [2, N_l, 4] for each level
    model.loss(tokens, states, label, levels=[2])     # level 2 alone

The paper's window could not be confirmed: 7 x 7 is the default here. Left out: the tokenizer, ImageNet, the published
3.0x memory, which is of their models.

Paper: Zhang et al., MVAR: Visual Autoregressive Modeling with Scale and Spatial Markovian Conditioning, 2025
(arXiv 2505.12742).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, window

Tokens = Int64[Tensor, "b _"]
Features = Float[Tensor, "b _ f"]
Hidden = Float[Tensor, "b n c"]


def nearest(side: int, size: int) -> Pattern:
    """The size x size places nearest to the query on a side x side map; all of a map that is not larger."""
    size = min(size, side)
    span = (size // 2, size - 1 - size // 2)
    return window(h=span, w=span, edge="shift")


def resize(state: Features, side: int) -> Float[Tensor, "b _ f"]:
    """A square map of features at another side, bilinear (down: mean of areas)."""
    old = round(state.shape[1] ** 0.5)
    image = state.transpose(1, 2).unflatten(2, (old, old))
    if side <= old:
        return F.adaptive_avg_pool2d(image, side).flatten(2).transpose(1, 2)
    return F.interpolate(image, size=(side, side), mode="bilinear").flatten(2).transpose(1, 2)


class LevelAttention(nn.Module):
    """Neighbourhood attention inside each of the levels that lie one after another in the tokens."""

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Hidden, sides: Sequence[int]) -> Hidden:
        """x [B, sum of side^2, C] -> the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v, sides).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sides: Sequence[int]) -> Tensor:
        """[B, heads, tokens, d], level by level."""
        counts = [side * side for side in sides]
        each = zip(sides, *(y.split(counts, 2) for y in (q, k, v)), strict=True)
        outs = [attention(a, b, c, grid=Grid(h=n, w=n), where=nearest(n, self.window)) for n, a, b, c in each]
        return torch.cat(outs, 2)  # type: ignore[arg-type]


class Block(nn.Module):
    """x + g1 * attention(s1 * LN x + t1), then x + g2 * MLP(s2 * LN x + t2); the six come from the class (adaLN)."""

    def __init__(self, dim: int, heads: int, window: int, mlp: int):
        super().__init__()
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.attend = LevelAttention(dim, heads, window)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp * dim), nn.GELU(), nn.Linear(mlp * dim, dim))

    def forward(self, x: Hidden, condition: Float[Tensor, "b c"], sides: Sequence[int]) -> Hidden:
        """x [B, N, C], condition [B, C] -> [B, N, C]."""
        g1, g2, s1, s2, t1, t2 = self.modulate(condition)[:, None].chunk(6, -1)
        x = x + g1 * self.attend((1 + s1) * self.norm(x) + t1, sides)
        return x + g2 * self.mlp((1 + s2) * self.norm(x) + t2)


@paper(
    system=34,
    name="MVAR",
    family="pattern",
    claim="next-scale generation: a scale sees the one before it only, a token its k neighbours; no cache",
    evidence=["tests/papers/pattern/test_mvar.py"],
)
class ScaleMarkovAR(nn.Module):
    """Logits of the tokens of each level from the state of the level before it and the class.

    codebook: [V, F], the features that a token adds to the state; not trained here. levels: sides of the maps.
    window: side of the neighbourhood. classes: number of classes.
    """

    codebook: Tensor

    def __init__(
        self,
        codebook: Float[Tensor, "v f"],
        levels: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        window: int = 7,
        dim: int = 64,
        heads: int = 4,
        depth: int = 2,
        classes: int = 1,
        mlp: int = 4,
    ):
        super().__init__()
        if dim % heads or list(levels) != sorted(levels) or not levels:
            raise ChronotopeError(
                f"ScaleMarkovAR: dim={dim} must be a multiple of heads={heads}, levels={levels} ascend."
            )
        self.levels = tuple(levels)
        self.register_buffer("codebook", codebook)
        self.classes, self.embed = nn.Embedding(classes, dim), nn.Linear(codebook.shape[1], dim)
        self.scale = nn.Embedding(len(levels), dim)
        self.place = nn.ParameterList(0.02 * torch.randn(side * side, dim) for side in levels)
        self.blocks = nn.ModuleList(Block(dim, heads, window, mlp) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, len(codebook))

    def forward(
        self, previous: Sequence[Features | None], label: Int64[Tensor, "b"], levels: Sequence[int] | None = None
    ) -> list[Float[Tensor, "b _ v"]]:
        """Logits of the levels (indices; default: all) from the state before each, None before level 0."""
        levels = range(len(self.levels)) if levels is None else levels
        if len(previous) != len(levels):
            raise ChronotopeError(f"ScaleMarkovAR: {len(previous)} states for {len(levels)} levels; give one for each.")
        condition = self.classes(label)
        x = torch.cat([self._input(level, state, condition) for level, state in zip(levels, previous, strict=True)], 1)
        sides = [self.levels[level] for level in levels]
        for block in self.blocks:
            x = block(x, condition, sides)
        return list(self.head(self.norm(x)).split([side * side for side in sides], 1))

    def _input(self, level: int, state: Tensor | None, condition: Tensor) -> Tensor:
        if (state is None) != (level == 0):
            raise ChronotopeError(
                f"ScaleMarkovAR: level {level} needs the state of the level before it; level 0 has none."
            )
        x = condition[:, None] if state is None else self.embed(resize(state, self.levels[level]))
        return x + self.place[level] + self.scale.weight[level]

    def loss(
        self,
        tokens: Sequence[Tokens],
        states: Sequence[Features],
        label: Int64[Tensor, "b"],
        levels: Sequence[int] | None = None,
    ) -> Float[Tensor, ""]:
        """Negative log-likelihood of the levels, in nats per item; tokens and states are those of all levels."""
        levels = range(len(self.levels)) if levels is None else levels
        logits = self([states[level - 1] if level else None for level in levels], label, levels)
        nats = [
            F.cross_entropy(y.flatten(0, 1), tokens[n].flatten(), reduction="sum")
            for n, y in zip(levels, logits, strict=True)
        ]
        return torch.stack(nats).sum() / len(label)

    def add(self, state: Features | None, tokens: Tokens, level: int) -> Float[Tensor, "b _ f"]:
        """f_l = up(f_{l-1}) + codebook[tokens]."""
        new = self.codebook[tokens]
        return new if state is None else resize(state, self.levels[level]) + new

    @torch.no_grad()
    def sample_level(
        self, level: int, state: Features | None, label: Int64[Tensor, "b"], seed: int = 0
    ) -> Float[Tensor, "b _ f"]:
        """The state of one level, drawn from the state before it and the class: nothing else is needed."""
        generator = torch.Generator(label.device).manual_seed(seed * len(self.levels) + level)
        share = self([state], label, [level])[0].softmax(-1)
        tokens = torch.multinomial(share.flatten(0, 1), 1, generator=generator).view(share.shape[:2])
        return self.add(state, tokens, level)

    def sample(self, label: Int64[Tensor, "b"], seed: int = 0) -> list[Float[Tensor, "b _ f"]]:
        """The states of all levels, drawn one after another; the last is the picture in features."""
        states: list[Tensor] = []
        for level in range(len(self.levels)):
            states.append(self.sample_level(level, states[-1] if states else None, label, seed))
        return states
