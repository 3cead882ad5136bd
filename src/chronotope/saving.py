"""Models that save and load themselves: a JSON file that says how to make one, and its weights."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from chronotope.errors import ChronotopeError

S = TypeVar("S", bound="Saved")
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Saved(nn.Module):
    """A module made of plain values, which it remembers: numbers, text, lists and dicts of these."""

    config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        made = cls.__init__

        @functools.wraps(made)
        def __init__(self: Saved, *args: Any, **given: Any) -> None:
            if "config" not in self.__dict__:  # not again for a base class
                bound = inspect.signature(made).bind(self, *args, **given)
                bound.apply_defaults()
                object.__setattr__(self, "config", dict(list(bound.arguments.items())[1:]))
            made(self, *args, **given)

        cls.__init__ = __init__  # type: ignore[assignment]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config, indent=1) + "\n")
        safetensors().save_file(
            {name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS
        )

    @classmethod
    def from_pretrained(cls: type[S], folder: str | Path) -> S:
        """Reads what `save_pretrained` wrote. Raises ChronotopeError where it is not there."""
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise ChronotopeError(f"{folder} has no {name}; give a folder that save_pretrained wrote.")
        model = cls(**json.loads((folder / CONFIG).read_text()))
        model.load_state_dict(safetensors().load_file(folder / WEIGHTS))
        return model


def safetensors() -> Any:
    """The library, or what to install."""
    try:
        import safetensors.torch
    except ImportError:
        raise ChronotopeError("saving and loading needs safetensors: pip install 'chronotope[train]'.") from None
    return safetensors.torch
