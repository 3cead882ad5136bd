"""A small causal language model over bytes."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float, Int64
from torch import Tensor, nn

from chronotope.grid import Grid
from chronotope.nn import Attention, Block, Stack
from chronotope.patterns import Pattern, causal
from chronotope.position import Rope

BYTES = 256


class Language(nn.Module):
    """Logits of the next byte from those before it: embedding, blocks of rotary attention, a linear layer.

    Args:
        dim, heads, layers: of the transformer.
        where: who may look at whom, joined with `causal()`; None: everything before.

    Example:
        >>> Language(32, 2, 1)(torch.randint(256, (2, 50))).shape
        torch.Size([2, 50, 256])
    """

    def __init__(self, dim: int = 128, heads: int = 4, layers: int = 3, where: Pattern | None = None):
        super().__init__()
        seen = causal() if where is None else where & causal()
        self.embed = nn.Embedding(BYTES, dim)
        blocks = [Block([Attention(dim, heads, where=seen, position=Rope(axes=("n",)))], dim) for _ in range(layers)]
        self.stack = Stack(blocks, dim)
        self.head = nn.Linear(dim, BYTES)

    def forward(self, tokens: Int64[Tensor, "b n"]) -> Float[Tensor, "b n bytes"]:
        """Logits of what comes after each byte."""
        return self.head(self.stack(self.embed(tokens), Grid(n=tokens.shape[1])))

    def loss(self, tokens: Int64[Tensor, "b n"]) -> Tensor:
        """Mean negative log likelihood of each byte but the first, in nats."""
        logits = self(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def attentions(self) -> Iterator[Attention]:
        """The attention layers, in order."""
        return (layer for layer in self.modules() if isinstance(layer, Attention))
