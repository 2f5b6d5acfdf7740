"""The U-ViT backbone: a noisy latent, a timestep and an encoded prompt in, noise out.

F. Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", arXiv 2209.12152: time, text and image
patches are all tokens, and long skip connections join shallow and deep blocks. Parameter names and shapes are those of
baofff/U-ViT `libs/uvit_t2i.py` (Linear weights transposed, as Paddle stores them).
"""

import paddle
from paddle import nn

from latent_diffusion.attention import Attention
from latent_diffusion.ops import LayerNorm, Linear
from latent_diffusion.transformer import Backbone, Block, Mlp, PatchEmbed, sinusoid, unpatchify

from .configuration import UViTConfig


class UViTBlock(Block):
    """Transformer block: tokens x [B, N, D] -> [B, N, D]; with `skip`, also takes tokens of an earlier block."""

    def __init__(self, config: UViTConfig, skip: bool = False):
        super().__init__(config, config.extras)
        dim = config.hidden_size
        self.norm1 = LayerNorm(dim)
        # The reference computes the products in float32 under mixed precision, too.
        self.attn = Attention(dim, config.num_attention_heads, config.qkv_bias, float32_products=True)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), approximate=False)
        self.skip_linear = Linear(2 * dim, dim) if skip else None

    def forward(self, x: paddle.Tensor, skip: paddle.Tensor | None = None) -> paddle.Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(paddle.concat([x, skip], axis=-1))
        attend, feed = self._merged_calls(x)
        x = x + attend(self.attn, self.norm1(x))
        return x + feed(self.mlp, self.norm2(x))


class UViT(Backbone):
    """Text-to-image U-ViT; it draws nothing at random."""

    def __init__(self, config: UViTConfig):
        super().__init__(config)
        dim = config.hidden_size
        self.patch_embed = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.context_embed = Linear(config.clip_dim, dim)
        self.pos_embed = self.create_parameter([1, config.extras + config.side**2, dim])
        self.in_blocks = nn.LayerList([UViTBlock(config) for _ in range(config.num_layers // 2)])
        self.mid_block = UViTBlock(config)
        self.out_blocks = nn.LayerList([UViTBlock(config, skip=True) for _ in range(config.num_layers // 2)])
        self.norm = LayerNorm(dim)
        self.decoder_pred = Linear(dim, config.patch_size**2 * config.in_channels)
        self.final_layer = nn.Conv2D(config.in_channels, config.in_channels, 3, padding=1)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Normal(0, 0.02), cut at -2 and 2, for linear layers and positions; PyTorch's default for convolutions."""
        normal = nn.initializer.TruncatedNormal(0.0, 0.02, -2.0, 2.0)
        normal(self.pos_embed)
        for layer in self.sublayers():
            if isinstance(layer, Linear):
                normal(layer.weight)
                if layer.bias is not None:
                    nn.initializer.Constant(0.0)(layer.bias)
            elif isinstance(layer, nn.Conv2D):
                # Uniform within 1 / sqrt(fan in), weight and bias.
                bound = float(layer.weight[0].size) ** -0.5
                uniform = nn.initializer.Uniform(-bound, bound)
                uniform(layer.weight)
                uniform(layer.bias)

    @property
    def _last_block(self) -> UViTBlock:
        return self.out_blocks[-1]

    def forward(self, x: paddle.Tensor, t: paddle.Tensor, context: paddle.Tensor) -> paddle.Tensor:
        """Predicts the noise of noisy latents.

        Args:
            x: latents [B, C, H, W].
            t: timesteps [B] in [1, 1000], integer or float.
            context: encoded prompts [B, L, clip_dim], L = `num_text_tokens`.

        Returns:
            [B, C, H, W].
        """
        dtype = self.pos_embed.dtype
        time = sinusoid(t, self.config.hidden_size, self.config.hidden_size // 2).astype(dtype).unsqueeze(1)
        tokens = [time, self.context_embed(context.astype(dtype)), self.patch_embed(x.astype(dtype))]
        x = paddle.concat(tokens, axis=1)
        x = x + self.pos_embed.expand(x.shape)
        skips = []
        for block in self.in_blocks:
            x = self._run(block, x)
            skips.append(x)
        x = self._run(self.mid_block, x)
        for block in self.out_blocks:
            x = self._run(block, x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, self.config.extras :]
        return self.final_layer(unpatchify(x, self.config.patch_size, self.config.in_channels))
