"""Feature maps of linear attention: phi(q) . phi(k) takes the place of exp(q . k).

Each is a module, phi(x [B, H, N, D], position=None) -> [B, H, N, F]; `size(D)` is F. Those that look at `position`, an
int or a tensor [N] of the first or of all places, say so; the others leave it alone.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError

Position = int | Tensor | None


class FeatureMap(nn.Module):
    """phi, applied to queries and keys alike."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "b h n d"], position: Position = None) -> Float[Tensor, "b h n f"]:
        """phi(x)."""

    def size(self, d: int) -> int:
        """The number of features of a head of size d."""
        return d


class Identity(FeatureMap):
    """phi(x) = x: no feature map; normalisers may be negative."""

    def forward(self, x: Float[Tensor, "b h n d"], position: Position = None) -> Float[Tensor, "b h n f"]:
        """x itself."""
        return x


class Elu(FeatureMap):
    """phi(x) = elu(x) + 1 > 0 (Katharopoulos et al. 2020, arXiv 2006.16236)."""

    def forward(self, x: Float[Tensor, "b h n d"], position: Position = None) -> Float[Tensor, "b h n f"]:
        """elu(x) + 1."""
        return F.elu(x) + 1


class Relu(FeatureMap):
    """phi(x) = relu(x) + eps: with eps = 0, queries and keys that share no channel have normaliser 0."""

    def __init__(self, eps: float = 0.0):
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, "b h n d"], position: Position = None) -> Float[Tensor, "b h n f"]:
        """relu(x) + eps."""
        return F.relu(x) + self.eps


class Exp(FeatureMap):
    """phi(x) = exp(x - max x), the largest over channels and tokens; the factor cancels where outputs are normalised.

    Of causal sequences the largest would come from the future, so `stable=False` leaves it out.
    """

    def __init__(self, stable: bool = True):
        super().__init__()
        self.stable = stable

    def forward(self, x: Float[Tensor, "b h n d"], position: Position = None) -> Float[Tensor, "b h n f"]:
        """exp(x), scaled."""
        return (x - x.detach().amax((2, 3), keepdim=True)).exp() if self.stable else x.exp()


class Softmax(FeatureMap):
    """phi(x) = softmax over channels of x, or of [x, -x] with `both` (Zhang et al. 2024, arXiv 2402.04347)."""

    def __init__(self, both: bool = False):
        super().__init__()
        self.both = both

    def forward(self, x: Float[Tensor, "b h n d"], position: Position = None) -> Float[Tensor, "b h n f"]:
        """softmax(x)."""
        return (torch.cat((x, -x), -1) if self.both else x).softmax(-1)

    def size(self, d: int) -> int:
        """d, or 2 d with `both`."""
        return 2 * d if self.both else d


class Taylor(FeatureMap):
    """phi(x) = [1, x / D^(1/4), vec(x x^T) / sqrt(2 D)]: phi(q) . phi(k) = 1 + s + s^2 / 2 >= 1/2, s = q . k / sqrt(D).

    The second-order Taylor series of exp(s) (Arora et al. 2024, arXiv 2402.18668). 1 + D + D^2 features.
    """

    def forward(self, x: Float[Tensor, "b h n d"], position: Position = None) -> Float[Tensor, "b h n f"]:
        """Powers 0, 1 and 2 of x."""
        d = x.shape[-1]
        square = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2 * d)
        return torch.cat((torch.ones_like(x[..., :1]), x / d**0.25, square), -1)

    def size(self, d: int) -> int:
        """1 + d + d^2."""
        return 1 + d + d * d


class Random(FeatureMap):
    """phi(x) = exp(W y - |y|^2 / 2) / sqrt(F), y = x / D^(1/4): positive random features of exp(q . k / sqrt(D)).

    The rows of W are Gaussian and orthogonal in blocks of D (Choromanski et al. 2021, arXiv 2009.14794). The
    expectation of phi(q) . phi(k) is exp(s) exactly; its variance falls with `features`.
    """

    weight: Tensor

    def __init__(self, d: int, features: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        blocks = []
        for _ in range(-(-features // d)):
            q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
            q = q * r.diagonal().sign()  # else some directions are likelier than others
            length = torch.randn(d, d, generator=generator, dtype=torch.float64).norm(dim=1)
            blocks.append(q.T * length[:, None])
        self.register_buffer("weight", torch.cat(blocks)[:features].float())

    def forward(self, x: Float[Tensor, "b h n d"], position: Position = None) -> Float[Tensor, "b h n f"]:
        """Positive features, the expectation of whose products is exp(q . k / sqrt(D))."""
        if x.shape[-1] != self.weight.shape[1]:
            raise ChronotopeError(f"Random: made for heads of {self.weight.shape[1]}, got {x.shape[-1]}.")
        y = x / x.shape[-1] ** 0.25
        exponent = y @ self.weight.to(y.dtype).T - y.square().sum(-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(len(self.weight))

    def size(self, d: int) -> int:
        """The number of rows of W."""
        return len(self.weight)


class Learned(FeatureMap):
    """phi(x) = softmax([W_h x, -W_h x]), one W for each head, the identity at first (arXiv 2402.04347)."""

    def __init__(self, heads: int, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(d).repeat(heads, 1, 1))

    def forward(self, x: Float[Tensor, "b h n d"], position: Position = None) -> Float[Tensor, "b h n f"]:
        """softmax over both signs of the projected head."""
        y = torch.einsum("bhnd,hed->bhne", x, self.weight.to(x.dtype))
        return torch.cat((y, -y), -1).softmax(-1)

    def size(self, d: int) -> int:
        """2 d."""
        return 2 * d


class Cosine(FeatureMap):
    """phi(x, i) = relu(x) * [cos(pi i / 2 L), sin(pi i / 2 L)]: products are weighed by cos(pi (i - j) / 2 L) >= 0.

    For at most L tokens (Qin et al. 2022, cosFormer, arXiv 2202.08791).
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def forward(self, x: Float[Tensor, "b h n d"], position: Position = None) -> Float[Tensor, "b h n f"]:
        """Both components; `position` counts from 0 where it is not given."""
        angle = math.pi / 2 * places(x.to(torch.promote_types(x.dtype, torch.float32)), position) / self.length
        if x.shape[2] and bool(angle[-1] > math.pi / 2):
            raise ChronotopeError(f"Cosine(length={self.length}): got a token at a later place; give a larger length.")
        y = F.relu(x)
        return torch.cat((y * angle.cos()[:, None].to(x.dtype), y * angle.sin()[:, None].to(x.dtype)), -1)

    def size(self, d: int) -> int:
        """2 d."""
        return 2 * d


class Lrpe(FeatureMap):
    """phi(x, i) = [x cos(i theta), x sin(i theta)], theta [H, D] learned: products turn with i - j in every channel.

    theta begins as a geometric series, 10000^(-2 c / D) (Qin et al. 2023, arXiv 2307.09270). Signs are kept: normalise
    by something else.
    """

    def __init__(self, heads: int, d: int, base: float = 10000.0):
        super().__init__()
        series = base ** (-2 / (heads * d) * torch.arange(heads * d))
        self.theta = nn.Parameter(series.view(heads, d))

    def forward(self, x: Float[Tensor, "b h n d"], position: Position = None) -> Float[Tensor, "b h n f"]:
        """Both components; `position` counts from 0 where it is not given."""
        exact = torch.promote_types(x.dtype, torch.float32)  # a place above 256 is not a number of bfloat16
        angle = places(x.to(exact), position)[:, None] * self.theta[:, None, :].to(exact)
        return torch.cat((x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)), -1)

    def size(self, d: int) -> int:
        """2 d."""
        return 2 * d


def places(x: Float[Tensor, "b h n d"], position: Position) -> Float[Tensor, "n"]:
    """The places of the tokens of x: those given, or counted from the first."""
    if isinstance(position, Tensor):
        return position.to(x.dtype)
    return torch.arange(x.shape[2], device=x.device, dtype=x.dtype) + (position or 0)
