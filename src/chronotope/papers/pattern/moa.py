"""MoA: every head of every layer keeps the first tokens and a window whose span grows with the input by its own rule.

    query i sees key j  iff  j <= i  and  (j < sink  or  i - j < S_h(N)),     S_h(N) = alpha_h + beta_h N

Spans are whole blocks of `block` tokens, at least one block and at most N. Which rule a head gets is found once, for
a pretrained model, by `moa_search`: influence of each attention weight on the loss, loss of each rule, Pareto front.

Sizes: sink 64, block 64; profiled at 2048, 4096 and 8192 tokens; mean KV density 0.5; 2 distinct rules per layer.

Example:
    >>> plan = MoA(rules=(((256, 0.0), (0, 0.5)),), sink=64)      # one layer of two heads
    >>> grid = ct.Grid(n=1024)
    >>> q = k = v = torch.randn(1, 2, 1024, 32)
    >>> ct.attention(q, k, v, grid=grid, where=plan.where(0, 1024)).shape
    torch.Size([1, 2, 1024, 32])

Left out: the commercial integer program with its epsilon levels (`moa_search.solve` gives the whole Pareto front, for
models as small as it can enumerate); the CUDA decode kernel; positions relative to the cache (they stay absolute);
results on 7B to 13B models. Blocks that the edge of the window cuts are seen by token, not whole.

Paper: Fu et al. 2024, "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
arXiv 2406.14909.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, causal, per_head, sinks, window


class Rule(NamedTuple):
    """The span of a head as a function of the length: alpha + beta N."""

    alpha: int
    beta: float

    def span(self, n: int, block: int = 64) -> int:
        """Tokens of the window at length n: whole blocks, at least one, at most n."""
        return min(n, max(1, int(self.alpha + self.beta * n) // block) * block)


def masked(span: int, n: int, sink: int, block: int) -> Bool[Tensor, "nb nb"]:
    """Which blocks of the past lie outside the first `sink` and the last `span` tokens, on a grid of blocks."""
    x = torch.arange(-(-n // block))
    distance = x[:, None] - x
    return (distance >= max(1, span // block)) & (x >= -(-sink // block))


@paper(
    system=195,
    name="MoA",
    family="pattern",
    claim="a sink and a window per head, each span growing with the input by a rule searched for the model",
    evidence=["tests/papers/pattern/test_moa.py"],
)
@dataclass(frozen=True)
class MoA:
    """The rules of a model, rules[layer][head] = (alpha, beta). Heads that share keys must have one rule."""

    rules: tuple[tuple[tuple[int, float], ...], ...]
    sink: int = 64
    block: int = 64

    def __post_init__(self) -> None:
        if not self.rules or not all(self.rules) or min(self.sink, self.block) < 1:
            raise ChronotopeError(
                f"{self!r}: give a rule (alpha, beta) for each head of each layer, sink and block of 1 or more."
            )

    def spans(self, layer: int, n: int) -> list[int]:
        """Window of each head in tokens, at length n."""
        return [Rule(*rule).span(n, self.block) for rule in self.rules[layer]]

    def where(self, layer: int, n: int, axis: str = "n") -> Pattern:
        """The pattern of one layer at length n: heads of equal span share one plan."""
        seen = per_head([sinks(self.sink) | window(**{axis: (span - 1, 0)}) for span in self.spans(layer, n)])  # type: ignore[arg-type]
        return seen & causal()

    def density(self, n: int) -> float:
        """Mean share of the keys that decoding at length n keeps, over all heads."""
        kept = [min(n, self.sink + span) for layer in range(len(self.rules)) for span in self.spans(layer, n)]
        return sum(kept) / (len(kept) * n)

    def cache(self, layer: int, n: int) -> RingCache:
        """An empty cache for decoding up to length n."""
        return RingCache(self.spans(layer, n), self.sink)

    def to_json(self) -> str:
        """The table layer x head of (alpha, beta), which `MoA.from_json` reads."""
        return json.dumps({"sink": self.sink, "block": self.block, "rules": self.rules})

    @classmethod
    def from_json(cls, text: str) -> MoA:
        """Reads what `to_json` wrote."""
        data = json.loads(text)
        return cls(tuple(tuple((a, b) for a, b in row) for row in data["rules"]), data["sink"], data["block"])


class RingCache:
    """For each head of the keys `sink + span` places: the sink's stay, the window's are written over in turn."""

    def __init__(self, spans: list[int], sink: int):
        self.spans, self.sink, self.length = spans, sink, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def step(
        self, q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b hk 1 d"], v: Float[Tensor, "b hk 1 dv"]
    ) -> Float[Tensor, "b h 1 dv"]:
        """Takes one token in and returns its attention over what is kept."""
        if k.shape[1] != len(self.spans):
            raise ChronotopeError(
                f"RingCache has {len(self.spans)} spans, k has {k.shape[1]} heads; give one span for each."
            )
        if not self.keys:
            self.keys = [k.new_zeros(len(k), 1, self.sink + span, k.shape[3]) for span in self.spans]
            self.values = [v.new_zeros(len(v), 1, self.sink + span, v.shape[3]) for span in self.spans]
        group = q.shape[1] // k.shape[1]
        outs = []
        for head, (span, keys, values) in enumerate(zip(self.spans, self.keys, self.values, strict=True)):
            place = self.length if self.length < self.sink else self.sink + (self.length - self.sink) % span
            keys[:, :, place], values[:, :, place] = k[:, head, None, 0], v[:, head, None, 0]
            held = min(self.length + 1, self.sink + span)
            asks = q[:, head * group : (head + 1) * group]
            outs.append(attention(asks, keys[:, :, :held], values[:, :, :held], grid=Grid(n=1), key_grid=Grid(m=held)))
        self.length += 1
        return torch.cat(outs, 1)  # type: ignore[arg-type]
