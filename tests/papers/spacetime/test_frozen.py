"""Frozen in Time: a clip of one frame is a picture, axis attentions with a class token, longer clips, retrieval."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.errors import ChronotopeError
from chronotope.papers.spacetime.frozen import (
    EPS,
    FrozenBlock,
    FrozenInTime,
    retrieval_loss,
    similarity,
    vit_weights,
)

SMALL = {"places": (3, 2), "patch": 2, "channels": 1, "dim": 16, "heads": 2, "layers": 2, "frames": 4, "size": 8}


class Vit(nn.Module):
    """A picture transformer of dense blocks, with the names of timm."""

    def __init__(self, model: FrozenInTime):
        super().__init__()
        self.model = model

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Class token and patches [B, 1 + S, D] of [B, C, H, W]."""
        own = self.model
        x = F.conv2d(pictures, own.embed.project.weight.view(16, 1, 2, 2), own.embed.project.bias, stride=2).flatten(2)
        x = torch.cat((own.cls.expand(len(pictures), -1, -1), x.mT), 1) + own.place
        for block in own.blocks:
            y = F.layer_norm(x, (16,), block.space_norm.weight, block.space_norm.bias, EPS)
            q, k, v = block.space.qkv(y).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            x = x + block.space.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + block.mlp(F.layer_norm(x, (16,), block.mlp_norm.weight, block.mlp_norm.bias, EPS))
        return own.norm(x)


def _model(seed: int = 0, **more: object) -> FrozenInTime:
    torch.manual_seed(seed)
    model = FrozenInTime(**{**SMALL, **more})  # type: ignore[arg-type]
    for name, value in model.named_parameters():
        if name.endswith("bias") and ".time." not in name:
            nn.init.normal_(value)
    return model.double()


@pytest.mark.parametrize("start", ["output", "values"])
def test_at_first_a_picture_is_seen_as_by_a_picture_transformer(start: str) -> None:
    model, picture = _model(time_init=start), torch.randn(3, 1, 6, 4, dtype=torch.float64)
    tokens, grid = model.tokens(picture[:, None])
    assert grid == ct.Grid(t=1, h=3, w=2, prefix=1)
    torch.testing.assert_close(tokens, Vit(model)(picture), rtol=0, atol=1e-12)


def test_equal_frames_leave_the_patches_of_the_first_block_alone_but_not_the_class_token() -> None:
    block, frame = _model().blocks[0], torch.randn(2, 6, 16, dtype=torch.float64)
    cls = torch.randn(2, 1, 16, dtype=torch.float64)
    one = block(torch.cat((cls, frame), 1), ct.Grid(t=1, h=3, w=2, prefix=1))
    four = block(torch.cat((cls, frame.repeat(1, 4, 1)), 1), ct.Grid(t=4, h=3, w=2, prefix=1))
    torch.testing.assert_close(four[:, 1:], one[:, 1:].repeat(1, 4, 1), rtol=0, atol=1e-12)
    assert (four[:, 0] - one[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["time", "space"])
def test_an_axis_attention_is_dense_attention_under_its_mask(name: str) -> None:
    torch.manual_seed(1)
    block = FrozenBlock(16, 2, time_init="random").double()
    grid, x = ct.Grid(t=4, h=3, w=2, prefix=1), torch.randn(2, 25, 16, dtype=torch.float64)
    coords = grid.coords()
    axes = [1, 2] if name == "time" else [0]
    mask = (coords[:, None, axes] == coords[None, :, axes]).all(-1)
    mask[0], mask[:, 0] = True, True
    layer = getattr(block, name)
    q, k, v = layer.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    dense = layer.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, grid), dense, rtol=0, atol=1e-12)
    pairs = ct.plan(layer.where, grid).mask().sum().item()
    assert pairs == 24 * ((4 if name == "time" else 6) + 1) + 25  # patches, and the row of the class token


def test_the_residual_is_the_input_of_the_block() -> None:
    torch.manual_seed(2)
    grid, x = ct.Grid(t=2, h=2, w=2, prefix=1), torch.randn(1, 9, 16)
    frozen = FrozenBlock(16, 2, time_init="random")
    other = FrozenBlock(16, 2, residual="timesformer")
    other.load_state_dict(frozen.state_dict())
    for block in (frozen, other):
        nn.init.zeros_(block.mlp.leave.weight), nn.init.zeros_(block.mlp.leave.bias)
    added = frozen.time(frozen.time_norm(x), grid)
    torch.testing.assert_close(other(x, grid) - frozen(x, grid), added)
    with pytest.raises(ChronotopeError, match="cannot be stepped"):
        frozen.init_state(1, ct.Grid(t=1, h=2, w=2))


def test_gradients_over_time_flow_from_the_first_step_but_not_from_the_published_start() -> None:
    clips = torch.randn(2, 3, 1, 6, 4, dtype=torch.float64)
    for start in ("output", "values"):
        model = _model(time_init=start)
        model(clips).square().sum().backward()
        for block in model.blocks:
            values, output = block.time.qkv.weight.grad.chunk(3)[2].abs().max(), block.time.out.weight.grad.abs().max()
            space = block.space.qkv.weight.grad.abs().max()
            if start == "output":
                assert values == 0 and output > 1e-3 * space  # the values follow once the output has moved
            else:
                assert output == 0 and values < 1e-12 * space


@pytest.mark.parametrize("how", ["zeros", "interpolate"])
def test_a_longer_model_sees_longer_clips(how: str) -> None:
    model, clips = _model(time_init="random"), torch.randn(2, 4, 1, 6, 4, dtype=torch.float64)
    nn.init.normal_(model.frame)
    longer = model.longer(8, how=how).double()  # type: ignore[arg-type]
    assert longer(torch.cat((clips, clips), 1)).shape == (2, 8)
    if how == "zeros":
        assert torch.equal(longer(clips), model(clips))
    else:
        torch.testing.assert_close(longer.frame[[0, 7]], model.frame[[0, 3]])
    with pytest.raises(ChronotopeError, match="4 or more"):
        model.longer(3)
    with pytest.raises(ChronotopeError, match="4 frames or fewer"):
        model(torch.randn(1, 5, 1, 6, 4, dtype=torch.float64))


def test_weights_of_a_vit_by_its_names_and_saving(tmp_path: object) -> None:
    model = _model()
    vit = {
        "cls_token": model.cls, "pos_embed": model.place[None], "patch_embed.proj.bias": model.embed.project.bias,
        "patch_embed.proj.weight": model.embed.project.weight.view(16, 1, 2, 2),
        "blocks.1.attn.proj.weight": model.blocks[1].space.out.weight, "head.weight": torch.zeros(3, 16),
        "blocks.0.mlp.fc2.bias": model.blocks[0].mlp.leave.bias, "norm.weight": model.norm.weight,
    }  # fmt: skip
    found = vit_weights(vit)
    state = model.state_dict()
    assert len(found) == 7 and all(torch.equal(value, state[name]) for name, value in found.items())
    with pytest.raises(ChronotopeError, match="stem"):
        vit_weights({"stem.weight": torch.zeros(1)})
    model.float().save_pretrained(tmp_path)  # type: ignore[arg-type]
    clips = torch.randn(1, 2, 1, 6, 4)
    assert torch.equal(FrozenInTime.from_pretrained(tmp_path)(clips), model(clips))  # type: ignore[arg-type]


def test_the_loss_is_both_cross_entropies() -> None:
    clips, texts = torch.randn(5, 8), torch.randn(5, 8)
    scores = similarity(clips, texts) / 0.05
    both = -(scores.log_softmax(1).diagonal().mean() + scores.log_softmax(0).diagonal().mean())
    torch.testing.assert_close(retrieval_loss(clips, texts), both)
    assert similarity(clips, clips).diagonal().allclose(torch.ones(5))


def _moving(count: int, frames: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares of one patch that go left and right by turns, [2 count, frames, 1, 2, 24], from the middle half."""
    right = torch.arange(2 * count) % 2
    at = torch.randint(3, 9, (2 * count, 1), generator=rng) + torch.arange(frames) * (2 * right[:, None] - 1)
    places = F.one_hot(at, 12).view(2 * count, frames, 1, 1, 12).float()
    return places.repeat_interleave(2, 3).repeat_interleave(2, 4), right


@pytest.mark.slow
@pytest.mark.parametrize("frames", [4, 1])
def test_only_clips_tell_left_from_right(frames: int) -> None:
    torch.manual_seed(0)
    model = FrozenInTime(places=(1, 12), patch=2, channels=1, dim=32, heads=4, layers=2, frames=4, size=16)
    texts = nn.Embedding(2, 16)
    optimizer = torch.optim.AdamW([*model.parameters(), *texts.parameters()], lr=2e-3)
    rng = torch.Generator().manual_seed(0)
    for _ in range(400):
        clips, right = _moving(16, frames, rng)
        pairs = zip(model(clips).split(2), right.split(2), strict=True)
        loss = torch.stack([retrieval_loss(clip, texts(text)) for clip, text in pairs]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        clips, right = _moving(1000, frames, rng)
        found = (similarity(model(clips), texts.weight).argmax(1) == right).float().mean().item()
    assert found >= 0.95 if frames == 4 else abs(found - 0.5) <= 0.05, found
