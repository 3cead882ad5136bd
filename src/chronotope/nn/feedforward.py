"""What happens to each token on its own."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError

KINDS = ("swiglu", "geglu", "gelu")


class FeedForward(nn.Module):
    """swiglu: y = W_2 (silu(W_g x) * W_1 x); geglu: gelu in place of silu; gelu: y = W_2 gelu(W_1 x).

    Args:
        dim: channels of x [..., dim].
        kind: "swiglu", "geglu" or "gelu".
        ratio: hidden channels over dim. The gated kinds have three matrices, so they take 2/3 of that, rounded up to a
            multiple of 8: the parameters come out about equal.
        biases: whether the matrices come with learned biases.

    Source: Shazeer 2020 (arXiv 2002.05202).
    """

    def __init__(self, dim: int, kind: str = "swiglu", ratio: float | int = 4.0, *, biases: bool = False):
        super().__init__()
        if kind not in KINDS:
            raise ChronotopeError(f"FeedForward(kind={kind!r}): expected one of {', '.join(KINDS)}.")
        if not dim * ratio >= 1:
            raise ChronotopeError(f"FeedForward(dim={dim}, ratio={ratio}): expected dim * ratio of 1 or more.")
        self.kind = kind
        gated = kind != "gelu"
        hidden = -(-round(dim * ratio * 2 / 3) // 8) * 8 if gated else round(dim * ratio)
        self.enter = nn.Linear(dim, hidden * (2 if gated else 1), bias=biases)
        self.leave = nn.Linear(hidden, dim, bias=biases)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """Each token on its own."""
        if self.kind == "gelu":
            return self.leave(F.gelu(self.enter(x)))
        gate, value = self.enter(x).chunk(2, -1)
        return self.leave((F.silu(gate) if self.kind == "swiglu" else F.gelu(gate)) * value)
