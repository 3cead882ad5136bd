"""DARE: one table of embeddings says which past behaviours matter, another one what they say.

For a target t and behaviours i with ids and times ago, with tables E^A (attention) and E^R (representation):

    s_i  = e^A_t . e^A_i / sqrt(d) + tau^A_now . tau^A_i / sqrt(d_time)     ids and times are scaled each by their size
    kept = the K behaviours of highest s                                    the search, which reads E^A alone
    h    = sum over kept of softmax(s)_i e^R_i                              e^R holds ids and times side by side
    p    = sigmoid(MLP([e^R_t, h, e^R_t * h]))

The search has no gradient, so another MLP predicts from the softmax over all behaviours, and its loss is added. With
one table for both, the gradients that come through s and through the rest add up in it; they may differ in size and
point apart (`DARE.paths`). With two tables E^A learns through the softmax only, and may be the smaller one.

Sizes: ids [B] of targets, [B, N] of behaviours, times ago [B, N] (0: now, which is the target's), mask [B, N] -> pooled
[B, D_R], scores [B, N], logits [B]. The search takes B N D_A products. Published: N 200, K 20, 16 channels for each of
ids and times, MLP of 200 and 80.

    >>> model = DARE(Tables(1000, 8), Tables(1000, 16), keep=20)
    >>> target, history = torch.randint(1000, (4,)), torch.randint(1000, (4, 200))
    >>> pooled, scores = model.read(target, history)
    >>> pooled.shape, scores.shape, model(target, history).shape
    (torch.Size([4, 16]), torch.Size([4, 200]), torch.Size([4]))

One table for both is `DARE(table, table)`. Without tables it is `decoupled_attention`: keys and values from anywhere.

Measured (400 items of 40 clusters, each with two values that its cluster says nothing of; clicked where the target's
values agree with the mean of those of its cluster in a history of 40; 2500 steps, three seeds; area under the curve,
share of relevant ones among the three highest scores):

    two tables of 8             0.92 0.91 0.91      0.61 0.60 0.58
    one of 16                   0.84 0.86 0.84      0.34 0.38 0.37
    one of 8, alone             0.83                0.31
    one of 8, projections of it 0.88                0.46

In the one of 16 the gradients of 27 to 40% of the items conflict, those through the representation 1.4 to 2 times as
large as those through the scores. The lead is the world's too: where one value decides, and the target's own does not
count, one table of 16 does as well (0.972, two of 8 0.975). It does not come of the start: with embeddings that start
at a tenth, 0.920 against 0.994.

Left out: public data, online gains, and how ids and times are made of logs. The released code (thuml/DARE at c72e087)
gives the same scores, pooled vectors and features, with item ids left out, to 1e-6 where all histories are at least
K long. Where one is shorter it keeps padding as well, as if it were real; here padding never counts. It can feed the
mean of the history to its MLP too, and it normalises the input of the MLP by batch; neither is done here.

Paper: Feng et al. 2024, "Long-Sequence Recommendation Models Need Decoupled Embeddings", arXiv 2410.02604.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.registry import paper
from chronotope.routing.route import gathered

SEARCHES = ("soft", "hard")


class Tables(nn.Module):
    """Embeddings of ids, and of times ago where there are any, side by side.

    Args:
        ids, dim: how many ids, and channels of each.
        times, time_dim: how many times ago there are, 0 being now, and channels of each; 0: no times.
    """

    def __init__(self, ids: int, dim: int, times: int = 0, time_dim: int = 0):
        super().__init__()
        if min(ids, dim) < 1 or (times < 1) != (time_dim < 1):
            raise ChronotopeError(
                f"Tables(ids={ids}, dim={dim}, times={times}, time_dim={time_dim}): expected at least 1 id and 1 "
                "channel, and times with channels or neither."
            )
        self.ids = nn.Embedding(ids, dim)
        self.times = nn.Embedding(times, time_dim) if times else None
        self.size = dim + time_dim
        parts = [torch.full((n,), n**-0.5) for n in (dim, time_dim) if n]
        self.scale: Tensor
        self.register_buffer("scale", torch.cat(parts), persistent=False)

    def forward(self, ids: Int64[Tensor, "*b"], time: Int64[Tensor, "*b"] | None = None) -> Float[Tensor, "*b d"]:
        """time: of each id; None: now."""
        if self.times is None:
            return self.ids(ids)  # type: ignore[no-any-return]
        return torch.cat((self.ids(ids), self.times(torch.zeros_like(ids) if time is None else time)), -1)


class Embedded(NamedTuple):
    """What attention reads, q scaled by its table, and what is represented: the target, and values of behaviours."""

    q: Float[Tensor, "b da"]
    k: Float[Tensor, "b n da"]
    target: Float[Tensor, "b d"]
    v: Float[Tensor, "b n d"]


class Paths(NamedTuple):
    """The gradient of a table's ids through the scores, and through everything else; their sum is all of it."""

    attention: Float[Tensor, "ids d"]
    representation: Float[Tensor, "ids d"]

    @property
    def cosine(self) -> Float[Tensor, "ids"]:
        """Of the two gradients of each id: below 0 they conflict. NaN where either is 0."""
        product = (self.attention * self.representation).sum(1)
        return product / (self.attention.norm(dim=1) * self.representation.norm(dim=1))

    @property
    def ratio(self) -> Float[Tensor, ""]:
        """How much larger the one through the representation is."""
        return self.representation.norm() / self.attention.norm()


def best(scores: Float[Tensor, "b n"], keep: int) -> Int64[Tensor, "b most"]:
    """Numbers of the highest scores of each row, in order; -1 for those that are -inf, which come last."""
    found = scores.detach().topk(min(keep, scores.shape[1]), dim=1)
    index = found.indices.masked_fill(found.values == -torch.inf, scores.shape[1]).sort(dim=1).values
    return index.masked_fill(index == scores.shape[1], -1)


def decoupled_attention(
    q: Float[Tensor, "b da"],
    k: Float[Tensor, "b n da"],
    v: Float[Tensor, "b n d"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    keep: int | None = None,
    among: Float[Tensor, "b n"] | None = None,
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n"]]:
    """(sum of softmax(k . q) v over the keys kept, k . q of all keys); q is scaled already.

    Args:
        mask: keys that are real; None: all. The scores of others are -inf.
        keep: how many keys of the highest score; None: all.
        among: scores that the keys are kept by in place of k . q; -inf: not kept.

    Where no key is kept the sum is 0.
    """
    scores = (k @ q[:, :, None])[..., 0]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if keep is None and mask is None and among is None:
        grid, keys = Grid(n=1), Grid(n=k.shape[1])
        every = attention(q[:, None, None], k[:, None], v[:, None], grid=grid, key_grid=keys, scale=1.0)
        return every[:, 0, 0], scores
    by = scores if among is None else among if mask is None else among.masked_fill(~mask, -torch.inf)
    index = best(by, k.shape[1] if keep is None else keep)[:, None, None]
    out, _ = gathered(q[:, None, None], k[:, None], v[:, None], index, scale=1.0)
    return out[:, 0, 0], scores


@paper(
    system=63,
    name="DARE",
    family="score",
    claim="scores from one table of embeddings and values from another: no gradient of the one disturbs the other",
    evidence=["tests/papers/score/test_dare.py"],
)
class DARE(nn.Module):
    """The click on a target, from what its user did before.

    Args:
        attend: table of queries and keys, E^A; it has `size` and `scale`, as `Tables` has.
        represent: table of targets and values, E^R; the same module as `attend` makes it the shared model.
        query: another table for queries; None: `attend`.
        keep: K; None: all behaviours, and then there is no second loss, which would be of the same softmax.
        search: "soft" keeps the behaviours of highest score, "hard" the latest (last) ones of the target's own id.
        hidden: channels inside the MLP.
    """

    def __init__(
        self,
        attend: Tables,
        represent: Tables,
        *,
        query: Tables | None = None,
        keep: int | None = 20,
        search: str = "soft",
        hidden: tuple[int, int] = (200, 80),
    ):
        super().__init__()
        if search not in SEARCHES or (keep is not None and keep < 1):
            raise ChronotopeError(
                f"DARE(keep={keep}, search={search!r}): expected at least 1, and one of {', '.join(SEARCHES)}."
            )
        self.attend, self.represent, self.query = attend, represent, attend if query is None else query
        self.keep, self.hard = keep, search == "hard"
        aware = 3 * represent.size
        self.predict = _mlp(aware, *hidden, 1)
        self.auxiliary = None if keep is None else _mlp(aware, hidden[0], 1)

    def read(
        self,
        q_ids: Int64[Tensor, "b"],
        kv_ids: Int64[Tensor, "b n"],
        time: Int64[Tensor, "b n"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n"]]:
        """(h, s): what the behaviours kept say, and the scores of all."""
        return self._read(self.embed(q_ids, kv_ids, time), mask, self._among(q_ids, kv_ids))

    def forward(
        self,
        q_ids: Int64[Tensor, "b"],
        kv_ids: Int64[Tensor, "b n"],
        time: Int64[Tensor, "b n"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b"]:
        """Logits of a click."""
        found = self.embed(q_ids, kv_ids, time)
        return _logits(self.predict, found.target, self._read(found, mask, self._among(q_ids, kv_ids))[0])

    def loss(
        self,
        q_ids: Int64[Tensor, "b"],
        kv_ids: Int64[Tensor, "b n"],
        label: Float[Tensor, "b"],
        time: Int64[Tensor, "b n"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Cross entropy of the click, and where some behaviours are kept, of the prediction from all of them."""
        return self._loss(self.embed(q_ids, kv_ids, time), label, mask, self._among(q_ids, kv_ids))

    def paths(
        self,
        q_ids: Int64[Tensor, "b"],
        kv_ids: Int64[Tensor, "b n"],
        label: Float[Tensor, "b"],
        time: Int64[Tensor, "b n"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Paths:
        """The gradients of the loss for the ids of `attend`, by the way they come."""
        found = self.embed(q_ids, kv_ids, time)
        cut = Embedded(*(x.detach().requires_grad_() for x in found))
        slopes = torch.autograd.grad(self._loss(cut, label, mask, self._among(q_ids, kv_ids)), cut)
        table = self.attend.ids.weight

        def through(some: slice) -> Tensor:
            (out,) = torch.autograd.grad(found[some], table, slopes[some], retain_graph=True, allow_unused=True)
            return torch.zeros_like(table) if out is None else out

        return Paths(through(slice(0, 2)), through(slice(2, 4)))

    def embed(
        self, q_ids: Int64[Tensor, "b"], kv_ids: Int64[Tensor, "b n"], time: Int64[Tensor, "b n"] | None = None
    ) -> Embedded:
        """The embeddings of targets and behaviours for each of their parts."""
        timed = self.attend.times is not None or self.represent.times is not None
        if timed != (time is not None):
            needed = "times of behaviours" if timed else "no times: tables have none"
            raise ChronotopeError(f"DARE: time={time if time is None else list(time.shape)}; expected {needed}.")
        return Embedded(
            self.query(q_ids) * self.query.scale, self.attend(kv_ids, time),
            self.represent(q_ids), self.represent(kv_ids, time),
        )  # fmt: skip

    def _read(self, x: Embedded, mask: Tensor | None, among: Tensor | None) -> tuple[Tensor, Tensor]:
        return decoupled_attention(x.q, x.k, x.v, mask=mask, keep=self.keep, among=among)

    def _among(self, q_ids: Tensor, kv_ids: Tensor) -> Tensor | None:
        if not self.hard:
            return None
        place = torch.arange(kv_ids.shape[1], device=kv_ids.device, dtype=self.attend.scale.dtype)
        return torch.where(kv_ids == q_ids[:, None], place, -torch.inf)

    def _loss(self, x: Embedded, label: Tensor, mask: Tensor | None, among: Tensor | None) -> Tensor:
        kept, _ = self._read(x, mask, among)
        loss = F.binary_cross_entropy_with_logits(_logits(self.predict, x.target, kept), label)
        if self.auxiliary is None:
            return loss
        every, _ = decoupled_attention(x.q, x.k, x.v, mask=mask)
        return loss + F.binary_cross_entropy_with_logits(_logits(self.auxiliary, x.target, every), label)


def _logits(mlp: nn.Module, target: Tensor, pooled: Tensor) -> Tensor:
    return mlp(torch.cat((target, pooled, target * pooled), 1))[:, 0]  # type: ignore[no-any-return]


def _mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with PReLUs between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.PReLU(init=0.1), nn.Linear(before, after)]
    return nn.Sequential(*layers[1:])
