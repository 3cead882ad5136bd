r"""IR-Diffusion: several subjects, each as its own reference picture has it, that do not melt into each other.

$$
o_p = \mathrm{Attn}(q_p,\ [K_{p}, K'_{s(p)}],\ [V_{p}, V'_{s(p)}]), \qquad
K_p = \{k_n : s(n) = s(p) \text{ or } s(n) = 0 \text{ or } s(p) = 0\}
$$

s(p): the subject at token p of the target, 0 for the background. Isolation: a token of a subject sees its own subject
and the background, not the other subjects; the background sees all of the target. Reposition: K'_i, V'_i are the tokens
of subject i in its reference picture, moved and scaled so that its box becomes the box of region i in the target; the
background sees no reference. References and target are denoised side by side, each reference by itself.

Sizes: a batch of (R references, target) once or more, N tokens each: + M keys, the cells of the regions; a mask of
N x (N + M) for each member, no weights.

    >>> import chronotope as ct
    >>> target = torch.zeros(8, 8, dtype=torch.int64)
    >>> target[:3, :3], target[4:, 4:] = 1, 2
    >>> references = torch.zeros(2, 8, 8, dtype=torch.bool)
    >>> references[0, 2:5, 5:8] = references[1, :4, :2] = True
    >>> layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    >>> x = torch.randn(3, 64, 32)
    >>> with ct.adapt.control(layer, Subjects(target, references)):
    ...     y, _ = layer(x, x, x, need_weights=False)
    >>> y.shape, isolation_mask(target.flatten()).shape
    (torch.Size([3, 64, 32]), torch.Size([64, 192]))

As released: `Subjects(..., share=False)`, isolation alone, everywhere; sharing from step 4 of 50 on and from the 55th
self-attention of SDXL's U-Net on; `SubjectText`, which mixes in attention to the reference's prompt, 0.9 to 0.1.
Regions: `subject_masks` of the attention so far, or those of a segmenter until step 40. Layers of other resolutions
take regions and boxes resampled to theirs.

The released code (hehuiguo/DreamStory, commit 91e1a4b) moves features before the projections to keys and values, and
takes the nearest one: that chooses tokens, as here; outputs of up to 21 differ by 2.6e-5 at most (20 draws of random
weights and masks). It moves references to targets, and not both to a third place. Its sum of powers adds in place to A
itself, so that it uses A + A^2 + A^3 + 2A^4 + 2A^5 + 2A^6 + 2A^7 + A^8; here the formula, of four powers. Its threshold
maximises c (c - 256) (m - mean)^2, not the variance between classes; here Otsu's.

Not shown: consistency of subjects in pictures of SDXL. Left out: the writer of prompts, the segmenter, matching by DIFT
features. Ours, since SDXL has none: where keys were turned by a rotary code, `rope=` turns those of references on to
where they are moved.

Paper: Huiguo He, Qiuyue Wang, Yuan Zhou, Yuxuan Cai, Hongyang Chao, Jian Yin, Huan Yang, "Improving Multi-Subject
Consistency in Open-Domain Image Generation with Isolation and Reposition Attention", 2024, arXiv 2411.19261.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from chronotope.adapt import Asked, At, Control
from chronotope.errors import ChronotopeError, UnsupportedError
from chronotope.papers.control.maps import normalised, sides
from chronotope.papers.registry import paper
from chronotope.position import Rope

Box = tuple[int, int, int, int]
"""top, left, bottom, right; the last two are the first outside."""


def isolation_mask(
    regions: Int64[Tensor, "n"], references: Bool[Tensor, "r n"] | None = None
) -> Bool[Tensor, "n keys"]:
    """[N, N + R N]: whom each token of the target sees, in the target, then in each reference.

    regions: 0 for the background, else the number of the subject, from 1. references: which tokens of each reference
    are the subject; None: all, of as many references as there are subjects.
    """
    if references is None:
        references = regions.new_ones(int(regions.max()), len(regions), dtype=torch.bool)
    own = (regions[:, None] == regions) | (regions[:, None] == 0) | (regions == 0)
    subjects = torch.arange(1, len(references) + 1, device=regions.device)
    shared = (regions[:, None] == subjects)[:, :, None] & references
    return torch.cat((own, shared.flatten(1)), 1)


def box_of(mask: Bool[Tensor, "h w"]) -> Box:
    """The smallest box with all of a mask that is not empty."""
    found = mask.nonzero()
    (top, left), (bottom, right) = found.amin(0).tolist(), (found.amax(0) + 1).tolist()
    return top, left, bottom, right


def reposition(
    feature: Float[Tensor, "*s h w"], source: Box, target: Box, mode: Literal["nearest", "bilinear"] = "nearest"
) -> Float[Tensor, "*s h w"]:
    """What is in one box, scaled to another one; 0 outside of it.

    "bilinear" puts the middles of corner pixels onto each other, so that what rises evenly comes back as it was.
    """
    part = feature[..., source[0] : source[2], source[1] : source[3]]
    size = (target[2] - target[0], target[3] - target[1])
    corners = True if mode == "bilinear" else None
    moved = F.interpolate(part.reshape(-1, 1, *part.shape[-2:]), size=size, mode=mode, align_corners=corners)
    out = torch.zeros_like(feature)
    out[..., target[0] : target[2], target[1] : target[3]] = moved.reshape(*feature.shape[:-2], *size)
    return out


def subject_masks(
    maps: Float[Tensor, "l h w t"], words: Sequence[Sequence[int]], start: int = 0
) -> Bool[Tensor, "r h w"]:
    """Which pixels are which subject's, by `maps.propagated` maps of all words: the one whose map is highest there.

    words: of each subject. A subject's map is the largest of its words', from 0 to 1; every map, that of the word
    `start` among them, which stands for the background, is divided by its mean over the picture.
    """
    mean = maps.mean(0)
    found = [normalised(mean[..., list(one)].amax(-1)) for one in words]
    stacked = torch.stack([*found, mean[..., start]])
    stacked = stacked / stacked.mean((1, 2), keepdim=True).clamp(min=1e-8)
    highest = stacked.argmax(0)
    return torch.stack([highest == i for i in range(len(words))])


@paper(
    system=185,
    name="IR-Diffusion",
    family="control",
    claim="subjects of a picture see their references, moved to where they are, and not each other",
    evidence=["tests/papers/control/test_ir_diffusion.py"],
)
class Subjects(Control):
    """Isolation and reposition in the self-attention of an image model; other layers stay as they are.

    The batch is (reference 1, .., reference R, target), once or, with guidance, twice; without references every member
    is a target.

    Args:
        regions: [h, w], the subject at each pixel of the target, from 1, or 0. Layers have h and w divided alike.
        references: [R, h, w], which pixels of each reference are its subject; None: none, isolation alone.
        isolate, share, reposition: whether subjects are hidden from each other, whether they see their references, and
            whether these are moved; else they are seen where they are.
        rope: the rotary code by which the model turned queries and keys, on axes "h" and "w".
    """

    def __init__(
        self,
        regions: Int64[Tensor, "h w"],
        references: Bool[Tensor, "r h w"] | None = None,
        isolate: bool = True,
        share: bool = True,
        reposition: bool = True,
        rope: Rope | None = None,
    ):
        self.regions, self.references = regions, references
        self.isolate, self.share, self.move, self.rope = isolate, share and references is not None, reposition, rope
        self.group = 1 if references is None else len(references) + 1
        if references is not None and (references.shape[1:] != regions.shape or int(regions.max()) > len(references)):
            raise ChronotopeError(
                f"regions {list(regions.shape)} of {int(regions.max())} subjects, references {list(references.shape)}; "
                "expected one reference for each subject, of the same h and w."
            )

    def asks(self, at: At, asked: Asked) -> Asked:
        if at.crossed or not asked.square:
            return asked
        if asked.where is not None or asked.causal:
            raise UnsupportedError(f"{at.layer}: subjects are told apart by a mask; not with a pattern or causality.")
        batch, n = asked.q.shape[0], asked.q.shape[2]
        _require_groups(at, batch, self.group)
        h, w = sides(n, self.regions.shape[0] / self.regions.shape[1])
        regions = _sampled(self.regions, (h, w)).to(asked.q.device)
        number = regions.flatten()
        own = isolation_mask(number)[:, :n] if self.isolate else number.new_ones(n, n, dtype=torch.bool)
        if not self.share:
            return _seen(asked, self._for_targets(own, batch))
        slots, sources, owners = self._moves(regions)
        k, v = (self._shared(x, sources, owners) for x in (asked.k, asked.v))
        if self.rope is not None and self.move:
            places = torch.stack((slots // w - sources // w, slots % w - sources % w), 1)
            k = self.rope(k, coords=places.double())
        shared = number[:, None] == owners + 1
        seen = self._for_targets(torch.cat((own, shared), 1), batch, n)
        mask = asked.mask
        if mask is not None:  # a key that is moved is masked as the place it is moved to
            mask = torch.cat((mask.expand(*mask.shape[:-1], n), mask.expand(*mask.shape[:-1], n)[..., slots]), -1)
        return _seen(asked.but(k=torch.cat((asked.k, k), 2), v=torch.cat((asked.v, v), 2), mask=mask), seen)

    def _moves(self, regions: Int64[Tensor, "h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """For each key that is added: its place in the target, in its reference, and the number of the reference."""
        assert self.references is not None
        h, w = regions.shape
        place, found = torch.arange(h * w, device=regions.device).view(h, w), []
        for i, whole in enumerate(self.references.to(regions.device)):
            mask, region = _sampled(whole, (h, w)), regions == i + 1
            if not bool(mask.any()) or not bool(region.any()):
                continue
            source = box_of(mask)
            # Numbers of places, from 1, are moved like features: exact, since each is taken from one pixel.
            marks = torch.where(mask, place + 1, 0).double()
            moved = reposition(marks, source, box_of(region)) if self.move else marks
            slots = moved.flatten().nonzero()[:, 0]
            found.append((slots, moved.flatten()[slots].long() - 1, torch.full_like(slots, i)))
        if not found:
            return (place.flatten()[:0],) * 3
        slots, sources, owners = (torch.cat(x) for x in zip(*found, strict=True))
        return slots, sources, owners

    def _shared(self, x: Float[Tensor, "b hk n d"], sources: Tensor, owners: Tensor) -> Float[Tensor, "b hk m d"]:
        """Tokens of the references of each group, for every member of it."""
        groups = x.unflatten(0, (-1, self.group))
        chosen = groups[:, owners, :, sources].permute(1, 2, 0, 3)  # [M, G, H, D] -> [G, H, M, D]
        return chosen.repeat_interleave(self.group, 0)

    def _for_targets(self, seen: Bool[Tensor, "n keys"], batch: int, own: int | None = None) -> Tensor:
        """[B, 1, N, keys]: members that are no target see all their own keys, and no other."""
        plain = torch.ones_like(seen)
        if own is not None:
            plain[:, own:] = False
        return torch.stack([seen if (i + 1) % self.group == 0 else plain for i in range(batch)])[:, None]


class SubjectText(Control):
    """out = (1 - blend) attention + blend attention to the reference's prompt, in each subject's region of the target.

    In layers that look at text; the batch as for `Subjects`, each reference with its own prompt.
    """

    def __init__(self, regions: Int64[Tensor, "h w"], subjects: int, blend: float | int = 0.9):
        self.regions, self.group, self.blend = regions, subjects + 1, blend

    def out(self, at: At, asked: Asked, out: Float[Tensor, "b h nq dv"]) -> Float[Tensor, "b h nq dv"]:
        if not at.crossed:
            return out
        if asked.mask is not None:
            raise UnsupportedError(f"{at.layer}: subjects' texts with a mask of padding; give prompts without one.")
        _require_groups(at, out.shape[0], self.group)
        size = sides(out.shape[2], self.regions.shape[0] / self.regions.shape[1])
        regions, mixed = _sampled(self.regions, size).to(out.device).flatten(), out.clone()
        for i in range(self.group - 1):
            here = regions == i + 1
            q, k, v = (
                asked.q[self.group - 1 :: self.group][:, :, here],
                asked.k[i :: self.group],
                asked.v[i :: self.group],
            )
            told = F.scaled_dot_product_attention(q, k, v, scale=asked.scale, enable_gqa=q.shape[1] != k.shape[1])
            mixed[self.group - 1 :: self.group, :, here] *= 1 - self.blend
            mixed[self.group - 1 :: self.group, :, here] += self.blend * told
        return mixed


def _require_groups(at: At, batch: int, group: int) -> None:
    if batch % group:
        raise ChronotopeError(
            f"{at.layer}: a batch of {batch}; expected a multiple of {group}: {group - 1} references, then the target."
        )


def _sampled(regions: Tensor, size: tuple[int, int]) -> Tensor:
    """The nearest pixel for each pixel of another resolution."""
    if regions.shape == size:
        return regions
    return F.interpolate(regions[None, None].double(), size=size, mode="nearest-exact")[0, 0].to(regions.dtype)


def _seen(asked: Asked, seen: Bool[Tensor, "b one n keys"]) -> Asked:
    """The call with keys hidden, besides those that its mask hides."""
    if asked.mask is None:
        return asked.but(mask=seen)
    if asked.mask.dtype == torch.bool:
        return asked.but(mask=asked.mask & seen)
    return asked.but(mask=asked.mask.masked_fill(~seen, -torch.inf))
