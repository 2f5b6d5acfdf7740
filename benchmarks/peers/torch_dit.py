"""DiT in plain PyTorch, for comparison: as `models.py` of facebookresearch/DiT and fast-DiT, with their names.

It takes the keys of `config/DiT_*.json`; labels are dropped by the data, as in this project.
"""

import torch
from torch import nn
from torch.nn.functional import layer_norm
from torch_layers import Attention, Mlp, Network, PatchEmbed, sinusoid, unpatchify

SINUSOIDS = 256


def modulate(x, shift, scale):
    return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(sinusoid(t, SINUSOIDS))


class LabelEmbedder(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class DiTBlock(nn.Module):
    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.attn = Attention(width, heads, qkv_bias=True)
        self.mlp = Mlp(width, int(width * mlp_ratio), approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(x, shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale))


class DiT(Network):
    """Latents x [B, C, H, W], timesteps t [B], labels y [B] -> [B, 2 C, H, W], or [B, C, H, W] without variance.

    The positions are a buffer to be filled: random ones cost the same.
    """

    def __init__(self, config):
        super().__init__()
        heads, patch, channels = config["num_attention_heads"], config["patch_size"], config["in_channels"]
        width = heads * config["attention_head_dim"]
        self.patch, self.channels = patch, channels * (2 if config["learn_sigma"] else 1)
        self.x_embedder = PatchEmbed(channels, width, patch)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config["num_classes"], width)
        self.register_buffer("pos_embed", torch.randn(1, (config["sample_size"] // patch) ** 2, width))
        self.blocks = nn.ModuleList([DiTBlock(width, heads, config["mlp_ratio"]) for _ in range(config["num_layers"])])
        self.final_layer = FinalLayer(width, patch**2 * self.channels)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = self.run(block, x, c)
        return unpatchify(self.final_layer(x, c), self.patch, self.channels)
