"""Builds the C++ kernels on first use, keeps the library for later processes, and loads it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch  # noqa: F401  (its libraries must be in the process before ours is loaded)

from chronotope.kernels.native.toolchain import (
    BuildError,
    Compiler,
    CompilerError,
    compile_flags,
    compile_library,
    cpu_level,
    digest,
    find_compiler,
    identity,
    native_flag,
    requirements,
)
from chronotope.machine import cache

__all__ = ["BuildError", "Setup", "compiled", "folder", "library", "reasons", "sources", "stamp"]

HERE = Path(__file__).parent
DAY = 24 * 3600.0
# What a compiler says that another day, or the next minute, would not make it say again.
PASSING = ("Killed", "No space left", "out of memory", "memory exhausted")


@dataclass(frozen=True)
class Setup:
    """What is built (the C++ files in `source`), where libraries are kept (`cache`), and with which compiler."""

    source: Path = HERE
    cache: Path | None = field(default_factory=cache)
    cxx: str | None = field(default_factory=lambda: os.environ.get("CXX"))


_known: dict[Setup, ctypes.CDLL | str] = {}  # the library, or why there is none
_told: set[str] = set()
_building = threading.Lock()


def _after_fork() -> None:
    global _building
    _building = threading.Lock()  # the thread that held it is not in this process


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _tell(line: str) -> None:
    """One line on stderr, once per process."""
    if line not in _told:
        _told.add(line)
        print(f"chronotope: {line}", file=sys.stderr, flush=True)


def library(setup: Setup | None = None) -> ctypes.CDLL:
    """The kernels, built if this machine has not built them yet; `BuildError` with one line where they cannot be."""
    if os.environ.get("CHRONOTOPE_NATIVE") == "0":
        raise BuildError("the native kernels are switched off: CHRONOTOPE_NATIVE=0")
    if sys.platform == "win32":
        raise BuildError("the native kernels are not built on Windows")
    setup = setup or Setup()
    with _building:
        found = _known.get(setup)
        if found is None:
            found = _known[setup] = _obtain(setup)
    if isinstance(found, str):
        raise BuildError(found)
    return found


def reasons(setup: Setup | None = None) -> list[str]:
    """Why there are no native kernels; empty where there are. Builds them if this machine has not."""
    try:
        library(setup)
    except BuildError as error:
        return [str(error)]
    return []


def sources(source: Path = HERE) -> list[Path]:
    """The .cpp files, which are compiled, and the .h files that they include, by name."""
    return sorted(path for path in source.iterdir() if path.suffix in (".cpp", ".h"))


def folder(setup: Setup | None = None) -> Path:
    """Where files that hold for this machine, torch, compiler and sources alone are kept; it exists."""
    setup = setup or Setup()
    try:
        compiler = find_compiler(setup.cxx)
    except BuildError:
        compiler = None  # measurements of other kernels are kept there too
    try:
        return _writable(setup.cache, _key(_identity(setup, compiler)))
    except OSError as error:
        raise BuildError(f"no folder for files of this machine: {error}; set CHRONOTOPE_CACHE") from error


def _identity(setup: Setup, compiler: Compiler | None) -> dict[str, str]:
    return identity(compiler, sources(setup.source), compile_flags(native_flag()))


def _key(about: dict[str, str]) -> str:
    return digest(json.dumps(about, sort_keys=True).encode())


def _obtain(setup: Setup) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        path = _prebuilt(setup) or _kept(setup)
    except BuildError as error:
        return str(error)
    except OSError as error:
        return str(_broken(f"the CPU kernels cannot be built: {error}"))
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        return str(_broken(f"the CPU kernels cannot be loaded: {error} (built anew when {path} is deleted)"))


def _whole(place: Path, name: str) -> Path | None:
    """The library of this name, if its contents are what was written: the digest of the contents ends the file's name.

    Looked at before loading, because loading part of a library can end the process.
    """
    for path in sorted(place.glob(f"{name}-*.so")):
        with suppress(FileNotFoundError):  # damaged, and deleted by a process that builds
            if path.stem == f"{name}-{digest(path.read_bytes())}":
                return path
    return None


def stamp(setup: Setup) -> str:
    """What a library that came with the package must fit: this torch, system and these sources."""
    return _key(requirements(sources(setup.source), compile_flags([])))


def _prebuilt(setup: Setup) -> Path | None:
    """A library that came with the package, for this torch, these sources and a level that the processor has."""
    place = setup.source / "prebuilt"
    if not place.is_dir():
        return None
    found = (_whole(place, f"{level}-{stamp(setup)}") for level in cpu_level())
    return next((path for path in found if path), None)


def _kept(setup: Setup) -> Path:
    """The library of this machine, from the cache or built now."""
    compiler = find_compiler(setup.cxx)
    about = _identity(setup, compiler)
    key = _key(about)
    # A cache that can only be read is good enough where the library is in it.
    found = _whole(setup.cache / key, "kernels") if setup.cache else None
    return found or _build_once(setup, compiler, _writable(setup.cache, key), about)


def _writable(cache: Path | None, key: str) -> Path:
    """The folder of a key in the cache, or in a temporary folder of this user where the cache cannot be written."""
    if cache is not None:
        try:
            (cache / key).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=cache / key):
                return cache / key
        except OSError as error:
            problem = f"cannot write {cache / key} ({error.strerror})"
    else:
        problem = "there is no home folder"
    user = os.getuid() if hasattr(os, "getuid") else "user"
    base = Path(tempfile.gettempdir()) / f"chronotope-{user}"
    base.mkdir(mode=0o700, exist_ok=True)
    about = base.lstat()
    # Everybody can write in the parent: libraries are loaded only from a folder that nobody else could fill.
    if base.is_symlink() or about.st_mode & 0o022 or (hasattr(os, "getuid") and about.st_uid != os.getuid()):
        raise BuildError(f"{problem}, and others can write {base}: set CHRONOTOPE_CACHE")
    _tell(f"{problem}; uses {base / key} (CHRONOTOPE_CACHE sets another)")
    (base / key).mkdir(exist_ok=True)
    return base / key


def _build_once(setup: Setup, compiler: Compiler, place: Path, about: dict[str, str]) -> Path:
    """Builds the library in its folder, unless another process has done so, or failed, in the meantime."""
    with _locked(place / "lock") as alone:
        if found := _whole(place, "kernels"):
            return found
        if failed := _failed(place / "failed.log"):
            raise _broken(failed)
        if alone:  # what killed processes and damaged files have left
            for path in [*place.glob("build-*"), *place.glob("kernels-*.so")]:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        _tell(f"building its CPU kernels with {compiler.name} (once for this machine; about 10 s) ...")
        _write(place / "about.json", json.dumps(about, indent=2, sort_keys=True))
        try:
            return compiled(setup, compiler, native_flag(), place, "kernels", rpath=True)
        except CompilerError as error:
            passing = any(word in error.said for word in PASSING)
            log = place / ("interrupted.log" if passing else "failed.log")
            again = "the next process tries again" if passing else "tried again when it is deleted or a day old"
            reason = f"building the CPU kernels with {compiler.name} failed: {error}; full log ({again}): {log}"
            _write(log, f"{reason}\n\n{error.log}")
            raise _broken(reason) from None


def compiled(
    setup: Setup, compiler: Compiler, instructions: Sequence[str], place: Path, name: str, rpath: bool
) -> Path:
    """A new library of this name in its place: compiled beside it, and moved there whole."""
    files = sources(setup.source)
    if not any(file.suffix == ".cpp" for file in files):
        raise BuildError(f"there are no C++ files in {setup.source}: install chronotope again")
    with tempfile.TemporaryDirectory(prefix="build-", dir=place) as scratch:
        made = Path(scratch).absolute() / "kernels.so"
        compile_library(compiler, files, compile_flags(instructions), made, rpath)
        out = place / f"{name}-{digest(made.read_bytes())}.so"
        os.replace(made, out)
    return out


def _broken(reason: str) -> BuildError:
    """`auto` goes on with another kernel, so the reason is told here, once."""
    _tell(reason)
    return BuildError(reason)


def _failed(log: Path) -> str | None:
    """The reason in the log of a build that failed within a day."""
    try:
        recent = 0 <= time.time() - log.stat().st_mtime < DAY
        return log.read_text(errors="replace").partition("\n")[0] if recent else None
    except FileNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    """Writes a small file at once: another process reads all of it or nothing."""
    beside = path.with_name(f"{path.name}-{os.getpid()}")
    beside.write_text(text)
    os.replace(beside, path)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds the lock of a folder among processes; False where the file system has no locks.

    Then each process builds for itself, which costs time only: files are moved into place whole. The system releases
    the lock of a process that dies, and compilers do not inherit it.
    """
    import fcntl  # not on Windows

    with path.open("a") as file:
        held, start = False, time.monotonic()
        while not held:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() - start > 1:
                    _tell("another process is building the CPU kernels; waiting for it ...")
                time.sleep(0.05)
            except OSError:
                break
        try:
            yield held
        finally:
            if held:
                fcntl.flock(file, fcntl.LOCK_UN)
