"""`python -m chronotope.bench [--threads 2]`."""

from __future__ import annotations

import argparse

import torch

from chronotope.bench import core
from chronotope.bench.referee import machine


def main() -> None:
    """Runs every part and prints it."""
    parser = argparse.ArgumentParser(prog="chronotope.bench", description="Times as ratios, side by side in one run.")
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    print(machine(threads))
    for part in (core.planning, lambda: core.million(threads), core.attention_table, lambda: core.memory(threads)):
        for line in part():
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
