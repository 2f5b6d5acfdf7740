"""The Inception network of the FID: TensorFlow's classifier of 2015-12-05, with weights in their PyTorch form.

It differs from torchvision's Inception v3 as pytorch-fid found (https://github.com/mseitzer/pytorch-fid/pull/16):
average pools do not count padding, the last block has a max pool, there are 1008 classes. Layers have torchvision's
names; TensorFlow's `mixed`, `mixed_1`, ... `mixed_10` are `Mixed_5b` to `Mixed_7c` in order.
"""

from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from ..checkpoint import set_weights
from ..pretrained import checksum, plain_weights
from ..weights import find_published, read_weights, transpose_linear
from .compiled import compiled
from .extractor import Extractor

PUBLISHED_FILE = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED_ADDRESS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
# What pytorch-fid and torch-fidelity call their files, and those converted from them.
FILE_NAMES = (
    PUBLISHED_FILE,
    "weights-inception-2015-12-05-6726825d.pth",
    "pt_inception-2015-12-05-6726825d.safetensors",
    "weights-inception-2015-12-05-6726825d.safetensors",
)

IMAGE_SIZE = 299
WIDTH, CLASSES = 2048, 1008
# Of the layer with the spatial features: how many channels are taken, and the side of its map.
SPATIAL_CHANNELS, SPATIAL_SIZE = 7, 17


class BatchNorm(nn.Layer):
    """Batch normalization with stored statistics, under PyTorch's names."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = self.create_parameter([channels], default_initializer=nn.initializer.Constant(1.0))
        self.bias = self.create_parameter([channels], is_bias=True)
        self.register_buffer("running_mean", paddle.zeros([channels]))
        self.register_buffer("running_var", paddle.ones([channels]))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, epsilon=1e-3)


class ConvUnit(nn.Layer):
    """Convolution, batch normalization and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel=1, stride: int = 1, padding="SAME"):
        super().__init__()
        self.conv = nn.Conv2D(in_channels, out_channels, kernel, stride, padding, bias_attr=False)
        self.bn = BatchNorm(out_channels)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.relu(self.bn(self.conv(x)))


class InceptionA(nn.Layer):
    def __init__(self, channels: int, pool_channels: int):
        super().__init__()
        self.branch1x1 = ConvUnit(channels, 64)
        self.branch5x5_1 = ConvUnit(channels, 48)
        self.branch5x5_2 = ConvUnit(48, 64, 5)
        self.branch3x3dbl_1 = ConvUnit(channels, 64)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3)
        self.branch_pool = ConvUnit(channels, pool_channels)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return _concat(
            self.branch1x1(x),
            _chain(x, self.branch5x5_1, self.branch5x5_2),
            _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            self.branch_pool(_average_pool(x)),
        )


class InceptionB(nn.Layer):
    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3 = ConvUnit(channels, 384, 3, stride=2, padding="VALID")
        self.branch3x3dbl_1 = ConvUnit(channels, 64)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, stride=2, padding="VALID")

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return _concat(
            self.branch3x3(x),
            _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            _halving_pool(x),
        )


class InceptionC(nn.Layer):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.branch1x1 = ConvUnit(channels, 192)
        self.branch7x7_1 = ConvUnit(channels, inner)
        self.branch7x7_2 = ConvUnit(inner, inner, (1, 7))
        self.branch7x7_3 = ConvUnit(inner, 192, (7, 1))
        self.branch7x7dbl_1 = ConvUnit(channels, inner)
        self.branch7x7dbl_2 = ConvUnit(inner, inner, (7, 1))
        self.branch7x7dbl_3 = ConvUnit(inner, inner, (1, 7))
        self.branch7x7dbl_4 = ConvUnit(inner, inner, (7, 1))
        self.branch7x7dbl_5 = ConvUnit(inner, 192, (1, 7))
        self.branch_pool = ConvUnit(channels, 192)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        double = (self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3)
        double += (self.branch7x7dbl_4, self.branch7x7dbl_5)
        return _concat(
            self.branch1x1(x),
            _chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
            _chain(x, *double),
            self.branch_pool(_average_pool(x)),
        )


class InceptionD(nn.Layer):
    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3_1 = ConvUnit(channels, 192)
        self.branch3x3_2 = ConvUnit(192, 320, 3, stride=2, padding="VALID")
        self.branch7x7x3_1 = ConvUnit(channels, 192)
        self.branch7x7x3_2 = ConvUnit(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvUnit(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvUnit(192, 192, 3, stride=2, padding="VALID")

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return _concat(
            _chain(x, self.branch3x3_1, self.branch3x3_2),
            _chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4),
            _halving_pool(x),
        )


class InceptionE(nn.Layer):
    def __init__(self, channels: int, pool):
        super().__init__()
        self.branch1x1 = ConvUnit(channels, 320)
        self.branch3x3_1 = ConvUnit(channels, 384)
        self.branch3x3_2a = ConvUnit(384, 384, (1, 3))
        self.branch3x3_2b = ConvUnit(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvUnit(channels, 448)
        self.branch3x3dbl_2 = ConvUnit(448, 384, 3)
        self.branch3x3dbl_3a = ConvUnit(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvUnit(384, 384, (3, 1))
        self.branch_pool = ConvUnit(channels, 192)
        self._pool = pool

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        single = self.branch3x3_1(x)
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        return _concat(
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self._pool(x)),
        )


def _chain(x: paddle.Tensor, *layers: nn.Layer) -> paddle.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _concat(*branches: paddle.Tensor) -> paddle.Tensor:
    return paddle.concat(branches, axis=1)


def _average_pool(x: paddle.Tensor) -> paddle.Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, exclusive=True)


def _max_pool(x: paddle.Tensor) -> paddle.Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halving_pool(x: paddle.Tensor) -> paddle.Tensor:
    return F.max_pool2d(x, 3, stride=2)


class InceptionNetwork(nn.Layer):
    """Images to features; the names of its parameters are those of the published weights."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2, padding="VALID")
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3, padding="VALID")
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3, padding="VALID")
        self.Mixed_5b = InceptionA(192, pool_channels=32)
        self.Mixed_5c = InceptionA(256, pool_channels=64)
        self.Mixed_5d = InceptionA(288, pool_channels=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, inner=128)
        self.Mixed_6c = InceptionC(768, inner=160)
        self.Mixed_6d = InceptionC(768, inner=160)
        self.Mixed_6e = InceptionC(768, inner=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, _average_pool)
        self.Mixed_7c = InceptionE(2048, _max_pool)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: paddle.Tensor) -> list[paddle.Tensor]:
        """Computes what the evaluator of guided-diffusion (ADM) takes from TensorFlow's graph.

        Args:
            images: float32 [B, 3, 299, 299] in 0..255.

        Returns:
            float32: `pool_3`, [B, 2048]; the first 7 channels of `mixed_6/conv`, channels last, [B, 17 * 17 * 7];
            `pool_3` times the weight of the classifier, without its bias, [B, 1008].
        """
        x = _chain((images - 128) / 128, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3)
        x = _chain(_halving_pool(x), self.Conv2d_3b_1x1, self.Conv2d_4a_3x3)
        x = _chain(_halving_pool(x), self.Mixed_5b, self.Mixed_5c, self.Mixed_5d)
        x = _chain(x, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d)
        # `mixed_6/conv` is branch1x1, the first of the branches.
        spatial = x[:, :SPATIAL_CHANNELS].transpose([0, 2, 3, 1]).flatten(1)
        x = _chain(x, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c)
        features = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return [features, spatial, features @ self.fc.weight]


def resized(images: np.ndarray) -> paddle.Tensor:
    """Images as the network takes them, bilinear as TensorFlow 1 resizes.

    Pixel i of the result is at i * size / 299 of the image, without half pixels: Paddle's `align_mode` 1. Not part of
    the network, since Paddle Inference cannot run it with oneDNN.

    Args:
        images: uint8 [B, H, W, 3].

    Returns:
        float32 [B, 3, 299, 299].
    """
    x = paddle.to_tensor(images).astype("float32").transpose([0, 3, 1, 2])
    return F.interpolate(x, [IMAGE_SIZE, IMAGE_SIZE], mode="bilinear", align_corners=False, align_mode=1)


class Inception(Extractor):
    """The features of FID ("features"), sFID ("spatial") and the Inception Score ("logits")."""

    name = "inception"
    widths = {"features": WIDTH, "spatial": SPATIAL_SIZE**2 * SPATIAL_CHANNELS, "logits": CLASSES}

    def __init__(self, network: InceptionNetwork):
        self.identity = f"{self.name}-{checksum(network)[:12]}"
        self._compute = compiled(network, [None, 3, IMAGE_SIZE, IMAGE_SIZE])

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self.widths, self._compute(resized(images)), strict=True))


def load_inception(weights: Path | None = None) -> Inception:
    """The extractor with published weights; see `load_network`."""
    return Inception(load_network(weights))


def load_network(weights: Path | None = None) -> InceptionNetwork:
    """The network with the weights of a `.pth` or `.safetensors` file in PyTorch's layout.

    Args:
        weights: the file; None for one of `FILE_NAMES` in the usual folders.

    Raises:
        InputError: there is none, it cannot be read, or it holds other weights.
    """
    path = weights or find_published(FILE_NAMES, "the Inception network", PUBLISHED_ADDRESS)
    weights = transpose_linear(_without_unused(plain_weights(read_weights(path))))
    network = InceptionNetwork()
    set_weights(network, weights, path)
    return network


def _without_unused(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leaves out torchvision's second classifier, which is for training only, and counters of training steps."""
    return {
        name: value
        for name, value in weights.items()
        if not name.startswith("AuxLogits.") and not name.endswith(".num_batches_tracked")
    }
