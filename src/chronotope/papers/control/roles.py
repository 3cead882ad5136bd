"""Who may look at whom by what tokens are: the texts of several prompts, the regions of an image, copies of regions.

    seen(query, key) = sees(role of the query, role of the key)

Roles are few, so a rule is a table of roles x roles and a number for each token, never N x N.

    >>> left, right = torch.eye(2).bool().repeat(1, 8)
    >>> layout = Layout(texts=(4, 2, 2), regions=torch.stack((left, right)))
    >>> own = by_roles(layout.roles(), lambda q, k: q.kind == "image" or not q.of.isdisjoint(k.of))
    >>> own.mask.shape, own
    (torch.Size([24, 24]), by_roles(24 tokens of 5 roles))
    >>> attention(*torch.randn(3, 1, 2, 24, 8), grid=Grid(n=24), where=own).shape
    torch.Size([1, 2, 24, 8])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.adapt import Asked, At
from chronotope.boxes import Boxes, identify
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.patterns import Pattern
from chronotope.patterns.base import Verdict


@dataclass(frozen=True)
class Role:
    """What a token is: text or a copy of one prompt, or a place of the image that is in some regions, or in none.

    Prompt 0 is that of the whole image, prompt i that of region i: regions are counted from 1.
    """

    kind: Literal["text", "image", "copy"]
    of: frozenset[int]


Sees = Callable[[Role, Role], bool]
"""Whether a query of the first role sees a key of the second."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens of a joint attention: texts one after another, the places of an image, and copies of some of these.

    texts: tokens of each prompt, first that of the whole image, then one for each region.
    regions: [n, places], which places each region has; they may overlap.
    copies: [n + 1, places], which places are copied for each prompt, appended after the image; None: none.
    """

    texts: tuple[int, ...]
    regions: Bool[Tensor, "n places"]
    copies: Bool[Tensor, "prompts places"] | None = None

    def __post_init__(self) -> None:
        n, places = self.regions.shape
        if len(self.texts) != n + 1:
            raise ChronotopeError(
                f"a layout of {n} regions with {len(self.texts)} texts {self.texts}; expected one for the whole image, "
                "then one for each region."
            )
        if self.copies is not None and self.copies.shape != (n + 1, places):
            raise ChronotopeError(f"copies have shape {list(self.copies.shape)}; expected [{n + 1}, {places}].")

    @property
    def places(self) -> int:
        """Number of places of the image."""
        return self.regions.shape[1]

    @property
    def copied(self) -> Int64[Tensor, "copies"]:
        """The place that each copy is of."""
        if self.copies is None:
            return torch.zeros(0, dtype=torch.int64)
        return self.copies.nonzero()[:, 1]

    def roles(self, image_first: bool = False) -> list[Role]:
        """That of every token: texts, image, copies; or image, copies, texts."""
        texts = [Role("text", frozenset((i,))) for i, size in enumerate(self.texts) for _ in range(size)]
        columns = self.regions.T.tolist()
        image = [Role("image", frozenset(i + 1 for i, within in enumerate(column) if within)) for column in columns]
        owners = [] if self.copies is None else self.copies.nonzero()[:, 0].tolist()
        image += [Role("copy", frozenset((i,))) for i in owners]
        return image + texts if image_first else texts + image


@dataclass(frozen=True, repr=False)
class ByRoles(Pattern):
    """table[role of the query, role of the key], on a grid of one axis: every token of a joint attention in order."""

    data: tuple[bytes, bytes]
    ids: Int64[Tensor, "n"] = field(compare=False, hash=False)
    table: Bool[Tensor, "roles roles"] = field(compare=False, hash=False)

    @property
    def mask(self) -> Bool[Tensor, "n n"]:
        """All of it, [query, key]."""
        return self.table[self.ids[:, None], self.ids]

    def check(self, grid: Grid, key_grid: Grid) -> None:
        for g in (grid, key_grid):
            if len(g.axes) != 1 or g.prefix or g.size != len(self.ids):
                raise ChronotopeError(f"{self!r} on {g!r}; expected Grid(n={len(self.ids)}).")

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        ids = self.ids.to(q.place.device)
        return self.table.to(q.place.device)[ids[q.place], ids[k.place]]

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        present, other = self._present(q), self._present(k)
        some = ((present @ self.table.float()) * other).sum(1) > 0
        hidden = ((present @ (~self.table).float()) * other).sum(1) > 0
        return some, ~hidden

    def _present(self, boxes: Boxes) -> Tensor:
        """[P, roles]: 1 where some token of the box has the role."""
        tokens, _ = boxes.tokens()  # padded by repeating a token of the box, which changes nothing here
        out = torch.zeros(len(boxes), len(self.table))
        return out.scatter_(1, self.ids[tokens.place], 1.0)

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        return identify(q.place(q.lo), k.place(k.lo))

    def prefix_sees(self) -> tuple[bool, bool]:
        return True, True

    def __repr__(self) -> str:
        return f"by_roles({len(self.ids)} tokens of {len(self.table)} roles)"


def by_roles(roles: Sequence[Role], sees: Sees) -> ByRoles:
    """The pattern of a rule between roles, on Grid(n=len(roles))."""
    kinds = list(dict.fromkeys(roles))
    ids = torch.tensor([kinds.index(role) for role in roles])
    table = torch.tensor([[sees(q, k) for k in kinds] for q in kinds])
    return ByRoles((ids.numpy().tobytes(), table.numpy().tobytes()), ids, table)


def image_first(layout: Layout, at: At, asked: Asked) -> bool:
    """Whether the image comes before the texts. Raises where a layer looks at other tokens than those of the layout."""
    expected = sum(layout.texts) + layout.places + len(layout.copied)
    if not asked.square or asked.q.shape[2] != expected:
        raise ChronotopeError(
            f"{at.layer}: {asked.q.shape[2]} queries look at {asked.k.shape[2]} keys; this layout has {expected} "
            "tokens in one joint attention. Choose the layers of that kind by `layers=`."
        )
    return at.text.start > 0


def seen_by(asked: Asked, pattern: ByRoles) -> Asked:
    """The call under a pattern of all its tokens; as a mask where another pattern holds already."""
    if asked.where is None:
        return asked.but(where=pattern, grid=Grid(n=len(pattern.ids)), tail=0)
    seen = pattern.mask.to(asked.q.device)
    if asked.mask is None:
        return asked.but(mask=seen)
    if asked.mask.dtype == torch.bool:
        return asked.but(mask=asked.mask & seen)
    return asked.but(mask=asked.mask.masked_fill(~seen, -torch.inf))
