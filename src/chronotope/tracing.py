"""What `ct.attention` does where torch.compile or torch.export traces it."""

from __future__ import annotations

from typing import Any

import torch

from chronotope.attention import Heads, calls
from chronotope.kernels import named


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def named_calls(*request: Any) -> list[tuple[Heads, str]]:
    """`attention.calls`, made once while tracing; the graph holds the names of the calls."""
    return [(heads, named(call, forever=True)) for heads, call in calls(*request)]
