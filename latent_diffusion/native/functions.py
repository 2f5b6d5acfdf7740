"""The kernels of `kernels.c` as differentiable functions of float32 tensors on a CPU.

Shapes that do not fit raise `ValueError`, since the kernels read addresses. `backward()` differentiates them, once: for
a `PyLayer` Paddle has neither `retain_graph` nor `paddle.grad` by some of the inputs. Without the kernels both work.
"""

import contextlib
import contextvars
import ctypes

import paddle
from paddle.autograd import PyLayer
from paddle.base.core import TracerEventType
from paddle.profiler import RecordEvent

from .library import load

# Whether linear layers multiply in bfloat16.
_rounding = contextvars.ContextVar("rounding", default=False)


@contextlib.contextmanager
def bfloat16_products():
    """Within the context `linear` rounds what it multiplies to bfloat16, as its gradients will; sums are float32."""
    token = _rounding.set(True)
    try:
        yield
    finally:
        _rounding.reset(token)


def covers(x: paddle.Tensor) -> bool:
    """Whether these functions can take `x`: the kernels are built, and it is a float32 tensor in host memory."""
    return load() is not None and paddle.in_dynamic_mode() and x.dtype == paddle.float32 and x.place.is_cpu_place()


def linear(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None) -> paddle.Tensor:
    """x [..., in], weight [in, out], bias [out] or none -> [..., out]."""
    rows = _Linear.apply(x.reshape([-1, x.shape[-1]]), weight, *([] if bias is None else [bias]))
    return rows.reshape([*x.shape[:-1], weight.shape[1]])


def gelu_linear(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor, approximate: bool) -> paddle.Tensor:
    """`linear` of GELU(x), exact or in its tanh approximation; GELU(x) is not kept for the backward pass."""
    rows = _GeluLinear.apply(x.reshape([-1, x.shape[-1]]), weight, bias, approximate)
    return rows.reshape([*x.shape[:-1], weight.shape[1]])


def layer_norm(x: paddle.Tensor, gain: paddle.Tensor, shift: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """Normalizes the last axis of x [B, N, D], then multiplies by gain and adds shift: [B, D], or [D] for all."""
    return _LayerNorm.apply(x, gain, shift, epsilon)


def gated_sum(x: paddle.Tensor, gate: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """x + gate * y for x, y [B, N, D] and gate [B, D]."""
    return _GatedSum.apply(x, gate, y)


def attention(qkv: paddle.Tensor, heads: int) -> paddle.Tensor:
    """Self-attention of queries, keys and values [B, N, 3 D] -> [B, N, D]; no weights [N, N] are stored."""
    return _Attention.apply(qkv, heads)


def lerp_(average: paddle.Tensor, value: paddle.Tensor, weight: float) -> None:
    """average += weight * (value - average), in place, for tensors of one shape."""
    _require(average.shape == value.shape, average, value)
    _call("lerp", average, value, weight, average.size)


class _Linear(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.rounding, ctx.has_bias = _rounding.get(), bias is not None
        ctx.wanted = _wanted(x, weight, *([bias] if ctx.has_bias else []))
        x = _rounded(x, ctx.rounding)
        ctx.save_for_backward(x, weight)
        return _biased_product(x, weight, bias, ctx.rounding)

    @staticmethod
    def backward(ctx, dout):
        x, weight = _taken(ctx)
        factor = _rounded(dout, ctx.rounding)
        gradients = [
            lambda: _product(factor, _rounded(weight, ctx.rounding), transpose_b=True),
            lambda: _product(x, factor, transpose_a=True),
            lambda: _column_sums(dout),
        ]
        return tuple(make() if wanted else None for make, wanted in zip(gradients, ctx.wanted, strict=False))


class _GeluLinear(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, bias, approximate):
        ctx.approximate, ctx.rounding, ctx.wanted = approximate, _rounding.get(), _wanted(x, weight, bias)
        ctx.save_for_backward(x, weight)
        activated = _room(x.shape)
        _call("gelu", activated, x, x.size, approximate)
        return _biased_product(_rounded(activated, ctx.rounding), weight, bias, ctx.rounding)

    @staticmethod
    def backward(ctx, dout):
        x, weight = _taken(ctx)
        factor = _rounded(dout, ctx.rounding)
        dx = _product(factor, _rounded(weight, ctx.rounding), transpose_b=True)
        activated = _room(x.shape)
        _call("gelu_gradient", dx, activated, dx, x, x.size, ctx.approximate)
        dweight = _product(_rounded(activated, ctx.rounding), factor, transpose_a=True)
        return _only(ctx.wanted, dx, dweight, _column_sums(dout))


class _LayerNorm(PyLayer):
    @staticmethod
    def forward(ctx, x, gain, shift, epsilon):
        ctx.wanted = _wanted(x, gain, shift)
        _require(gain.shape == shift.shape, gain, shift)
        out, mean, inverse = _room(x.shape), _room(x.shape[:-1]), _room(x.shape[:-1])
        _call("layer_norm", out, mean, inverse, x, gain, shift, *_groups(x, gain), epsilon)
        ctx.save_for_backward(x, gain, mean, inverse)
        return out

    @staticmethod
    def backward(ctx, dout):
        x, gain, mean, inverse = _taken(ctx)
        dx, dgain, dshift = _room(x.shape), _room(gain.shape), _room(gain.shape)
        _call("layer_norm_gradient", dx, dgain, dshift, dout, x, mean, inverse, gain, *_groups(x, gain))
        return _only(ctx.wanted, dx, dgain, dshift)


class _GatedSum(PyLayer):
    @staticmethod
    def forward(ctx, x, gate, y):
        ctx.wanted = _wanted(x, gate, y)
        _require(x.shape == y.shape, x, y)
        out = _room(x.shape)
        _call("gated_sum", out, x, gate, y, *_groups(x, gate))
        ctx.save_for_backward(gate, y)
        return out

    @staticmethod
    def backward(ctx, dout):
        gate, y = _taken(ctx)
        dgate, dy = _room(gate.shape), _room(y.shape)
        _call("gated_sum_gradient", dgate, dy, dout, gate, y, *_groups(y, gate))
        # A copy: gradients are summed in place.
        return _only(ctx.wanted, dout.clone(), dgate, dy)


class _Attention(PyLayer):
    @staticmethod
    def forward(ctx, qkv, heads):
        ctx.heads = heads
        ctx.save_for_backward(qkv)
        batch, tokens, width = qkv.shape
        out = _room([batch, tokens, width // 3])
        _call("attention", out, *_workplace(qkv, heads, 1), qkv, *_heads(qkv, heads))
        return out

    @staticmethod
    def backward(ctx, dout):
        (qkv,) = _taken(ctx)
        dqkv = _room(qkv.shape)
        _call("attention_gradient", dqkv, *_workplace(qkv, ctx.heads, 2), dout, qkv, *_heads(qkv, ctx.heads))
        return dqkv


def _wanted(*inputs: paddle.Tensor) -> list[bool]:
    """Which inputs need a gradient; for the others a `PyLayer` has to return None."""
    return [not tensor.stop_gradient for tensor in inputs]


def _only(wanted: list[bool], *gradients: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
    return tuple(gradient if each else None for gradient, each in zip(gradients, wanted, strict=True))


def _taken(ctx) -> tuple[paddle.Tensor, ...]:
    """What was saved for the backward pass, let go: Paddle would keep it until the whole pass is over."""
    tensors, ctx.container = ctx.saved_tensor(), None
    return tensors


def _biased_product(
    x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None, rounding: bool
) -> paddle.Tensor:
    """x [rows, in], rounded already, times weight [in, out], plus bias [out]."""
    out = _product(x, _rounded(weight, rounding))
    if bias is not None:
        _require(bias.shape == out.shape[1:], bias, out)
        _call("add_bias", out, bias, *out.shape)
    return out


def _product(a: paddle.Tensor, b: paddle.Tensor, transpose_a: bool = False, transpose_b: bool = False) -> paddle.Tensor:
    """The float32 product of two matrices, both float32 or both bfloat16, each transposed first if so said."""
    m, k = a.shape[::-1] if transpose_a else a.shape
    inner, n = b.shape[::-1] if transpose_b else b.shape
    _require(k == inner and a.dtype == b.dtype, a, b)
    out = _room([m, n])
    if status := _call("product", out, a, b, m, n, k, transpose_a, transpose_b, a.dtype == paddle.bfloat16):
        raise RuntimeError(f"oneDNN refuses a product of {m} x {k} and {k} x {n} (status {status})")
    return out


def _rounded(x: paddle.Tensor, rounding: bool) -> paddle.Tensor:
    """`x` in bfloat16, or as it is."""
    if not rounding:
        return x
    out = _room(x.shape, "bfloat16")
    _call("to_bfloat16", out, x, x.size)
    return out


def _column_sums(x: paddle.Tensor) -> paddle.Tensor:
    """x [rows, columns] -> [columns]."""
    out = _room([x.shape[1]])
    _call("column_sums", out, x, *x.shape)
    return out


def _groups(x: paddle.Tensor, per_group: paddle.Tensor) -> tuple[int, int, int]:
    """Groups of rows of x that share a row of `per_group` [B, D] or [D], rows in each, and their width D."""
    *groups, width = per_group.shape
    _require(width == x.shape[-1] and groups in ([], x.shape[:1]), x, per_group)
    count = groups[0] if groups else 1
    return count, x.size // width // max(count, 1), width


def _heads(qkv: paddle.Tensor, heads: int) -> tuple[int, int, int, int]:
    batch, tokens, width = qkv.shape
    if width % (3 * heads):
        raise ValueError(f"{width} values a token are not queries, keys and values of {heads} heads")
    return batch, tokens, heads, width // 3 // heads


def _workplace(qkv: paddle.Tensor, heads: int, matrices: int) -> tuple[paddle.Tensor, int, int]:
    """Room for so many matrices [tokens, row] on each thread, the threads, and the row: whole cache lines."""
    batch, tokens, _ = qkv.shape
    threads, row = max(1, min(load().threads(), batch * heads)), -(-tokens // 16) * 16
    return _room([threads, matrices, tokens, row]), threads, row


def _room(shape: list[int], dtype: str = "float32") -> paddle.Tensor:
    """A new tensor for a kernel to write to, in host memory whatever the defaults are."""
    return paddle.empty(shape, dtype, device="cpu")


def _require(fits: bool, a: paddle.Tensor, b: paddle.Tensor) -> None:
    if not fits:
        raise ValueError(f"{a.dtype} {a.shape} and {b.dtype} {b.shape} do not fit each other")


def _call(name: str, *arguments: paddle.Tensor | float | int) -> int:
    """Calls a kernel; tensors are passed as the addresses of their values. Only some return something of meaning."""
    # Kept until the call is over; they are copies only where the user lets Paddle make strided views.
    dense = [value.contiguous() if isinstance(value, paddle.Tensor) else value for value in arguments]
    with RecordEvent(f"{name} kernel", TracerEventType.Operator):
        return getattr(load(), name)(*map(_as_c, dense))


def _as_c(value: paddle.Tensor | float | int):
    if isinstance(value, paddle.Tensor):
        if value.dtype not in (paddle.float32, paddle.bfloat16) or not value.place.is_cpu_place():
            raise ValueError(f"kernels take float32 in host memory, not {value.dtype} on {value.place}")
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)
