"""A small space-time transformer that predicts coming frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope import saving
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, Block, PatchEmbed, Stack, States, Unpatch
from chronotope.patterns import Pattern, causal, full
from chronotope.planning import parse_pattern
from chronotope.position import Rope

Where = Pattern | Sequence[Any] | None


@dataclass(frozen=True)
class PredictorState:
    """The states of the layers, and the grid of one frame."""

    layers: States
    grid: Grid

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return self.layers.nbytes


class Predictor(nn.Module):
    """out_t = frame_t + change(frame_0 .. frame_t), which predicts frame t + 1.

    The change is a transformer over patches, rotary in t, h and w, whose last matrix starts at 0: an untrained model
    repeats the last frame, and training starts from there.

    Args:
        grid: of the tokens, axes t, h, w: clips are t frames of h * patch by w * patch pixels. Other sizes run too.
        patch: pixels of a patch, each side.
        channels: of a frame.
        dim, heads, layers: of the transformer.
        where: who may look at whom; a list takes turns over the layers. The model joins each with `causal("t")`.
            None: everything up to the own frame.
        mlp, mlp_ratio: the feed-forward, as for `ct.nn.Block`.

    Example:
        >>> model = Predictor(Grid(t=8, h=8, w=8), patch=4, where=window(t=5, h=5, w=5))
        >>> model(torch.rand(2, 8, 1, 32, 32)).shape
        torch.Size([2, 8, 1, 32, 32])

    Raises ChronotopeError: axes other than t, h, w, a prefix, a pattern that does not fit, sizes that do not divide.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        patch: int = 4,
        channels: int = 1,
        dim: int = 64,
        heads: int = 4,
        layers: int = 4,
        where: Where = None,
        mlp: str | None = "swiglu",
        mlp_ratio: float | int = 4.0,
    ):
        super().__init__()
        if grid.axes != ("t", "h", "w") or grid.prefix:
            raise ChronotopeError(
                f"Predictor({grid!r}): expected axes t, h, w without prefix, such as Grid(t=8, h=16, w=16)."
            )
        if layers < 1:
            raise ChronotopeError(f"Predictor(layers={layers}): expected 1 or more.")
        self.grid = grid
        self._config = {
            "grid": grid.to_dict(), "patch": patch, "channels": channels, "dim": dim, "heads": heads, "layers": layers,
            "mlp": mlp, "mlp_ratio": mlp_ratio,
        }  # fmt: skip
        self.embed = PatchEmbed(dim, patch, channels)
        rope = Rope(axes=("t", "h", "w"))
        self.stack = Stack(
            [Block([Attention(dim, heads, position=rope)], dim, mlp, mlp_ratio) for _ in range(layers)], dim
        )
        self.head = Unpatch(dim, patch, channels)
        nn.init.zeros_(self.head.project.weight)
        nn.init.zeros_(self.head.project.bias)
        self._where: list[Pattern] = []
        self.swap(where)

    def forward(self, clips: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t c h w"]:
        """Predictions: out[:, t] is for the frame after clips[:, t], and knows nothing of it."""
        x, grid = self.embed(clips)
        return clips + self.head(self.stack(x, grid), grid)

    def loss(self, clips: Float[Tensor, "b t c h w"]) -> Float[Tensor, ""]:
        """Mean squared error of out[:, :-1] against clips[:, 1:]."""
        if clips.shape[1] < 2:
            raise ChronotopeError(f"loss: clips of shape {list(clips.shape)}; expected 2 frames or more.")
        return F.mse_loss(self(clips)[:, :-1], clips[:, 1:])

    @property
    def where(self) -> list[Pattern]:
        """The pattern of each layer, before it is joined with `causal("t")`."""
        return list(self._where)

    def attentions(self) -> list[Attention]:
        """The attention layers, in order."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def swap(self, where: Where) -> list[Pattern]:
        """Sets other patterns: one for all layers, or a list that takes turns. Weights stay as they are.

        Returns the patterns that were there, one for each layer: `model.swap(model.swap(new))` changes nothing.
        """
        given = [full() if where is None else where] if where is None or isinstance(where, Pattern) else list(where)
        if not given or any(not isinstance(pattern, Pattern) for pattern in given):
            raise ChronotopeError(f"where={where!r}: expected a pattern, or a list of one or more patterns.")
        layers = self.attentions()
        for pattern in given:
            pattern.check(self.grid, self.grid)
            if pattern.heads not in (None, layers[0].heads):
                raise ChronotopeError(f"{pattern!r} is for {pattern.heads} heads, the model has {layers[0].heads}.")
        before, self._where = self._where, list(islice(cycle(given), len(layers)))
        for layer, pattern in zip(layers, self._where, strict=True):
            layer.where = pattern & causal("t")
        return before

    @contextmanager
    def swapped(self, where: Where) -> Iterator[Predictor]:
        """`with model.swapped(where):` the model with other patterns, which are put back at the end."""
        before = self.swap(where)
        try:
            yield self
        finally:
            self.swap(before)

    def init_state(self, batch: int) -> PredictorState:
        """The state before the first frame. Raises ChronotopeError where a pattern cannot be stepped."""
        one = self.grid.replace(t=1)
        return PredictorState(self.stack.init_state(batch, one), one)

    def step(
        self, frame: Float[Tensor, "b c h w"], state: PredictorState
    ) -> tuple[Float[Tensor, "b c h w"], PredictorState]:
        """The prediction after one more frame, and the state after it."""
        clips = frame[:, None]
        x, grid = self.embed(clips)
        if grid != state.grid:
            raise ChronotopeError(f"step: a frame {list(frame.shape)} gives {grid!r}; expected {state.grid!r}.")
        y, layers = self.stack.step(x, state.layers)
        return (clips + self.head(y, grid))[:, 0], PredictorState(layers, state.grid)

    def stream(self, frames: Iterable[Tensor]) -> Iterator[Float[Tensor, "b c h w"]]:
        """For each frame [B, C, H, W] that comes, the prediction of the next; together they equal `forward`."""
        state = None
        for frame in frames:
            state = self.init_state(frame.shape[0]) if state is None else state
            out, state = self.step(frame, state)
            yield out

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors. Raises ChronotopeError for a pattern that text cannot say."""
        texts = [repr(pattern) for pattern in self._where]
        for text in texts:
            parse_pattern(text)
        saving.write(folder, {**self._config, "where": texts}, self)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Predictor:
        """Reads what `save_pretrained` wrote."""
        config, weights = saving.read(folder)
        grid, where = Grid.from_dict(config.pop("grid")), [parse_pattern(text) for text in config.pop("where")]
        model = cls(grid, where=where, **config)
        model.load_state_dict(weights)
        return model
