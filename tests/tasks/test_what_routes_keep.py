"""What routes keep of trained models: the parts of the command, on small inputs."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

import chronotope as ct
from chronotope.models import Language
from chronotope.report.fidelity import fidelity_tables, write_fidelity
from chronotope.tasks import language
from chronotope.tasks.fidelity import LIMIT, STATIC, Sample, compare, menu, teach
from chronotope.tasks.measure import qkv
from chronotope.tasks.show import console

GRID = ct.Grid(n=64)


@pytest.fixture(scope="module")
def sample() -> Sample:
    torch.manual_seed(0)
    model = Language(16, 2, 1)
    layers = [qkv(model, torch.randint(256, (batch, GRID.size))) for batch in (1, 2)]
    return Sample("untrained", GRID, {"n": 4}, ct.causal(), *layers)


def test_q_k_v_are_what_the_layer_attends_with(sample: Sample) -> None:
    torch.manual_seed(1)
    model, x = Language(16, 2, 1), torch.randint(256, (1, GRID.size))
    (layer,) = qkv(model, x)
    (attention,) = model.attentions()
    seen: list[torch.Tensor] = []
    attention.out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(x)
    out = ct.attention(layer.q, layer.k, layer.v, grid=GRID, where=ct.causal())
    assert torch.allclose(out.transpose(1, 2).flatten(2), seen[0], atol=1e-6)


def test_a_score_learns_what_each_block_gets(sample: Sample) -> None:
    layer = sample.seen[0]
    cut = ct.route.Cut.of("test", sample.block)

    def mass(score: ct.route.Score) -> float:
        route = ct.route.Blockwise(cut, ct.route.TopK(0.25), ct.route.Moments(), score)
        return float(ct.fidelity(layer.q, layer.k, layer.v, grid=GRID, where=route, dense=ct.causal()).mass.mean())

    torch.manual_seed(0)
    assert mass(teach(layer, sample)) > mass(ct.route.Bilinear(2, 24, 16))


def test_every_entry_is_a_row_and_the_oracle_is_first(sample: Sample, tmp_path: Path) -> None:
    rows = compare(sample, console())
    assert {row.name for row in rows} == {name for name, _, _ in menu(sample)}
    assert all(0 < row.density <= 1 and 0 < row.mass <= 1.0001 for row in rows)
    assert all((row.above is None) == (row.kind == STATIC) for row in rows)
    best = max(row.above for row in rows if row.above is not None)
    assert best == max(row.above for row in rows if row.kind == LIMIT and row.above is not None)
    (table,) = fidelity_tables(rows)
    assert table.row_count == len(rows)
    assert "share of dense attention kept" in write_fidelity(rows, tmp_path).read_text()
    assert (tmp_path / "fidelity.json").exists()


def test_a_text_is_read_and_a_model_learns_it(tmp_path: Path) -> None:
    packed = tmp_path / "text.gz"
    packed.write_bytes(gzip.compress(b"abcd" * 8192))
    learned, held_out = language.split(language.read_text(packed))
    assert len(held_out) == round(0.1 * 4 * 8192)
    torch.manual_seed(0)
    before = Language().loss(held_out[:64].long()[None])
    after = language.learn(learned, 32, 20).loss(held_out[:64].long()[None])
    assert after < 0.5 * before
    assert len(language.read_text(None)) > 1 << 19


def test_a_text_that_is_not_there_or_too_short_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a")
    for path, text in ((tmp_path / "none.txt", "no such file"), (short, "1 bytes")):
        with pytest.raises(ct.ChronotopeError, match=text):
            language.read_text(path)
