"""The C++ compiler, how it is called, and what a compiled library depends on."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from chronotope.errors import ChronotopeError
from chronotope.machine import processor

OPTIMIZE = ("-O3", "-std=c++20", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
# /proc/cpuinfo names the instructions by which x86-64 levels are defined (lzcnt is "abm"). Best level first.
V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
LEVELS = {
    "x86-64-v4": V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": V3,
}
# What -march=native looks at. The rest of /proc/cpuinfo varies by core and by minute.
CPU_LINES = ("model name", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU variant", "CPU part")


class BuildError(ChronotopeError):
    """The native kernels cannot be built or loaded; the message is one line."""


class CompilerError(Exception):
    """The compiler refused: `said`, in answer to the commands in `log`."""

    def __init__(self, failed: Sequence[subprocess.CompletedProcess[str]]) -> None:
        self.said = "\n".join(each.stdout for each in failed)
        self.log = "\n".join(f"{shlex.join(each.args)}\n{each.stdout}" for each in failed)
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line and not line.startswith("collect2")]
        super().__init__((errors or lines or ["it says nothing"])[0])


@dataclass(frozen=True)
class Compiler:
    """A command (such as `ccache g++`, the program by its full path) and what it says of its version."""

    command: tuple[str, ...]
    version: str

    @property
    def name(self) -> str:
        return " ".join(Path(word).name for word in self.command)


def find_compiler(cxx: str | None) -> Compiler:
    """The compiler that CXX names, else the one on PATH."""
    names = [cxx] if cxx else ["clang++", "c++"] if sys.platform == "darwin" else ["g++", "c++"]
    try:
        commands = [words for words in map(shlex.split, names) if words and shutil.which(words[0])]
    except ValueError as error:
        raise BuildError(f"CXX={cxx} is not a command: {error}") from error
    if not commands:
        missing = f"CXX={cxx} is not on PATH" if cxx else "install g++ or set CXX"
        raise BuildError(f"no C++ compiler found: {missing}")
    program, *more = commands[0]
    command = (os.path.abspath(str(shutil.which(program))), *more)
    try:
        done = _run([*command, "--version"])
    except OSError as error:
        raise BuildError(f"the C++ compiler {shlex.join(command)} does not run: {error}") from error
    if done.returncode:
        raise BuildError(f"the C++ compiler {shlex.join(command)} does not run: {done.stdout.strip()[:200]!r}")
    # Torch's wheels for Linux carry GNU's OpenMP. Other compilers call a second runtime, with threads of its own.
    if sys.platform == "linux" and "Free Software Foundation" not in done.stdout:
        said = done.stdout.strip().partition("\n")[0]
        raise BuildError(f"the C++ compiler {shlex.join(command)} is not GNU's ({said}): install g++ or set CXX to it")
    return Compiler(command, done.stdout.strip().partition("\n")[0])


def native_flag() -> list[str]:
    """Instructions of this machine's processor."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return ["-mcpu=native"]
    return ["-march=native"] if machine in ("x86_64", "amd64") else []


def compile_flags(instructions: Sequence[str]) -> list[str]:
    """How each source is compiled. Apple's compiler has no OpenMP: at::parallel_for is serial there."""
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    return [*OPTIMIZE, *instructions, *openmp, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


def link_flags() -> list[str]:
    """How objects are linked: without -fopenmp, so that OpenMP is the runtime that torch itself has loaded.

    Torch's wheels bring their own copy of libgomp. With -fopenmp here, the library would ask for the system's by name,
    and a process with two runtimes has two pools of threads, one of which torch.set_num_threads does not reach.
    """
    # Some distributions drop libraries that nothing refers to by name, and with them the way to libgomp.
    needed = ["-Wl,--no-as-needed"] if sys.platform == "linux" else []
    return ["-shared", "-fPIC", *needed, "-ltorch_cpu", "-lc10"]


def torch_paths() -> tuple[list[str], list[str]]:
    """Where torch's headers and its libraries lie."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    heard = logger.disabled
    logger.disabled = True  # without a GPU it complains of CUDA, which is of no concern here
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise BuildError(f"torch.utils.cpp_extension cannot be imported ({error}): pip install setuptools") from error
    finally:
        logger.disabled = heard
    return include_paths(), library_paths()


def compile_library(compiler: Compiler, files: Sequence[Path], flags: Sequence[str], out: Path, rpath: bool) -> None:
    """Compiles the .cpp files, each by one call, and links them as `out`; objects lie beside it.

    `rpath`: whether the library knows where this torch lies, which is of use on this machine only.
    """
    includes, libraries = torch_paths()
    units = [file for file in files if file.suffix == ".cpp"]
    objects = [out.parent / f"{unit.stem}.o" for unit in units]
    commands = [
        [*compiler.command, *flags, *[f"-I{path}" for path in includes], "-c", str(unit.absolute()), "-o", str(made)]
        for unit, made in zip(units, objects, strict=True)
    ]
    with ThreadPoolExecutor(max(1, min(len(units), os.cpu_count() or 1))) as pool:
        done = list(pool.map(lambda command: _run(command, out.parent), commands))
    if not any(each.returncode for each in done):
        folders = [flag for path in libraries for flag in (f"-L{path}", *[f"-Wl,-rpath,{path}"] * rpath)]
        made = [str(path) for path in objects]
        done.append(_run([*compiler.command, *made, *folders, *link_flags(), "-o", str(out)], out.parent))
    if failed := [each for each in done if each.returncode]:
        raise CompilerError(failed)


def _run(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    # LC_ALL: messages are searched for "error", whatever the user's language.
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def cpu_lines() -> dict[str, str]:
    """What the system says of the first core, as far as compiled code depends on it; empty where it says nothing."""
    found: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        with info.open(errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in CPU_LINES:
                    found[name.strip()] = value.strip()
                elif not line.strip() and found:
                    break  # the next core
    return found


def cpu_level() -> list[str]:
    """The x86-64 levels of `LEVELS` that this processor has, best first."""
    has = set(cpu_lines().get("flags", "").split())
    return [level for level, needs in LEVELS.items() if needs <= has]


def digest(content: bytes) -> str:
    """64 bits of sha256 as hexadecimal."""
    return hashlib.sha256(content).hexdigest()[:16]


def requirements(files: Sequence[Path], flags: Sequence[str]) -> dict[str, str]:
    """What a library compiled from these files works with, wherever it runs."""
    contents = b"".join(digest(file.name.encode() + b"\0" + file.read_bytes()).encode() for file in files)
    return {
        "torch": str(torch.__version__),
        "torch commit": str(getattr(torch.version, "git_version", "")),
        "system": f"{sys.platform} {platform.machine()}",
        "flags": shlex.join([*flags, *link_flags()]),
        "sources": digest(contents),
    }


def identity(compiler: Compiler | None, files: Sequence[Path], flags: Sequence[str]) -> dict[str, str]:
    """What a library compiled for this machine alone depends on."""
    compiled_by = f"{shlex.join(compiler.command)}: {compiler.version}" if compiler else "none"
    cpu = {"processor": processor(), **cpu_lines()}
    if sys.platform == "darwin":
        cpu["chip"] = platform.version()  # ends in the chip that the system's kernel was made for
    return {**requirements(files, flags), "compiler": compiled_by, **{f"cpu {name}": cpu[name] for name in sorted(cpu)}}
