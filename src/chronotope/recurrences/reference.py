"""The meaning of a recurrence: one token after the other, in float64."""

from __future__ import annotations

import torch

from chronotope.recurrences.call import Backend, Inputs, Outputs


def compute(inputs: Inputs, chunk: int) -> Outputs:
    """S' = exp(decay_t) S;  S = S' + k_t^T u_t;  out_t = q_t S, where u_t = v_t, or beta_t (v_t - k_t S')."""
    dtype = inputs.q.dtype
    q, k, v = (x.double() for x in (inputs.q, inputs.k, inputs.v))
    memory, normalizer = inputs.memory.double(), inputs.normalizer
    z = None if normalizer is None else normalizer.double()
    outs, totals = [], []
    for t in range(q.shape[2]):
        key = k[:, :, t]
        if inputs.decay is not None:
            keep = inputs.decay[:, :, t].double().exp()
            keep = keep if keep.ndim == 3 else keep[..., None]
            memory = keep[..., None] * memory
            z = None if z is None else keep * z
        written = v[:, :, t]
        if inputs.beta is not None:
            found = torch.einsum("bhd,bhde->bhe", key, memory)
            written = inputs.beta[:, :, t, None].double() * (written - found)
        memory = memory + key[..., None] * written[..., None, :]
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], memory))
        if z is not None:
            z = z + key
            totals.append((q[:, :, t] * z).sum(-1))
    out = torch.stack(outs, 2) if outs else torch.zeros_like(v)
    total = None if z is None else (torch.stack(totals, 2) if totals else z.new_zeros(q.shape[:3])).to(dtype)
    return Outputs(out.to(dtype), total, memory.to(dtype), None if z is None else z.to(dtype))


REFERENCE = Backend(
    name="reference",
    about="steps in float64; defines the meaning",
    compute=compute,
    devices=("cpu", "cuda"),
    dtypes=(torch.float32, torch.float64),
    chunk=1,
    priority=0,
)
