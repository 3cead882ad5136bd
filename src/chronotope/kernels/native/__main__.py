"""`python -m chronotope.kernels.native` builds the C++ kernels ahead of time and prints where they are.

Without options it builds for this machine, as the first use would. With `--into DIR` it builds the libraries of the
x86-64 levels, which a package may carry in its folder `chronotope/kernels/native/prebuilt`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from chronotope.kernels.native.build import BuildError, Setup, compiled, library, stamp
from chronotope.kernels.native.toolchain import LEVELS, CompilerError, find_compiler, native_flag


def prebuild(into: Path, setup: Setup | None = None, levels: Sequence[str] = tuple(LEVELS)) -> list[Path]:
    """Builds the library of each x86-64 level into a folder."""
    setup = setup or Setup()
    compiler = find_compiler(setup.cxx)
    if native_flag() != ["-march=native"]:
        raise BuildError("libraries are built ahead of time on x86-64 only; on other machines the first use builds")
    into.mkdir(parents=True, exist_ok=True)
    out = []
    for level in levels:
        try:
            made = compiled(setup, compiler, [f"-march={level}"], into, f"{level}-{stamp(setup)}", rpath=False)
        except CompilerError as error:
            print(error.log, file=sys.stderr)
            raise BuildError(f"building for {level} failed: {error}") from None
        out.append(made)
    return out


def main(arguments: Sequence[str] | None = None, setup: Setup | None = None) -> int:
    """The command; 1 where it could not build."""
    parser = argparse.ArgumentParser(prog="python -m chronotope.kernels.native", description="Builds the C++ kernels.")
    parser.add_argument("--into", type=Path, help="build the x86-64 levels into this folder, for a package to carry")
    chosen = parser.parse_args(arguments)
    try:
        paths = prebuild(chosen.into, setup) if chosen.into else [Path(library(setup)._name)]
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
