r"""ACT: attention sinks beyond the first token are damped, and what they held goes to the other tokens.

$$
m_j = \frac{1}{|\{i : i \text{ sees } j\}|} \sum_i A_{ij}, \qquad
S = \{ j : m_j > \theta \} \setminus \{ \text{its first} \}, \qquad
A'_{ij} = \begin{cases}
\beta A_{ij} & j \in S \\
A_{ij} \left( 1 + (1 - \beta) \frac{\sum_{s \in S} A_{is}}{\sum_{r \notin S} A_{ir}} \right) & j \notin S
\end{cases}
$$

for each input and head, in heads that a search has found: those which, calibrated alone, raise a score on held-out
samples. The first of the tokens above theta, mostly the first of the sequence, is left alone. theta = 0.1, beta = 0.4.

Sizes: A [B, H, N, M]. As a control it holds some rows at a time: column means in one pass, y' = y + (A' - A) v in a
second.

    >>> weights = torch.full((1, 1, 4, 4), 0.2)
    >>> weights[..., 2] = 0.4
    >>> calibrate(weights, torch.ones(1, 1, 4, 4, dtype=torch.bool), threshold=0.3, protect_first=False)[0, 0, 0]
    tensor([0.2800, 0.2800, 0.1600, 0.2800])
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    >>> x, causal = torch.randn(1, 8, 16), torch.ones(8, 8, dtype=torch.bool).triu(1)
    >>> with ct.adapt.control(layer, ACT(), heads=[0]):
    ...     y, _ = layer(x, x, x, attn_mask=causal, need_weights=False)
    >>> y.shape
    torch.Size([1, 8, 16])

Rows of padding, which do not see themselves, are not counted. A row of which all is in S stays as it is. Calls with a
cache, whose map is not whole, are left as they are.

The released code (GATECH-EIC/ACT at commit a267af7, models/llama_modelling_aug.py) takes one sequence at a time, and
layers 2 to 30 of LLaMA-2-7B; its `atten_process_cal` on 20 maps with 2 planted sinks each, run on CPU, differs by 6e-8
at most. Its theta is absolute; whether the paper's is relative to N is unconfirmed.

In models of two layers that recall 8 pairs, a key whose scores are raised by 6 takes recall from 1.00 to 0.59 (means of
4 seeds, key 8 of 25); calibrated in the heads found it is 0.86. Where the raised key is one of the first 4, it may
be the first of those above theta, and is left alone: no gain in 2 of 4 seeds. Without a raised key, calibration of all
heads costs 14 points, which the search sees.

Left out: what is gained on real language models, and the released lists of heads.

Paper: Zhongzhi Yu, Zheng Wang, Yonggan Fu, Huihong Shi, Khalid Shaikh, Yingyan (Celine) Lin, "Unveiling and Harnessing
Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention Calibration", 2024, arXiv
2406.15765.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chronotope.adapt import Asked, At, Control
from chronotope.adapt.attach import Layers
from chronotope.errors import ChronotopeError
from chronotope.papers.control.heads import Head, heads_of, on_heads
from chronotope.papers.control.rows import row_blocks, values
from chronotope.papers.registry import paper


def calibrate(
    weights: Float[Tensor, "b h n m"],
    seen: Bool[Tensor, "#b #h n m"] | None = None,
    threshold: float | int = 0.1,
    beta: float | int = 0.4,
    protect_first: bool = True,
) -> Float[Tensor, "b h n m"]:
    """A' of maps that are there. `seen`: which keys a query may look at; None: those up to its own place."""
    n, m = weights.shape[2:]
    if seen is None:
        seen = torch.ones(n, m, dtype=torch.bool, device=weights.device).tril(m - n)[None, None]
    mass, count = _columns(weights, seen, m - n)
    return damped(weights, sinks_of(mass / count.clamp(min=1), threshold, protect_first), beta)


def sinks_of(
    mean: Float[Tensor, "b h m"], threshold: float | int = 0.1, protect_first: bool = True
) -> Bool[Tensor, "b h m"]:
    """S: tokens whose mean weight is above the threshold, without the first of them."""
    above = mean > threshold
    return above & (above.cumsum(-1) > 1) if protect_first else above


def damped(
    weights: Float[Tensor, "b h n m"], sinks: Bool[Tensor, "b h m"], beta: float | int = 0.4
) -> Float[Tensor, "b h n m"]:
    """Weights of sinks times beta; what that frees goes to the others of the row in proportion to their weights."""
    at = sinks[:, :, None]
    others = weights.masked_fill(at, 0.0).sum(-1, keepdim=True)
    freed = (1 - beta) * weights.masked_fill(~at, 0.0).sum(-1, keepdim=True)
    changed = torch.where(at, beta * weights, weights * (1 + freed / others))
    return torch.where(others > 0, changed, weights)


def _columns(weights: Float[Tensor, "b h n m"], seen: Bool[Tensor, "#b #h n m"], start: int) -> tuple[Tensor, Tensor]:
    """Sums of columns over rows that are real, and how many real rows see each. `start`: the token of row 0."""
    own = torch.arange(start, start + seen.shape[2], device=seen.device)[:, None]
    real = seen.gather(-1, own.expand(*seen.shape[:2], -1, 1))
    return (weights * real).sum(2), (seen & real).sum(2)


@paper(
    system=61,
    name="ACT",
    family="control",
    claim="per input, damps attention sinks beyond the first token in heads that a search has found",
    evidence=["tests/papers/control/test_act.py"],
)
class ACT(Control):
    """Calibrates the heads that it is attached to.

    Args:
        threshold: tokens with a larger mean weight are sinks.
        beta: what is left of the weight of sinks; 1 changes nothing.
        protect_first: the first sink is left alone.
        budget: how many weights are held at once.
    """

    def __init__(
        self,
        threshold: float | int = 0.1,
        beta: float | int = 0.4,
        protect_first: bool = True,
        budget: int = 1 << 24,
    ):
        if not 0 <= beta <= 1:
            raise ChronotopeError(f"ACT(beta={beta}): expected 0 to 1.")
        self.threshold, self.beta, self.protect_first, self.budget = threshold, beta, protect_first, budget

    def sinks(self, asked: Asked) -> Bool[Tensor, "b h n"]:
        """S of each head."""
        mass = count = torch.zeros((), device=asked.q.device)
        for rows, seen, weights in row_blocks(asked, budget=self.budget):
            more = _columns(weights, seen, rows.start)
            mass, count = mass + more[0], count + more[1]
        return sinks_of(mass / count.clamp(min=1), self.threshold, self.protect_first)

    def out(self, at: At, asked: Asked, out: Float[Tensor, "b h n dv"]) -> Float[Tensor, "b h n dv"]:
        """y + (A' - A) v."""
        if not asked.square or asked.q.shape[2] == 1:
            return out
        sinks, v = self.sinks(asked), values(asked)
        if not bool(sinks.any()):
            return out
        change = [
            (damped(weights, sinks, self.beta) - weights).to(v.dtype) @ v
            for _, _, weights in row_blocks(asked, budget=self.budget)
        ]
        return out + torch.cat(change, 2).to(out.dtype)


def search(
    model: nn.Module, score: Callable[[], float], one: Control | None = None, layers: Layers | None = None
) -> list[Head]:
    """Heads that raise the score when they alone are calibrated; attach to them by `heads.on_heads`.

    Args:
        score: runs the model on held-out samples; larger is better.
        one: the calibration; None: as published.
        layers: as for `ct.adapt.control`; the paper leaves out the first two and the last.
    """
    one, before = ACT() if one is None else one, score()
    found = []
    for head in heads_of(model, score, layers):
        with on_heads(model, one, [head]):
            if score() > before:
                found.append(head)
    return found
