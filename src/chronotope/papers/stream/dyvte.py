"""Dynamic Visual-Token Exit (DyVTE): all visual tokens leave after the first layer where text has read them.

After decoder layer l a small router looks at the text behind the image, h being hidden states and T its last token:

    f = [mean of h over the text after the image, without T;  h_T]          2 C numbers for each member of the batch
    (keep, exit) = W_2 gelu(W_1 f)                                          leave where exit - keep > threshold

From layer l + 1 on there are no visual tokens: not as queries, not as keys, not in the cache. Text keeps its place ids.
Earlier layers keep visual keys in their caches, and tokens generated later see them there. In a batch, visual tokens
are taken out when all members have left; until then those of members that have left are masked, to the same result.

Only routers learn. The layer l is drawn; the layers behind it run with visual tokens and without; the label is exit
where more than 99% of the most likely answer tokens agree and the loss without is less than 1.03 times that with.

Sizes: x [B, N, C] with Nv visual and Nt text tokens, Nv the same for all members; a router has 2048 (2 C + 2) weights.
L layers cost L (Nv + Nt) token passes, and with exit after layer l only (l + 1) (Nv + Nt) + (L - 1 - l) Nt.

    >>> model = DynamicVisualExit([DecoderLayer(32, 4) for _ in range(6)], dim=32)
    >>> x, visual = torch.randn(2, 24, 32), (torch.arange(24) >= 3) & (torch.arange(24) < 19)
    >>> out = model(x, visual.expand(2, -1), exits=torch.tensor([1, 1]))
    >>> out.hidden.shape, [cache.k.shape[2] for cache in out.state.caches]
    (torch.Size([2, 8, 32]), [24, 24, 8, 8, 8, 8])
    >>> model.step(torch.randn(2, 1, 32), out.state)[0].shape
    torch.Size([2, 1, 32])

Left out: LLaVA, VILA, Eagle and InternVL, and their attention maps in three stages; prompts of other lengths in one
batch. The released code (DoubtedSteam/DyVTE at b4a3396), which has the image at the tokens 35 to 610 and takes one
prompt at a time, leaves after the same layers and gives the same to 1e-6, at once and in steps.

Paper: Wu, Lin, Ye, Zhou, Sun, Ji 2024, "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and
the Empirical Findings", arXiv 2411.19628.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.papers.registry import paper
from chronotope.papers.stream.dyvte_decoder import Cache

IGNORED = -100
"""The target of tokens that answer nothing."""


@dataclass(frozen=True)
class ExitState(Carried):
    """The caches of the layers, which differ in length, and the place id of the next token."""

    caches: tuple[Cache, ...]
    place: Int64[Tensor, "b"]


class Exited(NamedTuple):
    """Hidden states of text, the layers after which visual tokens left (L: they stayed), and the state."""

    hidden: Float[Tensor, "b text c"]
    exits: Int64[Tensor, "b"]
    state: ExitState


class Branches(NamedTuple):
    """What a router sees after a layer, and hidden states of text with visual tokens behind it and without."""

    feature: Float[Tensor, "b two_c"]
    kept: Float[Tensor, "b text c"]
    exited: Float[Tensor, "b text c"]


class Router(nn.Module):
    """(keep, exit) from what a layer made of the text."""

    def __init__(self, dim: int, hidden: int = 2048):
        super().__init__()
        self.enter, self.leave = nn.Linear(2 * dim, hidden, bias=False), nn.Linear(hidden, 2, bias=False)

    def forward(self, feature: Float[Tensor, "b two_c"]) -> Float[Tensor, "b 2"]:
        """The logits."""
        return self.leave(F.gelu(self.enter(feature)))


@paper(
    system=76,
    name="DyVTE",
    family="stream",
    claim="a router on text states says after which layer all visual tokens leave the model and its later caches",
    evidence=["tests/papers/stream/test_dyvte.py"],
    missing="toy: routers save 0.41 of token passes at 0.7 points less accuracy, not 0.50; of the harder images, "
    "masking changes less than 1% of answers behind the last layer only",
)
class DynamicVisualExit(nn.Module):
    """The layers of a multimodal decoder, and a router after each.

    Args:
        layers: modules that are called like a `Layer`, such as `DecoderLayer` (dyvte_decoder).
        dim: channels.
        hidden: channels of a router.
        threshold: how much more the exit logit has to be than the other.
        first: the first layer after which visual tokens may leave.
    """

    def __init__(
        self, layers: Iterable[nn.Module], dim: int, hidden: int = 2048, threshold: float | int = 0.0, first: int = 0
    ):
        super().__init__()
        self.layers, self.threshold, self.first = nn.ModuleList(layers), threshold, first
        if not 0 <= first <= len(self.layers):
            raise ChronotopeError(f"first={first}: expected one of the {len(self.layers)} layers, or their number.")
        self.routers = nn.ModuleList(Router(dim, hidden) for _ in self.layers)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        visual: Bool[Tensor, "b n"],
        ids: Int64[Tensor, "b n"] | None = None,
        exits: Int64[Tensor, "b"] | None = None,
    ) -> Exited:
        """A prompt. ids: places, by default 0, 1, 2 ...; exits: the layers to leave after, not asking the routers."""
        ids = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if ids is None else ids
        require_spans(visual)
        place, depth = ids.amax(1) + 1, len(self.layers)
        found, seen, caches = torch.full_like(place, depth), None, []
        inside = True
        for i, layer in enumerate(self.layers):
            x, cache = layer(x, ids, seen)
            caches.append(cache)
            if not inside:
                continue
            now = (found == depth) & (self.leaves(x, visual, i) if exits is None else exits == i)
            found = torch.where(now, i, found)
            if bool((found < depth).all()):
                x, ids, seen, inside = text_of(x, visual), text_of(ids, visual), None, False
            elif bool((found < depth).any()):
                seen = ~(visual & (found < depth)[:, None])
        return Exited(text_of(x, visual) if inside else x, found, ExitState(tuple(caches), place))

    def step(self, x: Float[Tensor, "b 1 c"], state: ExitState) -> tuple[Float[Tensor, "b 1 c"], ExitState]:
        """The next token, over what each layer has kept."""
        caches = []
        for layer, before in zip(self.layers, state.caches, strict=True):
            x, cache = layer(x, state.place[:, None], None, before)
            caches.append(cache)
        return x, replace(state, caches=tuple(caches), place=state.place + 1)

    @torch.no_grad()
    def leaves(self, hidden: Float[Tensor, "b n c"], visual: Bool[Tensor, "b n"], layer: int) -> Bool[Tensor, "b"]:
        """Which members leave after this layer, if they have not yet."""
        if layer < self.first:
            return torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        keep, leave = self.routers[layer](text_state(hidden, visual)).unbind(1)
        return leave - keep > self.threshold

    @torch.no_grad()
    def branches(
        self, x: Float[Tensor, "b n c"], visual: Bool[Tensor, "b n"], layer: int, last: Int64[Tensor, "b"] | None = None
    ) -> Branches:
        """A text that is given as a whole, with visual tokens behind a layer and without. last: end of the prompt."""
        require_spans(visual)
        ids = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        for part in self.layers[: layer + 1]:
            x, _ = part(x, ids)
        feature, text, places = text_state(x, visual, last), text_of(x, visual), text_of(ids, visual)
        for part in self.layers[layer + 1 :]:
            (x, _), (text, _) = part(x, ids), part(text, places)
        return Branches(feature, text_of(x, visual), text)

    def loss(
        self,
        x: Float[Tensor, "b n c"],
        visual: Bool[Tensor, "b n"],
        head: Callable[[Tensor], Tensor],
        targets: Int64[Tensor, "b n"],
        layer: int,
    ) -> tuple[Float[Tensor, ""], Bool[Tensor, "b"]]:
        """The loss of the router of one layer, drawn by the caller, and the labels. Nothing else gets a gradient.

        head: hidden states to logits; targets: for each token that is to say the next token of the answer, that token;
        -100 elsewhere. The prompt ends with the first of them.
        """
        feature, kept, exited = self.branches(x, visual, layer, (targets != IGNORED).to(torch.uint8).argmax(1))
        with torch.no_grad():
            label = exit_label(head(kept), head(exited), text_of(targets, visual))
        return F.cross_entropy(self.routers[layer](feature), label.long()), label


@torch.no_grad()
def exit_label(
    kept: Float[Tensor, "b n v"],
    exited: Float[Tensor, "b n v"],
    targets: Int64[Tensor, "b n"],
    agree: float = 0.99,
    ratio: float = 1.03,
) -> Bool[Tensor, "b"]:
    """Whether visual tokens may leave: more than `agree` of the answer is the same, and its loss below ratio times."""
    answer = targets != IGNORED
    count = answer.sum(1)
    same = ((kept.argmax(2) == exited.argmax(2)) & answer).sum(1) / count
    before, after = (
        F.cross_entropy(x.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED).sum(1) / count
        for x in (kept, exited)
    )
    return (same > agree) & (after < ratio * before)


def text_state(
    hidden: Float[Tensor, "b n c"], visual: Bool[Tensor, "b n"], last: Int64[Tensor, "b"] | None = None
) -> Float[Tensor, "b two_c"]:
    """The mean of the text after the image up to its last token, and that token. last: default, the last of all."""
    place = torch.arange(visual.shape[1], device=visual.device)
    last = torch.full_like(place[:1], visual.shape[1] - 1).expand(len(visual)) if last is None else last
    after = (place > torch.where(visual, place, -1).amax(1, keepdim=True)) & (place < last[:, None])
    if not bool(after.any(1).all()):
        raise ChronotopeError("expected two tokens of text or more between the image and the end of the prompt.")
    mean = (hidden * after[..., None]).sum(1) / after.sum(1, keepdim=True)
    return torch.cat((mean, hidden[torch.arange(len(hidden), device=hidden.device), last]), 1)


def text_of(x: Tensor, visual: Bool[Tensor, "b n"]) -> Tensor:
    """What is not visual of x [B, N, ...], in order."""
    return x[~visual].unflatten(0, (len(x), -1))


def saved(exits: Int64[Tensor, "b"], layers: int, visual: int, text: int) -> Float[Tensor, "b"]:
    """The share of all passes of a token through a layer that exits save."""
    return (layers - 1 - exits).clamp(min=0) * visual / (layers * (visual + text))


def require_spans(visual: Bool[Tensor, "b n"]) -> None:
    """Raises ChronotopeError unless all members have as many visual tokens."""
    counts = visual.sum(1)
    if bool((counts != counts[0]).any()):
        raise ChronotopeError(f"{counts.tolist()} visual tokens: expected as many for each member of the batch.")
