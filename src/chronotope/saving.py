"""Models that save and load themselves: a JSON file that says how to make one, and its weights."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

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
        write(folder, self.config, self)

    @classmethod
    def from_pretrained(cls: type[S], folder: str | Path) -> S:
        """Reads what `save_pretrained` wrote. Raises ChronotopeError where it is not there."""
        config, weights = read(folder)
        model = cls(**config)
        model.load_state_dict(weights)
        return model


def write(folder: str | Path, config: Mapping[str, Any], model: nn.Module) -> None:
    """What `read` reads: config.json and the weights of a model."""
    save_file, folder = _safetensors().save_file, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json, and the weights by name. Raises ChronotopeError where they are not there."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ChronotopeError(f"{folder} has no {name}; give a folder that save_pretrained wrote.")
    return json.loads((folder / CONFIG).read_text()), _safetensors().load_file(folder / WEIGHTS)


def _safetensors() -> Any:
    """The library, or what to install."""
    try:
        import safetensors.torch
    except ImportError:
        raise ChronotopeError("saving and loading needs safetensors: pip install 'chronotope[train]'.") from None
    return safetensors.torch
