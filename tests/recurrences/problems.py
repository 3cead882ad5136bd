"""Random recurrences, and what a backend makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import chronotope as ct

FORMS = (None, "head", "token", "channel")


@dataclass(frozen=True)
class Problem:
    """The arguments of `ct.recurrence`, and gradients of its results."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    state: ct.RecurrentState | None
    normalize: bool
    scale: float
    douts: tuple[Tensor, ...]

    @classmethod
    def random(
        cls,
        form: str | None = None,
        delta: bool = False,
        normalize: bool = False,
        sizes: tuple[int, int, int, int, int] = (2, 2, 37, 5, 3),
        dtype: torch.dtype = torch.float64,
        strongest: float = 3.0,
        given: bool = True,
        seed: int = 0,
    ) -> Problem:
        """sizes: B, H, N, D, Dv. Decays lie in -strongest..0, most of them near 0."""
        b, h, n, d, e = sizes
        rng = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        def share(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=rng, dtype=torch.float64)

        # Positive features: sums of weights are far from 0.
        q, k = (share(b, h, n, d) if normalize else draw(b, h, n, d) for _ in range(2))
        shape = {None: None, "head": (h,), "token": (b, h, n), "channel": (b, h, n, d)}[form]
        decay = None if shape is None else -strongest * share(*shape) ** 3
        beta = None
        if delta:
            k, beta = torch.nn.functional.normalize(k, dim=-1), share(b, h, n)
        state = None
        if given:
            state = ct.RecurrentState(draw(b, h, d, e), share(b, h, d) if normalize else None)
        douts = [draw(b, h, n, e), draw(b, h, d, e)] + ([draw(b, h, d)] if normalize else [])
        parts = (None if x is None else x.to(dtype) for x in (q, k, draw(b, h, n, e), decay, beta))
        state = None if state is None else state.each(lambda x: x.to(dtype))
        return cls(*parts, state, normalize, 0.3, tuple(x.to(dtype) for x in douts))  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another precision."""

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        state = None if self.state is None else self.state.each(lambda x: x.to(dtype))
        q, k, v, decay, beta = (cast(x) for x in (self.q, self.k, self.v, self.decay, self.beta))
        assert q is not None and k is not None and v is not None
        douts = tuple(x.to(dtype) for x in self.douts)
        return replace(self, q=q, k=k, v=v, decay=decay, beta=beta, state=state, douts=douts)

    def results(self, backend: str, chunk: int | None = None) -> list[Tensor]:
        """out, the final state, and the gradient of everything that was given."""
        given = [self.q, self.k, self.v, self.decay, self.beta, *(self.state.tensors() if self.state else ())]
        leaves = [x.detach().clone().requires_grad_() if x is not None else None for x in given]
        q, k, v, decay, beta, *rest = leaves
        assert q is not None and k is not None and v is not None
        state = ct.RecurrentState(*rest) if rest else None  # type: ignore[arg-type]
        out, after = ct.recurrence(
            q, k, v, decay=decay, beta=beta, normalize=self.normalize, scale=self.scale, state=state, chunk=chunk,
            backend=backend,
        )  # fmt: skip
        found = [out, *after.tensors()]
        wanted = [x for x in leaves if x is not None]
        grads = torch.autograd.grad(found, wanted, list(self.douts))
        return [x.detach() for x in (*found, *grads)]


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of any result over its largest number, or, where that is nearly 0, over a part of the rest."""
    sizes = [float(y.double().abs().max()) if y.numel() else 0.0 for y in expected]
    least = 1e-3 * max(sizes)
    return max(
        float((x.double() - y.double()).abs().max()) / max(size, least) if y.numel() else 0.0
        for x, y, size in zip(found, expected, sizes, strict=True)
    )
