"""What the plain PyTorch networks are built of; names and shapes as in timm, which both official codes use."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class PatchEmbed(nn.Module):
    """Latents [B, C, H, W] -> tokens [B, N, D]."""

    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Tokens [B, N, D] -> [B, N, D], with PyTorch's fused attention."""

    def __init__(self, width, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with GELU between; `approximate` is PyTorch's, "tanh" or "none"."""

    def __init__(self, width, hidden, approximate):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.approximate = approximate

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Network(nn.Module):
    """Base of both: `gradient_checkpointing` computes blocks again in the backward pass."""

    gradient_checkpointing = False

    def enable_gradient_checkpointing(self):
        self.gradient_checkpointing = True

    def run(self, block, *inputs):
        return checkpoint(block, *inputs, use_reentrant=False) if self.gradient_checkpointing else block(*inputs)


def sinusoid(t, width):
    """Timesteps [B] -> cosines, then sines [B, width]."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def unpatchify(x, patch, channels):
    """Patches [B, N, p * p * C] -> [B, C, H, W]."""
    side = math.isqrt(x.shape[1])
    x = x.reshape(-1, side, side, patch, patch, channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, channels, side * patch, side * patch)
