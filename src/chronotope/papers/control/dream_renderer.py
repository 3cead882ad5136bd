r"""DreamRenderer: each text of a region is bound to a copy of that region, and so learns what it looks like alone.

The latents of region i are copied and run through the model as tokens of their own, C_i. Text i sees text i and C_i,
and C_i the same, so that neither knows of the other regions, however many layers there are. A place p of the image sees

    soft             text 0, text i where p in R_i, and all places
    hard             text i where p in R_i, and the places q where some R_i has both
    hard, text only  text i where p in R_i, and all places

and, being in no region, text 0 and all places; none but text i and C_i sees C_i. Vital layers are hard in the first
steps and "hard, text only" after them, the others soft. Under `hard` in all layers, region i is made exactly as if it
were alone: of text i, C_i and R_i.

Sizes: texts L_0 .. L_n, regions [n, h w]: N = sum L + h w tokens become N + sum |R_i|, and h w more with `whole`.

    >>> layout = bridged(Layout(texts=(3, 2, 2), regions=torch.eye(2).bool().repeat(1, 8)))
    >>> binding_pattern(layout, "hard").mask.shape, layout.copied.tolist()
    (torch.Size([39, 39]), [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15])
    >>> x = append_tokens(torch.randn(1, 16, 8), layout.copied)
    >>> x.shape, drop_tokens(x, 16).shape
    (torch.Size([1, 32, 8]), torch.Size([1, 16, 8]))

    bridge = Bridged(transformer, layout)  # a Flux transformer: called as before, it copies, runs and drops
    with ct.adapt.control(bridge, DreamRenderer(layout)):
        v = bridge(hidden_states=latents, img_ids=ids, timestep=t, ...)

As released: 200 tokens of text for each prompt, vital layers 19 .. 37 of 57, 20 hard steps of 20. Text 0 has no copy:
it sees all places of the image, and these see it. `whole` gives it one, so that no text sees the image itself. Copies
are cut out as boxes, at positions counted from the corner of each box (`ids="corner"`; "same": where they came from).

Left out: the search for vital layers, whose outcome is the default; the form for SD3, whose model takes latents as
images. After a step the released sampler cuts the copies off the latents and makes new ones, as `Bridged` does.

Compared with `FluxRDIMGAttnProcessor2_0_NPU` of limuloo/DreamRenderer at 01ad9f7 on random queries, two overlapping
regions, in its three masks: no difference.

Not shown: pictures of FLUX, which layers are vital, the published ratios.

Paper: Dewei Zhou, Mingwei Li, Zongxin Yang, Yi Yang, "DreamRenderer: Taming Multi-Instance Attribute Control in
Large-Scale Text-to-Image Models", 2025, arXiv 2503.12885.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from chronotope.adapt import Asked, At, Control
from chronotope.errors import ChronotopeError
from chronotope.papers.control.roles import ByRoles, Layout, Role, Sees, by_roles, image_first, seen_by
from chronotope.papers.registry import paper

Mode = Literal["soft", "hard", "hard_text_only"]
MODES = ("soft", "hard", "hard_text_only")


def bridged(layout: Layout, boxes: Bool[Tensor, "n places"] | None = None, whole: bool = False) -> Layout:
    """The layout with copies: of `boxes`, by default the regions themselves, and of the whole image for text 0."""
    own = layout.regions if boxes is None else boxes
    first = torch.full((1, layout.places), whole, device=own.device)
    return replace(layout, copies=torch.cat((first, own)))


def sees(mode: str, whole: bool) -> Sees:
    """The rule between two roles; whole: text 0 has a copy of the image for itself."""
    if mode not in MODES:
        raise ChronotopeError(f"mode={mode!r}; expected one of {', '.join(MODES)}.")

    def between(q: Role, k: Role) -> bool:
        own = not q.of.isdisjoint(k.of)
        if q.kind != "image":
            return own if k.kind != "image" else q == Role("text", frozenset((0,))) and not whole
        if k.kind == "copy":
            return False
        if k.kind == "text":
            return own or (0 in k.of and (mode == "soft" or not q.of))
        return own or mode != "hard" or not q.of

    return between


def binding_pattern(layout: Layout, mode: str, image_first: bool = False) -> ByRoles:
    """Who sees whom on Grid(n=tokens, copies among them); `.mask` is [tokens, tokens]."""
    whole = layout.copies is not None and bool(layout.copies[0].any())
    return by_roles(layout.roles(image_first), sees(mode, whole))


def append_tokens(x: Float[Tensor, "b n c"], copied: Int64[Tensor, "m"]) -> Float[Tensor, "b more c"]:
    """The tokens, then copies of some."""
    return torch.cat((x, x[:, copied.to(x.device)]), 1)


def drop_tokens(x: Float[Tensor, "b more c"], count: int) -> Float[Tensor, "b n c"]:
    """Without the last `count`."""
    return x[:, : x.shape[1] - count]


class Bridged(nn.Module):
    """A model of image tokens that runs copies of regions beside them, and returns the image alone.

    model: is given `hidden_states` [B, h w, C] and, if it has one, `img_ids` [h w, (.., row, column)], as the Flux
    transformers of diffusers are. ids: where copies are: "corner", counted from the top left of what is copied for each
    region, or "same", where they came from.
    """

    def __init__(self, model: nn.Module, layout: Layout, ids: Literal["corner", "same"] = "corner"):
        super().__init__()
        if layout.copies is None:
            raise ChronotopeError("this layout copies nothing: make it by bridged(layout).")
        self.model, self.layout, self.ids = model, layout, ids

    def forward(
        self,
        hidden_states: Float[Tensor, "b n c"],
        img_ids: Float[Tensor, "n axes"] | None = None,
        timestep: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """What the model returns: a tensor, a tuple or an object with `.sample`."""
        if hidden_states.shape[1] != self.layout.places:
            raise ChronotopeError(
                f"hidden_states has shape {list(hidden_states.shape)}; the layout has {self.layout.places} places."
            )
        if img_ids is not None:
            inputs["img_ids"] = self.positions(img_ids)
        if timestep is not None:
            inputs["timestep"] = timestep
        out = self.model(hidden_states=append_tokens(hidden_states, self.layout.copied), **inputs)
        return self._cut(out)

    def positions(self, img_ids: Float[Tensor, "n axes"]) -> Float[Tensor, "more axes"]:
        """Those of the image, then those of the copies."""
        assert self.layout.copies is not None
        parts = [img_ids]
        for copy in self.layout.copies.to(img_ids.device):
            own = img_ids[copy]
            if self.ids == "corner" and len(own):
                own = torch.cat((own[:, :-2], own[:, -2:] - own[:, -2:].min(0).values), 1)
            parts.append(own)
        return torch.cat(parts)

    def _cut(self, out: Any) -> Any:
        count = len(self.layout.copied)
        if isinstance(out, Tensor):
            return drop_tokens(out, count)
        if isinstance(out, tuple):
            return drop_tokens(out[0], count), *out[1:]
        out.sample = drop_tokens(out.sample, count)
        return out


@paper(
    system=141,
    name="DreamRenderer",
    family="control",
    claim="texts of regions see copies of their regions alone, and regions are made apart in the layers that matter",
    evidence=["tests/papers/control/test_dream_renderer.py", "tests/papers/control/test_roles.py"],
)
class DreamRenderer(Control):
    """The masks of a model whose image tokens are followed by copies (`Bridged`).

    vital: numbers of the attention layers that are hard. hard_steps: in how many steps, from the first, they see their
    own region alone; after these its text alone, and all places.
    """

    def __init__(self, layout: Layout, vital: Collection[int] = range(19, 38), hard_steps: int = 20):
        self.layout, self.vital, self.hard_steps = layout, vital, hard_steps
        self._made: dict[tuple[Mode, bool], ByRoles] = {}

    def mode(self, layer: int, step: int) -> Mode:
        """That of a layer at a step."""
        if layer not in self.vital:
            return "soft"
        return "hard" if step < self.hard_steps else "hard_text_only"

    def asks(self, at: At, asked: Asked) -> Asked:
        key = (self.mode(at.index, at.step), image_first(self.layout, at, asked))
        if key not in self._made:
            self._made[key] = binding_pattern(self.layout, *key)
        return seen_by(asked, self._made[key])
