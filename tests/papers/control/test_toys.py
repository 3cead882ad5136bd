"""The small denoiser that tests of controls share: scenes, what is seen in images, ladders of noise, training."""

import pytest
import torch
import toys

import chronotope as ct
from chronotope.models.diffusion import ddim_sample, flow_sample, guided, linear_alphas


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_scenes_are_as_their_words_say():
    scene = toys.scenes(300, rng())
    seen = toys.labels(scene.images)
    for i in range(300):
        words = [toys.WORDS[word] for word in scene.words[i]]
        assert words[0] == "<s>" and words.count("and") == int(scene.count[i]) - 1
        for j in range(int(scene.count[i])):
            spoken = [word for word, ours in zip(words, scene.spots[i, j].tolist(), strict=True) if ours]
            assert spoken == [toys.COLOURS[scene.colour[i, j]], toys.SHAPES[scene.shape[i, j]]]
            assert torch.equal(seen[i] == scene.colour[i, j], scene.masks[i, j] > 0)
            y, x = scene.masks[i, j].nonzero().double().mean(0).tolist()
            side = {"left": x < 3.5, "right": x > 3.5, "top": y < 3.5, "bottom": y > 3.5}
            assert side[toys.PLACES[scene.place[i, j]]]
    assert toys.right(scene.images, scene, least=1.0).all()
    assert not toys.right(torch.zeros(300, 3, 8, 8), scene)[:, 0].any()
    assert (toys.scenes(50, rng(), objects=2).count == 2).all()


def test_words_of_prompts():
    words = toys.prompt("a red square on the left", "")
    assert words.shape == (2, toys.LENGTH)
    assert [toys.WORDS[word] for word in words[0, :8]] == ["<s>", "a", "red", "square", "on", "the", "left", "<pad>"]


def test_noise_of_the_other_ladder_is_that_of_a_known_velocity():
    x, noise, alphas = (
        torch.randn(4, 3, 8, 8, generator=rng()),
        torch.randn(4, 3, 8, 8, generator=rng(1)),
        linear_alphas(),
    )
    step = torch.tensor([0.0, 100.0, 500.0, 999.0])
    a = alphas[step.long()].view(-1, 1, 1, 1)
    found = toys.as_ddpm(lambda *_: x - noise, alphas)(a.sqrt() * x + (1 - a).sqrt() * noise, step)
    assert (found - noise).abs().max() <= 1e-5
    made = ddim_sample(toys.as_ddpm(lambda *_: x - noise, alphas), noise, alphas, 10)
    assert made.shape == x.shape


@pytest.mark.parametrize(("form", "layers"), [("joint", 2), ("cross", 4)])
def test_layers_are_seen_and_context_is_words(form, layers):
    torch.manual_seed(0)
    model = toys.Toy(form).eval()
    x, t, words = torch.randn(2, 3, 8, 8), torch.rand(2), toys.prompt("a red square", "the blue ring")
    kept = ct.adapt.Capture()
    with ct.adapt.control(model, kept, layers="blocks.*"):
        out = model(x, t, words)
    assert len(kept.kept) == layers and out.shape == x.shape
    assert torch.equal(model(x, t, words), model(x, t, model.text(words)))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "least"), [("joint", 0.75), ("cross", 0.85)])
def test_it_draws_what_it_is_told(form, least):
    model, scene, alphas = toys.trained(form), toys.scenes(256, rng(99), objects=2), linear_alphas()
    told = guided(toys.told(model, scene.words), toys.told(model, toys.prompt("")), 2)
    noise = torch.randn(256, 3, 8, 8, generator=rng(1))
    by_flow = toys.right(flow_sample(told, noise, 20), scene).float().mean()
    by_ddim = toys.right(ddim_sample(toys.as_ddpm(told, alphas), noise, alphas, 20), scene).float().mean()
    print(f"{form}: objects that are right, by flow {by_flow:.2f}, by DDIM {by_ddim:.2f}")
    assert min(by_flow, by_ddim) >= least
