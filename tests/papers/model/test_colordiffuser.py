"""ColorDiffuser (system 46): references against dense attention, how far a frame is seen, flicker, chunks, adapter."""

import pytest
import torch
from torch.nn import functional as F

import chronotope as ct
from chronotope.errors import ChronotopeError
from chronotope.models.diffusion import ddim_sample, guided, linear_alphas
from chronotope.papers.model.colordiffuser import (
    Alternation,
    ColorDiffuser,
    ColorPropagation,
    alternated,
    in_chunks,
    with_luminance,
)

GRID = ct.Grid(t=4, h=2, w=3)


def averaging(x: torch.Tensor, t: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """The toy of the row: the mean of a frame and its reference."""
    return (x + x[:, frames]) / 2


def after(steps: int, schedule: Alternation, frames: int, impulse: int) -> list[int]:
    """The frames that know of one frame."""
    x = F.one_hot(torch.tensor(impulse), frames).double().view(1, frames, 1, 1, 1)
    model = alternated(averaging, schedule)
    for step in range(steps):
        x = model(x, torch.tensor([float(step)]))
    return x.flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("edge", ["self", "clamp"])
def test_what_a_frame_shows_goes_one_frame_each_way_in_two_steps(edge: str) -> None:
    for frames, impulse, k in ((9, 4, 0), (9, 4, 1), (9, 4, 3), (9, 0, 4), (9, 7, 5), (2, 1, 3), (1, 0, 2)):
        reached = after(2 * k, Alternation(edge=edge), frames, impulse)  # type: ignore[arg-type]
        assert reached == list(range(max(0, impulse - k), min(frames - 1, impulse + k) + 1))
    assert after(6, Alternation((-1,)), 9, 2) == list(range(2, 9))
    assert after(6, Alternation((1,)), 9, 6) == list(range(7))


def test_schedules_at_the_ends() -> None:
    assert Alternation().at(0, 4).tolist() == [0, 0, 1, 2]
    assert Alternation().at(3, 4).tolist() == [1, 2, 3, 3]
    assert Alternation((-2, 2)).at(0, 4).tolist() == [0, 1, 0, 1]
    assert Alternation((-2, 2), "clamp").at(0, 4).tolist() == [0, 0, 0, 1]


def test_a_frame_that_looks_at_itself_has_plain_self_attention() -> None:
    torch.manual_seed(0)
    inner = ct.nn.Attention(16, 2, where=ct.along("h", "w"), biases=True)
    x = torch.randn(2, 24, 16)
    for layer in (ColorPropagation(inner), ColorPropagation(inner, "concat")):
        for context in (None, x, (x, GRID)):
            torch.testing.assert_close(layer(x, GRID, context), inner(x, GRID), rtol=0, atol=1e-6)
    model = ColorDiffuser(16, 2, layers=2).double()
    torch.nn.init.normal_(model.adapt[0].conv.weight)
    clip, grey = torch.randn(2, 4, 3, 4, 6).double(), torch.rand(2, 4, 1, 4, 6).double()
    t = torch.tensor([3.0, 500.0]).double()
    torch.testing.assert_close(model(clip, t, grey, torch.arange(4)), model(clip, t, grey), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["replace", "concat"])
def test_references_are_dense_attention_over_the_frame_referred_to(mode: str) -> None:
    torch.manual_seed(0)
    inner, r = ct.nn.Attention(16, 2, biases=True).double(), [1, 0, 3, 1]
    x, y = torch.randn(2, 2, 24, 16, dtype=torch.float64)
    referred = y.view(2, 4, 6, 16)[:, r].flatten(1, 2)
    out = ColorPropagation(inner, mode)(x, GRID, referred)  # type: ignore[arg-type]
    for i in range(4):
        own, keys = x.view(2, 4, 6, 16)[:, i], y.view(2, 4, 6, 16)[:, r[i]]
        keys = torch.cat((own, keys), 1) if mode == "concat" else keys
        q = inner.qkv(own).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)[0]
        _, k, v = inner.qkv(keys).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        dense = inner.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(out.view(2, 4, 6, 16)[:, i], dense, rtol=0, atol=1e-12)
    with pytest.raises(ChronotopeError, match="in_chunks"):
        ColorPropagation(inner).init_state(1, ct.Grid(t=1, h=2, w=3))


def test_one_pass_of_the_model_looks_at_the_reference_and_no_further() -> None:
    torch.manual_seed(0)
    model = ColorDiffuser(16, 2, layers=3, mode="concat", text=8).double()
    for layer in model.adapt:
        torch.nn.init.normal_(layer.conv.weight, std=0.1)
    clip, grey = torch.randn(1, 5, 3, 4, 4).double().requires_grad_(), torch.rand(1, 5, 1, 4, 4).double()
    text = torch.randn(1, 3, 8).double().requires_grad_()
    out = model(clip, torch.tensor([9.0]).double(), grey, Alternation().at(0, 5), text)
    (seen,) = torch.autograd.grad(out[:, 3].square().sum(), clip, retain_graph=True)
    assert [i for i in range(5) if seen[:, i].abs().max() > 0] == [2, 3]
    assert torch.autograd.grad(out.square().sum(), text)[0].abs().max() > 0


def test_the_adapter_alone_is_trained_and_begins_as_nothing() -> None:
    torch.manual_seed(0)
    model, t = ColorDiffuser(16, 2, layers=2), torch.tensor([9.0])
    clip, grey = torch.randn(1, 3, 3, 4, 4), torch.rand(1, 3, 1, 4, 4)
    r = Alternation().at(1, 3)
    torch.testing.assert_close(model(clip, t, grey, r), model(clip, t, 1 - grey, r), rtol=0, atol=0)
    model(clip, t, grey, r).square().mean().backward()
    trained = {name for name, values in model.named_parameters() if values.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.split(".")[0] in ("grey", "adapt")}
    assert all(layer.conv.weight.grad.abs().max() > 0 for layer in model.adapt)


def test_flicker_is_halved_by_twenty_alternated_steps() -> None:
    alphas = linear_alphas()
    noise = torch.randn(4, 16, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def denoiser(share: float):  # type: ignore[no-untyped-def]
        """The best linear guess for pixels of deviation 0.5: the noise in the mean of a frame and its reference."""

        def say(x: torch.Tensor, t: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
            a = alphas[t.long()].view(-1, 1, 1, 1, 1)
            clean = a.sqrt() * 0.25 / (0.25 * a + 1 - a) * ((1 - share) * x + share * x[:, frames])
            return (x - a.sqrt() * clean) / (1 - a).sqrt()

        return say

    def variation(x: torch.Tensor) -> float:
        return float((x[:, 1:] - x[:, :-1]).abs().mean())

    alone = ddim_sample(alternated(denoiser(0.0)), noise, alphas, 20)
    made = ddim_sample(alternated(denoiser(0.5)), noise, alphas, 20)
    one_way = ddim_sample(alternated(denoiser(0.5), Alternation((-1,))), noise, alphas, 20)
    assert variation(made) <= 0.5 * variation(alone), (variation(made), variation(alone))
    # What is steady stays: the mean over frames is that of frames made alone, and looking one way loses it.
    steady = [
        torch.corrcoef(torch.stack((x.mean(1).flatten(), alone.mean(1).flatten())))[0, 1] for x in (made, one_way)
    ]
    assert steady[0] > 0.97 and steady[0] > steady[1], steady


def test_chunks_share_a_frame() -> None:
    torch.manual_seed(0)
    model, alphas = ColorDiffuser(16, 2, layers=1), linear_alphas()
    noise, grey = torch.randn(1, 7, 3, 4, 4), torch.rand(1, 7, 1, 4, 4)
    asked = []

    def sample(noise, known, mask, frames):  # type: ignore[no-untyped-def]
        asked.append((frames.start, frames.stop))
        told = model.colouring(grey[:, frames])
        return ddim_sample(
            guided(alternated(told), alternated(told), 1.0), noise, alphas, 4, clip=3, known=known, mask=mask
        )

    whole = in_chunks(sample, noise, 9)
    torch.testing.assert_close(whole, sample(noise, None, None, slice(0, 7)))
    asked.clear()
    made = in_chunks(sample, noise, 3)
    assert made.shape == noise.shape and asked == [(0, 3), (2, 5), (4, 7)]
    asked.clear()
    assert in_chunks(sample, noise[:, :6], 3).shape[1] == 6 and asked == [(0, 3), (2, 5), (4, 6)]
    with pytest.raises(ChronotopeError, match="one of which is shared"):
        in_chunks(sample, noise, 1)
    torch.testing.assert_close(made[:, :3], sample(noise[:, :3], None, None, slice(0, 3)))
    other = noise.clone()
    other[:, 2] += 1  # a frame that both chunks hold
    moved = (in_chunks(sample, other, 3) - made).abs().amax((0, 2, 3, 4))
    assert moved[2] > 0 and moved[3] > 0


def test_luminance_is_that_of_the_input() -> None:
    colour, grey = torch.randn(1, 2, 3, 4, 4), torch.rand(1, 2, 1, 4, 4)
    out = with_luminance(colour, grey)
    made = (torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1) * out).sum(2, keepdim=True)
    torch.testing.assert_close(made, grey)
    torch.testing.assert_close(out[:, :, 0] - out[:, :, 1], colour[:, :, 0] - colour[:, :, 1])
