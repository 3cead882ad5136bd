"""What the tests of building C++ share: a place with small sources, and everything that makes a library another."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chronotope.kernels.native import build, toolchain
from chronotope.kernels.native.build import Setup

ANSWER = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'
# Counts its calls and is g++. The first call that finds `hold` takes it and waits until `held` is deleted.
WRAPPER = """#!/bin/sh
case " $* " in
  *" -c "*)
    echo >> {base}/compiled
    if mv {base}/hold {base}/held 2> /dev/null; then while [ -e {base}/held ]; do sleep 0.05; done; fi;;
  *" -shared "*) echo >> {base}/linked;;
esac
exec {compiler} "$@"
"""
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs g++ on Linux")


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


class Place:
    """A folder with sources of two lines, a cache and a compiler that counts."""

    def __init__(self, base: Path) -> None:
        self.base, self.source, self.cache = base, base / "source", base / "cache"
        self.source.mkdir()
        (self.source / "answer.h").write_text("#define ANSWER 42\n")
        (self.source / "answer.cpp").write_text(ANSWER)
        self.cxx = script(base / "g++", WRAPPER.format(base=shlex.quote(str(base)), compiler=COMPILER))
        self.setup = Setup(self.source, self.cache, str(self.cxx))

    @classmethod
    def fresh(cls, base: Path, patch: pytest.MonkeyPatch) -> Place:
        """One that no setting of the user's and no earlier test has a part in."""
        for name in ("CXX", "CHRONOTOPE_NATIVE", "CHRONOTOPE_CACHE"):
            patch.delenv(name, raising=False)
        patch.setattr(build, "_known", {})
        patch.setattr(build, "_told", set())
        return cls(base)

    def count(self, what: str = "compiled") -> int:
        log = self.base / what
        return log.read_text().count("\n") if log.exists() else 0

    def hold(self) -> None:
        """The next compilation waits for `release`."""
        (self.base / "hold").touch()

    def release(self) -> None:
        (self.base / "held").unlink()

    def forget(self) -> Setup:
        """As in a process that has not built yet."""
        build._known.clear()
        build._told.clear()
        return self.setup

    def process(self, code: str = "print(library.answer())") -> subprocess.Popen[str]:
        """Another process that asks for the library at once."""
        first = (
            "from pathlib import Path\n"
            "from chronotope.kernels.native import build\n"
            f"setup = build.Setup(Path({str(self.source)!r}), Path({str(self.cache)!r}), {str(self.cxx)!r})\n"
            "library = build.library(setup)\n"
        )
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", first + code], stdout=pipe, stderr=pipe, text=True)

    @property
    def libraries(self) -> list[Path]:
        return sorted(self.cache.rglob("*.so"))


CHANGES: dict[str, Callable[[Place, pytest.MonkeyPatch], object]] = {
    "torch": lambda place, patch: patch.setattr(torch, "__version__", "2.99.0"),
    "torch's commit": lambda place, patch: patch.setattr(torch.version, "git_version", "0" * 40),
    "ABI": lambda place, patch: patch.setattr(torch, "compiled_with_cxx11_abi", lambda: False),
    "processor": lambda place, patch: patch.setattr(toolchain, "processor", lambda: "another"),
    "instructions": lambda place, patch: patch.setattr(toolchain, "cpu_lines", lambda: {"flags": "fpu"}),
    "machine": lambda place, patch: patch.setattr(platform, "machine", lambda: "riscv64"),
    "source": lambda place, patch: (place.source / "answer.cpp").write_text(ANSWER + "\n"),
    "header": lambda place, patch: (place.source / "answer.h").write_text("#define ANSWER 43\n"),
    "name": lambda place, patch: (place.source / "answer.cpp").rename(place.source / "question.cpp"),
    "compiler": lambda place, patch: patch.setattr(
        toolchain, "_run", lambda *_: subprocess.CompletedProcess([], 0, "g++ 99, Free Software Foundation")
    ),
}
