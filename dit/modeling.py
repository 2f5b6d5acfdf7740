"""The DiT backbone: a latent, a timestep and a class in, noise (and variance) out.

W. Peebles, S. Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748, with adaLN-Zero blocks. Parameter
names and shapes are those of facebookresearch/DiT `models.py` (Linear weights transposed, as Paddle stores them).
"""

import numpy as np
import paddle
from paddle import nn

from latent_diffusion.attention import Attention
from latent_diffusion.ops import Linear, gated_sum, modulated_layer_norm
from latent_diffusion.transformer import Backbone, Block, Mlp, PatchEmbed, sinusoid, unpatchify

from .configuration import DiTConfig

FREQUENCIES = 128
# The n of exp(-ln(10000) i / n): official DiT divides by the number of frequencies, (pp)diffusers by one less.
_FREQUENCY_DENOMINATOR = {"official": FREQUENCIES, "ppdiffusers": FREQUENCIES - 1}

# The name of the label table among the weights; its last row is the null class.
LABEL_TABLE = "y_embedder.embedding_table.weight"

# The official sampler guides these first channels of the noise only (`forward_with_cfg` of `models.py`).
GUIDED_CHANNELS = 3


class TimestepEmbedder(nn.Layer):
    """Timesteps [B] -> [B, D]: 128 cosines and 128 sines, then an MLP."""

    def __init__(self, hidden_size: int, convention: str):
        super().__init__()
        self.denominator = _FREQUENCY_DENOMINATOR[convention]
        self.mlp = nn.Sequential(Linear(2 * FREQUENCIES, hidden_size), nn.Silu(), Linear(hidden_size, hidden_size))

    def forward(self, t: paddle.Tensor) -> paddle.Tensor:
        embedding = sinusoid(t, 2 * FREQUENCIES, self.denominator)
        return self.mlp(embedding.astype(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Layer):
    """Labels [B] in [0, num_classes] -> [B, D]; the last row of the table is the null class of guidance."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: paddle.Tensor) -> paddle.Tensor:
        return self.embedding_table(y)


class DiTBlock(Block):
    """Transformer block with adaLN-Zero conditioning: tokens x [B, N, D], condition c [B, D] -> [B, N, D]."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        dim = config.hidden_size
        self.attn = Attention(dim, config.num_attention_heads)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), approximate=True)
        self.adaLN_modulation = nn.Sequential(nn.Silu(), Linear(dim, 6 * dim))

    def forward(self, x: paddle.Tensor, c: paddle.Tensor) -> paddle.Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, axis=1)
        attend, feed = self._merged_calls(x)
        x = gated_sum(x, gate_msa, attend(self.attn, modulated_layer_norm(x, shift_msa, scale_msa)))
        return gated_sum(x, gate_mlp, feed(self.mlp, modulated_layer_norm(x, shift_mlp, scale_mlp)))


class FinalLayer(nn.Layer):
    """Tokens [B, N, D], condition [B, D] -> patches [B, N, p * p * out_channels]."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim = config.hidden_size
        self.linear = Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.Silu(), Linear(dim, 2 * dim))

    def forward(self, x: paddle.Tensor, c: paddle.Tensor) -> paddle.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, axis=1)
        return self.linear(modulated_layer_norm(x, shift, scale))


class DiT(Backbone):
    """Class-conditional diffusion transformer.

    Training draws nothing at random here: replacing labels by the null class is the data's part.
    """

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.x_embedder = PatchEmbed(config.in_channels, config.hidden_size, config.patch_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size, config.timestep_convention)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
        self.pos_embed = self.create_parameter(
            [1, config.side**2, config.hidden_size],
            attr=paddle.ParamAttr(trainable=False),
        )
        self.blocks = nn.LayerList([DiTBlock(config) for _ in range(config.num_layers)])
        self.final_layer = FinalLayer(config)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """The paper's initialization: Xavier for linear layers, sin-cos positions, zero gates and output."""
        xavier, zeros, normal = (
            nn.initializer.XavierUniform(),
            nn.initializer.Constant(0.0),
            nn.initializer.Normal(0.0, 0.02),
        )
        for layer in self.sublayers():
            if isinstance(layer, Linear):
                xavier(layer.weight)
                zeros(layer.bias)
        proj = self.x_embedder.proj
        # As a linear layer from the values of a patch: Xavier over [D, C * p * p], not over the kernel's own fans.
        width, fan_in = proj.weight.shape[0], int(np.prod(proj.weight.shape[1:]))
        nn.initializer.XavierUniform(fan_in=fan_in, fan_out=width)(proj.weight)
        zeros(proj.bias)
        normal(self.y_embedder.embedding_table.weight)
        normal(self.t_embedder.mlp[0].weight)
        normal(self.t_embedder.mlp[2].weight)
        for modulation in [block.adaLN_modulation for block in self.blocks] + [self.final_layer.adaLN_modulation]:
            zeros(modulation[1].weight)
        zeros(self.final_layer.linear.weight)
        self.pos_embed.set_value(sincos_positions(self.config.hidden_size, self.config.side))

    @property
    def _last_block(self) -> DiTBlock:
        return self.blocks[-1]

    def forward(self, x: paddle.Tensor, t: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
        """Predicts the noise (and the variance values) of noisy latents.

        Args:
            x: latents [B, C, H, W].
            t: timesteps [B] in [0, 1000), integer or float.
            y: labels [B] int64 in [0, num_classes]; `num_classes` is the null class.

        Returns:
            [B, out_channels, H, W]: noise, then variance values in about [-1, 1] when `learn_sigma`.
        """
        x = self.x_embedder(x.astype(self.pos_embed.dtype))
        x = x + self.pos_embed.expand(x.shape)
        c = self.t_embedder(t) + self.y_embedder(y)
        # A copy of the condition for each user: their gradients are then summed in one fixed order, and recompute
        # gives the same bits as without.
        *conditions, final_condition = c.unsqueeze(0).expand([len(self.blocks) + 1, *c.shape]).unbind(0)
        for block, c in zip(self.blocks, conditions, strict=True):
            x = self._run(block, x, c)
        return unpatchify(self.final_layer(x, final_condition), self.config.patch_size, self.config.out_channels)

    def forward_with_cfg(
        self,
        x: paddle.Tensor,
        t: paddle.Tensor,
        y: paddle.Tensor,
        cfg_scale: float,
    ) -> paddle.Tensor:
        """Guided prediction in one batched forward pass (`forward_with_cfg` of the official `models.py`).

        Args:
            x: latents [2 B, C, H, W], of which only the first half is read.
            t: timesteps [2 B].
            y: labels [2 B]: B classes, then B null classes.
            cfg_scale: guidance scale, 1 for none.

        Returns:
            [2 B, out_channels, H, W]; guided channels are equal in both halves, the others are their own half's.
        """
        half = x[: x.shape[0] // 2]
        out = self(paddle.concat([half, half]), t, y)
        eps, rest = out[:, :GUIDED_CHANNELS], out[:, GUIDED_CHANNELS:]
        cond, uncond = eps.chunk(2, axis=0)
        guided = uncond + cfg_scale * (cond - uncond)
        return paddle.concat([paddle.concat([guided, guided]), rest], axis=1)


def sincos_positions(width: int, side: int) -> np.ndarray:
    """Fixed 2-D sin-cos position embedding, float32 [1, side * side, width] (`get_2d_sincos_pos_embed`, official DiT).

    The first half of the width encodes the column, the second the row.
    """
    frequencies = 10000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width / 4))

    def encode(positions: np.ndarray) -> np.ndarray:
        angles = np.outer(positions.reshape(-1), frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.meshgrid(np.arange(side, dtype=np.float64), np.arange(side, dtype=np.float64), indexing="ij")
    return np.concatenate([encode(columns), encode(rows)], axis=1)[None].astype("float32")
