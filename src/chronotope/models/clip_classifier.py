"""The class of a clip, from attention over the axes that each layer names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.nn import Attention, Block, PatchEmbed, Stack
from chronotope.patterns import Pattern, along, causal, window
from chronotope.position import Rope
from chronotope.saving import Saved

AXES = ("t", "h", "w")
BASE = 100.0  # of the rotary code: axes of clips are short


class ClipClassifier(Saved):
    r"""logits = W read(LN(block_L(... block_1(patches)))), read being the mean over all tokens, or the class token.

    Args:
        classes: how many.
        patch, channels: pixels of a patch on each side, channels of a frame.
        dim, heads, layers: of the blocks.
        order: the attentions of a block, each by the axes along which it looks: "t hw" is divided, "thw" joint, "t h w"
            axial, "hw" keeps frames apart: then the logits are the mean of those of the single frames. A list takes
            turns over the layers: ["hw", "t"] is interleaved, ["hw", "hw", "t", "t"] with 4 layers factorised.
        ordered: whether the time of a token is in its position code. Without, frames may be shuffled.
        token: whether a learned class token is read. It is a prefix token: all see it, and it sees all, so that frames
            are never quite apart.
        near: odd size of the window in h and w that attention along these axes is kept to; None: the whole frame.
        past: whether attention along t sees the own and earlier frames only; not with a class token, which comes before
            all frames and would see none of them.
        dropout, drop_path: as for `ct.nn.Block`.

    Example:
        >>> ClipClassifier(4, patch=2, order="t hw")(torch.rand(3, 5, 1, 6, 8)).shape
        torch.Size([3, 4])

    Raises ChronotopeError: an axis that is none of t, h, w, sizes that do not fit.

    Source: Bertasius et al. 2021 (arXiv 2102.05095), divided and joint attention with a class token; Arnab et al. 2021
    (arXiv 2103.15691), factorised: here tokens of all frames go on to the layers over time, not one for each frame.
    """

    def __init__(
        self,
        classes: int,
        patch: int = 1,
        channels: int = 1,
        dim: int = 64,
        heads: int = 4,
        layers: int = 2,
        order: str | Sequence[str] = "t hw",
        ordered: bool = True,
        *,
        token: bool = False,
        near: int | None = None,
        past: bool = False,
        dropout: float | int = 0.0,
        drop_path: float | int = 0.0,
    ):
        super().__init__()
        orders = [text.split() for text in ([order] if isinstance(order, str) else order)]
        if layers < 1 or not orders or any(not words or set("".join(words)) - set(AXES) for words in orders):
            raise ChronotopeError(
                f"ClipClassifier(layers={layers}, order={order!r}): expected one layer or more, and groups of the axes "
                "t, h, w between spaces, such as 't hw', or a list of such texts."
            )
        if token and past:
            raise ChronotopeError(
                "ClipClassifier(token=True, past=True): the class token comes first and sees nothing."
            )
        self.embed = PatchEmbed(dim, patch, channels)
        self.stack = Stack(
            [
                Block(
                    [
                        Attention(dim, heads, where=_where(axes, near, past), position=_code(axes, ordered))
                        for axes in words
                    ],
                    dropout=dropout,
                    drop_path=drop_path,
                )
                for words in islice(cycle(orders), layers)
            ]
        )
        self.token = nn.Parameter(torch.randn(dim) * 0.02) if token else None
        self.head = nn.Linear(dim, classes)

    def forward(self, clips: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b classes"]:
        """Logits."""
        return self.head(self.features(clips))

    def features(self, clips: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b dim"]:
        """What is read of the last layer."""
        x, grid = self.embed(clips)
        if self.token is None:
            return self.stack(x, grid).mean(1)
        x = torch.cat((self.token.expand(len(x), 1, -1), x), 1)
        return self.stack(x, grid.replace(prefix=1))[:, 0]


def _code(axes: str, ordered: bool) -> Rope | None:
    placed = tuple(axis for axis in axes if ordered or axis != "t")
    return Rope(axes=placed, base=BASE) if placed else None


def _where(axes: str, near: int | None, past: bool) -> Pattern:
    where = along(*axes)
    sizes: dict[str, Any] = {axis: near for axis in axes if near is not None and axis != "t"}
    if sizes:
        where = where & window(**sizes)
    return where & causal("t") if past and "t" in axes else where
