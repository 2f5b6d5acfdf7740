"""U-ViT in plain PyTorch, for comparison: as `libs/uvit_t2i.py` of baofff/U-ViT, with its names.

It takes the keys of `config/uvit_*.json`.
"""

import torch
from torch import nn
from torch_layers import Attention, Mlp, Network, PatchEmbed, sinusoid, unpatchify


class UViTBlock(nn.Module):
    def __init__(self, config, width, skip=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, config["num_attention_heads"], config["qkv_bias"])
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * config["mlp_ratio"]), approximate="none")
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(Network):
    """Latents x [B, C, H, W], timesteps t [B], encoded prompts [B, L, clip_dim] -> noise [B, C, H, W]."""

    def __init__(self, config):
        super().__init__()
        width = config["num_attention_heads"] * config["attention_head_dim"]
        channels, depth = config["in_channels"], config["num_layers"] // 2
        self.width, self.patch, self.channels = width, config["patch_size"], channels
        self.extras = 1 + config["num_text_tokens"]
        tokens = self.extras + (config["sample_size"] // self.patch) ** 2
        self.patch_embed = PatchEmbed(channels, width, self.patch)
        self.context_embed = nn.Linear(config["clip_dim"], width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.in_blocks = nn.ModuleList([UViTBlock(config, width) for _ in range(depth)])
        self.mid_block = UViTBlock(config, width)
        self.out_blocks = nn.ModuleList([UViTBlock(config, width, skip=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, self.patch**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, t, context):
        tokens = [sinusoid(t, self.width).unsqueeze(1), self.context_embed(context), self.patch_embed(x)]
        x = torch.cat(tokens, dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = self.run(block, x)
            skips.append(x)
        x = self.run(self.mid_block, x)
        for block in self.out_blocks:
            x = self.run(block, x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, self.extras :]
        return self.final_layer(unpatchify(x, self.patch, self.channels))
