r"""BaRISTA: electrodes in a brain as a set; how finely their places are told, and masked, is a choice of scale.

    tokens   h[c, p] = W E(x_c in patch p) + sum_k S_k[label_k(c)]     labels: coordinates, or a parcel, or a lobe
    block    h = h + A(N(h)),  h = h + MLP(N(h))                       A: all pairs, rotary over p, N: RMS norm
    taught   mean over masked (c, p) of |R h~[c, p] - z[c, p]|^2       h~: m stands for W E(x) where it is masked

E: residual blocks of two dilated convolutions over the samples of a patch, each then normed over samples, then a GELU.
z: what a copy of W E, which follows it by t = mu t + (1 - mu) s and gets no gradient, says of the patches unmasked. A
mask takes units of one scale: channels, or all channels of a parcel or lobe together.

Sizes: x [B, C, T], labels [B, C, K] -> [B, C * P, D], P = T / patch, on Grid(v=C, t=P). (C P)^2 pairs in each layer,
where attention along each axis has C^2 P + P^2 C: of 100 electrodes and 12 patches 1,440,000 against 134,400.

    >>> from chronotope.papers.model.barista_sets import scale_mask
    >>> places = {"channel": torch.randint(9, (2, 6, 3)), "parcel": torch.tensor([[0, 0, 1, 1, 2, 2]] * 2)[..., None]}
    >>> data = SpaceTimeSet(torch.randn(2, 6, 64), places)
    >>> model = BaRISTA([3], patch=16, dim=32, layers=2, scale="parcel")
    >>> model(data).shape
    torch.Size([2, 24, 32])
    >>> mask = scale_mask(data, patches=4, ratio=0.5, scale="parcel")
    >>> learner = MaskedLatents(model)
    >>> mask.shape, learner.loss(data, mask).shape
    (torch.Size([2, 6, 4]), torch.Size([]))

Channels that are not `real` are seen by nobody, and are in no mask. Defaults are those of the released code
(ShanechiLab/BaRISTA at commit 83b2737: 250 ms of 2048 Hz, 12 layers of width 64). With its weights, in float64, its
tokens and ours differ by 8e-15 of 9, after two layers, attention written out, by 3e-7 of 3: it has angles in float32.

Unconfirmed, since that code has no pretraining: momentum, the standardised z without S, mean square, R one matrix, and
whether a unit is masked in all patches (`span=None`) or in some. Left out: dropout, finetuning heads, reconstruction
of channels, atlases. Streaming: the window is run again, since all patches see each other.

Measured on 8 regions of 4 electrodes, one of them raised, noise in each electrode; 300 steps of 32 windows, one seed. A
ridge regression from pooled tokens finds the region, on subsets of 16 of 24 electrodes that were not shown before, in
0.669 of the windows at the scale of parcels (0.514 before the pretraining), 0.379 at that of channels (0.225). On the 8
electrodes that were never shown: 0.735 (0.447), and 0.130 (0.130), which is chance.

Not shown: Brain Treebank, subjects, lobes against parcels.

Paper: Lucine L. Oganesian, Saba Hashemi, Maryam M. Shanechi, "BaRISTA: Brain Scale Informed Spatiotemporal
Representation of Human Intracranial Neural Activity", 2025, arXiv 2512.12135.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.attention import Attention
from chronotope.nn.feedforward import FeedForward
from chronotope.nn.mixer import Context, Whole
from chronotope.papers.model.barista_sets import Scale, SpaceTimeSet
from chronotope.papers.registry import paper
from chronotope.position import Rope
from chronotope.saving import Saved


class Dilated(nn.Module):
    """y = P x + f(f(x)), f = GELU(norm over samples(convolution)); P: 1 where sizes stay, unless it is `last`."""

    def __init__(self, enter: int, leave: int, dilation: int, last: bool):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(size, leave, 3, dilation=dilation, padding="same") for size in (enter, leave)
        )
        self.skip = nn.Conv1d(enter, leave, 1) if last or enter != leave else nn.Identity()

    def forward(self, x: Float[Tensor, "n enter l"]) -> Float[Tensor, "n leave l"]:
        """Each patch on its own."""
        y = x
        for conv in self.convs:
            y = F.gelu(F.layer_norm(conv(y), y.shape[-1:]))
        return self.skip(x) + y


class Tokenizer(nn.Module):
    """W E(x): each patch of each channel on its own, by the same weights. What a patch is, is no axis of the grid."""

    def __init__(self, patch: int, dim: int, hidden: int, depth: int):
        super().__init__()
        sizes = [1, *[hidden] * (depth - 1), 1]
        self.patch = patch
        self.blocks = nn.Sequential(*(Dilated(sizes[i], sizes[i + 1], 2**i, last=i == depth - 1) for i in range(depth)))
        self.pool = nn.Linear(patch, dim, bias=False)

    def forward(self, x: Float[Tensor, "b c t"]) -> Float[Tensor, "b n dim"]:
        """Tokens, those of a channel side by side."""
        if x.shape[2] % self.patch or x.shape[2] == 0:
            raise ChronotopeError(f"x has shape {list(x.shape)}; expected a multiple of {self.patch} samples.")
        patches = x.unflatten(2, (-1, self.patch))
        return self.pool(self.blocks(patches.flatten(0, 2)[:, None])[:, 0]).unflatten(0, (len(x), -1))


class Layer(Whole):
    """h + A(N(h)), then h + MLP(N(h)); tokens that are not `real` are seen by nobody."""

    why = "all patches see each other, and the window is run again for each new one"

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention = Attention(dim, heads, position=Rope("t"), biases=True)
        self.mlp = FeedForward(dim, "geglu", 6, biases=True)  # 4 * dim hidden channels
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-8) for _ in range(2))

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        grid: Grid,
        context: Context | None = None,
        real: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        q, k, v = self.attention.project(self.norms[0](x), grid)
        hidden = None if real is None else x.new_zeros(real.shape).masked_fill(~real, -torch.inf)[:, None, None]
        mixed = attention(q, k, v, grid=grid, where=self.attention.where, bias=hidden)
        x = x + self.attention.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


@paper(
    system=39,
    name="BaRISTA",
    family="model",
    claim="electrodes as a set: space code and latent masking at the scale of channels, parcels or lobes",
    evidence=["tests/papers/model/test_barista.py"],
)
class BaRISTA(Saved):
    """The model.

    Args:
        entries: for each column of the labels at `scale`, how many values it has.
        scale: of the space code.
        patch, dim, heads, layers: samples of a patch, and the sizes of the Transformer.
        hidden, depth: channels and blocks of the convolutions; block i is dilated by 2^i.
    """

    def __init__(
        self,
        entries: Sequence[int],
        scale: Scale = "parcel",
        patch: int = 512,
        dim: int = 64,
        heads: int = 4,
        layers: int = 12,
        hidden: int = 5,
        depth: int = 5,
    ):
        super().__init__()
        if not entries or min(entries) < 1 or min(patch, layers, hidden, depth) < 1:
            raise ChronotopeError(
                f"BaRISTA(entries={list(entries)}, patch={patch}, layers={layers}, hidden={hidden}, depth={depth}): "
                "expected sizes of 1 or more, and a column of labels."
            )
        self.scale, self.dim = scale, dim
        self.tokenizer = Tokenizer(patch, dim, hidden, depth)
        self.space = nn.ModuleList(nn.Embedding(n, dim) for n in entries)
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-8)

    def code(self, data: SpaceTimeSet) -> Float[Tensor, "b c dim"]:
        """The sum of the S_k[label_k]."""
        labels = data.at(self.scale)
        if labels.shape[2] != len(self.space):
            raise ChronotopeError(
                f"labels of shape {list(labels.shape)}; expected [B, C, {len(self.space)}] at the scale {self.scale!r}."
            )
        labels = torch.where(data.there[..., None], labels, 0)
        return torch.stack([table(one) for table, one in zip(self.space, labels.unbind(2), strict=True)]).sum(0)

    def forward(
        self, data: SpaceTimeSet, mask: Bool[Tensor, "b c p"] | None = None, stand_in: Tensor | None = None
    ) -> Float[Tensor, "b n dim"]:
        """What all tokens have become. Where `mask` is set, `stand_in` [D] stands for what was recorded."""
        there = data.there
        h = self.tokenizer(torch.where(there[..., None], data.x, 0.0))
        grid = Grid(v=data.x.shape[1], t=h.shape[1] // data.x.shape[1])
        if mask is not None:
            h = torch.where(mask.flatten(1)[..., None], h.new_zeros(self.dim) if stand_in is None else stand_in, h)
        h = h + self.code(data).repeat_interleave(grid.sizes["t"], 1)
        real = None if data.real is None else there.repeat_interleave(grid.sizes["t"], 1)
        for layer in self.layers:
            h = layer(h, grid, None, real)
        return self.norm(h)

    def pooled(self, data: SpaceTimeSet) -> Float[Tensor, "b dim"]:
        """The mean over the tokens of real channels."""
        h = self(data).unflatten(1, (data.x.shape[1], -1)).mean(2)
        return torch.where(data.there[..., None], h, 0.0).sum(1) / data.there.sum(1, keepdim=True).clamp(min=1)


def masked_latent_loss(
    student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]
) -> Float[Tensor, ""]:
    """Mean square over masked tokens, of which there is one at least; no gradient to the teacher."""
    return (student - teacher.detach()).square().mean(-1)[mask].mean()


class MaskedLatents(nn.Module):
    """The pretraining: a student, and the copy of its tokenizer that teaches it.

    Args:
        student: a `BaRISTA`.
        momentum: mu; 1: the teacher stays as it is.
    """

    def __init__(self, student: BaRISTA, momentum: float = 0.996):
        super().__init__()
        self.student, self.momentum = student, momentum
        self.teacher = copy.deepcopy(student.tokenizer).requires_grad_(False)
        self.stand_in = nn.Parameter(0.02 * torch.randn(student.dim))
        self.readout = nn.Linear(student.dim, student.dim)

    def targets(self, data: SpaceTimeSet) -> Float[Tensor, "b n d"]:
        """z: the teacher's tokens; each channel of them standardised over the batch, so that no scale can shrink."""
        with torch.no_grad():
            z = self.teacher(torch.where(data.there[..., None], data.x, 0.0))
            real = z[data.there.repeat_interleave(z.shape[1] // data.x.shape[1], 1)]
            return (z - real.mean(0)) / (real.var(0, correction=0) + 1e-6).sqrt()

    def loss(self, data: SpaceTimeSet, mask: Bool[Tensor, "b c p"]) -> Float[Tensor, ""]:
        """What the student is taught by."""
        told = self.readout(self.student(data, mask, self.stand_in))
        return masked_latent_loss(told, self.targets(data), mask.flatten(1))

    @torch.no_grad()
    def update(self) -> None:
        """The teacher follows the student; after each step of the optimiser."""
        for mine, other in zip(self.teacher.parameters(), self.student.tokenizer.parameters(), strict=True):
            mine.lerp_(other, 1 - self.momentum)
