"""What the kernels cannot do. Needs no Triton: asked before it is known whether there is one."""

from __future__ import annotations

from importlib.util import find_spec

from chronotope.kernels.call import Facts, Scores
from chronotope.kernels.relative import only_relative
from chronotope.planning import Tiling

HEAD_SIZE = 256
MASK_WORDS = 1 << 28  # 1 GiB of element masks


def mask_words(tiles: Tiling) -> tuple[int, int, int]:
    """How element masks lie in memory: number of kinds, rows of each, words of 32 bits in each row."""
    return len(tiles.kinds[0]), int(tiles.q.sizes.max()), (int(tiles.k.sizes.max()) + 31) // 32


def reasons(facts: Facts, tiles: Tiling, scores: Scores) -> list[str]:
    """Why these kernels cannot run a call."""
    out = []
    if find_spec("triton") is None:
        out.append("Triton is not installed: pip install triton")
    if max(facts.head_size, facts.value_size) > HEAD_SIZE:
        out.append(f"head sizes up to {HEAD_SIZE}, got {facts.head_size} and {facts.value_size}")
    if tiles.pattern is None or tiles.pattern.reaches(tiles.q.grid, tiles.k.grid) is None:
        kinds, rows, words = mask_words(tiles)
        if kinds * rows * words > MASK_WORDS:
            size = kinds * rows * words / 2**28
            out.append(f"the element masks of its {kinds:,} kinds of tile pairs would take {size:.1f} GiB, 1 at most")
    return out + only_relative(facts, tiles, scores)
