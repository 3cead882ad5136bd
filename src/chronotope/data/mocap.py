"""Motion capture: rotations of joints, frame by frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError

Motions = dict[tuple[str, str], list[Float[Tensor, "t joints 3"]]]


def read_motions(path: str | Path) -> Motions:
    """Arrays `part/action/file` (.npz), frames by 3 numbers for each joint: films by part and action, in order of name.

    The first three numbers are the place of the body; the others are rotation vectors: an axis times an angle.

    Raises ChronotopeError: no such file, or other arrays.
    """
    path = Path(path)
    if not path.is_file():
        raise ChronotopeError(f"motions {path}: no such file; expected arrays part/action/file (.npz).")
    out: Motions = {}
    with np.load(path, allow_pickle=False) as file:
        for name in sorted(file):
            given, place = file[name], name.split("/")
            if len(place) != 3 or given.ndim != 2 or given.shape[1] % 3:
                raise ChronotopeError(
                    f"{path}: {name} of shape {list(given.shape)}; expected part/action/file, frames x (3 * joints)."
                )
            out.setdefault((place[0], place[1]), []).append(torch.from_numpy(given).float().unflatten(1, (-1, 3)))
    return out


def rotation(vector: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """The matrix of a rotation vector: exp of its cross product."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    angle = vector.norm(dim=-1)[..., None, None]
    # torch.sinc(x) is sin(pi x) / (pi x): neither form divides by an angle of 0.
    once, twice = torch.sinc(angle / torch.pi), torch.sinc(angle / (2 * torch.pi)) ** 2 / 2
    return torch.eye(3, dtype=vector.dtype, device=vector.device) + once * cross + twice * (cross @ cross)


def euler(vector: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3"]:
    """Angles a, b, c about x, y, z of a rotation vector's matrix R: R^T = Z(c) Y(b) X(a)."""
    r = rotation(vector)
    a = torch.atan2(r[..., 1, 2], r[..., 2, 2])
    b = -torch.asin(r[..., 0, 2].clamp(-1, 1))
    c = torch.atan2(r[..., 0, 1], r[..., 0, 0])
    return torch.stack([a, b, c], -1)
