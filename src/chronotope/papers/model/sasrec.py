r"""SASRec: what somebody takes next, from causal self-attention over what they took before.

$$
x_i = E_{s_i} + P_{n - m + i}, \qquad
a = A(\mathrm{LN}(x), x) + \mathrm{LN}(x), \qquad
x' = F(\mathrm{LN}(a)) + \mathrm{LN}(a), \qquad
r_{ij} = \mathrm{LN}(x'_i) \cdot E'_j
$$

A(q, kv): causal attention with queries from its first and keys and values from its second argument; F: two matrices and
a ReLU, each followed by dropout. E', the items as they are scored, is a table of its own or E. Taught by gBCE over one
positive and k uniform negatives of each step, with b = a (t (1 - 1/a) + 1/a), a = k / (items - 1):

$$
L = -\tfrac{1}{k+1} \Big( b \log \sigma(r^+) + \sum_{-} \log(1 - \sigma(r^-)) \Big)
$$

t = 0 gives b = 1: SASRec's binary cross-entropy. t > 0 undoes the overconfidence that few sampled negatives teach.
Where the scores are to fall to -log(k / b) on average, they begin there (`prior`): else the first steps teach nothing
but that, by gradients so large that Adam's second moments hide all that comes after.

Sizes: items [B, N] from 1 on, 0 after the end, lengths [B] -> h [B, N, C]; scores [..., items + 1], -inf for item 0.
A sequence of m items takes the last m positions of the table, whatever it is padded to.

    >>> model = SASRec(items=50, length=20, dim=16, layers=1)
    >>> h = model(torch.tensor([[3, 7, 9, 0], [4, 4, 2, 1]]), torch.tensor([3, 4]))
    >>> model.score(h[:, -1]).shape
    torch.Size([2, 51])

Left out: dropout of attention weights, since no kernel holds them; padding on the left, which is the same with these
positions; a cache of keys, since places count from the end and move with each new item. As in the authors' code, and
not in the paper, the residual of attention and feed-forward is what was normalised; as in the paper, and not in the
code, items are not multiplied by sqrt(C). Tables begin by Xavier's rule.

Paper: Wang-Cheng Kang, Julian McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, arXiv 1808.09781. gBCE:
Aleksandr Petrov, Craig Macdonald, "gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with Negative
Sampling", RecSys 2023, arXiv 2308.07192.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.dropout import Dropout
from chronotope.nn.ragged import Ragged
from chronotope.papers.registry import paper
from chronotope.patterns import causal
from chronotope.saving import Saved

FEW = 16
"""Up to so many candidates of a step are looked up; more are taken out of the scores of all items."""


class SASBlock(nn.Module):
    """Attention from normalised queries to keys as they are, and a feed-forward, both added to their norms."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.enter, self.leave = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "m c"], ragged: Ragged) -> Float[Tensor, "m c"]:
        """Each token from itself and those of its sequence before it."""
        own = self.norms[0](x)
        groups = zip(*(ragged.apart(y) for y in (self.q(own), self.k(x), self.v(x))), strict=True)
        own = self.norms[1](ragged.together([self._mixed(*group) for group in groups]) + own)
        return own + self.dropout(self.leave(self.dropout(F.relu(self.enter(own)))))

    def _mixed(self, *qkv: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in qkv)
        return attention(q, k, v, grid=Grid(n=q.shape[2]), where=causal()).transpose(1, 2).flatten(2)


@paper(
    system=120,
    name="SASRec",
    family="model",
    claim="the next item from causal self-attention over all items before it; gBCE where negatives are few",
    evidence=["tests/papers/model/test_sasrec.py", "tests/tasks/test_recommend.py"],
    missing="(d) in the first block only: mean distance over 16 items 7.3 on Beauty, 7.9 on MovieLens-1M (second: 6.0 "
    "and 5.4)",
)
class SASRec(Saved):
    """The model.

    Args:
        items: how many there are; they are numbered from 1.
        length: the most items of a sequence that are looked at.
        dim, heads, layers, dropout: of the transformer.
        tied: whether items are scored by the table that embeds them.
        prior: every score is about -prior in the beginning, as `gbce_prior` says.
    """

    def __init__(
        self,
        items: int,
        length: int = 200,
        dim: int = 64,
        heads: int = 1,
        layers: int = 2,
        dropout: float = 0.5,
        tied: bool = False,
        prior: float | int = 0.0,
    ):
        super().__init__()
        self.length = length
        self.embed, self.place = nn.Embedding(items + 1, dim), nn.Embedding(length, dim)
        self.answer = None if tied else nn.Embedding(items + 1, dim)
        self.blocks = nn.ModuleList(SASBlock(dim, heads, dropout) for _ in range(layers))
        self.norm, self.dropout = nn.LayerNorm(dim), Dropout(dropout)
        for table in (self.embed, self.place, self.answer):
            if table is not None:
                nn.init.xavier_normal_(table.weight)
        with torch.no_grad():  # what LayerNorm makes, without its bias, has no part along (1, ..., 1)
            self.norm.bias.fill_(math.sqrt(prior / dim))
            self.scored.sub_(math.sqrt(prior / dim))

    def forward(self, items: Int64[Tensor, "b n"], lengths: Int64[Tensor, "b"]) -> Float[Tensor, "b n c"]:
        """What is known after each item; 0 after the end.

        Raises ChronotopeError: a sequence has more items than the table of positions.
        """
        return Ragged(lengths).padded(self.known(items, lengths), items.shape[1])

    def known(self, items: Int64[Tensor, "b n"], lengths: Int64[Tensor, "b"]) -> Float[Tensor, "m c"]:
        """The same of the items that are there alone: those of the first sequence, then those of the second, ..."""
        if items.shape[1] > self.length and int(lengths.max()) > self.length:
            raise ChronotopeError(
                f"SASRec: a sequence of {int(lengths.max())} items, for a model of length {self.length}; "
                f"give the last {self.length} items of each."
            )
        ragged = Ragged(lengths)
        at = ragged.place + self.length - lengths[ragged.row]
        x = self.dropout(self.embed(items[ragged.row, ragged.place]) + self.place(at))
        for block in self.blocks:
            x = block(x, ragged)
        return self.norm(x)

    @property
    def scored(self) -> Float[Tensor, "items_and_none c"]:
        """Items as they are scored."""
        return (self.embed if self.answer is None else self.answer).weight

    def score(self, h: Float[Tensor, "*b c"]) -> Float[Tensor, "*b items_and_none"]:
        """Of all items."""
        out = h @ self.scored.T
        return torch.cat([torch.full_like(out[..., :1], -torch.inf), out[..., 1:]], -1)

    def score_of(self, h: Float[Tensor, "m c"], items: Int64[Tensor, "m k"]) -> Float[Tensor, "m k"]:
        """Of some items each."""
        if items.shape[1] > FEW:
            return (h @ self.scored.T).gather(1, items)
        return (F.embedding(items, self.scored) * h[:, None]).sum(-1)


def gbce(scores: Float[Tensor, "m k"], items: int, t: float) -> Float[Tensor, ""]:
    """The loss: the first score of each row is of what was taken, the others are of negatives. t = 0: plain BCE."""
    power = _power(scores.shape[1] - 1, items, t)
    taken, others = F.logsigmoid(scores[:, 0]), F.logsigmoid(-scores[:, 1:]).sum(1)
    return -(power * taken + others).mean() / scores.shape[1]


def gbce_prior(negatives: int, items: int, t: float) -> float:
    """-score at which the mean gradient of the loss is 0, where all items are taken as often: log(k / b)."""
    return math.log(negatives / _power(negatives, items, t))


def _power(negatives: int, items: int, t: float) -> float:
    share = negatives / (items - 1)
    return share * (t * (1 - 1 / share) + 1 / share)
