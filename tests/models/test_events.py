"""Events: nothing of what comes is known, drawing one by one is the model, and saved models are the same."""

import pytest
import torch
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.models import Events
from chronotope.models.events import MIXERS

KINDS, VOICES = 7, 3


def made(position="relative", **options):
    torch.manual_seed(0)
    return Events(KINDS, VOICES, position, **{"reach": 4, "dim": 16, "heads": 2, "layers": 2, **options}).eval()


def events(steps=6, batch=2, seed=0):
    return torch.randint(KINDS, (batch, steps * VOICES), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("position", MIXERS)
def test_an_event_is_told_by_those_before_it_alone(position):
    model, given = made(position), events()
    logits = model(given)
    for n in range(given.shape[1]):
        other = given.clone()
        other[:, n:] = (other[:, n:] + 1) % KINDS
        changed = model(other)
        torch.testing.assert_close(changed[:, : n + 1], logits[:, : n + 1], rtol=0, atol=1e-5)
        if n + 1 < given.shape[1]:
            assert (changed[:, n + 1] - logits[:, n + 1]).abs().max() > 1e-4


@pytest.mark.parametrize("position", MIXERS)
def test_time_and_voice_are_known(position):
    """Of equal events, each place has its own prediction; relative codes know no more than what is in reach."""
    logits = made(position)(torch.zeros(1, 6 * VOICES, dtype=torch.int64))[0].unflatten(0, (6, VOICES))
    for voice in range(1, VOICES):
        assert (logits[3, voice] - logits[3, 0]).abs().max() > 1e-4
    assert (logits[2] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("position", MIXERS)
def test_drawing_one_by_one_is_the_model(position, tied):
    model = made(position, tied=tied).double()
    likeliest = model.sample(6, 2, temperature=0)
    assert likeliest.shape == (2, 6 * VOICES)
    assert torch.equal(model(likeliest).argmax(-1), likeliest)
    given = events(4)
    continued = model.sample(6, 2, given, temperature=0)
    assert torch.equal(continued[:, : 4 * VOICES], given)
    assert torch.equal(model(continued)[:, 4 * VOICES :].argmax(-1), continued[:, 4 * VOICES :])


def test_draws_have_the_chances_that_the_model_gives():
    model, count = made(), 4000
    drawn = model.sample(2, count, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, model.sample(2, count, generator=torch.Generator().manual_seed(0)))
    chance = model(drawn)[:, 0].softmax(-1)[0]
    found = torch.bincount(drawn[:, 0], minlength=KINDS) / count
    assert (found - chance).abs().max() < 4 * (0.25 / count) ** 0.5
    last = model(drawn).softmax(-1)[:, -1]
    hit = last.gather(1, drawn[:, -1:])[:, 0].mean()  # the mean chance of what was drawn is that of drawing it twice
    assert (hit - (last**2).sum(1).mean()).abs() < 4 * 0.5 / count**0.5
    cold = model.sample(2, 200, temperature=1e-3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(cold, model.sample(2, 200, temperature=0))


def test_nats_are_those_of_the_logits_and_padding_has_none():
    model, given = made(), events()
    nats = model.nats(given)
    expected = -model(given).log_softmax(-1).gather(2, given[..., None])[..., 0]
    torch.testing.assert_close(nats, expected)
    padded = F.pad(given, (0, 2 * VOICES), value=-1)
    torch.testing.assert_close(model.nats(padded), F.pad(nats, (0, 2 * VOICES)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("position", MIXERS)
def test_every_weight_learns(position, tied):
    model = made(position, tied=tied).train()
    model.nats(events(8)).mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in model.parameters())


def test_sizes_do_not_depend_on_the_position_but_for_its_tables():
    sizes = {name: sum(weight.numel() for weight in made(name).parameters()) for name in MIXERS}
    assert sizes["absolute"] == sizes["rotary"]
    layers, heads, size, offsets = 2, 2, 8, (4 + 1) + (2 * VOICES - 1)
    assert sizes["relative"] == sizes["absolute"] + layers * heads * size * offsets


@pytest.mark.parametrize("position", MIXERS)
def test_it_saves_and_loads_itself(tmp_path, position):
    model = made(position)
    model.save_pretrained(tmp_path)
    again = Events.from_pretrained(tmp_path).eval()
    assert torch.equal(again(events()), model(events()))


def test_one_voice_is_a_language_model():
    model = Events(kinds=5, dim=16, heads=2, layers=1, reach=3).eval()
    given = torch.randint(5, (2, 9))
    assert model(given).shape == (2, 9, 5)
    drawn = model.sample(9, 2, temperature=0)
    assert torch.equal(model(drawn).argmax(-1), drawn)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ChronotopeError, match="absolute"):
        Events(KINDS, position="nowhere")
    with pytest.raises(ChronotopeError, match="expected 1 or more of each"):
        Events(KINDS, voices=0)
    with pytest.raises(ChronotopeError, match="7 events are no whole steps of 3 voices"):
        made()(events()[:, :7])
    with pytest.raises(ChronotopeError, match=r"expected \[2, whole steps of 3\], 4 at most"):
        made().sample(4, 2, events(5))
    with pytest.raises(ChronotopeError, match="whole steps"):
        made().sample(4, 2, events(3)[:, :4])
