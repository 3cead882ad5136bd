"""Sequences in topics of random lengths: what pages about chunks are tried on."""

import torch

from chronotope.papers.routing.dhsa import ChunkState, kept


def topics(seed, tokens=4096, segments=60, shortest=20, longest=150, size=64, noise=1.0):
    """(boundaries [segments + 1], one vector for each topic, keys [tokens, size]: the topic's vector and noise)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (segments,), generator=generator)
    while int(lengths.sum()) != tokens:  # mend one at a time, so that the sum fits
        step = 1 if int(lengths.sum()) < tokens else -1
        one = int(torch.randint(segments, (1,), generator=generator))
        if shortest <= int(lengths[one]) + step <= longest:
            lengths[one] += step
    vectors = torch.randn(segments, size, generator=generator)
    keys = vectors.repeat_interleave(lengths, 0) + noise * torch.randn(tokens, size, generator=generator)
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), vectors, keys


def as_they_are(edges, keys):
    """The boundaries of the topics."""
    return edges


def held(cut, size, noise, seeds):
    """Share of the attention mass of one topic, asked for, in the 512 keys of 4096 that are kept.

    By chunks that begin where `cut(edges, keys)` says, and by blocks of 64.
    """
    found = []
    for seed in range(seeds):
        edges, vectors, keys = topics(seed, size=size, noise=noise)
        generator = torch.Generator().manual_seed(1000 + seed)
        asked = int(torch.randint(60, (1,), generator=generator))
        q = vectors[asked] + noise * torch.randn(size, generator=generator)
        weight = (keys @ q / size**0.5).softmax(0)
        topic = torch.arange(4096)
        topic = (topic >= edges[asked]) & (topic < edges[asked + 1])
        for chunks in (cut(edges, keys), torch.arange(0, 4097, 64)):
            state = ChunkState.of(keys[None, None], keys[None, None], chunks)
            mask = torch.zeros(4096, dtype=torch.bool)
            mask[kept(q[None, None, None], state, 512)[0, 0]] = True
            assert int(mask.sum()) == 512
            found.append((weight[mask & topic].sum() / weight[topic].sum()).item())
    return sum(found[::2]) / seeds, sum(found[1::2]) / seeds
