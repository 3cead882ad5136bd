"""Faster Neighborhood Attention: each query sees the nearest keys on the grid, always the same number of them.

On a non-causal axis of length L, with left = k // 2 and right = (k - 1) // 2, query i sees keys start .. start + k - 1,

    start = max(i - left, 0), moved back where i + right >= L so that the window ends at L - 1

On a causal axis it sees max(i - k + 1, 0) .. i. Dilation d splits an axis into d interleaved axes with this rule each.
The page is `ct.window(edge="shift")`; the fused kernel's tiles are those of `ct.plan`; unfused scores are never made.

Sizes: q [B, H, N, D], k and v [B, Hk, N, D] on a grid of 1 to 3 axes (or more); work O(N * prod(k)), memory O(N).

    >>> grid = ct.Grid(h=16, w=16)
    >>> q = k = v = torch.randn(1, 2, grid.size, 32)
    >>> out, lse = neighborhood_attention(q, k, v, grid=grid, window={"h": 7, "w": 7})
    >>> out.shape
    torch.Size([1, 2, 256, 32])

Left out: the stride of later releases (queries that share a window); the batched-GEMM form; GPU speed-ups.

Paper: Hassani et al. 2024, "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the
Threadblock Level", arXiv 2403.04690.
"""

from __future__ import annotations

from collections import deque

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.merge import merge
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, full
from chronotope.patterns import window as within

Dilation = int | dict[str, int]


def neighborhood(window: dict[str, int], dilation: Dilation = 1, causal: tuple[str, ...] = ()) -> Pattern:
    """The pattern: `window` keys on each named axis, clamped inside the axis, or the last ones on `causal` axes."""
    unknown = [axis for axis in causal if axis not in window]
    if unknown or not window:
        raise ChronotopeError(
            f"neighborhood({window}, causal={causal}): give a window for every axis, causal ones too."
        )
    for axis, size in window.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ChronotopeError(f"neighborhood: window {axis}={size!r}; expected a number of keys of at least 1.")
    steps = dilation if isinstance(dilation, dict) else dict.fromkeys(window, dilation)
    both = {axis: (size // 2, (size - 1) // 2) for axis, size in window.items() if axis not in causal}
    past = {axis: (window[axis] - 1, 0) for axis in causal}
    parts = [
        within(edge=edge, dilation={axis: step for axis, step in steps.items() if axis in spans}, **spans)
        for spans, edge in ((both, "shift"), (past, "clip"))
        if spans
    ]
    return parts[0] & parts[1] if len(parts) == 2 else parts[0]


def menu(grid: Grid) -> Pattern:
    """At most 7 places on each axis of space and 5 frames."""
    return neighborhood({axis: min(n, 5 if axis == "t" else 7) for axis, n in grid.sizes.items()})


@paper(
    system=30,
    name="FNA",
    family="pattern",
    claim="every query sees exactly prod(window) nearest keys in 1D, 2D or 3D, in linear time and memory",
    evidence=["tests/papers/pattern/test_fna.py"],
    menu=menu,
)
def neighborhood_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n dv"],
    *,
    grid: Grid,
    window: dict[str, int],
    dilation: Dilation = 1,
    causal: tuple[str, ...] = (),
    extra_kv: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """(out, lse) of neighborhood attention.

    Args:
        window: keys on each axis by name, even or odd; an axis that is not named is not constrained.
        dilation: distance between neighbouring keys, one for all axes or by axis.
        causal: the axes on which no key is after its query.
        extra_kv: keys [B, Hk, M, D] and values [B, Hk, M, Dv] that every query sees as well.
        backend: as in `ct.attention`: "reference" is the dense mask, "torch" and others run the tiles.
    """
    where = neighborhood(window, dilation, causal)
    near = attention(q, k, v, grid=grid, where=where, scale=scale, return_lse=True, backend=backend)
    if extra_kv is None:
        return near  # type: ignore[return-value]
    more = Grid(n=extra_kv[0].shape[2])
    far = attention(q, *extra_kv, grid=grid, key_grid=more, where=full(), scale=scale, return_lse=True, backend=backend)
    return merge([near, far])  # type: ignore[list-item]


class Stream:
    """Neighborhood attention frame by frame, causal along the first axis; keeps (window - 1) * dilation + 1 frames.

    Args:
        frame: the grid of one frame, its first axis of size 1.
        window: as above, with the first axis.
        dilation: as above.
    """

    def __init__(self, frame: Grid, window: dict[str, int], dilation: Dilation = 1):
        self.frame, self.time = frame, frame.axes[0]
        steps = dilation if isinstance(dilation, dict) else dict.fromkeys(window, dilation)
        if frame.shape[0] != 1 or self.time not in window or frame.prefix:
            raise ChronotopeError(
                f"Stream on {frame!r}: expected one frame, a window for {self.time!r}, and no prefix."
            )
        self.every = steps.get(self.time, 1)
        self.frames: deque[tuple[Tensor, Tensor]] = deque(maxlen=(window[self.time] - 1) * self.every + 1)
        space = {axis: size for axis, size in window.items() if axis != self.time}
        inside = {axis: step for axis, step in steps.items() if axis in space}
        self.where = neighborhood(space, inside) if space else full()

    def step(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"], v: Float[Tensor, "b hk n dv"]
    ) -> Float[Tensor, "b h n dv"]:
        """The output of the next frame."""
        self.frames.append((k, v))
        kept = list(self.frames)[:: -self.every]
        keys, values = (torch.cat([frame[i] for frame in kept], 2) for i in (0, 1))
        # Exactly the frames of the window are here, so time constrains nothing, and their order does not matter.
        key_grid = self.frame.replace(**{self.time: len(kept)})
        return attention(q, keys, values, grid=self.frame, key_grid=key_grid, where=self.where)  # type: ignore[return-value]
