"""A small random transformer of joint attention, for tests of controls that need no training: layers of two kinds."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import chronotope as ct

ROPE = ct.Rope(axes=("h", "w"), base=100.0)


class JointAttention(nn.Module):
    """Text and image look at each other, "double" with matrices of their own; positions turn the image's tokens."""

    def __init__(self, dim: int, heads: int, double: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(1 + double))
        self.leave = nn.ModuleList(nn.Linear(dim, dim) for _ in range(1 + double))

    def forward(self, text: Tensor, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        n, both = text.shape[1], torch.cat((self.qkv[-1](text), self.qkv[0](image)), 1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in both.chunk(3, -1))
        q, k = (torch.cat((x[:, :, :n], ROPE(x[:, :, n:], coords=ids)), 2) for x in (q, k))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.leave[-1](out[:, :n]), self.leave[0](out[:, n:])


class Small(nn.Module):
    """hidden_states [B, h w, 3], encoder_hidden_states [B, L, dim], img_ids [h w, 2] -> [B, h w, 3]."""

    def __init__(self, double: int = 1, single: int = 1, dim: int = 32, heads: int = 2):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, dim), nn.Linear(dim, 3)
        self.attentions = nn.ModuleList(JointAttention(dim, heads, i < double) for i in range(double + single))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU()) for _ in self.attentions
        )
        self.norm = nn.LayerNorm(dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(
        self,
        hidden_states: Tensor,
        img_ids: Tensor,
        timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is not None
        x, y = self.enter(hidden_states), encoder_hidden_states
        if timestep is not None:
            x = x + timestep.view(-1, 1, 1)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            dy, dx = attention(self.norm(y), self.norm(x), img_ids)
            x, y = x + dx, y + dy
            x, y = x + mlp(x), y + mlp(y)
        return self.leave(x)


def places(h: int, w: int) -> Tensor:
    """img_ids of a grid."""
    return ct.Grid(h=h, w=w).coords().float()


def flux(double: int = 1, single: int = 1, channels: int = 4) -> nn.Module:
    """A small Flux transformer of diffusers, random, gates open. Text [B, L, 16], pooled [B, 8]."""
    import diffusers

    model = diffusers.FluxTransformer2DModel(
        in_channels=channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def flux_ids(h: int, w: int) -> Tensor:
    """img_ids of a grid, as Flux counts them: (0, row, column)."""
    return F.pad(places(h, w), (1, 0))
