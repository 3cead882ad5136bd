"""What happens to each token on its own."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError

KINDS = ("swiglu", "gelu")


class FeedForward(nn.Module):
    """swiglu: y = W_2 (silu(W_g x) * W_1 x); gelu: y = W_2 gelu(W_1 x).

    Args:
        dim: channels of x [..., dim].
        kind: "swiglu" or "gelu".
        ratio: hidden channels over dim. swiglu has three matrices, so it takes 2/3 of that, rounded up to a multiple
            of 8: the parameters come out about equal.

    Source: Shazeer 2020 (arXiv 2002.05202).
    """

    def __init__(self, dim: int, kind: str = "swiglu", ratio: float | int = 4.0):
        super().__init__()
        if kind not in KINDS:
            raise ChronotopeError(f"FeedForward(kind={kind!r}): expected one of {', '.join(KINDS)}.")
        if not dim * ratio >= 1:
            raise ChronotopeError(f"FeedForward(dim={dim}, ratio={ratio}): expected dim * ratio of 1 or more.")
        self.kind = kind
        hidden = -(-round(dim * ratio * 2 / 3) // 8) * 8 if kind == "swiglu" else round(dim * ratio)
        self.enter = nn.Linear(dim, hidden * (2 if kind == "swiglu" else 1), bias=False)
        self.leave = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """Each token on its own."""
        if self.kind == "gelu":
            return self.leave(F.gelu(self.enter(x)))
        gate, value = self.enter(x).chunk(2, -1)
        return self.leave(F.silu(gate) * value)
