"""The class of a clip, from attention over the axes that each layer names."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.nn import Attention, Block, PatchEmbed, Stack
from chronotope.patterns import along
from chronotope.position import Rope
from chronotope.saving import Saved

AXES = ("t", "h", "w")
BASE = 100.0  # of the rotary code: axes of clips are short


class ClipClassifier(Saved):
    """logits = W mean(LN(block_L(... block_1(patches)))), the mean over all tokens of Grid(t, h, w).

    Args:
        classes: how many.
        patch, channels: pixels of a patch on each side, channels of a frame.
        dim, heads, layers: of the blocks.
        order: the attentions of a block, each by the axes along which it looks: "t hw" is divided, "thw" joint, "hw"
            keeps frames apart: then the logits are the mean of those of the single frames.
        ordered: whether the time of a token is in its position code. Without, frames may be shuffled.

    Example:
        >>> ClipClassifier(4, patch=2, order="t hw")(torch.rand(3, 5, 1, 6, 8)).shape
        torch.Size([3, 4])

    Raises ChronotopeError: an axis that is none of t, h, w, sizes that do not fit.
    """

    def __init__(
        self,
        classes: int,
        patch: int = 1,
        channels: int = 1,
        dim: int = 64,
        heads: int = 4,
        layers: int = 2,
        order: str = "t hw",
        ordered: bool = True,
    ):
        super().__init__()
        if layers < 1 or not order.split() or any(axis not in AXES for word in order.split() for axis in word):
            raise ChronotopeError(
                f"ClipClassifier(layers={layers}, order={order!r}): expected one layer or more, and groups of the axes "
                "t, h, w between spaces, such as 't hw'."
            )
        self.embed = PatchEmbed(dim, patch, channels)
        self.stack = Stack(
            [Block([_attention(dim, heads, word, ordered) for word in order.split()]) for _ in range(layers)]
        )
        self.head = nn.Linear(dim, classes)

    def forward(self, clips: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b classes"]:
        """Logits."""
        return self.head(self.stack(*self.embed(clips)).mean(1))


def _attention(dim: int, heads: int, axes: str, ordered: bool) -> Attention:
    placed = tuple(axis for axis in axes if ordered or axis != "t")
    rope = Rope(axes=placed, base=BASE) if placed else None
    return Attention(dim, heads, where=along(*axes), position=rope)
