r"""Points into latent sets and back, for each frame, by attention.

$$ z = q + A(q, p), \quad z \mathrel{+}= \mathrm{MLP}(z), \qquad o = W A(\mathrm{e}(\mathrm{query}), B(z)) $$

p are codes of all points, q those of M of them that lie far apart; B is a stack of blocks over the M latents of a
frame. Of two clouds whose points belong to each other, those of the first frame and of frame t, the codes stand side by
side, and q are the same points in all frames. Source: Zhang et al. 2023, 3DShape2VecSet (arXiv 2301.11445).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, Block, FeedForward
from chronotope.patterns import along


class PointCode(nn.Module):
    """W (sin(2^i pi x), cos(2^i pi x), x), i = 0 .. waves - 1, on each of the axes of a point."""

    def __init__(self, dim: int, axes: int = 3, waves: int = 8):
        super().__init__()
        self.waves, self.project = waves, nn.Linear(axes * (2 * waves + 1), dim)

    def forward(self, points: Float[Tensor, "*b n axes"]) -> Float[Tensor, "*b n c"]:
        """A vector for each point."""
        speed = math.pi * 2.0 ** torch.arange(self.waves, device=points.device, dtype=points.dtype)
        angle = (points[..., None] * speed).flatten(-2)
        return self.project(torch.cat((angle.sin(), angle.cos(), points), -1))  # type: ignore[no-any-return]


class Look(nn.Module):
    """Attention in one head from the tokens of a frame to other tokens of the same frame, after a norm of both."""

    def __init__(self, dim: int):
        super().__init__()
        self.inner = Attention(dim, 1, where=along("m"), biases=True)
        self.norms = nn.ModuleList((nn.LayerNorm(dim), nn.LayerNorm(dim)))

    def forward(self, x: Float[Tensor, "b t m c"], source: Float[Tensor, "b t k c"]) -> Float[Tensor, "b t m c"]:
        """What each token finds."""
        grid, other = Grid(t=x.shape[1], m=x.shape[2]), Grid(t=x.shape[1], m=source.shape[2])
        there = self.norms[1](source).flatten(1, 2), other
        return self.inner(self.norms[0](x).flatten(1, 2), grid, there).view_as(x)  # type: ignore[no-any-return]


class SetEncoder(nn.Module):
    """Clouds of points of each frame -> M vectors for each frame.

    Args:
        dim: channels of the vectors.
        axes: coordinates of a point.
        clouds: 1, or 2 whose points belong to each other; each takes an equal part of the channels.

    Example:
        >>> encoder = SetEncoder(32, clouds=2)
        >>> encoder([torch.randn(2, 5, 40, 3), torch.randn(2, 5, 40, 3)], count=16).shape
        torch.Size([2, 5, 16, 32])
    """

    def __init__(self, dim: int, axes: int = 3, clouds: int = 1):
        super().__init__()
        if dim % clouds:
            raise ChronotopeError(f"SetEncoder(dim={dim}, clouds={clouds}): expected a multiple of the clouds.")
        self.clouds, self.code = clouds, PointCode(dim // clouds, axes)
        self.look, self.norm, self.mlp = Look(dim), nn.LayerNorm(dim), FeedForward(dim, "swiglu", 6.0, biases=True)

    def forward(
        self,
        clouds: Sequence[Float[Tensor, "b t n axes"]],
        count: int,
        chosen: Int64[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b t m c"]:
        """`chosen`: which points ask; default: `count` of the first cloud's first frame that lie far apart."""
        if len(clouds) != self.clouds:
            raise ChronotopeError(f"SetEncoder has {self.clouds} clouds, got {len(clouds)}.")
        chosen = farthest_points(clouds[0][:, 0], count) if chosen is None else chosen
        points = torch.cat([self.code(cloud) for cloud in clouds], -1)
        index = chosen[:, None, :, None].expand(-1, points.shape[1], -1, points.shape[3])
        asking = points.gather(2, index)
        x = asking + self.look(asking, points)
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


class SetDecoder(nn.Module):
    """Sets, and points to ask about -> a vector for each point: where it went, or whether it is inside.

    Args:
        channels: of a latent.
        dim, depth, heads: of the blocks over the latents of a frame.
        out, axes: channels of an answer, coordinates of a point.

    Example:
        >>> decoder = SetDecoder(channels=4, dim=32, depth=2, heads=2, out=3)
        >>> decoder(torch.randn(2, 5, 16, 4), torch.randn(2, 5, 100, 3)).shape
        torch.Size([2, 5, 100, 3])
    """

    def __init__(self, channels: int, dim: int, depth: int, heads: int, out: int = 3, axes: int = 3):
        super().__init__()
        self.enter, self.code = nn.Linear(channels, dim), PointCode(dim, axes)
        self.blocks = nn.ModuleList(
            Block([Attention(dim, heads, where=along("m"), biases=True)], mlp_ratio=6.0, drop_path=0.1)
            for _ in range(depth)
        )
        self.look, self.leave = Look(dim), nn.Linear(dim, out)

    def forward(
        self, sets: Float[Tensor, "b t m c"], points: Float[Tensor, "b t q axes"]
    ) -> Float[Tensor, "b t q out"]:
        """Each answer depends on its own point and the set of its frame."""
        x, grid = self.enter(sets.flatten(1, 2)), Grid(t=sets.shape[1], m=sets.shape[2])
        for block in self.blocks:
            x = block(x, grid)
        return self.leave(self.look(self.code(points), x.unflatten(1, grid.shape)))  # type: ignore[no-any-return]


@torch.no_grad()
def farthest_points(points: Float[Tensor, "b n axes"], count: int) -> Int64[Tensor, "b count"]:
    """Indices of points, the first one and then always that which is farthest from those before it."""
    if not 1 <= count <= points.shape[1]:
        raise ChronotopeError(f"farthest_points(count={count}): expected 1 to {points.shape[1]}, the points there are.")
    chosen = [torch.zeros(len(points), dtype=torch.int64, device=points.device)]
    nearest = torch.full(points.shape[:2], torch.inf, device=points.device, dtype=points.dtype)
    for _ in range(count - 1):
        last = points.gather(1, chosen[-1][:, None, None].expand(-1, 1, points.shape[2]))
        nearest = nearest.minimum((points - last).square().sum(-1))
        chosen.append(nearest.argmax(1))
    return torch.stack(chosen, 1)
