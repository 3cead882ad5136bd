"""Where tokens are: named integer axes in row-major order, after an optional prefix without a place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils import _pytree as pytree

from chronotope.errors import ChronotopeError

RESERVED = ("axes", "grid", "place")


class Grid:
    """Named integer axes on which tokens lie.

    `Grid(t=8, h=32, w=32, prefix=1)`: one prefix token, then 8 frames of 32 x 32 tokens, row-major.
    The first axis is the one that streams. Prefix tokens (class token, registers, text) have no
    coordinates and come before everything. Grids are values: frozen, hashable, cheap.

    Raises ChronotopeError when an axis is not a positive integer or there is no axis.
    """

    __slots__ = ("axes", "prefix", "shape")
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    prefix: int

    def __init__(self, prefix: int = 0, **axes: int):
        if not axes:
            raise ChronotopeError(
                "Grid() has no axis: name at least one, such as Grid(t=8, h=32, w=32) or Grid(n=4096)."
            )
        for name, size in axes.items():
            if name in RESERVED:
                raise ChronotopeError(
                    f"Grid axis {name!r}: the name means something else on coordinates; take another."
                )
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ChronotopeError(
                    f"Grid axis {name}={size!r}: an axis needs a size of at least 1 token, as an int."
                )
        if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
            raise ChronotopeError(f"Grid prefix={prefix!r}: expected the number of prefix tokens, 0 or more.")
        object.__setattr__(self, "axes", tuple(axes))
        object.__setattr__(self, "shape", tuple(axes.values()))
        object.__setattr__(self, "prefix", prefix)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Grid is frozen; make another one instead of setting {name}.")

    @property
    def places(self) -> int:
        """Number of tokens that have a place: all but the prefix."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of all tokens, prefix included."""
        return self.prefix + self.places

    def __len__(self) -> int:
        return self.size

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> size."""
        return dict(zip(self.axes, self.shape, strict=True))

    def coords(self, device: torch.device | str | None = None) -> Int64[Tensor, "size axes"]:
        """Coordinates of every token in order; prefix rows are -1."""
        out = torch.full((self.size, len(self.axes)), -1, dtype=torch.int64, device=device)
        index = torch.arange(self.places, device=device)
        for column in range(len(self.axes) - 1, -1, -1):
            out[self.prefix :, column] = index % self.shape[column]
            index = index // self.shape[column]
        return out

    def index(self, **coords: int) -> int:
        """Position in token order (prefix counted) of the token at these coordinates."""
        if set(coords) != set(self.axes):
            raise ChronotopeError(
                f"index({_kwargs(coords)}) on {self!r}: give each of the axes {_names(self.axes)} once."
            )
        place = 0
        for name, size in self.sizes.items():
            if not 0 <= coords[name] < size:
                raise ChronotopeError(f"index({name}={coords[name]}) on {self!r}: expected 0 to {size - 1}.")
            place = place * size + coords[name]
        return self.prefix + place

    def replace(self, prefix: int | None = None, **axes: int) -> Grid:
        """The same grid with other sizes on some axes, or another prefix."""
        self.require(axes, "replace")
        return Grid(prefix=self.prefix if prefix is None else prefix, **{**self.sizes, **axes})

    def require(self, axes: Mapping[str, Any] | tuple[str, ...], what: str) -> None:
        """Raises unless every named axis exists here."""
        unknown = [name for name in axes if name not in self.axes]
        if unknown:
            raise ChronotopeError(f"{what} names {_names(unknown)}, but {self!r} has the axes {_names(self.axes)}.")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, which `Grid.from_dict` reads."""
        return {"prefix": self.prefix, "axes": [list(item) for item in self.sizes.items()]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Grid:
        """Reads what `to_dict` wrote."""
        return cls(prefix=data["prefix"], **{str(name): int(size) for name, size in data["axes"]})

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Reads `t=8,h=32,w=32,prefix=1`, or sizes alone: `8,32,32` means t,h,w; `32,32` h,w; `4096` n."""
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if parts and all("=" not in part for part in parts):
            names = {1: ("n",), 2: ("h", "w"), 3: ("t", "h", "w")}.get(len(parts))
            if names is None:
                raise ChronotopeError(f"grid {text!r}: {len(parts)} sizes without names; write t=8,h=32,w=32.")
            parts = [f"{name}={size}" for name, size in zip(names, parts, strict=True)]
        axes: dict[str, int] = {}
        for part in parts:
            name, _, size = part.partition("=")
            name = name.strip()
            if not size.strip().removeprefix("-").isdecimal() or not name.isidentifier():
                raise ChronotopeError(f"grid {text!r}: {part!r} is not of the form axis=size, such as t=8.")
            if name in axes:
                raise ChronotopeError(f"grid {text!r} names the axis {name!r} twice.")
            axes[name] = int(size)
        return cls(**axes)

    def _key(self) -> tuple[Any, ...]:
        return (self.axes, self.shape, self.prefix)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return _grid, self._key()

    def __repr__(self) -> str:
        return f"Grid({_kwargs(self.sizes)}{f', prefix={self.prefix}' if self.prefix else ''})"


def _grid(axes: tuple[str, ...], shape: tuple[int, ...], prefix: int) -> Grid:
    return Grid(prefix, **dict(zip(axes, shape, strict=True)))


# A file of weights or an exported program may hold a grid: a value without code of its own.
torch.serialization.add_safe_globals([_grid])
# No tensors inside: torch.export takes a grid as an argument and holds its callers to an equal one.
pytree.register_pytree_node(
    Grid,
    lambda grid: ([], grid),
    lambda _, grid: grid,
    flatten_with_keys_fn=lambda grid: ([], grid),
    serialized_type_name="chronotope.Grid",
    to_dumpable_context=Grid.to_dict,
    from_dumpable_context=Grid.from_dict,
)


@dataclass(frozen=True)
class Coords:
    """Coordinates of some tokens, as patterns and biases see them: `q.t`, `k.h`.

    All tensors are int64 (`prefix`: bool) and broadcast against each other. `place` is the index in
    row-major order without the prefix. At prefix tokens the coordinates mean nothing; `prefix` says where.
    """

    grid: Grid
    axes: dict[str, Tensor]
    place: Tensor
    prefix: Tensor

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["axes"][name]
        except KeyError:
            raise AttributeError(f"no axis {name!r}; this grid has {_names(self.__dict__['grid'].axes)}") from None

    def view(self, *shape: int) -> Coords:
        """The same coordinates with every tensor reshaped."""
        axes = {name: value.view(*shape) for name, value in self.axes.items()}
        return Coords(self.grid, axes, self.place.view(*shape), self.prefix.view(*shape))

    @classmethod
    def of(cls, grid: Grid, token: Tensor) -> Coords:
        """Coordinates of the tokens at these indices (token order, prefix counted), any shape."""
        prefix = token < grid.prefix
        place = (token - grid.prefix).clamp(min=0)
        axes, rest = {}, place
        for name, size in reversed(grid.sizes.items()):
            axes[name] = rest % size
            rest = rest // size
        return cls(grid, axes, place, prefix)

    def aligned(self, onto: Grid) -> Coords:
        """These query coordinates, moved onto the key grid's axes: floor((x + 0.5) * n_key / n_query)."""
        if onto.axes == self.grid.axes and onto.shape == self.grid.shape:
            return self
        axes = {
            name: align(value, self.grid.sizes[name], onto.sizes[name]) if name in onto.axes else value
            for name, value in self.axes.items()
        }
        return Coords(self.grid, axes, self.place, self.prefix)


def joint_shape(*tensors: Tensor) -> torch.Size:
    """The shape to which tensors broadcast. (torch.broadcast_shapes imports sympy, half a second, when first used.)"""
    return torch.broadcast_tensors(*tensors)[0].shape


def align(x: Tensor, n_query: int, n_key: int) -> Tensor:
    """The place on a key axis of n_key at the centre of query place x on an axis of n_query."""
    return x if n_query == n_key else ((2 * x + 1) * n_key).div(2 * n_query, rounding_mode="floor")


def _names(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _kwargs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
