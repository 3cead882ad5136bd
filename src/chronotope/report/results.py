"""What a report is made of: the names that results must have, and the shapes of its pictures.

The letters: N = t * h * w tokens of the grid, d sizes of a head, Hm = 1 or heads.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from chronotope.errors import ChronotopeError

NAMES = [
    "schema",
    "version",
    "title",
    "input",
    "seed",
    "machine",
    "grid",
    "patch",
    "channels",
    "minutes",
    "budget",
    "model",
    "floor",
    "rows",
    "best",
    "pictures",
]
INSIDE = {
    "machine": ["cpu", "threads", "torch", "python", "platform"],
    "grid": ["t", "h", "w"],
    "model": ["dim", "heads", "layers", "parameters", "steps"],
    "floor": ["repeat_last"],
    "pictures": ["true", "predicted", "heads", "scale", "layer", "cones"],
}
ROW = [
    "name",
    "pattern",
    "error",
    "tuned",
    "mass",
    "density",
    "tile_density",
    "bound",
    "forward_ms",
    "forward_speedup",
    "train_ms",
    "train_speedup",
    "peak_mb",
]


def check(results: dict[str, Any]) -> None:
    """Raises ChronotopeError unless every name is there, names of patterns agree and pictures fit the grid."""
    _has(results, NAMES, "results")
    for part, names in INSIDE.items():
        _has(results[part], names, f"results[{part!r}]")
    if not results["rows"]:
        raise ChronotopeError("results['rows'] is empty, expected the dense row first: measure at least full()")
    for number, row in enumerate(results["rows"]):
        _has(row, ROW, f"results['rows'][{number}]")
    _check_names(results)
    _check_pictures(results)


def plain(value: Any, place: str = "results") -> Any:
    """The value in types that JSON has: numpy numbers become Python's, tuples lists.

    Raises ChronotopeError: a number is not finite, or the type has no form in JSON.
    """
    if isinstance(value, dict):
        return {str(key): plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{place}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        raise ChronotopeError(f"{place} is {value}, which JSON cannot hold: give None where nothing was measured")
    if value is None or isinstance(value, str | int | float):
        return value
    raise ChronotopeError(f"{place} is a {type(value).__name__}, expected a number, text, list, dict or None")


def _has(part: dict[str, Any], names: Iterable[str], place: str) -> None:
    missing = [name for name in names if name not in part]
    if missing:
        raise ChronotopeError(f"{place} lacks {', '.join(missing)}: add them")


def _check_names(results: dict[str, Any]) -> None:
    names = [row["name"] for row in results["rows"]]
    if len(set(names)) < len(names):
        raise ChronotopeError(f"results['rows'] names a pattern twice ({', '.join(names)}): give each its own name")
    known = {"best": [results["best"]] if results["best"] is not None else []}
    known |= {part: list(results["pictures"][part]) for part in ("predicted", "cones")}
    for part, used in known.items():
        strange = [name for name in used if name not in names]
        if strange:
            raise ChronotopeError(f"{part} names {', '.join(strange)}, expected names of rows: {', '.join(names)}")


def _check_pictures(results: dict[str, Any]) -> None:
    pictures = results["pictures"]
    size = results["grid"]["t"] * results["grid"]["h"] * results["grid"]["w"]
    true = pictures["true"]
    if true.ndim != 5 or true.shape[-1] not in (1, 3):
        raise ChronotopeError(f"pictures['true'] is {true.shape}, expected [clips, frames, H, W, C] with C = 1 or 3")
    arrays: dict[str, tuple[Any, Any, Any]] = {"['true']": (true, np.uint8, true.shape)}
    for name, value in pictures["predicted"].items():
        arrays[f"['predicted'][{name!r}]"] = (value, np.uint8, true.shape)
    for name, cone in pictures["cones"].items():
        _has(cone, ("mask", "q", "k"), f"pictures['cones'][{name!r}]")
        masks = 1 if len(cone["mask"]) == 1 else pictures["heads"]
        arrays[f"['cones'][{name!r}]['mask']"] = (cone["mask"], np.bool_, (masks, size, size))
        for part in ("q", "k"):
            shape = (pictures["heads"], size, cone["q"].shape[-1])
            arrays[f"['cones'][{name!r}][{part!r}]"] = (cone[part], np.float16, shape)
    for place, (value, dtype, shape) in arrays.items():
        if value.dtype != dtype or value.shape != shape:
            raise ChronotopeError(
                f"pictures{place} is {value.dtype} {list(value.shape)}, expected {np.dtype(dtype)} {list(shape)}"
            )
