"""Floating-point operations of the networks, counted from their configurations: two per multiply-add.

Matrix products, convolutions and attention count; what is done element by element does not. The DiT paper's Gflops
(table 1) are multiply-adds, half of these.
"""

from dit.configuration import DiTConfig
from uvit_ldm.configuration import UViTConfig

# A training step over a forward pass: the backward pass has a product for the inputs and one for the weights of each.
TRAINING = 3

# Width of the timestep sinusoids of DiT.
SINUSOIDS = 256


def forward_flops(config: DiTConfig | UViTConfig) -> int:
    """Of a forward pass of one sample, without guidance."""
    return _uvit(config) if isinstance(config, UViTConfig) else _dit(config)


def _dit(config: DiTConfig) -> int:
    width, tokens, patch_values = config.hidden_size, config.side**2, config.patch_size**2
    block = _block(tokens, width, config.mlp_ratio) + _product(1, width, 6 * width)
    condition = _product(1, SINUSOIDS, width) + _product(1, width, width)
    final = _product(1, width, 2 * width) + _product(tokens, width, patch_values * config.out_channels)
    return _product(tokens, patch_values * config.in_channels, width) + condition + config.num_layers * block + final


def _uvit(config: UViTConfig) -> int:
    width, image_tokens, patch_values = config.hidden_size, config.side**2, config.patch_size**2 * config.in_channels
    tokens, skips = config.extras + image_tokens, config.num_layers // 2
    embeddings = _product(image_tokens, patch_values, width)
    embeddings += _product(config.num_text_tokens, config.clip_dim, width)
    blocks = (2 * skips + 1) * _block(tokens, width, config.mlp_ratio) + skips * _product(tokens, 2 * width, width)
    convolution = _product(config.sample_size**2, 9 * config.in_channels, config.in_channels)
    return embeddings + blocks + _product(tokens, width, patch_values) + convolution


def _block(tokens: int, width: int, mlp_ratio: float) -> int:
    """Attention with its four projections, and the MLP."""
    projections = _product(tokens, width, 4 * width)
    attention = 2 * _product(tokens, width, tokens)  # over all heads
    return projections + attention + 2 * _product(tokens, width, int(width * mlp_ratio))


def _product(rows: int, inner: int, columns: int) -> int:
    """[rows, inner] times [inner, columns]."""
    return 2 * rows * inner * columns
