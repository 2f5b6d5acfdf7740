"""Multi-head self-attention over tokens, formulated for the device it runs on."""

import paddle
import paddle.nn.functional as F
from paddle import nn

from .native import functions as native
from .ops import Linear, on_cpu


class Attention(nn.Layer):
    """Self-attention with one projection for queries, keys and values (timm's `Attention`; names as there).

    `memory_efficient` selects Paddle's flash / memory-efficient kernel on a GPU; on a CPU it changes nothing.

    Args:
        dim: width D, a multiple of `num_heads`.
        qkv_bias: whether queries, keys and values have a bias.
        float32_products: multiply queries, keys and values in float32 whatever the precision, unless the
            memory-efficient kernel does it.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, float32_products: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.memory_efficient = False
        self.float32_products = float32_products
        self.qkv = Linear(dim, 3 * dim, bias_attr=None if qkv_bias else False)
        self.proj = Linear(dim, dim)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """x [B, N, D] -> [B, N, D]."""
        qkv = self.qkv(x)
        if native.covers(qkv):
            out = native.attention(qkv, self.num_heads)
        elif on_cpu(x):
            out = _batched_products(qkv, self.num_heads)
        elif self.memory_efficient:
            out = _fused(qkv, self.num_heads)
        elif self.float32_products:
            with paddle.amp.auto_cast(enable=False):
                out = _plain(qkv.astype("float32"), self.num_heads).astype(qkv.dtype)
        else:
            out = _plain(qkv, self.num_heads)
        return self.proj(out)


def _batched_products(qkv: paddle.Tensor, heads: int) -> paddle.Tensor:
    # Three 4-D transposes and 3-D products of dense tensors: each is several times faster on a CPU than the 5-D
    # permutation and the 4-D products of permuted views.
    batch, tokens, width = qkv.shape
    head_dim = width // 3 // heads
    q, k, v = (part.reshape([batch, tokens, heads, head_dim]) for part in qkv.chunk(3, axis=-1))
    q = (q * head_dim**-0.5).transpose([0, 2, 1, 3]).reshape([-1, tokens, head_dim])
    k = k.transpose([0, 2, 3, 1]).reshape([-1, head_dim, tokens])
    v = v.transpose([0, 2, 1, 3]).reshape([-1, tokens, head_dim])
    out = paddle.bmm(F.softmax(paddle.bmm(q, k)), v)
    return out.reshape([batch, heads, tokens, head_dim]).transpose([0, 2, 1, 3]).reshape([batch, tokens, -1])


def _split_heads(qkv: paddle.Tensor, heads: int) -> list[paddle.Tensor]:
    batch, tokens, width = qkv.shape
    return qkv.reshape([batch, tokens, 3, heads, width // 3 // heads]).unbind(2)


def _fused(qkv: paddle.Tensor, heads: int) -> paddle.Tensor:
    q, k, v = _split_heads(qkv, heads)
    return F.scaled_dot_product_attention(q, k, v).flatten(2)


def _plain(qkv: paddle.Tensor, heads: int) -> paddle.Tensor:
    q, k, v = (part.transpose([0, 2, 1, 3]) for part in _split_heads(qkv, heads))
    weights = F.softmax(paddle.matmul(q * q.shape[-1] ** -0.5, k, transpose_y=True))
    return paddle.matmul(weights, v).transpose([0, 2, 1, 3]).flatten(2)
