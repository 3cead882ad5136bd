"""What a model would give if its own attention were masked: dense, by torch alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import chronotope as ct

DENSE = F.scaled_dot_product_attention


@contextmanager
def masked(
    model: nn.Module,
    where: ct.Pattern,
    grid: ct.Grid | None,
    text: int = 0,
    after: bool = False,
    ahead: int = 0,
    parts: tuple[ct.Grid, ...] = (),
) -> Iterator[None]:
    """Adds the mask of a pattern to every square attention call of a model whose tokens are these.

    `grid`: where they are; None: any sequence, on `Grid(n=...)`. Of those, `text` more lie before or after them, where
    the model has them take part at all; `ahead` of them lie before them always. Layers may have grids of their own,
    `parts`, which their numbers of tokens tell apart.
    """

    def hidden(n: int) -> Tensor | None:
        """What the pattern hides, as is added to the scores; None: not these tokens."""
        whole = ct.Grid(n=n) if grid is None else next((part for part in parts if part.size == n), grid)
        more = n - whole.size
        if more not in (0, text):
            return None
        coords = ct.plan(where, ct.Grid(whole.prefix + more, **whole.sizes)).mask()
        if after:
            behind = max(0, more - ahead)
            coords = coords.roll((-behind, -behind), (0, 1))
        return torch.zeros(n, n).masked_fill(~coords, torch.finfo(torch.float32).min)

    def sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
             is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        n = query.shape[-2]
        extra = hidden(n) if n == key.shape[-2] else None
        if extra is not None:
            if is_causal:
                extra = extra.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
            attn_mask, is_causal = extra if attn_mask is None else attn_mask + extra, False
        return DENSE(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    with mock.patch.object(F, "scaled_dot_product_attention", sdpa):
        own = sys.modules[type(model).__module__]
        eager = getattr(own, "eager_attention_forward", None)
        if eager is None:
            yield
            return

        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
            extra = hidden(q.shape[2]) if q.shape[2] == k.shape[2] else None
            return eager(module, q, k, v, mask if extra is None or mask is None else mask.minimum(extra), **kwargs)

        with mock.patch.object(own, "eager_attention_forward", attend):
            yield
