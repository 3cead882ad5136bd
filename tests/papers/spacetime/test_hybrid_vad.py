"""Both sides of a gap: attention between frames, time turned around, cost, the cell; anomalies of a bouncing ball."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.errors import ChronotopeError
from chronotope.papers.spacetime.hybrid_vad import BothSides, Bridge, FrameAttention, Side, prediction_loss, scores


def _dense(layer: FrameAttention, x: torch.Tensor, asked: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Matrices in place of convolutions of one pixel, tokens of C H W / heads numbers."""

    def heads(conv: nn.Conv2d, y: torch.Tensor) -> torch.Tensor:
        maps = torch.einsum("oi,btihw->btohw", conv.weight[:, :, 0, 0], y) + conv.bias[:, None, None]
        return maps.reshape(len(y), y.shape[1], layer.heads, -1).transpose(1, 2)

    out = F.scaled_dot_product_attention(heads(layer.q, asked), heads(layer.k, x), heads(layer.v, x), mask)
    maps = out.transpose(1, 2).reshape(asked.shape)
    return torch.einsum("oi,btihw->btohw", layer.out.weight[:, :, 0, 0], maps) + layer.out.bias[:, None, None]


def test_with_kernels_of_one_pixel_it_is_attention_between_frames() -> None:
    torch.manual_seed(0)
    layer, x, asked = FrameAttention(4, 2, kernel=1), torch.randn(2, 5, 4, 3, 6), torch.randn(2, 3, 4, 3, 6)
    torch.testing.assert_close(layer(x), _dense(layer, x, x, None), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer(x, asked), _dense(layer, x, asked, None), rtol=0, atol=1e-5)
    real = torch.tensor([[True, False, True, True, False], [True] * 5])
    masked = layer(x, asked, real)
    torch.testing.assert_close(masked, _dense(layer, x, asked, real[:, None, None]), rtol=0, atol=1e-5)
    layer.where = ct.causal("t")
    causal = _dense(layer, x, x, torch.ones(5, 5, dtype=torch.bool).tril())
    torch.testing.assert_close(layer(x), causal, rtol=0, atol=1e-5)
    with pytest.raises(ChronotopeError, match="odd"):
        FrameAttention(4, 2, kernel=2)


@pytest.mark.parametrize("size", [4, 16])
def test_scores_are_one_for_two_frames_at_any_size(size: int) -> None:
    layer = FrameAttention(4, 2)
    weights = layer.weights(torch.randn(1, 6, 4, size, size), torch.randn(1, 2, 4, size, size))
    assert weights.shape == (1, 2, 2, 6)
    torch.testing.assert_close(weights.sum(3), torch.ones(1, 2, 2))


def test_time_turned_around_with_the_sides_swapped_is_the_same_turned_around() -> None:
    torch.manual_seed(0)
    model = BothSides(middle=2, dim=4)
    model.back.load_state_dict(model.ahead.state_dict())
    before, after = torch.rand(2, 2, 3, 1, 8, 8)
    ahead, back = model(before, after)
    other_ahead, other_back = model(after.flip(1), before.flip(1))
    torch.testing.assert_close(other_ahead, back.flip(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(other_back, ahead.flip(1), rtol=0, atol=1e-5)


def test_the_cell_on_one_pixel_is_an_lstm() -> None:
    torch.manual_seed(0)
    layer, cell = ct.nn.ConvLSTM(3, kernel=1), nn.LSTMCell(3, 3)
    with torch.no_grad():
        cell.weight_ih.copy_(layer.enter.weight[:, :, 0, 0])
        cell.weight_hh.copy_(layer.again.weight[:, :, 0, 0])
        cell.bias_ih.copy_(layer.enter.bias)
        cell.bias_hh.zero_()
    x, state, out = torch.randn(2, 5, 3), None, []
    for t in range(5):
        state = cell(x[:, t], state)
        out.append(state[0])
    torch.testing.assert_close(layer(x, ct.Grid(t=5, h=1, w=1)), torch.stack(out, 1), rtol=0, atol=1e-6)


def test_states_flow_along_time_and_from_coarse_to_fine_maps() -> None:
    torch.manual_seed(0)
    bridge, coarse, fine = Bridge(4, 2), torch.randn(1, 3, 4, 2, 2), torch.randn(1, 3, 2, 4, 4)
    first = bridge(coarse, fine)
    assert [y.shape for y in first] == [coarse.shape, fine.shape]
    other = coarse.clone()
    other[:, 1] += 1
    changed = [(a - b).abs().amax((0, 2, 3, 4)) > 0 for a, b in zip(first, bridge(other, fine), strict=True)]
    assert all(change.tolist() == [False, True, True] for change in changed)
    other = fine.clone()
    other[:, 1] += 1
    assert torch.equal(bridge(coarse, other)[0], first[0]) and not torch.equal(bridge(coarse, other)[1], first[1])


def test_every_weight_of_a_side_is_taught_and_errors_become_scores() -> None:
    side = Side(2, dim=4)
    frames = torch.rand(2, 3, 1, 8, 8)
    prediction_loss(side(frames), torch.rand(2, 2, 1, 8, 8)).backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for name, value in side.named_parameters()
               if "attend.q.bias" not in name and "attend.k" not in name)  # fmt: skip
    assert prediction_loss(frames, frames) == 0
    torch.testing.assert_close(scores(torch.tensor([[1.0, 0.1, 0.5], [0.01, 9.0, 0.5]])),
                               torch.tensor([0.0, 1 / 1.69897, 1.0]), rtol=1e-4, atol=1e-4)  # fmt: skip


def _video(frames: int, rng: torch.Generator, odd: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A ball between rough walls, [frames, 1, 32, 32]: it leaves a wall at random. And which frames are odd.

    From a third of the film on, for a quarter of it, the ball is twice as fast ("speed") or a cross ("look").
    """
    at, angle = 8 + 16 * torch.rand(2, generator=rng), 2 * torch.pi * torch.rand(1, generator=rng)
    grid, film = torch.arange(32.0), []
    is_odd = torch.zeros(frames, dtype=torch.bool)
    if odd is not None:
        is_odd[frames // 3 : frames // 3 + frames // 4] = True
    for t in range(frames):
        speed = 3.0 if odd == "speed" and is_odd[t] else 1.5
        step = speed * torch.cat((angle.sin(), angle.cos()))
        wall = ((at + step) < 4) | ((at + step) > 27)
        if wall.any():
            centre = torch.atan2(*(15.5 - at))
            angle = centre + (torch.rand(1, generator=rng) - 0.5) * 2.0
            step = speed * torch.cat((angle.sin(), angle.cos()))
        at = at + step
        y, x = grid[:, None] - at[0], grid[None] - at[1]
        near = (
            torch.minimum(y.abs(), x.abs()) - 0.5
            if odd == "look" and is_odd[t]
            else (y.square() + x.square()).sqrt() - 3
        )
        far = torch.maximum(y.abs(), x.abs()) - 4
        shape = torch.maximum(near, far) if odd == "look" and is_odd[t] else near
        film.append((0.5 - shape).clamp(0, 1))
    return torch.stack(film)[:, None], is_odd


def _area(scored: torch.Tensor, is_odd: torch.Tensor) -> float:
    """Under the curve of hits over false alarms."""
    high, low = scored[is_odd], scored[~is_odd]
    return ((high[:, None] > low).float() + 0.5 * (high[:, None] == low).float()).mean().item()


@pytest.mark.slow
def test_odd_frames_are_found_and_better_from_both_sides() -> None:
    torch.manual_seed(0)
    rng, model = torch.Generator().manual_seed(0), BothSides(middle=2, dim=8)
    films = torch.stack([_video(40, rng, None)[0] for _ in range(60)])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(700):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 700)
        film, start = (torch.randint(n, (8,), generator=rng) for n in (60, 33))
        clip = torch.stack([films[f, s : s + 8] for f, s in zip(film, start, strict=True)])
        loss = sum(prediction_loss(side, clip[:, 3:5]) for side in model(clip[:, :3], clip[:, 5:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found: dict[str, list[torch.Tensor]] = {"both": [], "ahead": [], "odd": []}
    with torch.inference_mode():
        for number in range(20):
            film, is_odd = _video(60, rng, "speed" if number % 2 else "look")
            clips = film.unfold(0, 8, 1).movedim(-1, 1)  # [53, 8, 1, 32, 32]
            sides = model(clips[:, :3], clips[:, 5:])
            errors = torch.stack([(side[:, 0] - clips[:, 3]).square().mean((1, 2, 3)) for side in sides])
            found["both"].append(scores(errors))
            found["ahead"].append(scores(errors[0]))
            found["odd"].append(is_odd[3:-4])
    odd = torch.cat(found["odd"])
    both, ahead = (_area(torch.cat(found[name]), odd) for name in ("both", "ahead"))
    assert both > 0.9 and both >= ahead + 0.02, (both, ahead)
