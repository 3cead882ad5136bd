r"""STTN: a forecast for every sensor of a road network, from attention over sensors, then over time steps.

$$
x' = F[x, D^v, D^t], \quad
a = \mathrm{LN}(x' + A_v(x')), \quad
m = \mathrm{LN}(a + \mathrm{MLP}(a)), \quad
c = \sum_{k<K} T_k(\tilde L)\, x' \Theta_k, \quad
g = \sigma(f(m) + f'(c)), \quad
y = x + g m + (1 - g) c
$$

then the same over time, without c and g: $y' = F'[y, D^t]$, $a = \mathrm{LN}(y' + A_t(y'))$,
$z = y + \mathrm{LN}(a + \mathrm{MLP}(a))$. A_v attends over the sensors of a time step, A_t over the steps of a
sensor, forwards and backwards. D^v [V, V] and D^t [T, T] are learned tables, at first the weights of the graph and
one-hot; F is one matrix over channels and table rows. T_k: Chebyshev polynomials of the scaled Laplacian,

$$
L = D^{-1/2} (D - W) D^{-1/2}, \qquad \tilde L = 2 L / \lambda_{max} - I, \qquad T_k = 2 \tilde L T_{k-1} - T_{k-2}
$$

Two matrices turn what each sensor has at the last step into all horizons. Taught by the mean absolute error.

Sizes: x [B, T, V, C], weights [V, V] -> [B, horizons, V]. O(T V^2 + V T^2) pairs.

    >>> ring = [[float((i - j) % 5 in (1, 4)) for j in range(5)] for i in range(5)]
    >>> model = STTN(ring, steps=12, horizons=3, dim=16, heads=2)
    >>> model(torch.randn(2, 12, 5, 1)).shape
    torch.Size([2, 3, 5])

`where` of the attentions is an attribute: `neighbours="graph"` joins `graph(edges, axis="v")` to it, `causal=True`
`causal("t")`. Readings that are missing (`real` false) are seen by nobody: neither by attention nor by the convolution.

Left out: dropout; the released code has no gate and adds 0.1 c instead. Unconfirmed: blocks, widths and K of the
published numbers; here as in that code, 1 block of width 64 and K = 3, unless told otherwise. Streaming: the window is
run again for each new step, since D^t belongs to places in the window.

Not shown: the published tables, of 228 and 325 sensors. Attention over sensors gains where edges change with the state
of the senders (one block: 0.76, 0.77, 0.80 of the errors of the convolution alone at steps 1 to 3; two blocks, of which
the second convolves what the first has multiplied: 0.89, 0.91, 0.87). On 25 sensors of PeMSD7(M) attention over time
takes 5% off the error, and what is told of the graph 1%, within the spread of seeds.

Paper: Mingxing Xu, Wenrui Dai, Chunmiao Liu, Xing Gao, Weiyao Lin, Guo-Jun Qi, Hongkai Xiong, "Spatial-Temporal
Transformer Networks for Traffic Flow Forecasting", 2020, arXiv 2001.02908.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.attention import Attention
from chronotope.nn.mixer import Context, Whole
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, along, causal, graph
from chronotope.saving import Saved

Space = Literal["gated", "attention", "graph", "none"]


def chebyshev(weights: Float[Tensor, "v v"], order: int) -> Float[Tensor, "order v v"]:
    """T_0 .. T_{order - 1} of the scaled Laplacian; weights[i, j]: how much i hears of j. No edge at all: zeros."""
    weights = weights.double()
    degree = weights.sum(1)
    root = torch.where(degree > 0, degree, 1.0).rsqrt()
    laplacian = root[:, None] * (degree.diag() - weights) * root
    largest = torch.linalg.eigvals(laplacian).abs().max().clamp(min=1e-12)
    identity = torch.eye(len(weights), dtype=torch.float64)
    out = [identity, 2 * laplacian / largest - identity]
    while len(out) < order:
        out.append(2 * out[1] @ out[-1] - out[-2])
    return torch.stack(out[:order]).float()


class Windowed(Whole):
    """A layer for windows of a fixed length, which are run again for each new step."""

    why = "its places are those in the window, which is run again for each new step"


class Places(nn.Module):
    """F[x, D^v, D^t]: channels joined by a row of a table for each axis, times one matrix."""

    def __init__(self, dim: int, **tables: Float[Tensor, "_ _"]):
        super().__init__()
        self.enter = nn.Linear(dim, dim)
        self.tables = nn.ParameterDict({axis: nn.Parameter(table.clone()) for axis, table in tables.items()})
        self.spread = nn.ModuleDict({axis: nn.Linear(len(table), dim, bias=False) for axis, table in tables.items()})

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """The matrix in parts: what a table gives is the same for all tokens at one place of its axis."""
        out = self.enter(x).unflatten(1, grid.shape)
        for axis, table in self.tables.items():
            shape = [size if name == axis else 1 for name, size in grid.sizes.items()]
            out = out + self.spread[axis](table).view(*shape, -1)
        return out.flatten(1, -2)


class Encoder(Windowed):
    """LN(a + MLP(a)), a = LN(x + A(x)); without heads, a = x."""

    def __init__(self, dim: int, heads: int, hidden: int, where: Pattern):
        super().__init__()
        self.attention = Attention(dim, heads, where=where) if heads else None
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None, real: Tensor | None = None
    ) -> Float[Tensor, "b n c"]:
        """All tokens; those that are not `real` [B, N] are seen by nobody."""
        if self.attention is not None:
            q, k, v = self.attention.project(x, grid)
            hidden = None if real is None else x.new_zeros(real.shape).masked_fill(~real, -torch.inf)[:, None, None]
            mixed = attention(q, k, v, grid=grid, where=self.attention.where, bias=hidden)
            x = self.norms[0](x + self.attention.out(mixed.transpose(1, 2).flatten(2)))
        return self.norms[1](x + self.mlp(x))


class GraphConvolution(Windowed):
    """c = sum_k T_k(L~) x Theta_k over the axis v, for each time step."""

    basis: Tensor

    def __init__(self, dim: int, basis: Float[Tensor, "order v v"]):
        super().__init__()
        self.register_buffer("basis", basis, persistent=False)
        self.mix = nn.Linear(len(basis) * dim, dim)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None, real: Tensor | None = None
    ) -> Float[Tensor, "b n c"]:
        """All tokens; those that are not `real` [B, N] count as zeros."""
        x = x if real is None else x * real[..., None]
        spread = self.basis.flatten(0, 1) @ x.unflatten(1, grid.shape)
        return self.mix(spread.unflatten(2, self.basis.shape[:2]).transpose(2, 3).flatten(3)).flatten(1, 2)


class SpatialTransformer(Windowed):
    """y = x + g m + (1 - g) c: attention over sensors, and a convolution on the graph."""

    def __init__(self, places: Places, dynamic: Encoder | None, static: GraphConvolution | None, dim: int):
        super().__init__()
        self.places, self.dynamic, self.static = places, dynamic, static
        self.gates = None if dynamic is None or static is None else nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None, real: Tensor | None = None
    ) -> Float[Tensor, "b n c"]:
        """All tokens at once."""
        placed = self.places(x, grid)
        parts = [part(placed, grid, None, real) for part in (self.dynamic, self.static) if part is not None]
        if self.gates is None:
            return x + sum(parts)
        m, c = parts
        gate = torch.sigmoid(self.gates[0](m) + self.gates[1](c))
        return x + gate * m + (1 - gate) * c


class TemporalTransformer(Windowed):
    """z = y + E(F'[y, D^t]): attention over the time steps of each sensor."""

    def __init__(self, places: Places, encoder: Encoder):
        super().__init__()
        self.places, self.encoder = places, encoder

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None, real: Tensor | None = None
    ) -> Float[Tensor, "b n c"]:
        """All tokens at once."""
        return x + self.encoder(self.places(x, grid), grid, None, real)


@paper(
    system=56,
    name="STTN",
    family="spacetime",
    claim="attention over sensors, gated against a graph convolution, then attention over time steps",
    evidence=["tests/papers/spacetime/test_sttn.py", "tests/tasks/test_traffic.py"],
)
class STTN(Saved):
    """The model.

    Args:
        weights: [V][V], weights[i][j]: how much sensor i hears of sensor j; 0 for no edge.
        steps, horizons: of the window, and of the forecast.
        channels: of a reading; the forecast has one.
        mean, std: of the readings: what goes in and comes out is in their unit.
        dim, heads, blocks, hidden, order: width, heads of both attentions, blocks, width of the MLPs, and K.
        space: "gated", or one side of the gate alone, or "none". Without "graph" nothing is told of the weights.
        time: whether steps attend to each other. Without, only the last one is known.
        neighbours: "all" sensors are seen, or those that the "graph" joins.
        causal: whether steps attend to earlier ones only.
    """

    def __init__(
        self,
        weights: Sequence[Sequence[float]],
        steps: int = 12,
        horizons: int = 9,
        channels: int = 1,
        mean: float = 0.0,
        std: float = 1.0,
        dim: int = 64,
        heads: int = 4,
        blocks: int = 1,
        hidden: int = 128,
        order: int = 3,
        space: Space = "gated",
        time: bool = True,
        neighbours: Literal["all", "graph"] = "all",
        causal: bool = False,
    ):
        super().__init__()
        edges = torch.tensor(weights, dtype=torch.float32)
        if edges.ndim != 2 or edges.shape[0] != edges.shape[1] or bool((edges < 0).any()):
            raise ChronotopeError(f"weights of shape {list(edges.shape)}; expected [V][V] numbers of 0 or more.")
        self.grid, self.mean, self.std = Grid(t=steps, v=len(edges)), mean, std
        told = space in ("gated", "graph")
        basis = chebyshev(edges, order)
        over_space, over_time = _patterns(edges, neighbours, causal)
        self.enter = nn.Linear(channels, dim)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            if space != "none":
                places = Places(dim, v=edges if told else torch.eye(len(edges)), t=torch.eye(steps))
                dynamic = None if space == "graph" else Encoder(dim, heads, hidden, over_space)
                static = GraphConvolution(dim, basis) if told else None
                self.blocks.append(SpatialTransformer(places, dynamic, static, dim))
            encoder = Encoder(dim, heads if time else 0, hidden, over_time)
            self.blocks.append(TemporalTransformer(Places(dim, t=torch.eye(steps)), encoder))
        self.head = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, horizons))

    def forward(
        self, x: Float[Tensor, "b t v c"], real: Bool[Tensor, "b t v"] | None = None
    ) -> Float[Tensor, "b horizons v"]:
        """The forecast. `real`: which readings there are; None: all."""
        if x.shape[1:3] != self.grid.shape:
            raise ChronotopeError(
                f"x has shape {list(x.shape)}; expected [B, {', '.join(map(str, self.grid.shape))}, C]."
            )
        x = (x - self.mean) / self.std
        if real is not None:
            x, real = torch.where(real[..., None], x, 0.0), real.flatten(1)
        h = self.enter(x).flatten(1, 2)
        for block in self.blocks:
            h = block(h, self.grid, None, real)
        last = h.unflatten(1, self.grid.shape)[:, -1]
        return self.head(last).transpose(1, 2) * self.std + self.mean

    def loss(
        self, x: Float[Tensor, "b t v c"], future: Float[Tensor, "b horizons v"], real: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """Mean absolute error."""
        return F.l1_loss(self(x, real), future)


def _patterns(edges: Tensor, neighbours: str, forwards: bool) -> tuple[Pattern, Pattern]:
    space, time = along("v"), along("t")
    if neighbours == "graph":
        listener, speaker = edges.nonzero().T
        space = space & graph(torch.stack((speaker, listener)), axis="v")
    return space, time & causal("t") if forwards else time
