r"""BroadWay (later ByTheWay): attention over time drawn to that of an earlier block, then its faster part made larger.

A [F, F]: the weights of a layer over F frames; R: those of the layer's fellow in the first of the blocks, resized to
its places.

$$
A' = A + \alpha (R - A), \qquad
A'' = \frac{1}{F} \sum_{|k - F/2| > \tau} \hat A'_k e^{2 \pi i k n / F}
    + \frac{\beta'}{F} \sum_{|k - F/2| \le \tau} \hat A'_k e^{2 \pi i k n / F}
$$

$$
E(A) = \mathrm{mean} \sum_j A_{ij}^2, \qquad E(A') = E_{low} + E_{high}, \qquad
\beta' = \max\left(\beta,\ \sqrt{(E(A) - E_{low}) / E_{high}}\right)
$$

A' lies nearer to R by 1 - alpha: frames agree better. A'' has at least the energy of A: what moves, moves more. Hats
are Fourier transforms along the keys; means are over places, heads and queries, in the videos that are told the text.
Frequency 0 is never in the upper band, so rows sum to 1 as before; weights below 0 occur. With F = 16 and tau = 7 the
band is all but the mean: A'' = 1/F + beta (A' - 1/F), of energy 1/F + beta^2 (E(A') - 1/F).

Sizes: weights [B h w, H, F, F].

    >>> layer, x = torch.nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(3, 16, 16)
    >>> with ct.adapt.control(layer, BroadWay(alpha=0.0, beta=1.5), steps=range(5)):
    ...     out, weights = layer(x, x, x)
    >>> bool((weights.sum(-1) - 1).abs().max() < 2e-6)
    True

`like` says for each layer where R comes from: layers that are their own fellow, those of the first block, get the
second part alone. R is as it was before it was changed itself. On AnimateDiff in diffusers (`UNetMotionModel`):

    fellow = lambda name: re.sub("up_blocks.[23]", "up_blocks.1", name)
    more = BroadWay(0.6, 1.5, like=fellow, batch=2, space=(64, 64), guided=True)
    with ct.adapt.control(unet, more, layers=[f"up_blocks.{i}.motion*" for i in (1, 2, 3)], steps=range(10)):

Settings of the released code (Bujiazi/ByTheWay, commit 1ae7294), for 16 frames: at the first 20% of the steps, in the
attention over time of up blocks 1, 2 and 3, tau = 7, and alpha = 0.6, beta = 1.5 (AnimateDiff) or alpha = 0.1, beta =
10 (VideoCrafter2). That code, copied to run beside this on random weights of 16 frames, tau = 3, 5, 7: weights of up to
1.6 at beta = 1.5 differ by 1.0e-6 at most, those of up to 9.4 at beta = 10 by 1.5e-5. How it resizes over space it does
not say: here bilinearly. For an odd F its band is not symmetric; here it is, of 2 tau frequencies.

In a small net trained on clips that mostly stand still, with changes at 5 of 25 steps, the mean square of what changes
from frame to frame rises from 0.031 to 0.034, 0.044 and 0.063 at beta = 1.5, 3 and 5 (alpha = 0), or to 0.032, 0.035
and 0.043 (alpha = 0.6); two other seeds rise as well. Trained on clips that all move, it does not rise: 0.131 becomes
0.128 at beta = 5. This does not tell motion from flicker.

Left out: the trained models, and what the changes bring there.

Paper: Jiazi Bu, Pengyang Ling, Pan Zhang, Tong Wu, Xiaoyi Dong, Yuhang Zang, Yuhang Cao, Dahua Lin, Jiaqi Wang,
"ByTheWay: Boost Your Text-to-Video Generation Model to Higher Quality in a Training-free Way", 2024, arXiv 2410.06241.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chronotope.adapt.control import At, Control
from chronotope.errors import ChronotopeError
from chronotope.papers.registry import paper


@paper(
    system=9,
    name="BroadWay",
    family="control",
    claim="weights over time drawn to those of an earlier block, and their upper frequencies made larger",
    evidence=["tests/papers/control/test_broadway.py"],
)
class BroadWay(Control):
    """The control, for layers that attend over time.

    Args:
        alpha: share of the way to the weights of the earlier layer.
        beta: factor of the upper band, at least.
        tau: half the width of the band, below F / 2.
        like: the name of the layer that a layer is drawn to, which has to be controlled too and to come first;
            default: itself.
        batch: videos in the model's batch, those for guidance counted.
        space: height and width of the latents, of which each level has a whole part, rounded up; needed where a layer
            has more places than the one that it is drawn to.
        guided: whether the second half of the batch alone is told the text: energies are taken there.
    """

    def __init__(
        self,
        alpha: float | int = 0.6,
        beta: float | int = 1.5,
        tau: int = 7,
        like: Callable[[str], str] = str,
        batch: int = 1,
        space: tuple[int, int] | None = None,
        guided: bool = False,
    ):
        if tau < 0 or beta < 0 or batch < 1 or (guided and batch % 2):
            raise ChronotopeError(
                f"tau={tau}, beta={beta}, batch={batch}: expected 0 or more, and a batch of 1 or more, even if guided."
            )
        self.alpha, self.beta, self.tau, self.like = alpha, beta, tau, like
        self.batch, self.space, self.guided = batch, space, guided

    def weights(self, at: At, weights: Float[Tensor, "b h f f"]) -> Float[Tensor, "b h f f"]:
        """Both changes. Notes the weights for later layers of the same call."""
        at.memo[at.layer, self] = weights
        other = at.memo.get((self.like(at.layer), self))
        if other is None:
            raise ChronotopeError(
                f"{at.layer} is drawn to {self.like(at.layer)!r}, which did not come before it: name both by layers=."
            )
        if other.shape[1:] != weights.shape[1:]:
            raise ChronotopeError(f"{at.layer}: weights {list(weights.shape[1:])} drawn to {list(other.shape[1:])}.")
        if len(other) != len(weights):
            other = self._resized(other, len(weights))
        # A layer that is its own fellow stays as it is, to the last bit.
        drawn = weights if other is weights else torch.lerp(weights, other, float(self.alpha))
        high = energy(self._told(bands(drawn, self.tau)[1])).clamp(min=1e-12)
        # E_low is E(A') - E_high.
        square = 1 + (energy(self._told(weights)) - energy(self._told(drawn))) / high
        return enhance(drawn, self.tau, square.clamp(min=float(self.beta) ** 2).sqrt())

    def _told(self, weights: Float[Tensor, "b h f f"]) -> Float[Tensor, "b2 h f f"]:
        return weights[len(weights) // 2 :] if self.guided else weights

    def _resized(self, weights: Float[Tensor, "b h f f"], rows: int) -> Float[Tensor, "b2 h f f"]:
        old, new = self._sides(len(weights)), self._sides(rows)
        maps = weights.reshape(self.batch, *old, -1).movedim(-1, 1)
        maps = F.interpolate(maps, new, mode="bilinear")
        return maps.movedim(1, -1).reshape(rows, *weights.shape[1:])

    def _sides(self, rows: int) -> tuple[int, int]:
        """Height and width of a level with so many rows."""
        h, w = self.space or (0, 0)
        for part in range(1, max(h, w) + 1):
            sides = math.ceil(h / part), math.ceil(w / part)
            if self.batch * sides[0] * sides[1] == rows:
                return sides
        raise ChronotopeError(
            f"{rows} rows are no level of {self.batch} videos of space={self.space}: give batch= and the height and "
            "width of the latents."
        )


def energy(weights: Float[Tensor, "b h f f"]) -> Float[Tensor, ""]:
    """Mean over all rows of the sum of squares: 1/F where they are flat, 1 where each looks at one frame."""
    return weights.square().sum(-1).mean()


def bands(weights: Float[Tensor, "*b f f"], tau: int) -> tuple[Float[Tensor, "*b f f"], Float[Tensor, "*b f f"]]:
    """The parts below and in the band of half-width tau around frequency F / 2; their energies add up."""
    frames = weights.shape[-1]
    if 2 * tau >= frames:
        raise ChronotopeError(f"tau={tau}: the band would reach the mean of {frames} frames; expected below F / 2.")
    frequency = torch.arange(frames // 2 + 1, device=weights.device)
    upper = torch.fft.rfft(weights, dim=-1) * (frequency >= frames / 2 - tau)
    high = torch.fft.irfft(upper, frames, dim=-1)
    return weights - high, high


def enhance(
    weights: Float[Tensor, "*b f f"], tau: int, beta: float | int | Float[Tensor, ""]
) -> Float[Tensor, "*b f f"]:
    """The upper band times beta."""
    return weights + (beta - 1) * bands(weights, tau)[1]
