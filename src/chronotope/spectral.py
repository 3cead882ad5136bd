"""Places of the nodes of a graph, from the slow vibrations of its Laplacian."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError

SAME = 1e-8
"""Eigenvalues, which lie between 0 and 2, and entries of vectors that differ by less are taken as equal."""


def spectral(edges: Any, nodes: int, vectors: int, weights: Tensor | None = None) -> Float[Tensor, "nodes vectors"]:
    r"""Coordinates of nodes in which neighbours are near, as `places` of a `ct.Rope` or of a `ct.nn.Sinusoidal`.

    $$
    D^{-1} A\, x_k = (1 - \lambda_k)\, x_k, \qquad 0 = \lambda_0 < \lambda_1 \le \lambda_2 \dots, \qquad
    \sum_i d_i x_{ki}^2 = \sum_i d_i
    $$

    x_k = D^{-1/2} u_k, u_k being the eigenvectors of the normalised Laplacian I - D^{-1/2} A D^{-1/2}; those of
    eigenvalue 0, which tell components apart, are left out. Mean square 1: multiply for more turns of a rotary code.

    Signs: the sum of cubes is positive; where it is 0, the first entry that is not. Where eigenvalues coincide, as on a
    ring, any basis of their space would do; the one taken comes from projecting node 0, then node 1, ... onto it. So
    coordinates are the same on every machine; and they follow the nodes when these are renumbered, but for the signs
    and bases that symmetries of the graph leave open, which depend on the numbering.

    Args:
        edges: int [2, E], as for `ct.graph`; directions are left out.
        nodes: how many there are.
        vectors: columns.
        weights: positive, one for each edge; default 1.

    Example:
        >>> path = [[0, 1, 2], [1, 2, 3]]
        >>> rope = Rope(("t", "v"), places={"v": spectral(path, nodes=4, vectors=2)})
        >>> rope(torch.randn(1, 2, 5 * 4, 16), Grid(t=5, v=4)).shape
        torch.Size([1, 2, 20, 16])

    Raises ChronotopeError: edges of other nodes, weights that are not positive, fewer eigenvectors than asked for.

    Source: Belkin and Niyogi 2003, Laplacian eigenmaps; as angles of a rotary code, Reid et al. 2025, "Rotary Position
    Encodings for Graphs" (arXiv 2509.22259), who learn the frequencies; here they are those of the code.
    """
    adjacency = _adjacency(edges, nodes, weights)
    degree = adjacency.sum(1)
    rooted = torch.where(degree > 0, degree, 1.0).sqrt()
    # A node without edges has eigenvalue 0 of its own.
    laplacian = torch.diag((degree > 0).double()) - adjacency / rooted / rooted[:, None]
    values, found = torch.linalg.eigh(laplacian)
    start = int((values < SAME).sum())
    if not 1 <= vectors <= nodes - start:
        raise ChronotopeError(
            f"spectral(vectors={vectors}): a graph of {nodes} nodes in {start} parts has {nodes - start} eigenvectors."
        )
    columns: list[Tensor] = []
    while len(columns) < vectors:
        end = start + int((values[start:] - values[start] < SAME).sum())
        columns += _basis(found[:, start:end])
        start = end
    x = torch.stack(columns[:vectors], 1) * (degree.sum().sqrt() / rooted)[:, None]
    return torch.stack([_signed(column) for column in x.T], 1)


def _adjacency(edges: Any, nodes: int, weights: Tensor | None) -> Float[Tensor, "nodes nodes"]:
    """Symmetric, without loops."""
    pairs = torch.as_tensor(edges).detach().cpu()
    if pairs.ndim != 2 or pairs.shape[0] != 2 or pairs.is_floating_point() or nodes < 2:
        raise ChronotopeError(f"spectral: edges {list(pairs.shape)} of {nodes} nodes; expected whole numbers [2, E].")
    if pairs.numel() and not 0 <= int(pairs.min()) <= int(pairs.max()) < nodes:
        raise ChronotopeError(f"spectral: edges between {int(pairs.min())} and {int(pairs.max())} of {nodes} nodes.")
    given = torch.ones(pairs.shape[1]) if weights is None else weights.detach().cpu()
    if given.shape != pairs.shape[1:] or not bool((given > 0).all()):
        raise ChronotopeError(f"spectral: weights {list(given.shape)}; expected a positive one for each of the edges.")
    out = torch.zeros(nodes, nodes, dtype=torch.float64)
    out[pairs[0].long(), pairs[1].long()] = given.double()
    return torch.maximum(out, out.T).fill_diagonal_(0)


def _basis(space: Float[Tensor, "nodes k"]) -> list[Float[Tensor, "nodes"]]:
    """An orthonormal basis of the space of these columns that depends on the space alone."""
    if space.shape[1] == 1:
        return [space[:, 0]]
    out: list[Tensor] = []
    for row in space:
        vector = space @ row
        for other in out:
            vector = vector - (vector @ other) * other
        # A node whose projection is nearly one of those before it would give a direction of rounding errors.
        if float(vector.norm()) > SAME**0.5:
            out.append(vector / vector.norm())
        if len(out) == space.shape[1]:
            break
    return out


def _signed(x: Float[Tensor, "nodes"]) -> Float[Tensor, "nodes"]:
    cubes = float(x.pow(3).sum())
    if abs(cubes) < SAME * len(x):
        cubes = float(x[x.abs() > SAME**0.5][0])
    return x if cubes > 0 else -x
