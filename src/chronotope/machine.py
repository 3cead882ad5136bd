"""What times are of, and where they are kept."""

import os
import platform
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def processor() -> str:
    """The name of the processor, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def cache() -> Path | None:
    """The user's folder for what can be made again: CHRONOTOPE_CACHE, else by XDG_CACHE_HOME; None without a home."""
    if chosen := os.environ.get("CHRONOTOPE_CACHE"):
        return Path(chosen).absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "chronotope"
    try:
        return Path.home() / ".cache" / "chronotope"
    except RuntimeError:
        return None
