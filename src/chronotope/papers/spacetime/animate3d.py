r"""Animate3D (MV-VDM): attention over time and attention over the views of a frame, side by side and mixed.

$$
y = (1 - a)\, A_t(x + e_t) + a\, A_{nhw}(x + e_{hw} + e_n), \qquad a = \sigma(\mu), \quad \mu = 0 \text{ at first}
$$

A_t attends over the frames of a place of a view, as the video model does that it comes from; A_nhw over all views of a
frame at once. Each has its own code of place: time for the one, place and, if wanted, camera for the other. A third
branch lets each view look at its first frame; the three are mixed by a softmax of learned numbers, 0 at first. Or
(`merge="zero_sum"`) branches are added up, those after the first with outputs of 0 at first: the module begins as the
video model.

Identity (`MV2VAdapter`) beside a frozen attention (q, k, v, W_o) over the views of a frame: the first frame is known,
clean renderings of the object, and a second query looks at its keys and values,

$$ y = W_o \big( A(q, k, v) + W' A(W'_q x,\, k_{t=0},\, v_{t=0}) \big), \qquad W' = 0 \text{ at first} $$

Sizes: x [B, V T h w, C] on Grid(n=V, t=T, h, w) -> the same. V h w T^2 + T (V h w)^2 pairs, not (V T h w)^2; the first
frame takes V T (h w)^2 more, the adapter T (V h w)^2. Published: 4 views, 16 frames of latents 32 x 32.

    >>> grid = Grid(n=4, t=8, h=4, w=4)
    >>> layer = view_time_attention(32, 2, camera="sinusoid", image=True)
    >>> layer(torch.randn(1, grid.size, 32), grid).shape
    torch.Size([1, 512, 32])
    >>> identity = MV2VAdapter(Attention(32, 2, where=along("n", "h", "w")))
    >>> identity(torch.randn(1, grid.size, 32), grid).shape
    torch.Size([1, 512, 32])

Weights of the video model go into `layer.branches[0].attend`; any branch is frozen by `requires_grad_(False)`. In
training and sampling (`chronotope.models.diffusion`) a mask of 0 on the first frame keeps it clean. No streaming: a
frame sees all others.

Not shown: quality of what is generated, and moving shapes fitted to it.

Left out: the U-Net of MVDream and the rest of AnimateDiff's motion modules around it, text, data, weights; the fit of
moving Gaussians to the videos and its refinement by 4D-SDS. Places are counted from 0; the released code spreads the
rows and columns of a frame over 0 to 2 pi. It has no biases in W_q, W_k and W_v.

Checked beside the released code (yanqinJiang/Animate3D, commit 033a1be; weights copied, its places of rows and columns
in ours, torch's attention for that of xformers, 4 views of 5 frames of 3 x 3): outputs of up to 1.8 differ by 4.2e-8 at
most for two or three branches and both merges, those of the adapter by 2.3e-16.

Paper: Yanqin Jiang, Chaohui Yu, Chenjie Cao, Fan Wang, Weiming Hu, Jin Gao, "Animate3D: Animating Any 3D Model with
Multi-view Video Diffusion", 2024, arXiv 2407.11398.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, Learned, Mixer, Sinusoidal, Whole
from chronotope.nn.mixer import Context, require_tokens
from chronotope.papers.registry import paper
from chronotope.patterns import along

MERGES, CAMERAS = ("alpha", "zero_sum"), (None, "sinusoid", "learned")


class Branch(Whole):
    """attend(codes(x)), over all tokens of x or, with `first`, over those of its first frame.

    Args:
        attend: its pattern says over which axes.
        codes: of place, such as `Sinusoidal(dim, ("t",))`, one added after the other.
    """

    why = "frames see those after them"

    def __init__(self, attend: Attention, codes: Sequence[Mixer] = (), first: bool = False):
        super().__init__()
        self.dim, self.first = attend.dim, first
        self.codes, self.attend = nn.ModuleList(codes), attend

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All frames at once."""
        for code in self.codes:
            x = code(x, grid)
        return self.attend(x, grid, first_frame(x, grid) if self.first else None)  # type: ignore[no-any-return]


class ParallelAttention(Whole):
    """Branches over the same tokens, merged.

    Args:
        merge: "alpha": the mean by learned shares, of two branches (1 - sigmoid(mix), sigmoid(mix)), of more
            softmax(mix), mix = 0 at first. "zero_sum": the sum, all branches but the first beginning with outputs of 0.
    """

    why = "frames see those after them"

    def __init__(self, branches: Sequence[Branch], merge: str = "alpha"):
        super().__init__()
        if len(branches) < 2 or merge not in MERGES:
            raise ChronotopeError(
                f"ParallelAttention: {len(branches)} branches, merge={merge!r}; expected 2 or more, one of {MERGES}."
            )
        self.dim, self.branches = branches[0].dim, nn.ModuleList(branches)
        self.mix = None
        if merge == "alpha":
            self.mix = nn.Parameter(torch.zeros(1 if len(branches) == 2 else len(branches)))
        else:
            for branch in branches[1:]:
                silence(branch.attend.out)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All frames of all views at once."""
        require_tokens(x, grid, self.dim, "x")
        found = torch.stack([branch(x, grid) for branch in self.branches])
        return found.sum(0) if self.mix is None else torch.einsum("k,kbnc->bnc", self.shares(), found)

    def shares(self) -> Float[Tensor, "k"]:
        """What each branch has in the merge: a share of 1, or 1."""
        if self.mix is None:
            return next(self.parameters()).new_ones(len(self.branches))
        a = self.mix.sigmoid()
        return torch.cat((1 - a, a)) if len(self.mix) == 1 else self.mix.softmax(0)


class MV2VAdapter(Whole):
    """A frozen attention over the views of a frame, and beside it a second query to the keys and values of frame 0.

    base: such as `Attention(dim, heads, where=along("n", "h", "w"))`. Its parameters take no gradient.
    """

    why = "frames see those after them"

    def __init__(self, base: Attention):
        super().__init__()
        self.dim, self.base = base.dim, base.requires_grad_(False)
        inner = base.heads * base.head_dim
        self.query, self.out = nn.Linear(base.dim, inner, bias=False), nn.Linear(inner, inner)
        silence(self.out)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All frames of all views at once."""
        base = self.base
        q, k, v = base.project(x, grid)
        (k0, known), (v0, _) = first_frame(k, grid), first_frame(v, grid)
        second = self.query(x).unflatten(2, (base.heads, -1)).transpose(1, 2)
        own = attention(q, k, v, grid=grid, where=base.where)
        identity = attention(second, k0, v0, grid=grid, key_grid=known, where=base.where)
        assert isinstance(own, Tensor) and isinstance(identity, Tensor)
        joined, told = own.transpose(1, 2).flatten(2), identity.transpose(1, 2).flatten(2)
        return base.out(joined + self.out(told))  # type: ignore[no-any-return]


@paper(
    system=43,
    name="Animate3D (MV-VDM)",
    family="spacetime",
    claim="attention over time and over all views of a frame side by side, merged so that training begins at a known "
    "model; frame 0 gives identity",
    evidence=["tests/papers/spacetime/test_animate3d.py"],
)
def view_time_attention(
    dim: int,
    heads: int,
    *,
    merge: str = "alpha",
    image: bool = False,
    camera: str | None = None,
    views: int = 4,
) -> ParallelAttention:
    """The branches time, views and, with `image`, first frame, on Grid(n, t, h, w).

    Args:
        camera: code of the view in the second branch: None, "sinusoid", or "learned" for up to `views` of them.
        merge: as for `ParallelAttention`.
    """
    if camera not in CAMERAS:
        raise ChronotopeError(f"view_time_attention(camera={camera!r}): expected one of {CAMERAS}.")
    codes: list[Mixer] = [Sinusoidal(dim, ("h", "w"))]
    if camera is not None:
        codes.append(Learned(dim, n=views) if camera == "learned" else Sinusoidal(dim, ("n",)))
    branches = [
        Branch(Attention(dim, heads, where=along("t"), biases=True), [Sinusoidal(dim, ("t",))]),
        Branch(Attention(dim, heads, where=along("n", "h", "w"), biases=True), codes),
    ]
    if image:
        branches.append(Branch(Attention(dim, heads, where=along("h", "w"), biases=True), first=True))
    return ParallelAttention(branches, merge)


def first_frame(x: Float[Tensor, "*b n c"], grid: Grid) -> tuple[Float[Tensor, "*b m c"], Grid]:
    """The tokens at t = 0, on the grid without t, whose places they keep."""
    grid.require(("t",), "first_frame")
    axis = x.ndim - 2 + grid.axes.index("t")
    rest = {name: size for name, size in grid.sizes.items() if name != "t"}
    if grid.prefix or not rest:
        raise ChronotopeError(f"first_frame: {grid!r}; expected t and other axes, and no prefix.")
    return x.unflatten(-2, grid.shape).select(axis, 0).flatten(x.ndim - 2, -2), Grid(**rest)


def silence(layer: nn.Linear) -> None:
    """Sets all weights to 0."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
