r"""Many series forecast at once: patches of time and variables as tokens of a grid, or one matrix over time.

$$
\hat y = m + s\,(\text{body}(\tfrac{x - m}{s})), \qquad
\text{linear: } W x + b \ \ (\text{or } W_1\,\text{trend}(x) + W_2\,(x - \text{trend}(x)) + b), \qquad
\text{blocks: } W_o\,\text{blocks}(W_e\,\text{patches}(x))
$$

m and s: of each series over its look-back, see `norm`. All matrices are shared by the variables. Tokens lie on
Grid(t=patches, v=variables): what a block mixes along t, along v or over both is its mixer.

| published | here |
|---|---|
| Linear, NLinear, DLinear (Zeng et al. 2022, arXiv 2205.13504) | no blocks; norm="last"; trend=25 |
| PatchTST (Nie et al. 2022, arXiv 2211.14730) | blocks "time time time", norm "instance" |
| iTransformer (Liu et al. 2023, arXiv 2310.06625) | blocks "variable variable", patch=None, norm "instance" |

Left out: learned scale and shift of the norm; padding (patches end at the last value; what is too old for a whole patch
is dropped); batch norm; dropout of attention weights, of hidden channels, and before the last matrix (it is on what
enters the blocks, and on what each mixer and feed-forward adds). Blocks are pre-norm, with rotary time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, Block, Decay, Mixer, Recurrence, Stack
from chronotope.patterns import along
from chronotope.planning.parse import named
from chronotope.position import Rope
from chronotope.saving import Saved

NORMS = ("none", "last", "instance")
SMALL = 1e-5

ROPE = Rope(axes=("t",))
MIXERS: Mapping[str, Callable[[int, int], Mixer]] = {
    "time": lambda dim, heads: Attention(dim, heads, where=along("t"), position=ROPE),
    "variable": lambda dim, heads: Attention(dim, heads, where=along("v")),
    "joint": lambda dim, heads: Attention(dim, heads, position=ROPE),
    "recurrence": lambda dim, heads: Recurrence(dim, heads, decay=Decay(dim, heads), along="t"),
}
"""What a block can mix: attention along time, along variables, over both; a gated linear recurrence along time."""


class Matrix(nn.Module):
    """[..., L] -> [..., H] by one matrix; with `trend`, by one for a centred moving average and one for the rest."""

    def __init__(self, lookback: int, horizon: int, trend: int):
        super().__init__()
        self.trend = trend
        self.rest = nn.Linear(lookback, horizon)
        self.slow = nn.Linear(lookback, horizon) if trend else None

    def forward(self, x: Float[Tensor, "b v lookback"]) -> Float[Tensor, "b v horizon"]:
        """Each variable on its own."""
        if self.slow is None:
            return self.rest(x)
        # At the ends the outermost values count as often as the window overhangs.
        around = F.pad(x, (self.trend // 2, self.trend // 2), mode="replicate")
        slow = F.avg_pool1d(around, self.trend, 1)
        return self.slow(slow) + self.rest(x - slow)


class Patched(nn.Module):
    """Patches of each series as tokens, blocks, and one matrix from all tokens of a variable to its horizon."""

    def __init__(
        self,
        lookback: int,
        horizon: int,
        blocks: Sequence[str],
        patch: int,
        stride: int,
        dim: int,
        heads: int,
        ratio: float,
        dropout: float,
    ):
        super().__init__()
        self.patch, self.stride = patch, stride
        self.tokens = (lookback - patch) // stride + 1
        self.skipped = (lookback - patch) % stride
        self.embed = nn.Linear(patch, dim)
        self.stack = Stack(
            [Block([MIXERS[name](dim, heads)], dim, "gelu", ratio, dropout=dropout) for name in blocks], dim
        )
        self.head = nn.Linear(self.tokens * dim, horizon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b v lookback"]) -> Float[Tensor, "b v horizon"]:
        """All variables together."""
        grid = Grid(t=self.tokens, v=x.shape[1])
        tokens = self.embed(x[..., self.skipped :].unfold(-1, self.patch, self.stride)).transpose(1, 2)
        out = self.stack(self.dropout(tokens.flatten(1, 2)), grid).unflatten(1, grid.shape)
        return self.head(out.transpose(1, 2).flatten(2))


class Forecaster(Saved):
    """The model: past [B, L, V] -> future [B, H, V], for any number V of variables.

    Args:
        lookback, horizon: L and H.
        blocks: names of `MIXERS`, one for each block; none: one matrix over time.
        norm: "none"; "last": m is the last value; "instance": m and s are mean and standard deviation.
        trend: width of the moving average, odd; 0: none. Without blocks only.
        patch, stride: values in a token, and between the starts of two tokens; patch=None: a variable is one token.
        dim, heads, ratio: of the blocks; `ratio`: hidden channels over dim.
        dropout: of the tokens, and of what mixers and feed-forwards add to them.

    Raises ChronotopeError: an unknown name, or sizes that do not fit.

    Example:
        >>> Forecaster(96, 24, ["time", "variable"])(torch.randn(2, 96, 7)).shape
        torch.Size([2, 24, 7])
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        blocks: Sequence[str] = (),
        norm: str = "none",
        trend: int = 0,
        patch: int | None = 16,
        stride: int = 8,
        dim: int = 16,
        heads: int = 4,
        ratio: float | int = 8,
        dropout: float | int = 0.0,
    ):
        super().__init__()
        size = lookback if patch is None else patch
        if horizon < 1 or not 1 <= size <= lookback or stride < 1:
            raise ChronotopeError(
                f"Forecaster({lookback=}, {horizon=}, {patch=}, {stride=}): expected a horizon of 1 or more, and "
                "patches within the look-back."
            )
        if norm not in NORMS:
            raise ChronotopeError(f"Forecaster({norm=}): expected one of {', '.join(NORMS)}.")
        if trend and (blocks or trend % 2 == 0 or trend < 0):
            raise ChronotopeError(f"Forecaster({trend=}, {blocks=}): expected an odd width, and no blocks.")
        self.lookback, self.norm = lookback, norm
        self.body: nn.Module
        if blocks:
            named("mixer", blocks, MIXERS)
            self.body = Patched(lookback, horizon, blocks, size, stride, dim, heads, float(ratio), float(dropout))
        else:
            self.body = Matrix(lookback, horizon, trend)

    def forward(self, past: Float[Tensor, "b lookback v"]) -> Float[Tensor, "b horizon v"]:
        """The values that come. Raises ChronotopeError for another look-back."""
        if past.shape[1] != self.lookback:
            raise ChronotopeError(f"past of shape {list(past.shape)}; expected [B, {self.lookback}, V].")
        x = past.transpose(1, 2)
        level, scale = self._level(x)
        return (level + scale * self.body((x - level) / scale)).transpose(1, 2)

    def _level(self, x: Float[Tensor, "b v lookback"]) -> tuple[Float[Tensor, "*b v 1"], Float[Tensor, "*b v 1"]]:
        if self.norm == "none":
            return torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        if self.norm == "last":
            return x[..., -1:], torch.ones_like(x[..., :1])
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return mean, (variance + SMALL).sqrt()
