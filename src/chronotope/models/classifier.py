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


class Classifier(Saved):
    """logits = W LN(pool(block_L(... block_1(E u)))), u being `patch` values of all channels after one another.

    A block: x = x + mix(LN(x)) for each of its mixers in turn, then x = x + F(LN(x)). Tokens lie on Grid(t=...).

    Args:
        channels, classes: of the series.
        patch: values of a token.
        dim, heads, layers, dropout: of the blocks.
        mixers: what a block mixes tokens with, joined by "+": "attention" (rotary, all to all), "convolution" (`width`
            tokens around, channel by channel), "recurrence" (gated linear attention, there and back). "none": tokens
            do not meet before the pool.
        pool: "mean" over the tokens, or "class": a learned token in front (`prefix=1`), for attention only.
        width: of the convolution, odd.
        mean, scale: of each channel in the training data; values are (x - mean) / scale. None: 0 and 1.

    What lies after the end of a series changes nothing, and no element of a batch knows of another.

    Example:
        >>> model = Classifier(channels=3, classes=4, patch=2, mixers="convolution+attention")
        >>> model(torch.randn(5, 21, 3), torch.tensor([21, 7, 20, 1, 2])).shape
        torch.Size([5, 4])

    Raises ChronotopeError: an unknown mixer or pool, sizes that do not fit.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        channels: int,
        classes: int,
        patch: int = 1,
        dim: int = 64,
        heads: int = 4,
        layers: int = 2,
        mixers: str = "attention",
        pool: str = "mean",
        width: int = 9,
        dropout: float = 0.1,
        mean: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
    ):
        super().__init__()
        names = [] if mixers == "none" else mixers.split("+")
        if pool not in POOLS or (pool == "class" and "attention" not in names):
            raise ChronotopeError(
                f"Classifier(pool={pool!r}, mixers={mixers!r}): pool is one of {', '.join(POOLS)}; a class token "
                "sees the others by attention."
            )
        if patch < 1 or layers < 1:
            raise ChronotopeError(f"Classifier(patch={patch}, layers={layers}): expected 1 or more.")
        self.patch = patch
        self.register_buffer("mean", _per_channel(mean, channels, 0.0))
        self.register_buffer("scale", _per_channel(scale, channels, 1.0))
        self.embed = nn.Linear(patch * channels, dim)
        self.first = nn.Parameter(torch.randn(dim) * 0.02) if pool == "class" else None
        self.blocks = nn.ModuleList(
            SeriesBlock([_mixer(name, dim, heads, width) for name in names], dim, dropout) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(
        self, series: Float[Tensor, "b n channels"], lengths: Int64[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b classes"]:
        """Logits. `lengths`: where each series ends; None: at n."""
        if lengths is None:
            lengths = torch.full((len(series),), series.shape[1], device=series.device)
        x, real = self.tokens(series, lengths)
        grid = Grid(t=x.shape[1])
        if self.first is not None:
            grid = grid.replace(prefix=1)
            x = torch.cat((self.first.expand(len(x), 1, -1), x), 1)
            real = torch.cat((torch.ones_like(real[:, :1]), real), 1)
        for block in self.blocks:
            x = block(x, grid, real)
        x = x[:, 0] if self.first is not None else _over(x, real).sum(1) / real.sum(1)[:, None]
        return self.head(self.norm(x))

    def tokens(
        self, series: Float[Tensor, "b n channels"], lengths: Int64[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b t dim"], Bool[Tensor, "b t"]]:
        """A token for every `patch` values, and which of them hold a value of the series."""
        if series.shape[2] != len(self.mean):
            raise ChronotopeError(f"series of {series.shape[2]} channels; the model is for {len(self.mean)}.")
        if not bool(((lengths >= 1) & (lengths <= series.shape[1])).all()):
            raise ChronotopeError(f"lengths {lengths.tolist()}; expected 1 to {series.shape[1]}.")
        inside = torch.arange(series.shape[1], device=series.device) < lengths[:, None]
        values = _over((series - self.mean) / self.scale, inside)
        values = nn.functional.pad(values, (0, 0, 0, -series.shape[1] % self.patch))
        count = values.shape[1] // self.patch
        real = torch.arange(count, device=series.device) * self.patch < lengths[:, None]
        return self.embed(values.reshape(len(series), count, -1)), real


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
        if width < 1 or width % 2 == 0:
            raise ChronotopeError(f"Classifier(width={width}): expected an odd number.")
        self.conv = nn.Conv1d(dim, dim, width, padding=width // 2, groups=dim)
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


def _over(x: Float[Tensor, "b n c"], real: Bool[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
    """Zeros where nothing is; what was there is not multiplied, so that NaN does not leak."""
    return torch.where(real[..., None], x, 0.0)


def _per_channel(given: Sequence[float] | None, channels: int, otherwise: float) -> Float[Tensor, "channels"]:
    out = torch.full((channels,), otherwise) if given is None else torch.tensor(list(given), dtype=torch.float32)
    if len(out) != channels:
        raise ChronotopeError(f"Classifier: mean or scale of {len(out)} numbers for {channels} channels.")
    return out
