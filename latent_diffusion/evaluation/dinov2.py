"""DINOv2 (Oquab et al., arXiv:2304.07193) as an extractor, for the FD-DINOv2 of Stein et al. (arXiv:2306.04675).

Images are prepared as NVlabs/edm2 does in `calculate_metrics.py`; a feature is the class token after the last norm.
"""

import math
import re
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..attention import Attention
from ..checkpoint import set_weights
from ..errors import InputError
from ..hub import existing_file
from ..ops import Linear
from ..pretrained import checksum, plain_weights
from ..transformer import Mlp, PatchEmbed
from ..weights import find_published, read_weights, transpose_linear
from .extractor import Extractor

PUBLISHED_FILE = "dinov2_vitl14_pretrain.pth"
PUBLISHED_ADDRESS = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14"
# The names in a folder of transformers.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")

# Pixels of an image and of a patch, and patches in a row.
IMAGE_SIZE, PATCH = 224, 14
GRID = IMAGE_SIZE // PATCH

# ImageNet's, of pixels in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

HEAD_DIM, EPSILON = 64, 1e-6
# The letters in the names of the official models, by width.
SIZES = {384: "s", 768: "b", 1024: "l", 1536: "g"}


class SwiGLU(nn.Layer):
    """The MLP of ViT-g/14, gated by SiLU (`SwiGLUFFNFused`)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w12 = Linear(dim, 2 * hidden_dim)
        self.w3 = Linear(hidden_dim, dim)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        gate, value = self.w12(x).chunk(2, axis=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Layer):
    """A factor for each channel of x [B, N, D]."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = self.create_parameter([dim])

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x * self.gamma.expand(x.shape)


class Block(nn.Layer):
    """A transformer block with layer scales."""

    def __init__(self, dim: int, mlp: nn.Layer):
        super().__init__()
        # Paddle's own norm is the fastest where there is no gradient.
        self.norm1 = nn.LayerNorm(dim, EPSILON)
        self.attn = Attention(dim, dim // HEAD_DIM)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, EPSILON)
        self.mlp = mlp
        self.ls2 = LayerScale(dim)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Layer):
    """The network for images of 224x224 pixels, with the parameter names of facebookresearch/dinov2.

    Args:
        dim: width D, a multiple of 64.
        depth: blocks.
        hidden_dim: of the MLPs.
        gated: whether these are `SwiGLU`.
        registers: number of register tokens (Darcet et al., arXiv:2309.16588).
    """

    def __init__(self, dim: int, depth: int, hidden_dim: int, gated: bool = False, registers: int = 0):
        super().__init__()
        self.patch_embed = PatchEmbed(3, dim, PATCH)
        self.cls_token = self.create_parameter([1, 1, dim])
        self.pos_embed = self.create_parameter([1, 1 + GRID**2, dim])
        self.register_tokens = self.create_parameter([1, registers, dim]) if registers else None
        self.blocks = nn.LayerList(
            Block(dim, SwiGLU(dim, hidden_dim) if gated else Mlp(dim, hidden_dim, approximate=False))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, EPSILON)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """Normalized pixels [B, 3, 224, 224] -> class tokens [B, D]."""
        batch = x.shape[0]
        tokens = [self.cls_token + self.pos_embed[:, :1], self.patch_embed(x) + self.pos_embed[:, 1:]]
        if self.register_tokens is not None:
            tokens.append(self.register_tokens)  # officially in the middle: attention knows no order
        x = paddle.concat([token.expand([batch, -1, -1]) for token in tokens], axis=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


class DINOv2(Extractor):
    """Features of DINOv2: "features" float32 [B, D], of images of any size.

    Args:
        network: with its weights.
    """

    name = "dinov2"

    def __init__(self, network: VisionTransformer):
        self._network = network
        self._network.eval()
        dim, registers = network.cls_token.shape[-1], network.register_tokens
        size = SIZES.get(dim, dim)
        kind = f"vit{size}14" if registers is None else f"vit{size}14_reg{registers.shape[1]}"
        self.identity = f"{self.name}_{kind}-{checksum(network)[:12]}"
        self.widths = {"features": dim}

    @paddle.no_grad()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": self._network(prepare(images)).numpy()}


def load_dinov2(weights: Path | None = None) -> DINOv2:
    """The extractor with the weights of an official model, ViT-S/14 to ViT-g/14, with or without registers.

    Args:
        weights: a file with the names of facebookresearch/dinov2 or of transformers' `Dinov2Model`, in PyTorch's
            layout, or a folder of transformers; None for the file of ViT-L/14 in the usual folders.

    Raises:
        InputError: there is none, it cannot be read, or it holds other weights.
    """
    path = weights or find_published([PUBLISHED_FILE], "DINOv2", PUBLISHED_ADDRESS)
    if path.is_dir():
        path = existing_file(path, FOLDER_FILES, "DINOv2")
    state = plain_weights(read_weights(path))
    if any(name.startswith("embeddings.") for name in state):
        state = _official_names(state)
    state.pop("mask_token", None)  # is for training
    network = _network(state, path)
    state["pos_embed"] = _fit_positions(state["pos_embed"], antialias=network.register_tokens is not None, path=path)
    set_weights(network, transpose_linear(state), path)
    return DINOv2(network)


# Names of transformers' `Dinov2Model` and what the official code has for them.
_OFFICIAL_NAMES = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    ("attention.attention.query.", "attn.q."),
    ("attention.attention.key.", "attn.k."),
    ("attention.attention.value.", "attn.v."),
    ("attention.output.dense.", "attn.proj."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("mlp.weights_in.", "mlp.w12."),
    ("mlp.weights_out.", "mlp.w3."),
    ("layernorm.", "norm."),
)


def _official_names(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of transformers under the names of the official code, with queries, keys and values in one."""
    renamed = {}
    for name, value in weights.items():
        for theirs, official in _OFFICIAL_NAMES:
            name = name.replace(theirs, official)
        renamed[name] = value
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):
            joined = np.concatenate([renamed.pop(part) for part in parts])
            renamed[name.replace(".attn.q.", ".attn.qkv.")] = joined
    return renamed


def _network(weights: dict[str, np.ndarray], path: Path) -> VisionTransformer:
    """A network of the size of these weights, without them; `path` names them in errors."""
    gated = "blocks.0.mlp.w12.weight" in weights
    hidden = "blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"
    if missing := [name for name in ("cls_token", "pos_embed", hidden) if name not in weights]:
        raise InputError(f"{path} holds no weights of DINOv2: it lacks {missing[0]}")
    dim = weights["cls_token"].shape[-1]
    if dim % HEAD_DIM:
        raise InputError(f"{path} holds no weights of DINOv2: its width {dim} is no multiple of {HEAD_DIM}")
    depth = len({found[1] for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))})
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    return VisionTransformer(dim, depth, weights[hidden].shape[-1], gated, registers)


# Position embeddings and images on other grids


def _fit_positions(positions: np.ndarray, antialias: bool, path: Path) -> np.ndarray:
    """Position embeddings [1, 1 + N * N, D] for 16x16 patches: [1, 257, D]; `path` names them in errors.

    As `interpolate_pos_encoding` of the official code, which enlarges by 16.1 / N and in models with registers reduces
    to 16 positions with antialiasing.
    """
    side = math.isqrt(positions.shape[1] - 1) if positions.ndim == 3 and positions.shape[1] > 1 else 0
    if len(positions) != 1 or 1 + side**2 != positions.shape[1]:
        raise InputError(f"{path} holds no weights of DINOv2: its pos_embed has shape {list(positions.shape)}")
    if side == GRID:
        return positions
    matrix = antialiased_bicubic(side, GRID) if antialias else bicubic(side, GRID, (GRID + 0.1) / side)
    grid = positions[0, 1:].reshape(side, side, -1)
    grid = np.einsum("ih,jw,hwd->ijd", matrix, matrix, grid, optimize=True).astype(np.float32)
    return np.concatenate([positions[:, :1], grid.reshape(1, GRID**2, -1)], axis=1)


def prepare(images: np.ndarray) -> paddle.Tensor:
    """Images uint8 [B, H, W, 3] -> normalized pixels float32 [B, 3, 224, 224].

    As torch's `interpolate(mode="bicubic", antialias=True)` on floats, whose values may leave [0, 255], and then
    ImageNet's mean and standard deviation.
    """
    rows, columns = (
        paddle.to_tensor(antialiased_bicubic(size, IMAGE_SIZE).astype(np.float32)) for size in images.shape[1:3]
    )
    pixels = paddle.to_tensor(images.transpose(0, 3, 1, 2)).astype("float32")
    pixels = paddle.matmul(rows, paddle.matmul(pixels, columns, transpose_y=True))
    mean, std = (paddle.to_tensor(values).reshape([3, 1, 1]) for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def antialiased_bicubic(size: int, new_size: int) -> np.ndarray:
    """The matrix float64 [new_size, size] that resamples as Pillow's and torch's antialiased bicubic filter (a = -0.5).

    The filter grows with the distance of the new samples where there are fewer of them.
    """
    scale = size / new_size
    centers = scale * (np.arange(new_size) + 0.5)
    weights = _cubic((np.arange(size) + 0.5 - centers[:, None]) / max(scale, 1), a=-0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def bicubic(size: int, new_size: int, scale_factor: float) -> np.ndarray:
    """The matrix float64 [new_size, size] of torch's `interpolate(scale_factor=..., mode="bicubic")` (a = -0.75).

    Beyond the ends the first and the last value are repeated.
    """
    positions = (np.arange(new_size) + 0.5) / scale_factor - 0.5
    first = np.floor(positions).astype(int) - 1
    matrix = np.zeros((new_size, size))
    for tap in range(4):
        columns = np.clip(first + tap, 0, size - 1)
        matrix[np.arange(new_size), columns] += _cubic(positions - first - tap, a=-0.75)
    return matrix


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (IEEE Transactions on Acoustics, Speech, and Signal Processing, 1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))
