"""Weights in the layout of the official PyTorch code."""

from pathlib import Path

import numpy as np

from latent_diffusion.checkpoint import set_weights
from latent_diffusion.ops import Linear
from latent_diffusion.weights import read_weights

from .modeling import DiT

# PyTorch's file suffixes; every other weight file is Paddle's own.
TORCH_SUFFIXES = (".pt", ".pth")


def load_official(path: Path, model: DiT) -> None:
    """Sets the weights of an official `.pt` file (its EMA weights, where it is a training checkpoint).

    Names are the same; weights of linear layers are transposed, as PyTorch stores them [out, in] and Paddle [in, out].

    Raises:
        InputError: the file cannot be read or refused, or its weights are not those of the model.
    """
    linear = {f"{name}.weight" for name, layer in model.named_sublayers() if isinstance(layer, Linear)}
    weights = {
        name: np.ascontiguousarray(value.T) if name in linear else value for name, value in read_weights(path).items()
    }
    set_weights(model, weights, path)
