"""Where a token is, written into queries and keys by rotation, so that their product knows differences only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid

Offset = Mapping[str, float | int]


@dataclass(frozen=True, init=False)
class Rope:
    """Rotary position code over named axes.

    Pair i of the n pairs of an axis turns by the angle x * base^(-i / n) at coordinate x; so the product of a rotated
    query and a rotated key depends on the difference of their coordinates only, and codes do not change when an axis
    grows. Of a head of size D the first R channels are rotated, the pair of channel c being (c, c + R / 2), the axes
    in order; the other channels pass.

    Args:
        axes: names of the axes, such as ("t", "h", "w").
        base: the longest wavelength is about 2 pi * base tokens.
        share: the part of the pairs that each axis gets, such as {"t": 0.5, "h": 0.25, "w": 0.25}; adding up to 1 or
            less. Default: equal parts. Parts are rounded down to whole pairs.

    `rope(x, grid)` rotates x [B, H, grid.size, D]; prefix tokens have no place and pass. `rope(x, coords=c)` takes
    coordinates of its own, float [N, axes] or [B, N, axes]: timestamps, or the places of one grid on another
    (`rope.coords(grid, onto=other)`). `offset={"t": 7}` moves the coordinates: a slice at time 7.

    Example:
        >>> rope = Rope(axes=("t", "h", "w"))
        >>> rope(torch.randn(2, 4, 8 * 6 * 6, 32), Grid(t=8, h=6, w=6)).shape
        torch.Size([2, 4, 288, 32])

    Raises ChronotopeError: an axis that the grid lacks, a head with fewer pairs than one for each axis, coordinates
    of another shape.

    Source: Su et al. 2021 (arXiv 2104.09864), one rotation for each axis.
    """

    axes: tuple[str, ...]
    base: float
    share: tuple[float, ...]

    def __init__(
        self,
        axes: tuple[str, ...] | str = ("t", "h", "w"),
        base: float | int = 10000.0,
        share: Mapping[str, float | int] | None = None,
    ):
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        if not axes or len(set(axes)) < len(axes):
            raise ChronotopeError(f"Rope(axes={axes!r}): expected different names of axes, such as ('t', 'h', 'w').")
        if not base > 1:
            raise ChronotopeError(f"Rope(base={base!r}): expected a number above 1.")
        if share is not None and (
            set(share) != set(axes) or min(share.values()) <= 0 or sum(share.values()) > 1 + 1e-9
        ):
            raise ChronotopeError(
                f"Rope(share={dict(share)!r}): expected a part above 0 for each of the axes {', '.join(axes)}, "
                "adding up to 1 or less."
            )
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "base", float(base))
        object.__setattr__(self, "share", tuple(1 / len(axes) if share is None else float(share[a]) for a in axes))

    def __call__(
        self,
        x: Float[Tensor, "b h n d"],
        grid: Grid | None = None,
        *,
        coords: Tensor | None = None,
        offset: Offset | None = None,
    ) -> Float[Tensor, "b h n d"]:
        """x rotated, in its own dtype. With a grid and coords, the coords are those of the tokens after the prefix."""
        exact = torch.promote_types(x.dtype, torch.float32)
        if coords is None and not offset and grid is not None:
            # A compiler cannot look into a cache; it keeps the table as a constant by itself.
            made = _table if torch.compiler.is_compiling() else _kept_table
            table = made(self, grid, x.shape[3], exact, x.device)
        else:
            table = self._table(self._places(x, grid, coords, offset), x.shape[3], exact)
        cos, sin = table
        prefix = 0 if grid is None else grid.prefix
        if cos.shape[-2] != x.shape[2] - prefix:
            raise ChronotopeError(f"Rope: {cos.shape[-2] + prefix} coordinates for x of shape {list(x.shape)}.")
        return _rotate(x, cos, sin, prefix)

    def coords(
        self, grid: Grid, onto: Grid | None = None, device: torch.device | str | None = None
    ) -> Float[Tensor, "n axes"]:
        """Coordinates of the tokens with a place, float64: a column for each axis of this code.

        With `onto`, the places of `grid` on the axes of another grid of other sizes, centre on centre:
        (x + 0.5) * n_onto / n - 0.5. An axis that one of the two lacks tells nothing: it is 0.
        """
        places = grid.coords(device)[grid.prefix :].double()
        columns = []
        for axis in self.axes:
            if onto is not None and not (axis in grid.axes and axis in onto.axes):
                columns.append(torch.zeros_like(places[:, 0]))
                continue
            grid.require((axis,), repr(self))
            x = places[:, grid.axes.index(axis)]
            ratio = 1.0 if onto is None else onto.sizes[axis] / grid.sizes[axis]
            columns.append(x if ratio == 1 else (x + 0.5) * ratio - 0.5)
        return torch.stack(columns, 1)

    def between(self, grid: Grid, key_grid: Grid) -> tuple[Float[Tensor, "n axes"], Float[Tensor, "nk axes"]]:
        """Coordinates of the tokens of two grids that meet, on the axes of the first: `coords` of both.

        An axis that only one of them has tells nothing: it is 0 in both.
        """
        places, key_places = self.coords(grid, onto=grid), self.coords(key_grid, onto=grid)
        for column, axis in enumerate(self.axes):
            if axis not in grid.axes and axis not in key_grid.axes:
                grid.require((axis,), repr(self))
            if axis not in key_grid.axes:
                places[:, column] = 0
        return places, key_places

    def pairs(self, head_dim: int) -> dict[str, int]:
        """Channel pairs that each axis gets in a head of this size."""
        # The small number keeps 0.3 * 10 from being 2.
        out = {axis: int(head_dim // 2 * part + 1e-6) for axis, part in zip(self.axes, self.share, strict=True)}
        if min(out.values()) < 1:
            raise ChronotopeError(
                f"{self!r}: a head of size {head_dim} has {head_dim // 2} pairs of channels, which leaves {out}; "
                "every axis needs 1 pair or more. Use a larger head, fewer axes or other shares."
            )
        return out

    def _places(self, x: Tensor, grid: Grid | None, coords: Tensor | None, offset: Offset | None) -> Tensor:
        if coords is None:
            if grid is None:
                raise ChronotopeError("Rope: give a grid, or coords of shape [N, axes].")
            coords = self.coords(grid, device=x.device)
        elif coords.ndim not in (2, 3) or coords.shape[-1] != len(self.axes):
            raise ChronotopeError(
                f"Rope: coords of shape {list(coords.shape)}; expected [N, {len(self.axes)}] or "
                f"[B, N, {len(self.axes)}] for the axes {', '.join(self.axes)}."
            )
        coords = coords.to(x.device, torch.float64)
        unknown = [axis for axis in offset or () if axis not in self.axes]
        if unknown:
            raise ChronotopeError(f"Rope: offset={dict(offset or {})!r} names {unknown}, the code is over {self.axes}.")
        if offset:
            coords = coords + coords.new_tensor([float(offset.get(axis, 0)) for axis in self.axes])
        return coords

    def _table(self, coords: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles, [N, R / 2] or [B, 1, N, R / 2]; angles in float64, for large times."""
        angles = []
        for column, n in enumerate(self.pairs(head_dim).values()):
            speed = self.base ** (-torch.arange(n, dtype=torch.float64, device=coords.device) / n)
            angles.append(coords[..., column, None] * speed)
        angle = torch.cat(angles, -1)
        angle = angle if angle.ndim == 2 else angle[:, None]
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def __repr__(self) -> str:
        base = "" if self.base == 10000.0 else f", base={self.base:g}"
        equal = self.share == (1 / len(self.axes),) * len(self.axes)
        share = "" if equal else f", share={dict(zip(self.axes, self.share, strict=True))}"
        return f"Rope(axes={self.axes!r}{base}{share})"


def _table(rope: Rope, grid: Grid, head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return rope._table(rope.coords(grid, device=device), head_dim, dtype)


@lru_cache(maxsize=64)
def _kept_table(
    rope: Rope, grid: Grid, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    # A table made in inference mode could not be used by a later training step.
    with torch.inference_mode(False), torch.no_grad():
        return _table(rope, grid, head_dim, dtype, device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, prefix: int) -> Tensor:
    half = cos.shape[-1]
    body = x[:, :, prefix:].to(cos.dtype)
    a, b, rest = body.split((half, half, x.shape[3] - 2 * half), -1)
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin), rest
    out = torch.cat(turned, -1).to(x.dtype)
    return torch.cat((x[:, :, :prefix], out), 2) if prefix else out
