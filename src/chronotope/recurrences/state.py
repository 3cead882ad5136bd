"""What a recurrence carries along time."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from chronotope.carried import Carried


@dataclass(frozen=True)
class RecurrentState(Carried):
    """S_t, and z_t where the output is normalised; float32, or float64 where the inputs are.

    memory [B, H, D, Dv]: what has been written under each key channel. normalizer [B, H, D]: the decayed sum of keys.
    """

    memory: Float[Tensor, "b h d dv"]
    normalizer: Float[Tensor, "b h d"] | None = None
