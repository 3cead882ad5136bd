r"""HeadHunter and SoftPAG: guidance away from a model some of whose heads see less, and a search for those heads.

$$
A' = (1 - u) A + u I \;\text{ in the heads of a set } S, \text{ so } \; y' = (1 - u)\, y + u\, v, \qquad
\hat\epsilon = \epsilon + w (\epsilon - \epsilon'_S)
$$

u = 1 is perturbed-attention guidance (PAG), each token its own value; smaller u is gentler. The search: R rounds; in
each, every head outside S is tried, S with it, and the k best join S.

Sizes: y, v [B, H, N, D]; no map is held, and a guided step is two calls of the model. R = 5, k = 3, w = 3, u = 1 for a
style and R = 1, k = 24 for quality in general, of the 576 heads of Stable Diffusion 3; u = 0.5 where that is too much.

    >>> net = torch.nn.TransformerEncoderLayer(16, 4, dropout=0.0, batch_first=True)
    >>> model = lambda x, t: net(x)
    >>> heads = heads_of(net, lambda: model(torch.randn(1, 9, 16), None))
    >>> heads
    [('self_attn', 0), ('self_attn', 1), ('self_attn', 2), ('self_attn', 3)]
    >>> def score(chosen):  # the nearer to 1 all through, the better
    ...     made = away(model, weakened(model, net, chosen), 2.0)
    ...     return -float((flow_sample(made, torch.randn(2, 9, 16), steps=4) - 1).square().mean())
    >>> len(head_hunter(score, heads, rounds=2, add=1))
    2

Layers that look at another sequence have no own value and stay as they are. In joint attention the released code
(cvlab-kaist/HeadHunter at commit 3828d1c, attention_processor.py, `attention_identity`) puts I in place of all of A,
rows and columns of text too, and so does this page; `text=False` leaves the rows of text. Its steps from the scores to
the output of the heads, run on CPU on 10 random inputs of 64 and 13 tokens, differ by 1.4e-6 at most.

A denoiser of 8 x 8 scenes, trained for minutes, without a prompt: heads searched with u = 0.1 and w = 1 by the energy
distance to the data, 4 of 8, then u = 0.05. Unguided samples are at 0.026, guided ones at 0.015, 0.009, 0.009 for
w = 1, 2, 3. With u = 0.1 and w = 3 it is 1.5 to 2 times that of unguided ones.

Left out: maps other than I (uniform, mean query, hard maximum), geodesics between A and I, scores of images by learned
models, and so the results on Stable Diffusion 3 and FLUX.1.

Paper: Donghoon Ahn, Jiwon Kang, Sanghyun Lee, Minjae Kim, Jaewon Min, Wooseok Jang, Sangwu Lee, Sayak Paul, Susung
Hong, Seungryong Kim, "Fine-Grained Perturbation Guidance via Attention Head Selection", 2025, arXiv 2506.10978 (later
"Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow Models").
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from chronotope.adapt import Asked, At, Control
from chronotope.errors import ChronotopeError
from chronotope.models.diffusion import Model
from chronotope.papers.control.heads import Head, on_heads
from chronotope.papers.control.rows import values
from chronotope.papers.registry import paper


class SoftPAG(Control):
    """y' = (1 - u) y + u v, v the values of the queries' own tokens. text: whether tokens of text lose sight too."""

    def __init__(self, u: float | int = 1.0, text: bool = True):
        if not 0 <= u <= 1:
            raise ChronotopeError(f"SoftPAG(u={u}): expected 0 to 1.")
        self.u, self.text = u, text

    def out(self, at: At, asked: Asked, out: Float[Tensor, "b h n dv"]) -> Float[Tensor, "b h n dv"]:
        """Of layers whose queries and keys are the same tokens."""
        if not asked.square:
            return out
        soft = (1 - self.u) * out + self.u * values(asked).to(out.dtype)
        if not self.text:
            soft[:, :, at.text] = out[:, :, at.text]
        return soft


def weakened(model: Model, net: nn.Module, heads: Collection[Head], one: Control | None = None) -> Model:
    """The model with these heads of `net`, which it calls, under a control; None: `SoftPAG()`."""
    one = SoftPAG() if one is None else one

    def weak(x: Tensor, t: Tensor) -> Tensor:
        with on_heads(net, one, heads):
            return model(x, t)

    return weak


def away(model: Model, weak: Model, weight: float | int, base: Model | None = None) -> Model:
    """base + weight (model - weak): guidance away from a weak model, added to another, such as `guided(..)`.

    base: None is the model itself.
    """

    def steered(x: Tensor, t: Tensor) -> Tensor:
        said = model(x, t)
        return (said if base is None else base(x, t)) + weight * (said - weak(x, t))

    return steered


@paper(
    system=106,
    name="HeadHunter",
    family="control",
    claim="guidance away from a model whose chosen heads see themselves alone, and a greedy search for the heads",
    evidence=["tests/papers/control/test_head_hunter.py"],
)
def head_hunter(
    objective: Callable[[list[Head]], float],
    heads: Sequence[Head],
    rounds: int = 5,
    add: int = 3,
    until_drop: bool = False,
) -> list[Head]:
    """The heads found, in the order in which they joined.

    Args:
        objective: what generation guided away from these heads is worth, such as the mean score of a few samples.
        heads: all candidates, as `heads_of` lists them.
        rounds, add: R and k.
        until_drop: ends before a round that makes the objective smaller; one more evaluation a round.
    """
    found: list[Head] = []
    worth = -float("inf")
    for _ in range(rounds):
        scores = {head: objective([*found, head]) for head in heads if head not in found}
        more = [*found, *sorted(scores, key=scores.__getitem__, reverse=True)[:add]]
        if until_drop:
            now = objective(more)
            if now < worth:
                break
            worth = now
        found = more
    return found
