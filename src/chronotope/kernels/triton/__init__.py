"""Block-sparse flash attention for NVIDIA GPUs in Triton, which is imported when a kernel first runs.

Under Triton's interpreter (TRITON_INTERPRET=1) the kernels run on CPU tensors too: for checking them, hence only when
asked for by name. It cannot multiply bfloat16 numbers, and that of Triton 3.6 needs NumPy below 2.4.
"""

from __future__ import annotations

import os

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.kernels.call import Backend, Gradients, Known, Scores
from chronotope.kernels.triton.limits import HEAD_SIZE, reasons
from chronotope.planning import Tiling

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def forward(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b hk nk d"],
    v: Float[Tensor, "b hk nk dv"],
    tiles: Tiling,
    scores: Scores,
) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"]]:
    """Attention over the tiles of a plan: (out, lse). The meaning is `kernels.reference`."""
    from chronotope.kernels.triton.forward_pass import forward

    return forward(q, k, v, tiles, scores)


def backward(known: Known, tiles: Tiling, scores: Scores) -> Gradients:
    """Gradients of one call."""
    from chronotope.kernels.triton.backward_pass import backward

    return backward(known, tiles, scores)


TRITON = Backend(
    name="triton",
    about="fused tiles for NVIDIA GPUs, in Triton",
    forward=forward,
    backward=backward,
    devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
    dtypes=(torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16),
    head_sizes=f"up to {HEAD_SIZE}",
    tested_on="interpreter only",
    priority=-1 if INTERPRETED else 20,
    also=reasons,
)
