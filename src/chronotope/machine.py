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
    return _cache(os.environ.get("CHRONOTOPE_CACHE"), os.environ.get("XDG_CACHE_HOME"))


@lru_cache(maxsize=8)
def _cache(chosen: str | None, base: str | None) -> Path | None:
    if chosen:
        return Path(chosen).absolute()
    if base:
        return Path(base).absolute() / "chronotope"
    try:
        return Path.home() / ".cache" / "chronotope"
    except RuntimeError:
        return None
