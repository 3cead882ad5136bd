"""Results of a comparison that never ran: odd sizes, a mask per head, a query that sees nothing, a losing row."""

import numpy as np
import pytest

GRID = {"t": 5, "h": 7, "w": 9}
HEADS, CLIPS = 2, 3
# Name, expression, error at once, error tuned, density, forward milliseconds.
ROWS = [
    ("dense", "full()", 0.0041, 0.0040, 1.0, 41.3),
    ("near", "window(t=3, h=5, w=5) & causal('t')", 0.0047, 0.00403, 0.12, 8.9),
    ("divided", "along('t') | along('h', 'w')", 0.0052, 0.0042, 0.21, 12.25),
    ("heads", "per_head([window(t=3), causal('t', strict=True)])", 0.0061, 0.0047, 0.4, 60.5),
    ("a <b>&'odd'", "nothing() | segments(ids)</script>", 0.04, 0.011, 0.03, 6.0),
]


def row(name, pattern, error, tuned, density, forward):
    tiles = min(1.0, 1.3 * density)
    return {
        "name": name,
        "pattern": pattern,
        "error": error,
        "tuned": tuned,
        "mass": density**0.3,
        "density": density,
        "tile_density": tiles,
        "bound": 1 / tiles,
        "forward_ms": forward,
        "forward_speedup": 41.3 / forward,
        "train_ms": 3 * forward,
        "train_speedup": 41.3 / forward,
        "peak_mb": 120.0 + 1000 * tiles,
    }


def masks():
    """Bool [Hm, N, N] by name, from coordinates alone."""
    t, h, w = (axis.ravel() for axis in np.meshgrid(*(np.arange(n) for n in GRID.values()), indexing="ij"))
    dt, dh, dw = (axis[None] - axis[:, None] for axis in (t, h, w))
    near = (abs(dt) <= 1) & (abs(dh) <= 2) & (abs(dw) <= 2)
    return {
        "dense": np.ones((1, len(t), len(t)), bool),
        "near": (near & (dt <= 0))[None],
        "divided": (((dh == 0) & (dw == 0)) | (dt == 0))[None],
        "heads": np.stack([abs(dt) <= 1, dt < 0]),
    }


def comparison():
    """A results dict with pictures, the same at every call."""
    rng = np.random.default_rng(0)
    tokens = GRID["t"] * GRID["h"] * GRID["w"]
    true = rng.integers(0, 256, (CLIPS, GRID["t"], 14, 18, 1), dtype=np.uint8)

    def head():
        return rng.normal(size=(HEADS, tokens, 6)).astype(np.float16)

    return {
        "schema": 1,
        "version": "0.1.0",
        "title": "Patterns <compared>",
        "input": "moving digits & co",
        "seed": 3,
        "machine": {"cpu": "a processor", "threads": 2, "torch": "2.13.0", "python": "3.11.2", "platform": "Linux"},
        "grid": GRID,
        "patch": 2,
        "channels": 1,
        "minutes": 1.0,
        "budget": 0.01,
        "model": {"dim": 12, "heads": HEADS, "layers": 4, "parameters": 123456, "steps": 700},
        "floor": {"repeat_last": 0.031},
        "rows": [row(*values) for values in ROWS],
        "best": "near",
        "pictures": {
            "true": true,
            "predicted": {name: 255 - true if name == "near" else true for name, *_ in ROWS},
            "heads": HEADS,
            "scale": 0.6,
            "layer": 2,
            "cones": {name: {"mask": mask, "q": head(), "k": head()} for name, mask in masks().items()},
        },
    }


@pytest.fixture
def results():
    return comparison()


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """(path of the page, the results it shows)."""
    from chronotope.report import write_report

    shown = comparison()
    return write_report(shown, tmp_path_factory.mktemp("report") / "page.html"), shown
