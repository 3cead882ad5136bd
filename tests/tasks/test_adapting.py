"""Adapting a model from its profile to its outcome, and the fine-tuning after it, on models of two layers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import chronotope as ct
from chronotope.adapt import Assignment, apply, load
from chronotope.adapt.candidates import candidates
from chronotope.adapt.inputs import relative
from chronotope.adapt.outcome import interval, report
from chronotope.cli import app
from chronotope.models import VideoDiT
from chronotope.tasks.adapting import Subject, adapt, check, pretrained, subject_of
from chronotope.tasks.distilling import distil

GRID = ct.Grid(t=3, h=4, w=5)


class SelfAttention(nn.Module):
    def __init__(self, where: ct.Pattern | None = None):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mask = None if where is None else ct.plan(where, GRID).mask()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Two layers: the first looks at its own frame by itself, the second everywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.near, self.far = SelfAttention(ct.window(t=1)), SelfAttention()
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.near(x)
        return x + self.far(x)


def inputs(count: int, seed: int = 1) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(2, GRID.size, 16, generator=rng) for _ in range(count)]


def subject() -> Subject:
    """What the command line names."""
    return Subject(Net(), inputs(2), inputs(3, seed=2), GRID)


def test_what_a_layer_does_not_look_at_costs_no_error_to_leave_out() -> None:
    tried = [ct.window(t=1), ct.window(t=1, h=1, w=1)]
    found = adapt(subject(), budget=1e-4, tried=tried, queries=GRID.size, rounds=0)
    assert found.assignment.layers["near"] == (ct.window(t=1),) * 2
    assert found.assignment.layers["far"] == (ct.full(),) * 2
    assert found.outcomes[1].error < 1e-5 and found.assignment.density < 1


def test_the_budget_holds_on_the_inputs_that_were_chosen_by_and_nearly_on_others() -> None:
    own = subject()
    found = adapt(own, budget=0.05, queries=GRID.size, rounds=0)
    with torch.no_grad(), apply(own.model, found.assignment, GRID):
        patched = [own.model(x) for x in own.inputs]
    with torch.no_grad():
        plain = [own.model(x) for x in own.inputs]
    assert relative(plain, patched) <= 0.05
    assert found.outcomes[1].error <= 0.1
    assert found.outcomes[0].error < 1e-5


def test_outcomes_are_of_each_input_and_times_are_of_pairs() -> None:
    own = subject()
    (row,) = report(own.model, {"near": ct.window(t=1)}, own.held_out, grid=GRID, rounds=2)
    assert len(row.errors) == 3 and row.spread == interval(row.errors)
    assert 0 < row.attention < row.seconds and row.speedup > 0 and row.attention_speedup > 0 and row.memory > 0


def test_an_interval_of_the_mean_is_that_of_students_t() -> None:
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.30 * 1.0 / 3**0.5)
    assert interval([1.0]) != interval([1.0])


def test_candidates_fit_their_grid_and_leave_something_out() -> None:
    for grid in (GRID, ct.Grid(n=640), ct.Grid(t=1, h=7), ct.Grid(prefix=2, h=5, w=3)):
        found = candidates(grid)
        assert len(set(found)) == len(found) > 0
        assert all(ct.plan(one, grid).density <= 1 for one in found)


def test_a_model_that_is_not_itself_under_full_is_refused() -> None:
    class Odd(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    with pytest.raises(ct.ChronotopeError, match="its own: off by"):
        check(Subject(Odd(), inputs(1), inputs(1), GRID))


def test_the_command_writes_what_apply_reads(tmp_path: Path) -> None:
    ran = CliRunner().invoke(
        app, ["adapt", f"{__name__}:subject", "--budget", "0.2", "--rounds", "1", "--out", str(tmp_path)]
    )
    assert ran.exit_code == 0, ran.output
    assert "searched" in ran.output and "uniform" in ran.output
    facts = json.loads((tmp_path / "adapt.json").read_text())
    assert {row["name"] for row in facts["rows"]} >= {"dense", "searched"}
    assert (tmp_path / "adapt.html").stat().st_size > 1000
    own = subject()
    with apply(own.model, tmp_path / "assignment.json", GRID) as handle:
        own.model(own.inputs[0])
    assert len(handle.layers) == 2 and load(tmp_path / "assignment.json").error <= 0.2


class Told(Net):
    """Is told a noise level."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x) * (1 + timestep)


def told_subject() -> Subject:
    batches = [(x, torch.tensor(level)) for x, level in zip(inputs(6), (0.1, 0.9) * 3, strict=True)]
    return Subject(Told().eval(), batches[:4], batches[4:], GRID)


def test_the_command_chooses_by_noise_level(tmp_path: Path) -> None:
    command = ["adapt", f"{__name__}:told_subject", "--budget", "0.2", "--rounds", "1", "--out", str(tmp_path)]
    ran = CliRunner().invoke(app, [*command, "--levels", "0.5"])
    assert ran.exit_code == 0, ran.output
    assert list(load(tmp_path / "assignment.json").above) == [0.5]
    assert "far from 0.5 on" in (tmp_path / "adapt.html").read_text()
    ran = CliRunner().invoke(app, [*command, "--levels", "high"])
    assert ran.exit_code != 0 and "expected numbers" in str(ran.exception) + ran.output


@pytest.mark.parametrize(
    ("model", "given", "told"),
    [
        ("no.such.module:thing", None, "write it as package.module:function"),
        (f"{__name__}:Net", None, "without inputs"),
        ("does/not/exist", None, "cannot be loaded|needs transformers"),
    ],
)
def test_what_cannot_be_adapted_is_said(model: str, given: str | None, told: str) -> None:
    with pytest.raises(ct.ChronotopeError, match=told):
        subject_of(model, given, {})


def test_models_are_read_from_folders(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    assert type(pretrained(str(tmp_path))).__name__ == "ViTModel"
    batches = tmp_path / "batches.pt"
    torch.save([{"pixel_values": torch.randn(1, 3, 8, 8)} for _ in range(3)], batches)
    own = subject_of(str(tmp_path), str(batches), {})
    assert (len(own.inputs), len(own.held_out)) == (1, 2)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ct.ChronotopeError, match=r"no config\.json"):
        pretrained(str(tmp_path))


def test_models_of_diffusers_and_of_the_project_are_read_from_folders(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 1, "attention_head_dim": 8, "in_channels": 2, "num_layers": 1, "sample_size": 4}
    diffusers.DiTTransformer2DModel(**sizes, norm_num_groups=1).save_pretrained(tmp_path / "dit")
    assert type(pretrained(str(tmp_path / "dit"))).__name__ == "DiTTransformer2DModel"
    own = VideoDiT(patch=2, dim=24, layers=1, heads=2)
    own.save_pretrained(tmp_path / "own")
    torch.save([(torch.rand(1, 2, 1, 4, 4), torch.rand(1)) for _ in range(2)], tmp_path / "states.pt")
    named = "chronotope.models:VideoDiT.from_pretrained"
    found = subject_of(named, str(tmp_path / "states.pt"), {"folder": str(tmp_path / "own")})
    assert isinstance(found.model, VideoDiT) and len(found.held_out) == 1


@pytest.mark.parametrize("rank", [None, 4])
def test_fine_tuning_brings_a_patched_model_nearer_to_itself(rank: int | None) -> None:
    if rank is not None:
        pytest.importorskip("peft")
    model = Net()
    dense = copy.deepcopy(model)
    held_out = inputs(1, seed=9)[0]
    choice = Assignment({"near": (ct.window(t=1, h=3, w=3),) * 2, "far": (ct.window(t=1, h=3, w=3),) * 2})

    def error() -> float:
        with torch.no_grad(), apply(model, choice, GRID):
            return relative([dense(held_out)], [model(held_out)])

    before, names = error(), [name for name, _ in model.named_parameters()]
    losses = distil(model, choice, inputs(4), steps=40, rate=3e-3, rank=rank, grid=GRID)
    assert error() < 0.95 * before and len(losses) == 40
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(module._forward_hooks for module in model.modules())
    changed = [name for name, weight in model.named_parameters() if not torch.equal(weight, dense.get_parameter(name))]
    assert all("qkv" in name or "out" in name for name in changed) or rank is None
