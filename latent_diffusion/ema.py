"""Exponential moving average of a model's weights."""

import contextlib

import numpy as np
import paddle

from .errors import InputError
from .ops import lerp_


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
        self._trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
        with paddle.no_grad():
            self._averages = {name: p.astype("float32").clone() for name, p in self._trained.items()}

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
        for name, p in self._trained.items():
            lerp_(self._averages[name], (masters or {}).get(p.name, p).astype("float32"), weight)

    def state_dict(self) -> dict[str, paddle.Tensor]:
        """All weights of the model under its own names, float32: averages, and what is not trained as it is."""
        return {name: tensor.astype("float32") for name, tensor in self.model.state_dict().items()} | self._averages

    @paddle.no_grad()
    def set_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restores the averages from `state_dict()`'s content.

        Raises:
            InputError: a weight is missing or has another shape.
        """
        for name, average in self._averages.items():
            if name not in state or list(state[name].shape) != average.shape:
                raise InputError(f"the EMA weights lack {name} of shape {average.shape}: they belong to another model")
        for name, average in self._averages.items():
            average.set_value(np.asarray(state[name], dtype=np.float32))

    @contextlib.contextmanager
    @paddle.no_grad()
    def applied(self):
        """Within the context the model holds the averages; afterwards its own weights again, bit for bit."""
        own = {name: p.clone() for name, p in self._trained.items()}
        try:
            for name, p in self._trained.items():
                p.copy_(self._averages[name].astype(p.dtype), True)
            yield self.model
        finally:
            for name, p in self._trained.items():
                p.copy_(own[name], True)
