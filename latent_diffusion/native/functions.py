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


def gelu_linear(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor, approximate: bool) -> paddle.Tensor:
    """`linear` of GELU(x), exact or in its tanh approximation; GELU(x) is not kept for the backward pass."""
    rows = _GeluLinear.apply(x.reshape([-1, x.shape[-1]]), weight, bias, approximate)
    return rows.reshape([*x.shape[:-1], weight.shape[1]])


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
        return _biased_product(x, weight, bias, ctx.rounding)

    @staticmethod
    def backward(ctx, dout):
        x, weight = _taken(ctx)
        factor = _rounded(dout, ctx.rounding)
        dx = _product(factor, _rounded(weight, ctx.rounding), transpose_b=True) if ctx.needs_dx else None
        dweight = _product(x, factor, transpose_a=True)
        return (dx, dweight, _column_sums(dout)) if ctx.has_bias else (dx, dweight)


class _GeluLinear(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, bias, approximate):
        ctx.approximate, ctx.rounding = approximate, _rounding
        ctx.save_for_backward(x, weight)
        activated = paddle.empty_like(x)
        _call("gelu", activated, x, x.size, approximate)
        return _biased_product(_rounded(activated, ctx.rounding), weight, bias, ctx.rounding)

    @staticmethod
    def backward(ctx, dout):
        x, weight = _taken(ctx)
        factor = _rounded(dout, ctx.rounding)
        dx = _product(factor, _rounded(weight, ctx.rounding), transpose_b=True)
        activated = paddle.empty_like(x)
        _call("gelu_gradient", dx, activated, dx, x, x.size, ctx.approximate)
        return dx, _product(_rounded(activated, ctx.rounding), factor, transpose_a=True), _column_sums(dout)


def _biased_product(
    x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None, rounding: bool
) -> paddle.Tensor:
    """x [rows, in], rounded already, times weight [in, out], plus bias [out]."""
    out = _product(x, _rounded(weight, rounding))
    if bias is not None:
        _call("add_bias", out, bias, *out.shape)
    return out


def _column_sums(x: paddle.Tensor) -> paddle.Tensor:
    """x [rows, columns] -> [columns]."""
    out = paddle.empty([x.shape[1]])
    _call("column_sums", out, x, *x.shape)
    return out


def _taken(ctx) -> tuple[paddle.Tensor, ...]:
    """What was saved for the backward pass, let go: Paddle would keep it until the whole pass is over."""
    tensors, ctx.container = ctx.saved_tensor(), None
    return tensors


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
        x, gain, mean, inverse = _taken(ctx)
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
        gate, y = _taken(ctx)
        dgate, dy = paddle.empty_like(gate), paddle.empty_like(y)
        _call("gated_sum_gradient", dgate, dy, dout, gate, y, *_groups(y, gate))
        # A copy: gradients are summed in place.
        return dout.clone(), dgate, dy


class _Attention(PyLayer):
    @staticmethod
    def forward(ctx, qkv, heads):
        ctx.heads = heads
        ctx.save_for_backward(qkv)
        batch, tokens, width = qkv.shape
        out = paddle.empty([batch, tokens, width // 3])
        row = _aligned(tokens)
        _call("attention", out, _scratch(tokens * row), qkv, *_heads(qkv, heads), row)
        return out

    @staticmethod
    def backward(ctx, dout):
        (qkv,) = _taken(ctx)
        dqkv, tokens = paddle.empty_like(qkv), qkv.shape[1]
        row = _aligned(tokens)
        scratch = _scratch(2 * tokens * row)
        _call("attention_gradient", dqkv, scratch, dout, qkv, *_heads(qkv, ctx.heads), row)
        return dqkv


def _aligned(count: int) -> int:
    """`count` values, or the next more that fill whole cache lines."""
    return -(-count // 16) * 16


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
