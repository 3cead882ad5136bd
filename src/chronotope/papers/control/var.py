r"""VAR: attention that a language model wastes on sinks goes to the rest of the image, in heads that look at the image.

A token is a sink of a layer where a few known channels D of its input stand out, $\max_{d \in D} |x_d| > \tau\,
\mathrm{rms}(x)$. Of a query after the image, in a head with weights a, image tokens I, sinks S:

$$
\sum_I a \ge \alpha, \quad \sum_{I \cap S} a \le \rho \sum_I a, \quad I \cap S \ne \emptyset:
\qquad a'_j = \begin{cases}
p\, a_j & j \in S \\
a_j + (1 - p) \frac{\sum_S a}{\sum_{I \setminus S} a}\, a_j & j \in I \setminus S \\
a_j & \text{else}
\end{cases}
$$

and a' = a where one of the three does not hold. tau = 20, rho = 0.5, alpha = 0.2, p = 0.6.

Sizes: a [B, H, M, N], sinks [B, N]. As a control it holds the rows after the image alone: y' = y + (a' - a) v.

    >>> a = torch.tensor([0.3, 0.2, 0.3, 0.1, 0.1])[None, None, None]  # a text sink, three of the image, a question
    >>> sinks = torch.tensor([[True, True, False, False, False]])
    >>> redistributed(a, sinks, slice(1, 4))[0, 0, 0]
    tensor([0.1800, 0.1200, 0.4500, 0.1500, 0.1000])
    >>> model = torch.nn.Sequential(*[torch.nn.TransformerEncoderLayer(64, 4, batch_first=True) for _ in range(4)])
    >>> with VAR(slice(1, 17), dims=(3, 40)).on(model.eval()):
    ...     model(torch.randn(2, 24, 64)).shape
    torch.Size([2, 24, 64])

`on` watches the inputs of the modules that hold the attention layers, and leaves out the first two layers and the last.
Sinks of tokens in a cache are remembered, and tokens that come later are looked at too, so that decoding equals a pass
over everything; the released code looks at the prompt alone.

The released code (seilk/VisAttnSink at commit 98e62d6) takes one sequence at a time; its src/logic/logic.py, run on CPU
on 40 random inputs, finds the same sinks and differs by 3e-8 at most, in the 1,331 of 1,440 rows that are changed.

Left out: what is gained on the benchmarks of LLaVA.

Paper: Seil Kang, Jinyeong Kim, Junhyeok Kim, Seong Jae Hwang, "See What You Are Told: Visual Attention Sink in Large
Multimodal Models", 2025, arXiv 2503.03321.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chronotope.adapt import Asked, At, Control, control
from chronotope.adapt.attach import Layers, attention_names, selection
from chronotope.errors import ChronotopeError
from chronotope.papers.control.rows import row_blocks, values
from chronotope.papers.registry import paper

CHANNELS = {"llama-2-7b": (1415, 2533), "llama-2-13b": (2100, 4743)}
"""D of the language models that the paper looks into."""


def sink_tokens(x: Float[Tensor, "b n c"], dims: Collection[int], tau: float | int = 20) -> Bool[Tensor, "b n"]:
    """Tokens in which one of the channels `dims` is more than tau times the root mean square of all."""
    x = x.float()
    return x[..., list(dims)].abs().amax(-1) > tau * x.square().mean(-1).sqrt()


def redistributed(
    weights: Float[Tensor, "b h m n"],
    sinks: Bool[Tensor, "b n"],
    image: slice,
    p: float | int = 0.6,
    rho: float | int = 0.5,
    least: float | int = 0.2,
) -> Float[Tensor, "b h m n"]:
    """a' of rows that come after the image."""
    inside = torch.zeros_like(sinks)
    inside[:, image] = True
    sink, seen, wasted = (x[:, None, None] for x in (sinks, inside & ~sinks, inside & sinks))

    def mass(of: Tensor) -> Tensor:
        return weights.masked_fill(~of, 0.0).sum(-1, keepdim=True)

    rest, lost = mass(seen), mass(wasted)
    looks = rest + lost
    chosen = (looks >= least) & (lost <= rho * looks) & wasted.any(-1, keepdim=True) & (rest > 0)
    # p = 1 changes no bit: the factors are 1.
    factor = torch.where(sink, p, torch.where(seen, 1 + (1 - p) * mass(sink) / rest, 1.0))
    return torch.where(chosen, weights * factor, weights)


@paper(
    system=109,
    name="VAR",
    family="control",
    claim="in heads that look at the image, weight on sinks goes to the rest of the image",
    evidence=["tests/papers/control/test_var.py"],
)
class VAR(Control):
    """The redistribution; attach it by `on`.

    Args:
        image: where in the sequence the image is.
        dims: channels of the language model that stand out in sinks, such as those in `CHANNELS`.
        tau, p, rho, least: as above; `least` is alpha.
    """

    def __init__(
        self,
        image: slice,
        dims: Collection[int],
        tau: float | int = 20,
        p: float | int = 0.6,
        rho: float | int = 0.5,
        least: float | int = 0.2,
    ):
        if image.start is None or image.stop is None or not 0 <= image.start < image.stop:
            raise ChronotopeError(f"VAR(image={image}): expected slice(start, stop) of a part of the sequence.")
        self.image, self.dims, self.tau, self.p, self.rho, self.least = image, dims, tau, p, rho, least
        self.new: dict[str, Tensor] = {}
        self.sinks: dict[str, Tensor] = {}

    @contextmanager
    def on(self, model: nn.Module, layers: Layers | None = None, skip: tuple[int, int] = (2, 1)) -> Iterator[None]:
        """Acts on the attention layers of a decoder.

        Args:
            layers: those of the decoder, as for `ct.adapt.control`; default: all attention layers.
            skip: how many of them are left out at the beginning and at the end.
        """
        names = attention_names(model)
        names = list(filter(selection(layers, names), names))
        names = names[skip[0] : len(names) - skip[1]]
        if not names:
            raise ChronotopeError(f"VAR: without the first {skip[0]} layers and the last {skip[1]} none is left.")
        self.new, self.sinks = {}, {}
        with ExitStack() as stack:
            for name in names:
                holder = model.get_submodule(name.rpartition(".")[0])
                stack.callback(holder.register_forward_pre_hook(self._look(name), with_kwargs=True).remove)
            stack.enter_context(control(model, self, layers=names))
            yield

    def out(self, at: At, asked: Asked, out: Float[Tensor, "b h n dv"]) -> Float[Tensor, "b h n dv"]:
        """y + (a' - a) v in the rows after the image."""
        sinks = self._known(at.layer, asked.k.shape[2])
        first = max(0, self.image.stop - asked.start)
        if first >= asked.q.shape[2] or not bool(sinks[:, self.image].any()):
            return out
        v, out = values(asked), out.clone()
        for rows, _, weights in row_blocks(asked, first):
            new = redistributed(weights, sinks, self.image, self.p, self.rho, self.least)
            out[:, :, rows] += ((new - weights).to(v.dtype) @ v).to(out.dtype)
        return out

    def _look(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            self.new[name] = sink_tokens(x, self.dims, self.tau)

        return hook

    def _known(self, name: str, keys: int) -> Bool[Tensor, "b n"]:
        """Sinks among all keys: those of this call, after those of the calls before if there is a cache."""
        new = self.new[name]
        if new.shape[1] != keys:
            old = self.sinks.get(name)
            if old is None or old.shape[1] + new.shape[1] != keys:
                raise ChronotopeError(
                    f"VAR at {name}: of {keys} keys {new.shape[1]} were seen in this call and "
                    f"{0 if old is None else old.shape[1]} before; attach it before the cache gets its first tokens."
                )
            new = torch.cat((old, new), 1)
        self.sinks[name] = new
        return new
