"""MoH: attention as a sum over heads, of which each token takes some, and weighs them.

    y = sum_i g_i H_i W_o^i                       H_i = softmax(q_i k_i^T / sqrt(D)) v_i, head i of H
    shared heads:   g_i = a_1 S softmax(W_s x)_i                           S of them, for every token
    routed heads:   g_i = a_2 K s_i / (sum of the K largest s)             if s_i is one of these; else 0
    s = softmax(W_r x),   (a_1, a_2) = 2 softmax(W_h x); without shared heads a_2 = 1

The scales make every g_i 1 where all routers are 0 and K is all E = H - S routed heads: then y is multi-head attention.
Routers see the load on routed heads, balance = E^2 mean_i(mean_tokens(s_i) * share of tokens that take i), which is K
where both are even. (It can be less: where few tokens are sure of a head and the many others are not.)

router="qnorm" takes heads by the norms of their queries and has no weights: s = softmax(|q_i| / their deviation over
the routed heads), before norm and position code. Heads taken count 1; the gradient is that of the scaled softmax above.

Sizes: x [B, N, C]; gates [B, N, H], S + K of a token not 0; a token needs the queries, weights and W_o of its heads
alone, 4 N D operations of attention for each; keys and values of a head are needed if any token takes it. The weight
of balance is 0.01; `with balances(model) as losses:` collects it from layers inside a model.

    >>> layer = MoH(ct.nn.Attention(64, 8, where=ct.causal(), position=ct.Rope("n")), shared=2, keep=4)
    >>> mixed = layer.mix(torch.randn(2, 50, 64), ct.Grid(n=50))
    >>> mixed.out.shape, mixed.active.sum(-1).unique(), mixed.balance.shape
    (torch.Size([2, 50, 64]), tensor([6]), torch.Size([]))

Measured, two kinds of tokens that need different heads (d = 64, 8 heads, 2 shared and 4 routed; mean square error of
targets of variance 2.04): one layer between linear ones 0.002, plain attention 0.53, 6 of 8 heads by lot 0.70. With an
MLP behind it, which can undo heads for a kind of tokens, plain attention is better: 0.004 against 0.009 and 0.099 in
two seeds (0.19 and 0.38 by lot): routing settles where two heads do the same.

Left out: scores of ViT, DiT and LLaMA are not shown; layers whose heads are all shared. How gradients pass the 0 and 1
of router="qnorm" is a choice of this page: the authors' code for it (SkyworkAI/MoH at 2cefd57) is for inference. Their
layers for images and for language give the same as this one.

Paper: Jin, Zhu, Yuan, Yan 2024, "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.nn import Attention
from chronotope.nn.mixer import Context, Mixer, State, require_tokens
from chronotope.papers.registry import paper

ROUTERS = ("linear", "qnorm")


class Gates(NamedTuple):
    """How much each head counts for each token, which heads it takes, and the balance loss."""

    weight: Float[Tensor, "b n h"]
    active: Bool[Tensor, "b n h"]
    balance: Float[Tensor, ""]


class Mixed(NamedTuple):
    """What a layer gives, which heads each token took, and the balance loss."""

    out: Float[Tensor, "b n c"]
    active: Bool[Tensor, "b n h"]
    balance: Float[Tensor, ""]


@paper(
    system=95,
    name="MoH",
    family="score",
    claim="each token takes the shared heads and its best few of the others, weighed by gates; other heads are skipped",
    evidence=["tests/papers/score/test_moh.py"],
)
class MoH(Mixer):
    """A mixture of the heads of an attention layer, whose weights it takes over: `layer.attention`, `layer.out`.

    Args:
        attention: the heads; patterns, masks, grouped keys, position and cache are those of this layer.
        shared: S, heads that every token takes, the first ones.
        keep: K, routed heads of a token.
        router: "linear", or "qnorm" for the norms of queries.

    `gather`: an attribute; True computes each head for the tokens that take it, to the same result.
    """

    def __init__(self, attention: Attention, shared: int = 2, keep: int = 4, router: str = "linear"):
        super().__init__()
        routed = attention.heads - shared
        if shared < 0 or not 1 <= keep <= routed or (router == "qnorm" and routed < 2):
            raise ChronotopeError(
                f"MoH(shared={shared}, keep={keep}) of {attention.heads} heads: expected shared from 0 on and keep from"
                " 1 to the number of routed heads, of which router='qnorm' compares two or more."
            )
        if router not in ROUTERS:
            raise ChronotopeError(f"MoH(router={router!r}): expected one of {', '.join(ROUTERS)}.")
        self.dim, self.heads, self.shared, self.keep = attention.dim, attention.heads, shared, keep
        self.router, self.gather = router, False
        # The heads of the layer are its output before the projection, at once and in steps.
        self.attention, self.out = attention, attention.out
        attention.out = nn.Identity()  # type: ignore[assignment]
        linear = router == "linear"
        self.to_routed = nn.Linear(self.dim, routed, bias=False) if linear else None
        self.to_shared = nn.Linear(self.dim, shared, bias=False) if linear and shared else None
        self.to_parts = nn.Linear(self.dim, 2, bias=False) if linear and shared else None

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once; with context, over the context."""
        return self.mix(x, grid, context).out

    def mix(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Mixed:
        """`forward`, with the heads taken and the balance loss."""
        gates = self.route(x)
        if self.gather:
            if context is not None:
                raise ChronotopeError("MoH with gather=True takes no context; set gather to False.")
            return Mixed(self._gathered(x, grid, gates), gates.active, gates.balance)
        return Mixed(self._joined(self.attention(x, grid, context), gates), gates.active, gates.balance)

    def route(self, x: Float[Tensor, "b n c"]) -> Gates:
        """Which heads each token takes, and how much they count."""
        score = self._scores(x)
        best = score.topk(self.keep, dim=-1).indices
        taken = torch.zeros_like(score, dtype=torch.bool).scatter_(2, best, True)
        load = taken.flatten(0, 1).to(score.dtype).mean(0)
        balance = score.shape[2] ** 2 * (score.flatten(0, 1).mean(0) * load).mean()
        routed = score * taken
        routed = self.keep * routed / routed.sum(-1, keepdim=True)
        shared = torch.ones_like(score[..., :1]).expand(-1, -1, self.shared)
        if self.router == "qnorm":
            routed = taken + (routed - routed.detach())
        elif self.to_shared is not None and self.to_parts is not None:
            parts = 2 * self.to_parts(x).softmax(-1)
            shared = self.shared * self.to_shared(x).softmax(-1) * parts[..., :1]
            routed = routed * parts[..., 1:]
        active = torch.cat((torch.ones_like(shared, dtype=torch.bool), taken), 2)
        return Gates(torch.cat((shared, routed), 2), active, balance)

    def init_state(self, batch: int, grid: Grid) -> State:
        """The cache of the attention layer."""
        return self.attention.init_state(batch, grid)

    def step(self, x: Float[Tensor, "b s c"], state: Any) -> tuple[Float[Tensor, "b s c"], State]:
        """The next slice."""
        heads, state = self.attention.step(x, state)
        return self._joined(heads, self.route(x)), state

    def _scores(self, x: Tensor) -> Float[Tensor, "b n routed"]:
        if self.to_routed is not None:
            return self.to_routed(x).softmax(-1)
        size = self.attention.head_dim
        rows = self.attention.qkv.weight[self.shared * size : self.heads * size]
        norms = F.linear(x, rows).unflatten(2, (-1, size)).norm(dim=3)
        deviation = norms.std(2, keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny)
        return (norms / deviation).softmax(-1)

    def _joined(self, heads: Float[Tensor, "b n hd"], gates: Gates) -> Float[Tensor, "b n c"]:
        weighed = heads.unflatten(2, (self.heads, -1)) * gates.weight[..., None].to(heads.dtype)
        return self.out(weighed.flatten(2))

    def _gathered(self, x: Tensor, grid: Grid, gates: Gates) -> Float[Tensor, "b n c"]:
        """The sum over heads, each computed for the tokens that take it."""
        layer = self.attention
        require_tokens(x, grid, self.dim, "x")
        if layer.where is not None and layer.where.routes:
            raise ChronotopeError(f"{layer.where!r} chooses for blocks of queries, which gather=True would take apart.")
        size, group = layer.head_dim, layer.heads // layer.kv_heads
        q, k, v = layer.qkv.weight.split([n * size for n in (layer.heads, layer.kv_heads, layer.kv_heads)])
        y = torch.zeros_like(x)
        for pair in range(layer.kv_heads):
            own = slice(pair * size, (pair + 1) * size)
            heads = [i for i in range(pair * group, (pair + 1) * group) if bool(gates.active[..., i].any())]
            if not heads:
                continue
            key = _placed(layer, F.linear(x, k[own]), grid, None, layer.k_norm)
            value = F.linear(x, v[own])[:, None]
            for i in heads:
                of_head = slice(i * size, (i + 1) * size)
                index = _index(gates.active[..., i])
                some = x.gather(1, index[..., None].expand(-1, -1, self.dim))
                query = _placed(layer, F.linear(some, q[of_head]), grid, index, layer.q_norm)
                out = attention(
                    query, key, value, grid=Grid(n=index.shape[1]), key_grid=Grid(n=grid.size),
                    bias=_bias(layer, i, index, grid, query), softcap=layer.softcap, backend=layer.backend,
                )  # fmt: skip
                part = F.linear(out[:, 0], self.out.weight[:, of_head])
                # Tokens that fill up the rows of a batch have a gate of 0.
                part = part * gates.weight[..., i].gather(1, index)[..., None].to(part.dtype)
                y = y.scatter_add(1, index[..., None].expand_as(part), part)
        return y if self.out.bias is None else y + self.out.bias


@contextmanager
def balances(model: nn.Module) -> Iterator[list[Tensor]]:
    """The balance losses of all MoH layers of a model, in the order of the calls made inside."""
    found: list[Tensor] = []

    def note(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert isinstance(layer, MoH)
        found.append(layer.route(args[0] if args else named["x"]).balance)

    layers = [layer for layer in model.modules() if isinstance(layer, MoH)]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _index(active: Bool[Tensor, "b n"]) -> Int64[Tensor, "b most"]:
    """The tokens of each member that are active, in order, filled up with some that are not."""
    most = int(active.sum(1).max())
    return (~active).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]


def _placed(
    layer: Attention, x: Float[Tensor, "b m d"], grid: Grid, index: Tensor | None, norm: nn.Module | None
) -> Float[Tensor, "b 1 m d"]:
    """Queries or keys of one head after norm and position code; index: where they are, None: everywhere."""
    x = x[:, None] if norm is None else norm(x[:, None])
    if layer.position is None or index is None:
        return x if layer.position is None else layer.position(x, grid)
    # A rotation by the coordinate 0 leaves prefix tokens as they are.
    places = F.pad(layer.position.coords(grid, device=x.device), (0, 0, grid.prefix, 0))
    return layer.position(x, coords=places[index])


def _bias(layer: Attention, head: int, index: Tensor, grid: Grid, like: Tensor) -> Float[Tensor, "b 1 m n"] | None:
    """What the pattern and the bias of the layer say of some queries and all keys."""
    if layer.where is None and layer.bias is None:
        return None
    queries = Coords.of(grid, index[:, :, None])
    keys = Coords.of(grid, torch.arange(grid.size, device=index.device)[None, None])
    shape = (*index.shape, grid.size)
    score = like.new_zeros(shape)
    if layer.bias is not None:
        score = score + layer.bias(queries, keys)[head].to(like.dtype)
    if layer.where is not None:
        score = score.masked_fill(~layer.where.head(head).sees(queries, keys).expand(shape), -torch.inf)
    return score[:, None]
