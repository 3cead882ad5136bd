"""Recurrences on NVIDIA GPUs in Triton, which is imported when a kernel first runs.

Under Triton's interpreter (TRITON_INTERPRET=1) the kernels run on CPU tensors too: for checking them, hence only when
asked for by name.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from chronotope.recurrences.call import Backend, Inputs, Outputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KEY_SIZE = 128
CHUNKS = (16, 32, 64)


def compute(inputs: Inputs, chunk: int) -> Outputs:
    """The recurrence, by chunks of as many tokens as the least of `CHUNKS` that holds `chunk`."""
    from chronotope.recurrences.triton.calls import compute

    return compute(inputs, min(size for size in CHUNKS if size >= chunk))


def reasons(inputs: Inputs, chunk: int) -> list[str]:
    """Why these kernels cannot run a call. Needs no Triton."""
    out = []
    if find_spec("triton") is None:
        out.append("Triton is not installed: pip install triton")
    if inputs.q.shape[3] > KEY_SIZE:
        out.append(f"key sizes up to {KEY_SIZE}, got {inputs.q.shape[3]}")
    if chunk not in CHUNKS:
        out.append(f"chunks of {', '.join(map(str, CHUNKS))} tokens, got {chunk}")
    return out


TRITON = Backend(
    name="triton",
    about="chunks, fused for NVIDIA GPUs, in Triton",
    compute=compute,
    devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
    dtypes=(torch.float32,),
    chunk=64,
    priority=-1 if INTERPRETED else 20,
    tested_on="interpreter only",
    differentiable="once",
    also=reasons,
)
