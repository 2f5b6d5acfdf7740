"""Exponential moving average of a model's weights."""

import contextlib

import numpy as np
import paddle

from .errors import InputError

# Parameters are averaged in buckets of about this many values: two kernels a bucket in place of one a parameter,
# at the price of one bucket of temporary memory.
BUCKET_SIZE = 16 << 20


class EMA:
    """Float32 average of the trainable parameters of `model`: `ema = decay * ema + (1 - decay) * parameter`.

    Args:
        model: the layer that is trained; its current weights are the first average.
        decay: 0.9999 in the DiT paper.
        warmup: take `(1 + n) / (10 + n)` at update n while that is smaller, so that short runs forget their start.
    """

    def __init__(self, model: paddle.nn.Layer, decay: float = 0.9999, warmup: bool = False):
        if not 0.0 <= decay < 1.0:
            raise InputError(f"the EMA decay must be in [0, 1), not {decay}")
        self.model, self.decay, self.warmup = model, decay, warmup
        named = [(name, p) for name, p in model.named_parameters() if not p.stop_gradient]
        self._buckets = [_Bucket(group) for group in _groups(named)]

    def decay_at(self, update: int) -> float:
        """The decay in force at the given update, counted from 1."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @paddle.no_grad()
    def update(self, update: int, masters: dict[str, paddle.Tensor] | None = None) -> None:
        """Averages the current weights in.

        Args:
            update: counts optimizer steps from 1.
            masters: float32 copies of half-precision parameters, by parameter name, to be used in their place.
        """
        weight = 1.0 - self.decay_at(update)
        for bucket in self._buckets:
            bucket.average.lerp_(bucket.current(masters), weight)

    def state_dict(self) -> dict[str, paddle.Tensor]:
        """All weights of the model under its own names, float32: averages, and what is not trained as it is."""
        state = {name: tensor.astype("float32") for name, tensor in self.model.state_dict().items()}
        for bucket in self._buckets:
            state.update(bucket.tensors())
        return state

    @paddle.no_grad()
    def set_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restores the averages from `state_dict()`'s content.

        Raises:
            InputError: a weight is missing or has another shape.
        """
        for bucket in self._buckets:
            bucket.restore(state)

    @contextlib.contextmanager
    @paddle.no_grad()
    def applied(self):
        """Within the context the model holds the averages; afterwards its own weights again, bit for bit."""
        own = [(p, p.clone()) for bucket in self._buckets for _, p in bucket.named]
        try:
            for bucket in self._buckets:
                tensors = bucket.tensors()
                for name, p in bucket.named:
                    p.copy_(tensors[name].astype(p.dtype), True)
            yield self.model
        finally:
            for p, value in own:
                p.copy_(value, True)


class _Bucket:
    """Some parameters, and their averages in one flat tensor."""

    def __init__(self, named: list[tuple[str, paddle.Tensor]]):
        self.named = named
        self.average = self.current().clone()

    @paddle.no_grad()
    def current(self, masters: dict[str, paddle.Tensor] | None = None) -> paddle.Tensor:
        values = [(masters or {}).get(p.name, p) for _, p in self.named]
        return paddle.concat([value.flatten().astype("float32") for value in values])

    def tensors(self) -> dict[str, paddle.Tensor]:
        parts = self.average.split([p.size for _, p in self.named])
        return {name: part.reshape(p.shape) for (name, p), part in zip(self.named, parts, strict=True)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        for name, p in self.named:
            if name not in state or list(state[name].shape) != p.shape:
                raise InputError(f"the EMA weights lack {name} of shape {list(p.shape)}: they belong to another model")
        flat = np.concatenate([np.asarray(state[name], dtype=np.float32).reshape(-1) for name, _ in self.named])
        self.average.set_value(flat)


def _groups(named: list[tuple[str, paddle.Tensor]]) -> list[list[tuple[str, paddle.Tensor]]]:
    groups, size = [[]], 0
    for name, p in named:
        if groups[-1] and size + p.size > BUCKET_SIZE:
            groups.append([])
            size = 0
        groups[-1].append((name, p))
        size += p.size
    return groups
