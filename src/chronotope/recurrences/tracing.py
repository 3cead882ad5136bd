"""What a compiler that traces a recurrence takes as settled."""

from __future__ import annotations

import torch

from chronotope.recurrences.native import unbuilt


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unbuilt_constant() -> tuple[str, ...]:
    """Why there is no library, found out while tracing."""
    return unbuilt()
