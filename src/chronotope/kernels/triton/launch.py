"""How kernels are started: block sizes, and tensors as arguments."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from chronotope.kernels.triton.lists import SMALLEST, Lists


class Shape(NamedTuple):
    """Queries and keys of a block at most, and how many warps and stages of prefetch it gets."""

    queries: int
    keys: int
    warps: int
    stages: int


SHAPES: dict[tuple[str, bool], dict[int, Shape]] = {
    ("forward", True): {64: Shape(128, 64, 8, 3), 128: Shape(128, 64, 8, 3), 256: Shape(128, 32, 8, 2)},
    ("dq", True): {64: Shape(128, 64, 8, 2), 128: Shape(64, 64, 4, 2), 256: Shape(64, 32, 8, 2)},
    ("dkv", True): {64: Shape(32, 128, 8, 2), 128: Shape(32, 128, 8, 2), 256: Shape(32, 64, 8, 2)},
    ("forward", False): {64: Shape(64, 32, 8, 2), 128: Shape(32, 16, 8, 2), 256: Shape(16, 16, 8, 1)},
    ("dq", False): {64: Shape(32, 32, 8, 2), 128: Shape(32, 16, 8, 1), 256: Shape(16, 16, 4, 1)},
    ("dkv", False): {64: Shape(32, 32, 8, 2), 128: Shape(16, 16, 8, 1), 256: Shape(16, 16, 8, 1)},
}
"""By pass, by whether numbers have 16 bits, and by the head size up to which the shape serves.

Not timed: the largest that ptxas compiles for sm_90 with few or no registers spilled and that shared memory holds.
"""


def shape(which: str, dtype: torch.dtype, *sizes: int) -> Shape:
    """The blocks of a pass for head sizes."""
    by_size = SHAPES[which, dtype.itemsize == 2]
    return by_size[min(size for size in by_size if size >= max(sizes))]


def fit(blocks: Shape, work: Lists, by_query: bool) -> Shape:
    """The shape with fewer warps where tiles are so small that blocks are lower."""
    limit = blocks.queries if by_query else blocks.keys
    return blocks._replace(warps=max(min(2, blocks.warps), blocks.warps * work.height.value // limit))


class Strided(NamedTuple):
    """A tensor [B, heads, tokens, size] whose last dimension is dense, padded to `block` numbers where it is read."""

    data: Tensor
    batch: int
    head: int
    token: int
    size: tl.constexpr
    block: tl.constexpr


def strided(x: Float[Tensor, "b heads tokens size"]) -> Strided:
    """A tensor as an argument of a kernel."""
    block = max(SMALLEST, triton.next_power_of_2(x.shape[3]))
    return Strided(x, x.stride(0), x.stride(1), x.stride(2), tl.constexpr(x.shape[3]), tl.constexpr(block))


def dense(x: Float[Tensor, "b heads tokens size"]) -> Float[Tensor, "b heads tokens size"]:
    """The tensor, copied where its last dimension is not dense."""
    return x if x.stride(3) == 1 else x.contiguous()


def launch(kernel: Any, programs: int, device: torch.device, shape: Shape, *arguments: Any) -> None:
    """Starts a kernel on the device of its tensors."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Fused multiply-add is said outright: the default of Triton is about to change (3.9 warns of it).
        options = {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True}
        kernel[(programs,)](*arguments, **options)
