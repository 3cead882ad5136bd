"""Models of transformers whose attention is neither `sdpa` nor `eager`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import near, nothing_is_left  # noqa: F401
from torch import Tensor

import chronotope as ct
from chronotope.adapt import attach

transformers = pytest.importorskip("transformers")

TOKENS = 24
SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 50,
}  # fmt: skip
LLAMA = (transformers.LlamaConfig, transformers.LlamaForCausalLM, {})
GEMMA = (transformers.Gemma2Config, transformers.Gemma2ForCausalLM, {"head_dim": 16, "sliding_window": 5})


def made(kind: Any, name: str) -> Any:
    config, model, more = kind
    torch.manual_seed(0)
    return model(config(**SIZES, **more, attn_implementation=name)).eval()


def inputs() -> dict[str, Tensor]:
    tokens = torch.randint(0, 50, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    seen = torch.ones(2, TOKENS, dtype=torch.long)
    seen[1, 15:] = 0
    return {"input_ids": tokens, "attention_mask": seen}


@pytest.mark.slow  # transformers compiles it
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [LLAMA, GEMMA], ids=["llama", "gemma2"])
def test_flex_attention_is_patched_by_way_of_another(kind: Any) -> None:
    model, other, given = made(kind, "flex_attention"), made(kind, "eager"), inputs()
    seen = given["attention_mask"].bool()
    with torch.no_grad():
        before = model(**given).logits
        with attach(model, ct.full()) as handle:
            near(model(**given).logits[seen], before[seen], 2e-5)
            assert all(layer.done for layer in handle.layers)
        with attach(model, ct.window(n=3)), attach(other, ct.window(n=3)):
            near(model(**given).logits[seen], other(**given).logits[seen], 1e-6)
            assert not torch.allclose(model(**given).logits[seen], before[seen], atol=1e-3)
            tokens = model.generate(given["input_ids"][:1], max_new_tokens=4, do_sample=False)
        assert tokens.shape == (1, TOKENS + 4)
        assert model.config._attn_implementation == "flex_attention"
        assert torch.equal(model(**given).logits, before)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_named_again_afterwards(name: str) -> None:
    """The package is not needed: as long as the model is patched, nothing calls it."""
    model, other, given = made(LLAMA, "sdpa"), made(LLAMA, "sdpa"), inputs()
    model.config._attn_implementation_internal = name
    seen = given["attention_mask"].bool()
    with torch.no_grad():
        first = attach(model, ct.window(n=3))
        with attach(model, ct.window(n=5)), attach(other, ct.window(n=3)):
            near(model(**given).logits[seen], other(**given).logits[seen], 1e-6)
        first.remove()
    assert model.config._attn_implementation_internal == name


def test_what_nobody_here_knows_is_listed() -> None:
    model = made(LLAMA, "sdpa")
    model.config._attn_implementation_internal = "paged|sdpa"
    with attach(model, ct.window(n=3)) as handle:
        assert model.config._attn_implementation_internal == "paged|sdpa"
    assert all("its implementation is 'paged|sdpa'" in layer.why for layer in handle.layers)
