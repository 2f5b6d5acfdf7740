"""What the backbones are built of: patches, timestep sinusoids, MLPs, and the parts that training switches."""

import contextvars
import math
import sys
from abc import abstractmethod

import paddle
from paddle import nn

from .attention import Attention
from .ops import Linear, gelu_linear
from .runtime import is_first_process
from .token_merging import MergesTokens, TokenMerging, merged_calls

NEEDS_GPU = "memory-efficient attention needs a GPU: it has no effect on a CPU"


class PatchEmbed(nn.Layer):
    """Latents [B, C, H, W] -> tokens [B, N, D], row by row."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2D(channels, width, patch, stride=patch)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.proj(x).flatten(2).transpose([0, 2, 1])


def unpatchify(x: paddle.Tensor, patch: int, channels: int) -> paddle.Tensor:
    """Patches [B, N, p * p * C] of a square image, channel fastest -> [B, C, H, W]."""
    side = math.isqrt(x.shape[1])
    x = x.reshape([x.shape[0], side, side, patch, patch, channels]).transpose([0, 5, 1, 3, 2, 4])
    return x.reshape([x.shape[0], channels, side * patch, side * patch])


def sinusoid(t: paddle.Tensor, width: int, denominator: float) -> paddle.Tensor:
    """Cosines, then sines, of t at `width // 2` frequencies exp(-ln(10000) i / denominator).

    Args:
        t: [B], integer or float.
        width: of the result; even.

    Returns:
        float32 [B, width].
    """
    # Multiplied before it is divided, as in the references: another rounding here is multiplied by t.
    exponents = -math.log(10000) * paddle.arange(width // 2, dtype="float32") / denominator
    angles = t.astype("float32").unsqueeze(1) * paddle.exp(exponents).unsqueeze(0)
    return paddle.concat([paddle.cos(angles), paddle.sin(angles)], axis=-1)


class Mlp(nn.Layer):
    """Two linear layers with GELU between, exact or in its tanh approximation."""

    def __init__(self, dim: int, hidden_dim: int, approximate: bool):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)
        self.approximate = approximate

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return gelu_linear(self.fc1(x), self.fc2, self.approximate)


class Block(nn.Layer):
    """Base of transformer blocks: what merges image tokens around its layers, outside training.

    Args:
        config: has `side`, tokens in a row of the image.
        extras: tokens before those of the image, never merged.
    """

    def __init__(self, config, extras: int = 0):
        super().__init__()
        self.merging: TokenMerging | None = None
        self.side, self.extras = config.side, extras

    def _merged_calls(self, x: paddle.Tensor):
        """`merged_calls` for the block's input x [B, N, D]."""
        return merged_calls(None if self.training else self.merging, x, self.extras, self.side)


class Backbone(MergesTokens, nn.Layer):
    """Base of the networks: what training and inference switch in all of them.

    `enable_recompute` (also set by PaddleNLP's `--recompute`) trades activation memory for a second forward pass.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.enable_recompute = False

    def _merging_blocks(self) -> list[Block]:
        return [layer for layer in self.sublayers() if isinstance(layer, Block)]

    def enable_xformers_memory_efficient_attention(self) -> None:
        """Uses Paddle's flash / memory-efficient attention; on a CPU says that this has no effect."""
        if not paddle.device.is_compiled_with_cuda() and is_first_process():
            print(f"note: {NEEDS_GPU}", file=sys.stderr)
        self.set_memory_efficient_attention(True)

    def set_memory_efficient_attention(self, enabled: bool) -> None:
        """Switches Paddle's flash / memory-efficient attention on or off."""
        for layer in self.sublayers():
            if isinstance(layer, Attention):
                layer.memory_efficient = enabled

    @property
    @abstractmethod
    def _last_block(self) -> Block:
        """The one whose output no other block takes."""

    def _run(self, block: Block, *inputs: paddle.Tensor) -> paddle.Tensor:
        """A block's output, computed again in the backward pass if so switched.

        Not that of the last block: its backward pass comes first, when dropping what it keeps would save nothing.
        """
        if not (self.enable_recompute and self.training) or block is self._last_block:
            return block(*inputs)
        from paddle.distributed.fleet.utils import recompute

        # The second pass is in the precision of the first.
        context = contextvars.copy_context()
        # Blocks draw nothing at random in training, so there is no generator state to keep.
        return recompute(lambda *tensors: context.run(block, *tensors), *inputs, preserve_rng_state=False)
