r"""Events in a row, or notes of several voices: each one from all before it.

$$
p(x_n \mid x_{<n}) = \mathrm{softmax}(W h_n), \qquad h = \mathrm{blocks}(E_{x_{n-1}} + \mathrm{code}(t_n, v_n))
$$

Events lie on Grid(t=steps, v=voices), step by step and, within a step, voice by voice: n = t * voices + v. What stands
at n is the event before it, told where the next one will be. Left out: dropout of attention weights, which no kernel
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.bias import RelativeBias
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, Block, Mixer, Sinusoidal, Stack
from chronotope.nn.relative import RelativeAttention
from chronotope.patterns import causal
from chronotope.planning.parse import named
from chronotope.position import Rope
from chronotope.saving import Saved

AXES = ("t", "v")
SOONER = causal()


@dataclass(frozen=True)
class Sizes:
    """Of a layer: channels, heads, voices, and how many steps back have a code of their own."""

    dim: int
    heads: int
    voices: int
    reach: int


MIXERS: Mapping[str, Callable[[Sizes], Mixer]] = {
    "absolute": lambda s: Attention(s.dim, s.heads, where=SOONER),
    "relative": lambda s: RelativeAttention(s.dim, s.heads, {"t": (s.reach, 0), "v": s.voices - 1}, where=SOONER),
    "rotary": lambda s: Attention(s.dim, s.heads, where=SOONER, position=Rope(axes=AXES)),
    "bias": lambda s: Attention(
        s.dim, s.heads, where=SOONER, bias=RelativeBias(s.heads, t=s.reach, v=max(s.voices - 1, 1))
    ),
}
"""How events know where they are: sinusoids added to them; learned vectors of relative places that queries meet;
rotation; learned numbers of relative places."""


class Events(Saved):
    """The model.

    Args:
        kinds: of events, numbered from 0.
        voices: events of a step.
        position: a name of `MIXERS`.
        reach: steps back that have a code of their own, of "relative" and "bias"; those before them share one.
        dim, heads, layers, ratio, dropout: of the transformer.
        tied: whether events are told apart by the table that embeds them.

    Raises ChronotopeError: an unknown position, a size below 1.

    Example:
        >>> model = Events(kinds=12, voices=4, dim=32, heads=2, layers=1)
        >>> model(torch.randint(12, (2, 10 * 4))).shape
        torch.Size([2, 40, 12])
        >>> model.sample(steps=3, batch=2).shape
        torch.Size([2, 12])
    """

    def __init__(
        self,
        kinds: int,
        voices: int = 1,
        position: str = "relative",
        reach: int = 128,
        dim: int = 128,
        heads: int = 4,
        layers: int = 4,
        ratio: float | int = 4,
        dropout: float | int = 0.0,
        tied: bool = False,
    ):
        super().__init__()
        named("position", [position], MIXERS)
        if min(kinds, voices, reach, layers) < 1:
            raise ChronotopeError(f"Events({kinds=}, {voices=}, {reach=}, {layers=}): expected 1 or more of each.")
        self.kinds, self.voices = kinds, voices
        sizes = Sizes(dim, heads, voices, reach)
        # The last entry stands before the first event.
        self.embed = nn.Embedding(kinds + 1, dim)
        code: list[Mixer] = [Sinusoidal(dim, AXES)] if position == "absolute" else []
        blocks = [Block([MIXERS[position](sizes)], dim, "gelu", ratio, dropout=dropout) for _ in range(layers)]
        self.stack = Stack([*code, *blocks], dim)
        self.dropout = nn.Dropout(float(dropout))
        self.head = None if tied else nn.Linear(dim, kinds, bias=False)
        # Logits begin with variance 1 where the table gives them.
        nn.init.normal_(self.embed.weight, std=dim**-0.5 if tied else 1.0)

    def forward(self, events: Int64[Tensor, "b n"]) -> Float[Tensor, "b n kinds"]:
        """Logits of each event from those before it. Raises ChronotopeError where the last step is not whole."""
        if events.shape[1] == 0 or events.shape[1] % self.voices:
            raise ChronotopeError(
                f"Events: {events.shape[1]} events are no whole steps of {self.voices} voices; expected a multiple."
            )
        before = F.pad(events[:, :-1], (1, 0), value=self.kinds)
        grid = Grid(t=events.shape[1] // self.voices, v=self.voices)
        return self._logits(self.stack(self.dropout(self._embedded(before)), grid))

    def nats(self, events: Int64[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """-log p of each event given those before it; 0 for those that are -1, which may follow the end only."""
        logits = self(events.clamp(min=0))
        return F.cross_entropy(logits.transpose(1, 2), events, ignore_index=-1, reduction="none")

    @torch.no_grad()
    def sample(
        self,
        steps: int,
        batch: int = 1,
        given: Int64[Tensor, "b m"] | None = None,
        temperature: float | int = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int64[Tensor, "b n"]:
        """Events of so many steps, drawn one by one; the first ones are those given, whole steps. temperature 0: the
        likeliest. Keys and values are kept, so that a step costs what it sees.
        """
        device = self.embed.weight.device
        events = torch.full((batch, steps * self.voices), self.kinds, device=device)
        known = 0
        if given is not None:
            known = given.shape[1] // self.voices
            if given.shape[0] != batch or given.shape[1] % self.voices or known > steps:
                raise ChronotopeError(
                    f"given {list(given.shape)}: expected [{batch}, whole steps of {self.voices}], {steps} at most."
                )
            events[:, : given.shape[1]] = given
        state = self.stack.init_state(batch, Grid(t=1, v=self.voices))
        last = torch.full((batch, 1), self.kinds, device=device)
        for time in range(steps):
            own = events[:, time * self.voices : (time + 1) * self.voices]
            # A state is left as it was, so a step is taken anew with each event of it that is known.
            for voice in range(0 if time >= known else self.voices - 1, self.voices):
                h, after = self.stack.step(self._embedded(torch.cat([last, own[:, :-1]], 1)), state)
                if time >= known:
                    own[:, voice] = _drawn(self._logits(h[:, voice]), temperature, generator)
            state, last = after, own[:, -1:]
        return events

    def _embedded(self, events: Int64[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        x = self.embed(events)
        return x if self.head is not None else x * x.shape[-1] ** 0.5

    def _logits(self, h: Float[Tensor, "*b c"]) -> Float[Tensor, "*b kinds"]:
        return h @ self.embed.weight[: self.kinds].T if self.head is None else self.head(h)


def _drawn(
    logits: Float[Tensor, "b kinds"], temperature: float | int, generator: torch.Generator | None
) -> Int64[Tensor, "b"]:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
