"""LRCN: the cell, steps, padding, a state that does not grow; directions of motion, captions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.papers.spacetime.lrcn import LRCN, Captioner, frame_encoder


def _cell(lstm: nn.LSTM, x: torch.Tensor) -> torch.Tensor:
    """The formula, one step after the other, for x [B, T, dim]."""
    h = c = x.new_zeros(len(x), lstm.hidden_size)
    out = []
    for t in range(x.shape[1]):
        gates = x[:, t] @ lstm.weight_ih_l0.T + h @ lstm.weight_hh_l0.T + lstm.bias_ih_l0 + lstm.bias_hh_l0
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(h)
    return torch.stack(out, 1)


def test_the_whole_is_the_formula_and_its_steps() -> None:
    torch.manual_seed(0)
    model, clips = LRCN(3, channels=2, dim=8, hidden=5, read="sequence"), torch.randn(2, 6, 2, 7, 9)
    seen = model.frames(clips.flatten(0, 1)).unflatten(0, (2, 6))
    whole = model(clips)
    torch.testing.assert_close(whole, model.head(_cell(model.time, seen)), rtol=0, atol=1e-6)
    state, sizes = None, set()
    for t in range(6):
        logits, state = model.step(clips[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=0, atol=1e-6)
        sizes.add(sum(part.numel() for part in state))
    assert sizes == {2 * 1 * 2 * 5}  # h and c of one layer, at every step


@pytest.mark.parametrize("read", ["mean", "last"])
def test_padding_changes_nothing(read: str) -> None:
    torch.manual_seed(0)
    model, clips = LRCN(3, channels=1, dim=8, hidden=5, layers=2, read=read), torch.randn(2, 6, 1, 6, 6)  # type: ignore[arg-type]
    real = torch.arange(6) < torch.tensor([[4], [6]])
    found = model(clips, real)
    torch.testing.assert_close(found[0], model(clips[:1, :4])[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], model(clips[1:])[0], rtol=0, atol=1e-6)
    changed = clips.clone()
    changed[0, 4:] = 1e3
    assert torch.equal(model(changed, real), found)
    with pytest.raises(ChronotopeError, match="at their end"):
        model(clips, ~real)


def test_the_future_does_not_change_the_past() -> None:
    model, clips = LRCN(3, channels=1, dim=8, hidden=5, read="sequence"), torch.randn(1, 5, 1, 6, 6)
    later = clips.clone()
    later[:, 3:] += 1
    torch.testing.assert_close(model(later)[:, :3], model(clips)[:, :3])


def test_a_caption_is_what_the_logits_say_word_by_word() -> None:
    torch.manual_seed(0)
    model, pictures = Captioner(7, channels=1, dim=8, hidden=16), torch.randn(5, 1, 8, 8)
    words = model.caption(pictures, longest=6)
    given = torch.cat((torch.zeros(5, 1, dtype=torch.int64), words[:, :-1]), 1)
    said = model(pictures, given).argmax(2)
    for mine, theirs in zip(words.tolist(), said.tolist(), strict=True):
        end = mine.index(0) + 1 if 0 in mine else len(mine)
        assert mine[:end] == theirs[:end] and not any(mine[end:])


def _dots(count: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Dots of 2 x 2 that go right, left, down or up by 7 pixels in 16 frames of 16 x 16.

    A frame at random shows a dot at a + b on either axis, a of 0..7 and b of 0..7 uniform, whatever the way.
    """
    way = torch.randint(4, (count,), generator=rng)
    start, aside = torch.randint(8, (count, 1, 2), generator=rng), torch.randint(8, (count, 1), generator=rng)
    ahead = (torch.arange(16) // 2).expand(count, -1)
    going = torch.where(way[:, None] % 2 == 0, ahead, 7 - ahead)
    across = way[:, None] < 2
    at = start + torch.stack((torch.where(across, aside, going), torch.where(across, going, aside)), -1)
    near = torch.arange(16) - at[..., None]
    near = (near >= 0) & (near < 2)  # [count, 16, 2, 16]
    return (near[:, :, 0, :, None] & near[:, :, 1, None]).float()[:, :, None], way


class Frames(nn.Module):
    """The mean of the logits of single frames."""

    def __init__(self) -> None:
        super().__init__()
        self.frames, self.head = frame_encoder(1, 32), nn.Linear(32, 4)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Logits [B, 4]."""
        return self.head(self.frames(clips.flatten(0, 1)).relu()).unflatten(0, clips.shape[:2]).mean(1)


@pytest.mark.slow
def test_motion_is_seen_through_time_only() -> None:
    found = {}
    for name in ("lrcn", "frames"):
        torch.manual_seed(0)
        model = LRCN(4, channels=1, dim=32, hidden=64) if name == "lrcn" else Frames()
        optimizer, rng = torch.optim.Adam(model.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
        for _ in range(400):
            clips, way = _dots(32, rng)
            loss = F.cross_entropy(model(clips), way)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            clips, way = _dots(2000, rng)
            found[name] = (model(clips).argmax(1) == way).float().mean().item()
            if name == "lrcn":
                found["reversed"] = (model(clips.flip(1)).argmax(1) == way ^ 1).float().mean().item()
    assert found["lrcn"] > 0.95 and found["reversed"] > 0.95 and abs(found["frames"] - 0.25) <= 0.05, found


def _shapes(count: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A square, a cross or a ring of one of three colours, and its caption: colour, shape, end."""
    colour, shape = (torch.randint(3, (count,), generator=rng) for _ in range(2))
    masks = torch.zeros(3, 5, 5)
    masks[0], masks[1, 2], masks[1, :, 2], masks[2] = 1, 1, 1, 1
    masks[2, 1:4, 1:4] = 0
    pictures = torch.zeros(count, 3, 16, 16)
    for n, (row, column) in enumerate(torch.randint(12, (count, 2), generator=rng).tolist()):
        pictures[n, colour[n], row : row + 5, column : column + 5] = masks[shape[n]]
    return pictures, torch.stack((1 + colour, 4 + shape, torch.zeros_like(shape)), 1)


@pytest.mark.slow
def test_captions_name_colour_and_shape_in_order() -> None:
    torch.manual_seed(0)
    model, rng = Captioner(7, dim=32, hidden=64), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(800):
        pictures, words = _shapes(32, rng)
        given = torch.cat((torch.zeros(32, 1, dtype=torch.int64), words[:, :-1]), 1)
        loss = F.cross_entropy(model(pictures, given).flatten(0, 1), words.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pictures, words = _shapes(1000, rng)
    said = model.caption(pictures, longest=3)
    assert (said == words).all(1).float().mean().item() > 0.95
