"""What a kernel of the recurrence is given and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

FLOOR = -800.0
"""exp of it is 0 in every dtype, so a stronger decay changes nothing; and sums of it stay finite."""


@dataclass(frozen=True)
class Inputs:
    """One call: float32 or float64 throughout, decays from `FLOOR` on (native: any).

    decay: None, [B, H, N], or [B, H, N, D]. memory and normalizer are the state before the first token; normalizer is
    None where the output is not normalised.
    """

    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n dv"]
    decay: Float[Tensor, "b h n"] | Float[Tensor, "b h n d"] | None
    beta: Float[Tensor, "b h n"] | None
    memory: Float[Tensor, "b h d dv"]
    normalizer: Float[Tensor, "b h d"] | None


@dataclass(frozen=True)
class Outputs:
    """q_t S_t, and q_t . z_t where it is wanted; the state after the last token."""

    out: Float[Tensor, "b h n dv"]
    total: Float[Tensor, "b h n"] | None
    memory: Float[Tensor, "b h d dv"]
    normalizer: Float[Tensor, "b h d"] | None


Compute = Callable[[Inputs, int], Outputs]
"""(inputs, chunk) -> outputs, differentiable."""


@dataclass(frozen=True)
class Backend:
    """One way to compute a recurrence, and what it can do."""

    name: str
    about: str
    compute: Compute
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    chunk: int
    priority: int
    tested_on: str = "cpu"
    differentiable: str = "twice"
    also: Callable[[Inputs, int], list[str]] | None = None

    def reasons(self, inputs: Inputs, chunk: int) -> list[str]:
        """Why this backend cannot run the call; empty where it can."""
        out = []
        if inputs.q.device.type not in self.devices:
            out.append(f"runs on {', '.join(self.devices)}, the tensors are on {inputs.q.device.type}")
        if inputs.q.dtype not in self.dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            out.append(f"computes in {names}, the inputs need {str(inputs.q.dtype).removeprefix('torch.')}")
        return out if out or self.also is None else self.also(inputs, chunk)
