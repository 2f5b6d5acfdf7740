"""Operations whose fastest formulation depends on the device: one function each (attention has a module of its own).

On a GPU the plain forms are used, on a CPU the kernels of `native/`. Where those are not built, the formulation counts:
Paddle's broadcasting kernels and the row sums of their gradients are slow on a CPU, its matrix products are fast. A
product with a vector of ones broadcasts, and its gradient is again a product (`x * s` over [8, 256, 384] with s
[8, 1, 384], forward and backward: 9.7 ms broadcast, 1.9 ms so).
"""

import paddle
import paddle.nn.functional as F
from paddle import nn

from .native import functions as native


def on_cpu(x: paddle.Tensor) -> bool:
    """Whether `x` lives in host memory."""
    return x.place.is_cpu_place()


def expand_tokens(v: paddle.Tensor, tokens: int) -> paddle.Tensor:
    """Repeats `v` [B, D] for every token: [B, tokens, D], or [B, 1, D] where broadcasting is fast."""
    v = v.unsqueeze(1)
    return paddle.bmm(paddle.ones([v.shape[0], tokens, 1], v.dtype), v) if on_cpu(v) else v


def modulated_layer_norm(
    x: paddle.Tensor, shift: paddle.Tensor, scale: paddle.Tensor, epsilon: float = 1e-6
) -> paddle.Tensor:
    """`norm(x) * (1 + scale) + shift` for x [B, N, D] and shift, scale [B, D] (adaLN, DiT paper section 3.2).

    The normalization is over the last axis, without scale and shift of its own; epsilon 1e-6 as the official DiT.
    """
    if native.covers(x):
        return native.layer_norm(x, scale + 1, shift, epsilon)
    tokens = x.shape[1]
    return layer_norm(x, epsilon) * expand_tokens(scale + 1, tokens) + expand_tokens(shift, tokens)


def gated_sum(x: paddle.Tensor, gate: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """`x + gate * y` for x, y [B, N, D] and gate [B, D] (adaLN-Zero, DiT paper section 3.2)."""
    if native.covers(x):
        return native.gated_sum(x, gate, y)
    return x + expand_tokens(gate, x.shape[1]) * y


def lerp_(average: paddle.Tensor, value: paddle.Tensor, weight: float) -> None:
    """`average += weight * (value - average)` in place, for tensors of one shape."""
    if native.covers(average):
        native.lerp_(average, value, weight)
    else:
        average.lerp_(value, weight)


class Linear(nn.Linear):
    """`nn.Linear` for x [..., in] -> [..., out]; weight [in, out], bias [out] or none."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if not on_cpu(x):
            return super().forward(x)
        if native.covers(x):
            return native.linear(x, self.weight, self.bias)
        rows = x.reshape([-1, x.shape[-1]])
        out = paddle.matmul(rows, self.weight)
        if self.bias is not None:
            out = out + _every_row(self.bias, rows.shape[0])
        return out.reshape([*x.shape[:-1], self.weight.shape[1]])


def gelu_linear(x: paddle.Tensor, linear: Linear, approximate: bool) -> paddle.Tensor:
    """`linear(GELU(x))` for x [..., in] -> [..., out], GELU exact or in its tanh approximation."""
    if native.covers(x):
        return native.gelu_linear(x, linear.weight, linear.bias, approximate)
    return linear(F.gelu(x, approximate=approximate))


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis, with scale and shift; epsilon 1e-5."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if not on_cpu(x):
            return super().forward(x)
        if native.covers(x):
            return native.layer_norm(x, self.weight, self.bias, self._epsilon)
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
