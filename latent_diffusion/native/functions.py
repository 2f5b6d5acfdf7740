"""The kernels of `kernels.c` as differentiable functions of float32 tensors on a CPU."""

import contextlib
import ctypes

import paddle
from paddle.autograd import PyLayer
from paddle.base.core import TracerEventType
from paddle.profiler import RecordEvent

from .library import load

# Whether `linear` multiplies in bfloat16.
_rounding = False


def covers(x: paddle.Tensor) -> bool:
    """Whether these functions can take `x`: the kernels are built, and it is a float32 tensor in host memory."""
    return load() is not None and paddle.in_dynamic_mode() and x.dtype == paddle.float32 and x.place.is_cpu_place()


@contextlib.contextmanager
def bfloat16_products():
    """Within the context `linear` rounds what it multiplies to bfloat16, as its gradients will; sums are float32."""
    global _rounding
    before, _rounding = _rounding, True
    try:
        yield
    finally:
        _rounding = before


def linear(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None) -> paddle.Tensor:
    """x [..., in], weight [in, out], bias [out] or none -> [..., out]."""
    rows = _Linear.apply(x.reshape([-1, x.shape[-1]]), weight, *([] if bias is None else [bias]))
    return rows.reshape([*x.shape[:-1], weight.shape[1]])


def layer_norm(x: paddle.Tensor, gain: paddle.Tensor, shift: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """Normalizes the last axis of x [B, N, D], then multiplies by gain and adds shift: [B, D], or [D] for all."""
    return _LayerNorm.apply(x, gain, shift, epsilon)


def gated_sum(x: paddle.Tensor, gate: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """x + gate * y for x, y [B, N, D] and gate [B, D]."""
    return _GatedSum.apply(x, gate, y)


def gelu(x: paddle.Tensor, approximate: bool) -> paddle.Tensor:
    """GELU of any tensor, exact or in its tanh approximation."""
    return _Gelu.apply(x, approximate)


def attention(qkv: paddle.Tensor, heads: int) -> paddle.Tensor:
    """Self-attention of queries, keys and values [B, N, 3 D] -> [B, N, D]; no weights [N, N] are stored."""
    return _Attention.apply(qkv, heads)


def lerp_(average: paddle.Tensor, value: paddle.Tensor, weight: float) -> None:
    """average += weight * (value - average), in place, for tensors of one size."""
    _call("lerp", average, value, weight, average.size)


class _Linear(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.has_bias, ctx.needs_dx, ctx.rounding = bias is not None, not x.stop_gradient, _rounding
        x = _rounded(x, ctx.rounding)
        ctx.save_for_backward(x, weight)
        out = _product(x, _rounded(weight, ctx.rounding))
        if ctx.has_bias:
            _call("add_bias", out, bias, *out.shape)
        return out

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensor()
        factor = _rounded(dout, ctx.rounding)
        dx = _product(factor, _rounded(weight, ctx.rounding), transpose_b=True) if ctx.needs_dx else None
        dweight = _product(x, factor, transpose_a=True)
        if not ctx.has_bias:
            return dx, dweight
        dbias = paddle.empty([dout.shape[1]])
        _call("column_sums", dbias, dout, *dout.shape)
        return dx, dweight, dbias


def _rounded(x: paddle.Tensor, rounding: bool) -> paddle.Tensor:
    """`x` in bfloat16, or as it is."""
    if not rounding:
        return x
    out = paddle.empty(x.shape, "bfloat16")
    _call("to_bfloat16", out, x, x.size)
    return out


def _product(a: paddle.Tensor, b: paddle.Tensor, transpose_a: bool = False, transpose_b: bool = False) -> paddle.Tensor:
    """The float32 product of two matrices, both float32 or both bfloat16, each transposed first if so said."""
    (k, m) = a.shape if transpose_a else a.shape[::-1]
    n = b.shape[0] if transpose_b else b.shape[1]
    out = paddle.empty([m, n], "float32")
    if status := _call("product", out, a, b, m, n, k, transpose_a, transpose_b, a.dtype == paddle.bfloat16):
        raise RuntimeError(f"oneDNN refuses a product of {m} x {k} and {k} x {n} (status {status})")
    return out


class _LayerNorm(PyLayer):
    @staticmethod
    def forward(ctx, x, gain, shift, epsilon):
        out = paddle.empty_like(x)
        mean, inverse = paddle.empty(x.shape[:-1]), paddle.empty(x.shape[:-1])
        _call("layer_norm", out, mean, inverse, x, gain, shift, *_groups(x, gain), epsilon)
        ctx.save_for_backward(x, gain, mean, inverse)
        return out

    @staticmethod
    def backward(ctx, dout):
        x, gain, mean, inverse = ctx.saved_tensor()
        dx, dgain, dshift = paddle.empty_like(x), paddle.empty_like(gain), paddle.empty_like(gain)
        _call("layer_norm_gradient", dx, dgain, dshift, dout, x, mean, inverse, gain, *_groups(x, gain))
        return dx, dgain, dshift


class _GatedSum(PyLayer):
    @staticmethod
    def forward(ctx, x, gate, y):
        out = paddle.empty_like(x)
        _call("gated_sum", out, x, gate, y, *_groups(x, gate))
        ctx.save_for_backward(gate, y)
        return out

    @staticmethod
    def backward(ctx, dout):
        gate, y = ctx.saved_tensor()
        dgate, dy = paddle.empty_like(gate), paddle.empty_like(y)
        _call("gated_sum_gradient", dgate, dy, dout, gate, y, *_groups(y, gate))
        # A copy: gradients are summed in place.
        return dout.clone(), dgate, dy


class _Gelu(PyLayer):
    @staticmethod
    def forward(ctx, x, approximate):
        ctx.approximate = approximate
        ctx.save_for_backward(x)
        out = paddle.empty_like(x)
        _call("gelu", out, x, x.size, approximate)
        return out

    @staticmethod
    def backward(ctx, dout):
        (x,) = ctx.saved_tensor()
        dx = paddle.empty_like(x)
        _call("gelu_gradient", dx, dout, x, x.size, ctx.approximate)
        return dx


class _Attention(PyLayer):
    @staticmethod
    def forward(ctx, qkv, heads):
        ctx.heads = heads
        ctx.save_for_backward(qkv)
        batch, tokens, width = qkv.shape
        out = paddle.empty([batch, tokens, width // 3])
        _call("attention", out, _scratch(tokens * tokens), qkv, *_heads(qkv, heads))
        return out

    @staticmethod
    def backward(ctx, dout):
        (qkv,) = ctx.saved_tensor()
        dqkv, tokens = paddle.empty_like(qkv), qkv.shape[1]
        _call("attention_gradient", dqkv, _scratch(2 * tokens * tokens), dout, qkv, *_heads(qkv, ctx.heads))
        return dqkv


def _groups(x: paddle.Tensor, per_group: paddle.Tensor) -> tuple[int, int, int]:
    """Groups of rows that share a row of `per_group`, rows in each, and their width."""
    width = x.shape[-1]
    groups = per_group.size // width
    return groups, x.size // width // groups, width


def _heads(qkv: paddle.Tensor, heads: int) -> tuple[int, int, int, int]:
    batch, tokens, width = qkv.shape
    return batch, tokens, heads, width // 3 // heads


def _scratch(size: int) -> paddle.Tensor:
    """Room for so many values on each thread."""
    return paddle.empty([load().threads(), size])


def _call(name: str, *arguments: paddle.Tensor | float | int) -> int:
    """Calls a kernel; tensors are passed as the addresses of their values. Only some return something of meaning."""
    # Kept until the call is over; they are copies only where the user lets Paddle make strided views.
    dense = [value.contiguous() if isinstance(value, paddle.Tensor) else value for value in arguments]
    with RecordEvent(f"{name} kernel", TracerEventType.Operator):
        return getattr(load(), name)(*map(_as_c, dense))


def _as_c(value: paddle.Tensor | float | int):
    if isinstance(value, paddle.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)
