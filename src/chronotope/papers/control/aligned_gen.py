r"""AlignedGen: images of one style, by attention to the first of the batch as if it lay beside each of the others.

With q, k, v of the image tokens before rotation, R(p) the rotation at place p, W the width, image 0 the reference:

$$
q' = \mathrm{AdaIN}(q, q_0), \quad k' = \mathrm{AdaIN}(k, k_0), \quad
\mathrm{AdaIN}(x, y) = \frac{x - \mu_x}{\sigma_x} \sigma_y + \mu_y
$$

$$
o = \mathrm{softmax}\big(R(p) q' \, [\, \text{text},\; R(p) k',\; \lambda R(p + (0, W)) k_0 \,]^T\big)
    \, [\, \text{text},\; v,\; v_0 \,]
$$

mu and sigma of each head and channel over the tokens of an image; lambda = (t / 1000)^2 falls over the sampling, or is
fixed. Without the shift by W (ShiftPE) each token of the reference has the place of one's own, and is looked at for
that. Image 0 looks at itself alone, so it comes out as it does by itself.

Sizes: q, k, v [B, H, L + n, D], n image tokens at `ids` [n, axes]; keys and values become [B, H, L + 2 n, D]. Controls
see rotated q and k: R(-p) takes the rotation off, and R(0, W) R(p) = R(p + (0, W)).

    >>> ids = Grid(h=4, w=4).coords().float()
    >>> shift_ids(ids, 1, 4)[:2].tolist()
    [[0.0, 4.0], [0.0, 5.0]]
    >>> rope = Rope(axes=("h", "w"))
    >>> shared = SharedAttention(lambda x, ids: rope(x, coords=ids), ids, strength=1.0)
    >>> asked = shared.share(Asked(*torch.randn(3, 2, 4, 5 + 16, 8)), first=5)
    >>> asked.k.shape, asked.mask.shape
    (torch.Size([2, 4, 37, 8]), torch.Size([2, 1, 1, 37]))

    shared = SharedAttention(flux_turn((16, 56, 56)), img_ids)
    with ct.adapt.control(transformer, shared, layers="single_transformer_blocks.*", steps=range(30)):
        ...

As released: layers 19 .. 56 of 57, 30 steps. By default lambda falls there; its script takes 1.1 in all steps.

A picture that was not made by the model is the reference by `with_reference`: at each step it enters as image 0, with
the noise of that step. Left out: the paper's own way of taking the features of such a picture, which its code lacks.

How often a token looks at its own place of the reference, where content tells nothing, in shares of one place: 7.5
without the shift and 1.7 with it on 6 x 10 tokens; with heads and positions of Flux on 32 x 32 tokens 12.4 and 2.8,
since rows still meet.

Compared with `ShareAttnFluxAttnProcessor2_0` of Jiexuanz/AlignedGen at 454797c on random q, k, v, with lambda fixed and
falling, image 0 protected and not: outputs differ by 5.4e-7 at most.

Not shown: scores of style and of text with the weights of FLUX.

Paper: Jiexuan Zhang, Yiheng Du, Qian Wang, Yu Gu, Weiqi Li, Jian Zhang, "AlignedGen: Aligning Style Across Generated
Images", 2025, arXiv 2509.17088.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chronotope.adapt import Asked, At, Control
from chronotope.errors import ChronotopeError, UnsupportedError
from chronotope.models.diffusion import Model
from chronotope.papers.registry import paper
from chronotope.position import Rope

Turn = Callable[[Tensor, Tensor], Tensor]
"""Rotates x [B, H, n, D] by the places ids [n, axes], which add up."""


def shift_ids(ids: Float[Tensor, "n axes"], axis: int, offset: float | int) -> Float[Tensor, "n axes"]:
    """The places moved along an axis."""
    out = ids.clone()
    out[:, axis] += offset
    return out


def flux_turn(dims: tuple[int, ...], base: float | int = 10000.0) -> Turn:
    """The rotation of Flux transformers, `axes_dims_rope`: channels 2 i and 2 i + 1 are a pair, axes in order."""
    names = tuple(f"axis{i}" for i in range(len(dims)))
    rope = Rope(axes=names, base=base, share={name: dim / sum(dims) for name, dim in zip(names, dims, strict=True)})

    def turn(x: Tensor, ids: Tensor) -> Tensor:
        halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rope(halves, coords=ids).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

    return turn


def adain(x: Float[Tensor, "b h n d"], like: Float[Tensor, "one h m d"], eps: float = 1e-5) -> Float[Tensor, "b h n d"]:
    """x with the mean and deviation over tokens of `like`, for each head and channel."""
    (mean, deviation), (own_mean, own_deviation) = (
        (y.mean(2, keepdim=True), (y.var(2, keepdim=True) + eps).sqrt()) for y in (like, x)
    )
    return (x - own_mean) / own_deviation * deviation + mean


def falling(time: float, longest: float | int = 1.0) -> float:
    """lambda = (t / longest)^2. longest: the first noise level as the model is told of it, 1 by pipelines of Flux."""
    return (time / longest) ** 2


@paper(
    system=131,
    name="AlignedGen",
    family="control",
    claim="one style for a batch: keys and values of image 0 shared at shifted places, statistics of q and k aligned",
    evidence=["tests/papers/control/test_aligned_gen.py"],
    missing="the same place gets below 2 x uniform on small grids: 2.8 x (12.4 unshifted) on 32 x 32 tokens of Flux",
)
class SharedAttention(Control):
    """Shared attention with ShiftPE and AdaIN. Image 0 of the batch is the reference.

    turn: the model's rotation of q and k. ids: places of the image tokens, as the model has them; those before or after
    them in a joint attention are text. strength: lambda, or a function of the noise level that the model is told.
    adain: whether statistics are aligned. shift: of the reference, one number for each axis; default: the width, the
    extent of the last axis. protect_first: whether image 0 looks at itself alone.
    """

    def __init__(
        self,
        turn: Turn,
        ids: Float[Tensor, "n axes"],
        strength: float | int | Callable[[float], float] = falling,
        adain: bool = True,
        shift: tuple[float, ...] | None = None,
        protect_first: bool = True,
    ):
        self.turn, self.ids, self.strength, self.adain, self.protect = turn, ids, strength, adain, protect_first
        width = float(ids[:, -1].max() - ids[:, -1].min()) + 1
        self.shift = ids.new_tensor([0.0] * (ids.shape[1] - 1) + [width] if shift is None else shift)

    def asks(self, at: At, asked: Asked) -> Asked:
        text = asked.q.shape[2] - len(self.ids)
        if not asked.square or text < 0:
            raise ChronotopeError(
                f"{at.layer}: {asked.q.shape[2]} queries look at {asked.k.shape[2]} keys; expected attention over "
                f"{len(self.ids)} image tokens, with text or without. Choose the layers of that kind by `layers=`."
            )
        return self.share(asked, 0 if at.text.start > 0 else text, self._strength(at))

    def _strength(self, at: At) -> float | int:
        if not callable(self.strength):
            return self.strength
        if at.time is None:
            raise ChronotopeError(f"{at.layer}: the model is told no noise level; give strength= as a number.")
        return self.strength(at.time)

    def share(self, asked: Asked, first: int, strength: float | int = 1.0) -> Asked:
        """The call with the reference among its keys. first: where the image begins."""
        if asked.where is not None or asked.causal:
            raise UnsupportedError("shared attention has keys of another image: not with a pattern or a causal mask.")
        if len(asked.q) == 1:
            return asked
        q, k = (self._aligned(x, first) for x in (asked.q, asked.k))
        here = slice(first, first + len(self.ids))
        reference = self.turn(asked.k[:1, :, here], self.shift.to(k.device).expand(len(self.ids), -1))
        scale = k.new_full((len(k), 1, 1, 1), float(strength))
        scale[0] = 1.0
        k = torch.cat((k, scale * reference), 2)
        v = torch.cat((asked.v, asked.v[:1, :, here].expand(len(k), -1, -1, -1)), 2)
        return asked.but(q=q, k=k, v=v, mask=self._mask(asked.mask, k))

    def _aligned(self, x: Float[Tensor, "b h n d"], first: int) -> Float[Tensor, "b h n d"]:
        """Image tokens of all but image 0 with its statistics, taken before rotation."""
        if not self.adain:
            return x
        ids, end = self.ids.to(x.device), first + len(self.ids)
        plain = self.turn(x[:, :, first:end], -ids)
        moved = self.turn(adain(plain[1:], plain[:1]), ids)
        return torch.cat((x[:, :, :first], torch.cat((x[:1, :, first:end], moved)), x[:, :, end:]), 2)

    def _mask(self, own: Tensor | None, k: Tensor) -> Tensor | None:
        """The model's own mask, and nothing of the reference for image 0."""
        if own is None and not self.protect:
            return None
        shown = torch.ones(len(k), 1, 1, k.shape[2], dtype=torch.bool, device=k.device)
        shown[0, ..., k.shape[2] - len(self.ids) :] = not self.protect
        if own is None:
            return shown
        own = own.expand(*own.shape[:-1], k.shape[2] - len(self.ids))
        if own.dtype == torch.bool:
            return F.pad(own, (0, len(self.ids)), value=True) & shown
        return F.pad(own, (0, len(self.ids))).masked_fill(~shown, -torch.inf)


def with_reference(model: Model, picture: Float[Tensor, "one *s"], noise: Float[Tensor, "one *s"]) -> Model:
    """The model of a flow, with a picture that exists as image 0: t picture + (1 - t) noise at time t."""

    def told(x: Tensor, t: Tensor) -> Tensor:
        first = t[:1].view(-1, *[1] * (x.ndim - 1))
        both = torch.cat((first * picture + (1 - first) * noise, x))
        return model(both, torch.cat((t[:1], t)))[1:]

    return told
