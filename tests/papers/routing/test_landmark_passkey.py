"""Landmark Attention (system 74): pass-keys found at four times the length of training, by the best 2 of 31 blocks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.routing.landmark import LandmarkAttention, insert_landmarks

KEYS, VALUES, NOISE, LONG = 16, 10, 16, 31
MARK = KEYS + VALUES + NOISE


def pass_keys(generator, batch, blocks, pairs, apart=0):
    """Noise with pairs of a key and a value; at the end up to 8 keys come again and ask for theirs. Landmarks are in.

    apart: whole blocks before the end that have no pair.
    """
    n = blocks * LONG
    ids = KEYS + VALUES + torch.randint(NOISE, (batch, n), generator=generator)
    key = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :pairs]
    value = KEYS + torch.randint(VALUES, key.shape, generator=generator)
    free = torch.tensor([i for i in range(n - max(10, apart * LONG)) if i % LONG % 2 == 0 and i % LONG < LONG - 1])
    place = free[torch.rand(batch, len(free), generator=generator).argsort(1)[:, :pairs]]
    ids.scatter_(1, place, key).scatter_(1, place + 1, value)
    asked = n - 8 + torch.rand(batch, 8, generator=generator).argsort(1)[:, :pairs]
    which = torch.rand(batch, pairs, generator=generator).argsort(1)[:, :8]
    ids.scatter_(1, asked, key.gather(1, which))
    target = torch.full_like(ids, -100).scatter_(1, asked, value.gather(1, which))
    both = torch.stack((ids, target), 2).float()
    return insert_landmarks(both, torch.tensor([float(MARK), -100.0]), LONG).long().unbind(2)


class Finder(nn.Module):
    """Tokens beside the ones before them; a layer where landmarks gather their block; then the layer in question."""

    def __init__(self, mixer, dim=64):
        super().__init__()
        self.token, self.head = nn.Embedding(MARK + 1, dim // 2), nn.Linear(dim, KEYS + VALUES)
        nn.init.normal_(self.token.weight, std=0.5)
        gather = ct.window(n=1) | (ct.causal() & ct.predicate(lambda q, k: q.n == LONG))
        local = ct.nn.Attention(dim, 2, where=ct.blocks(t=1) & gather, position=ct.Rope("n"))
        self.stack = ct.nn.Stack([ct.nn.Block([m], mlp_ratio=2.0) for m in (local, mixer)])

    def embed(self, ids):
        return torch.cat((self.token(ids), self.token(F.pad(ids[:, :-1], (1, 0), value=MARK))), -1)

    def forward(self, ids):
        return self.head(self.stack(self.embed(ids), ct.Grid(t=ids.shape[1] // (LONG + 1), n=LONG + 1)))

    def stepped(self, ids):
        state, out = self.stack.init_state(len(ids), ct.Grid(t=1, n=LONG + 1)), []
        for part in self.embed(ids).split(LONG + 1, 1):
            y, state = self.stack.step(part, state)
            out.append(y)
        return self.head(torch.cat(out, 1))


def learned(make, seed=0):
    """A model that has learned to find 6 to 12 pairs in sequences of up to 256 tokens, short ones first."""
    torch.manual_seed(seed)
    model, generator, step = Finder(make()), torch.Generator().manual_seed(seed), 0
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    phases = ((150, 64, 1, 6), (200, 32, 3, 6), (400, 16, 8, 12))
    for steps, batch, blocks, pairs in phases:
        for _ in range(steps):
            optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 50, 1 - step / 750)
            ids, target = pass_keys(generator, batch, blocks, pairs)
            loss = F.cross_entropy(model(ids).flatten(0, 1), target.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
    return model


@torch.no_grad()
def found(model, blocks=32, sequences=100):
    """Share of single pass-keys said, at 1024 tokens, none of them in the last two blocks."""
    ids, target = pass_keys(torch.Generator().manual_seed(99), sequences, blocks, 1, apart=2)
    return float((model.stepped(ids).argmax(-1) == target)[target != -100].float().mean())


# 2026-11-21: 1.000 (0.950 from another seed; with weight decay 0.01 from 0.82 to 0.98), and 0.090 for the window.
@pytest.mark.slow
def test_a_pass_key_is_recalled_at_1024_tokens_after_training_at_256():
    share = found(learned(lambda: LandmarkAttention(64, 2, block=LONG, keep=2)))
    print(f"pass-keys recalled with the best 2 of 31 blocks: {share:.3f}")
    assert share >= 0.95


@pytest.mark.slow
def test_a_window_recalls_none():
    where, position = ct.window(t=(1, 0)) & ct.causal(), ct.Rope(("t", "n"))
    share = found(learned(lambda: ct.nn.Attention(64, 2, where=where, position=position)))
    print(f"pass-keys recalled by a window of two blocks: {share:.3f}")
    assert share < 0.25  # values are 10
