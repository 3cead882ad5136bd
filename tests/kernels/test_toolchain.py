"""Which compilers will do, whose threads the C++ kernels run on, and libraries built ahead of time."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from building import CHANGES, Place, needs_compiler, script
from chronotope.kernels.native import __main__ as command
from chronotope.kernels.native import build, toolchain
from chronotope.kernels.native.build import BuildError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place.fresh(tmp_path, monkeypatch)


@pytest.mark.parametrize("cxx", [None, "/nowhere/c++", "no-such-compiler -m64"])
def test_without_a_compiler(place: Place, cxx: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.base / "empty").mkdir()
    monkeypatch.setenv("PATH", str(place.base / "empty"))
    setup = replace(place.setup, cxx=cxx)
    expected = f"CXX={cxx} is not on PATH" if cxx else "install g++ or set CXX"
    assert build.reasons(setup) == [f"no C++ compiler found: {expected}"]
    with pytest.raises(BuildError, match="no C\\+\\+ compiler found"):
        build.library(setup)
    assert build.folder(setup).is_dir()  # where measurements of other kernels are kept


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("#!/bin/sh\necho 'clang version 17.0.6'\n", "is not GNU's (clang version 17.0.6): install g++"),
        ("#!/bin/sh\necho broken >&2\nexit 3\n", "does not run: 'broken'"),
        ("neither a script nor a program", "does not run: [Errno 8]"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems take other compilers")
def test_a_compiler_that_will_not_do(place: Place, text: str, reason: str) -> None:
    (found,) = build.reasons(replace(place.setup, cxx=str(script(place.base / "cxx", text))))
    assert reason in found and "\n" not in found


THREADS = """
#include <ATen/Parallel.h>
#include <vector>
extern "C" int limit() { return at::get_num_threads(); }
extern "C" int chunks(long n) {
  std::vector<int> starts(n, 0);
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t) { starts[begin] = 1; });
  int out = 0;
  for (int start : starts) out += start;
  return out;
}
"""
COUNT_THREADS = """
import torch
for n in (1, 3, 2):
    torch.set_num_threads(n)
    print(library.limit(), library.chunks(1000), end=" ")
mapped = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
print(sum(name in path.rpartition("/")[2] for path in mapped for name in ("gomp", "iomp", "libomp")))
"""


@needs_compiler
def test_threads_are_those_of_torch(place: Place) -> None:
    (place.source / "answer.cpp").write_text(THREADS)
    out, errors = place.process(COUNT_THREADS).communicate(timeout=100)
    assert out == "1 1 3 3 2 2 1\n", errors
    assert re.fullmatch(r"chronotope: building its CPU kernels with g\+\+ .*\n", errors)
    (library,) = place.libraries
    listed = subprocess.run(["readelf", "-d", str(library)], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed)
    # By this name the system's runtime would be loaded beside a wheel's own, whose name carries a hash.
    assert "libtorch_cpu.so" in needed and not [name for name in needed if "omp" in name]


x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="levels are of x86-64")


@needs_compiler
@x86
def test_a_library_that_came_with_the_package(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = toolchain.cpu_level()
    if not levels:
        pytest.skip("a processor below x86-64-v3")
    assert command.main(["--into", str(place.source / "prebuilt")], place.setup) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(printed) == sorted((place.source / "prebuilt").iterdir())
    assert [path.name.startswith(level) for path, level in zip(printed, toolchain.LEVELS, strict=True)] == [True] * 2
    without = replace(place.setup, cxx="/nowhere/g++")
    assert build.library(without).answer() == 42
    assert not place.cache.exists()
    place.forget()
    monkeypatch.setattr(build, "cpu_level", lambda: levels[-1:])
    assert Path(build.library(without)._name).name.startswith(levels[-1])
    for change in ("torch", "header"):
        place.forget()
        assert build.reasons(without) == []
        place.forget()
        with pytest.MonkeyPatch.context() as patch:
            CHANGES[change](place, patch)
            assert "no C++ compiler found" in build.reasons(without)[0]


@needs_compiler
def test_the_command_builds_for_this_machine(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([], place.setup) == 0
    assert capsys.readouterr().out == f"{place.libraries[0]}\n"
    assert command.main([], replace(place.setup, cxx="/nowhere/g++")) == 1
    assert "no C++ compiler found" in capsys.readouterr().err
    if platform.machine() == "x86_64":
        (place.source / "answer.cpp").write_text("no C++\n")
        assert command.main(["--into", str(place.base / "out")], place.setup) == 1
        assert "building for x86-64-v4 failed: " in capsys.readouterr().err


def test_levels_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    v3, v4 = toolchain.V3, toolchain.LEVELS["x86-64-v4"]
    for has, expected in ((v4, ["x86-64-v4", "x86-64-v3"]), (v3, ["x86-64-v3"]), (v3 - {"fma"}, []), (frozenset(), [])):
        monkeypatch.setattr(toolchain, "cpu_lines", lambda has=has: {"flags": " ".join(has)})
        assert toolchain.cpu_level() == expected
