"""Memory grows with the number of tokens, not of pairs: measured in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

# VmHWM is the largest resident size since the program started. (ru_maxrss would begin with that of the test process.)
SCRIPT = """
import sys, torch, chronotope as ct
torch.set_num_threads(1)

def status(key):  # in bytes
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

def step(frames):
    grid = ct.Grid(t=frames, h=32, w=32)
    q, k, v = (torch.randn(1, 2, grid.size, 32, requires_grad=True) for _ in range(3))
    out = ct.attention(q, k, v, grid=grid, where=ct.window(t=3, h=9, w=9), backend=sys.argv[2])
    out.sum().backward()

step(1)  # libraries loaded, buffers made
before = status("VmRSS")
step(int(sys.argv[1]))
print(status("VmHWM") - before)
"""


def peak(frames: int, backend: str) -> int:
    """Bytes above what the process held before planning, forward and backward of so many frames of 32 x 32 tokens."""
    command = [sys.executable, "-c", SCRIPT, str(frames), backend]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_peak_memory_grows_with_the_tokens() -> None:
    small, large = peak(8, "torch"), peak(32, "torch")
    print(f"peak above the start: 8,192 tokens {small / 2**20:.0f} MiB, 32,768 tokens {large / 2**20:.0f} MiB")
    # Four times the tokens; sixteen times the pairs.
    assert large < 5 * small
    # One byte for each pair of tokens would be more.
    assert large < 32768**2
