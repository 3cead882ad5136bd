"""Files that may be packed."""

from __future__ import annotations

import gzip
from pathlib import Path


def unpacked(path: Path) -> bytes:
    """What a file holds; that of a .gz without its packing."""
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data
