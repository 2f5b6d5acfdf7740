"""Operations whose fastest formulation depends on the device: one function each (attention has a module of its own).

On a CPU, Paddle's broadcasting kernels and the row sums of their gradients are slow, its matrix products are fast:
a product with a vector of ones broadcasts, and its gradient is again a product (`x * s` over [8, 256, 384] with s
[8, 1, 384], forward and backward: 9.7 ms broadcast, 1.9 ms so). On a GPU the plain forms are used.
"""

import paddle
import paddle.nn.functional as F
from paddle import nn


def on_cpu(x: paddle.Tensor) -> bool:
    """Whether `x` lives in host memory."""
    return x.place.is_cpu_place()


def expand_tokens(v: paddle.Tensor, tokens: int) -> paddle.Tensor:
    """Repeats `v` [B, D] for every token: [B, tokens, D], or [B, 1, D] where broadcasting is fast."""
    v = v.unsqueeze(1)
    return paddle.bmm(paddle.ones([v.shape[0], tokens, 1], v.dtype), v) if on_cpu(v) else v


def modulate(x: paddle.Tensor, shift: paddle.Tensor, scale: paddle.Tensor) -> paddle.Tensor:
    """`x * (1 + scale) + shift` for x [B, N, D] and shift, scale [B, D] (adaLN, DiT paper section 3.2)."""
    tokens = x.shape[1]
    return x * expand_tokens(scale + 1, tokens) + expand_tokens(shift, tokens)


class Linear(nn.Linear):
    """`nn.Linear` for x [..., in] -> [..., out]; weight [in, out], bias [out] or none."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if not on_cpu(x):
            return super().forward(x)
        rows = x.reshape([-1, x.shape[-1]])
        out = paddle.matmul(rows, self.weight)
        if self.bias is not None:
            out = out + _every_row(self.bias, rows.shape[0])
        return out.reshape([*x.shape[:-1], self.weight.shape[1]])


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis, with scale and shift; epsilon 1e-5."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if not on_cpu(x):
            return super().forward(x)
        rows = layer_norm(x, self._epsilon).reshape([-1, x.shape[-1]])
        count = rows.shape[0]
        return (rows * _every_row(self.weight, count) + _every_row(self.bias, count)).reshape(x.shape)


def _every_row(v: paddle.Tensor, rows: int) -> paddle.Tensor:
    """`v` [D] repeated: [rows, D]."""
    return paddle.matmul(paddle.ones([rows, 1], v.dtype), v.unsqueeze(0))


def layer_norm(x: paddle.Tensor, epsilon: float = 1e-6) -> paddle.Tensor:
    """Layer normalization over the last axis without scale or shift; epsilon 1e-6 as the official DiT."""
    width = x.shape[-1]
    if not on_cpu(x):
        return F.layer_norm(x, [width], epsilon=epsilon)
    # Means, and their way back to every column, as products: the kernel's gradient takes twice as long.
    rows, mean, ones = (
        x.reshape([-1, width]),
        paddle.full([width, 1], 1.0 / width, x.dtype),
        paddle.ones([1, width], x.dtype),
    )
    centered = rows - paddle.matmul(paddle.matmul(rows, mean), ones)
    inverse_std = paddle.rsqrt(paddle.matmul(centered * centered, mean) + epsilon)
    return (centered * paddle.matmul(inverse_std, ones)).reshape(x.shape)
