"""The class of a series, whatever its length and number of channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, Decay, FeedForward, Recurrence
from chronotope.position import Rope
from chronotope.saving import Saved

POOLS = ("mean", "class")
HYBRID = "convolution+attention"


class Classifier(Saved):
    """logits = W LN(pool(block_L(... block_1(stem(u))))), u being the values of all channels.

    The stem leaves a token for every `patch` values, see `Stem`; tokens lie on Grid(t=...). A block: x = x + mix(LN(x))
    for each of its mixers in turn, then x = x + F(LN(x)).

    Args:
        channels, classes: of the series.
        blocks: what each mixes tokens with, joined by "+": "attention" (rotary, all to all), "convolution" (`width`
            tokens around, channel by channel), "recurrence" (gated linear attention, there and back). "none": tokens
            do not meet between stem and pool.
        dim, heads, dropout: of the blocks.
        patch: values from one token to the next.
        width: of the convolutions, in the stem in values, in blocks in tokens; odd.
        pool: "mean" over the tokens, or "class": a learned token in front (`prefix=1`), for attention only.
        units: mean and standard deviation of each channel in the training data, to which values are scaled. None: 0, 1.

    What lies after the end of a series changes nothing, and no element of a batch knows of another.

    Example:
        >>> model = Classifier(channels=3, classes=4, blocks=["convolution", "attention"], patch=2)
        >>> model(torch.randn(5, 21, 3), torch.tensor([21, 7, 20, 1, 2])).shape
        torch.Size([5, 4])

    Raises ChronotopeError: an unknown mixer or pool, sizes that do not fit.
    """

    units: Tensor

    def __init__(
        self,
        channels: int,
        classes: int,
        blocks: Sequence[str] = (HYBRID, HYBRID),
        dim: int = 64,
        heads: int = 4,
        patch: int = 1,
        width: int = 9,
        pool: str = "mean",
        dropout: float = 0.1,
        units: Sequence[Sequence[float]] | None = None,
    ):
        super().__init__()
        mixers = [[] if block == "none" else block.split("+") for block in blocks]
        if pool not in POOLS or (pool == "class" and not any("attention" in names for names in mixers)):
            raise ChronotopeError(
                f"Classifier(pool={pool!r}, blocks={list(blocks)}): pool is one of {', '.join(POOLS)}; a class token "
                "sees the others by attention."
            )
        self.register_buffer("units", _per_channel(units, channels))
        self.stem = Stem(channels, dim, patch, width)
        self.first = nn.Parameter(torch.randn(dim) * 0.02) if pool == "class" else None
        self.blocks = nn.ModuleList(
            SeriesBlock([_mixer(name, dim, heads, width) for name in names], dim, dropout) for names in mixers
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(
        self, series: Float[Tensor, "b n channels"], lengths: Int64[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b classes"]:
        """Logits. `lengths`: where each series ends; None: at n."""
        if lengths is None:
            lengths = torch.full((len(series),), series.shape[1], device=series.device)
        x, real = self.stem(self._scaled(series, lengths), lengths)
        grid = Grid(t=x.shape[1])
        if self.first is not None:
            grid = grid.replace(prefix=1)
            x = torch.cat((self.first.expand(len(x), 1, -1), x), 1)
            real = torch.cat((torch.ones_like(real[:, :1]), real), 1)
        for block in self.blocks:
            x = block(x, grid, real)
        x = x[:, 0] if self.first is not None else _over(x, real).sum(1) / real.sum(1)[:, None]
        return self.head(self.norm(x))

    def _scaled(
        self, series: Float[Tensor, "b n channels"], lengths: Int64[Tensor, "b"]
    ) -> Float[Tensor, "b n channels"]:
        if series.shape[2] != len(self.units):
            raise ChronotopeError(f"series of {series.shape[2]} channels; the model is for {len(self.units)}.")
        if not bool(((lengths >= 1) & (lengths <= series.shape[1])).all()):
            raise ChronotopeError(f"lengths {lengths.tolist()}; expected 1 to {series.shape[1]}.")
        return (series - self.units[:, 0]) / self.units[:, 1]


class Stem(nn.Module):
    """Tokens of a series: token i = B gelu(A u), at the values from patch * i on.

    A, B: convolutions, A of `width` values, B of `patch` and width // 2 more on both sides, `patch` apart: what a token
    holds hardly depends on where the series is cut.
    """

    def __init__(self, channels: int, dim: int, patch: int, width: int):
        super().__init__()
        if patch < 1:
            raise ChronotopeError(f"Classifier(patch={patch}): expected 1 or more.")
        self.patch, self.side = patch, _odd(width) // 2
        self.values = nn.Conv1d(channels, dim // 2, width, padding=self.side)
        self.tokens = nn.Conv1d(dim // 2, dim, patch + 2 * self.side, stride=patch)

    def forward(
        self, series: Float[Tensor, "b n channels"], lengths: Int64[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b t dim"], Bool[Tensor, "b t"]]:
        """A token for every `patch` values, and which of them begin within the series."""
        n = series.shape[1]
        inside = torch.arange(n, device=series.device) < lengths[:, None]
        x = nn.functional.gelu(self.values(_over(series, inside).transpose(1, 2))).transpose(1, 2)
        x = nn.functional.pad(_over(x, inside).transpose(1, 2), (self.side, self.side + -n % self.patch))
        x = self.tokens(x).transpose(1, 2)
        return x, torch.arange(x.shape[1], device=x.device) * self.patch < lengths[:, None]


class SeriesBlock(nn.Module):
    """x = x + mix(LN(x)) for each mixer, then x = x + F(LN(x)), with dropout of what is added."""

    def __init__(self, mixers: list[SeriesMixer], dim: int, dropout: float):
        super().__init__()
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(len(mixers) + 1))
        self.feed = FeedForward(dim, "gelu", 2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, real: Bool[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        """All tokens; those that are not real are seen by none."""
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            x = x + self.dropout(mixer(norm(x), grid, real))
        return x + self.dropout(self.feed(self.norms[-1](x)))


class SeriesMixer(nn.Module):
    """Mixes the real tokens of each series: `forward(x, grid, real)`."""


class Attended(SeriesMixer):
    """Each token looks at all real ones, rotary in t."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention = Attention(dim, heads, position=Rope(axes=("t",)))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, real: Bool[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        """The class token, if any, looks and is looked at as the others."""
        if bool(real.all()):
            return self.attention(x, grid)
        q, k, v = self.attention.project(x, grid)
        # A pattern is one for the batch; where each series ends is not.
        hidden = torch.zeros(real.shape, dtype=q.dtype, device=q.device).masked_fill(~real, -torch.inf)
        out = attention(q, k, v, grid=grid, bias=hidden[:, None, None])
        return self.attention.out(out.transpose(1, 2).flatten(2))


class Convolved(SeriesMixer):
    """Each channel of a token from those `width` tokens around it; zeros outside the series."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, width, padding=_odd(width) // 2, groups=dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, real: Bool[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        """A class token stays as it is."""
        y = self.conv(_over(x, real)[:, grid.prefix :].transpose(1, 2)).transpose(1, 2)
        return nn.functional.pad(self.out(nn.functional.gelu(y)), (0, 0, grid.prefix, 0))


class Recurred(SeriesMixer):
    """The sum of two recurrences, one from the start and one from the end."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.there, self.back = (Recurrence(dim, heads, decay=Decay(dim, heads)) for _ in range(2))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, real: Bool[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        """A class token stays as it is. The way back starts after the end, where zeros write nothing."""
        x = _over(x, real)[:, grid.prefix :]
        grid = grid.replace(prefix=0) if grid.prefix else grid
        y = self.there(x, grid) + self.back(x.flip(1), grid).flip(1)
        return nn.functional.pad(y, (0, 0, real.shape[1] - y.shape[1], 0))


def _mixer(name: str, dim: int, heads: int, width: int) -> SeriesMixer:
    if name == "attention":
        return Attended(dim, heads)
    if name == "convolution":
        return Convolved(dim, width)
    if name == "recurrence":
        return Recurred(dim, heads)
    raise ChronotopeError(
        f"Classifier: mixer {name!r}; expected attention, convolution, recurrence, joined by '+', or none."
    )


def _odd(width: int) -> int:
    if width < 1 or width % 2 == 0:
        raise ChronotopeError(f"Classifier(width={width}): expected an odd number.")
    return width


def _over(x: Float[Tensor, "b n c"], real: Bool[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
    """Zeros where nothing is; what was there is not multiplied, so that NaN does not leak."""
    return torch.where(real[..., None], x, 0.0)


def _per_channel(units: Sequence[Sequence[float]] | None, channels: int) -> Float[Tensor, "channels 2"]:
    if units is None:
        units = [(0.0, 1.0)] * channels
    if len(units) != channels or any(len(pair) != 2 for pair in units):
        raise ChronotopeError(f"Classifier(units={units}): expected mean and deviation of each of {channels} channels.")
    return torch.tensor([list(pair) for pair in units], dtype=torch.float32)
