"""Writes docs/adapted.md by running the rows of tests/adapt: `python docs/adapted.py`, minutes."""

import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests/adapt"))

import adapted  # noqa: E402

HEAD = """# Models that exist

Small random models of each class, patched by `ct.adapt.attach`. Each cell is what a test found
(`tests/adapt/test_adapted.py`; `python docs/adapted.py` makes this page):

- **patched**: attention layers that a pattern reached; `handle.layers` says of each other one why not (cross-attention,
  text alone, not run, or attention that the model writes out by itself).
- **full**: under `full()` the output is the model's own, within float32 rounding (2e-5 of the largest).
- **window**, **gradients**: a window of 3 on each axis (of 5 tokens in text) gives what the model gives when the mask
  of the window is added to its own; outputs, and gradients of all parameters.
- **loop**: greedy generation with its cache, or three steps of a sampler, under `full()`: as before.
- **saved**: what is saved while a pattern is attached loads as the model it was.
- **restored**: after `remove()` the output is the same to the bit, and no hook is left.

`-`: there is nothing to test. Models of transformers with padding are compared where tokens are not padding.
"""
COLUMNS = "| | patched | full | window | gradients | loop | saved | restored |\n|---|---|---|---|---|---|---|---|"


def main() -> None:
    """Runs every row."""
    parts = [HEAD]
    for library in adapted.KINDS:
        lines = [adapted.line(name, cells) for name, cells in adapted.rows(library)]
        parts.append(f"## {library} {version(library)}\n\n{COLUMNS}\n" + "\n".join(lines) + "\n")
    (ROOT / "docs/adapted.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
