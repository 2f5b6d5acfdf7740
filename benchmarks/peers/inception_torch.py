"""The Inception network of the FID in PyTorch, for comparison: run by an interpreter that has PyTorch and no Paddle.

    python inception_torch.py layers WEIGHTS IMAGES OUT
    python inception_torch.py rate WEIGHTS IMAGES

`layers` computes in float64 and writes what goes into and comes out of every layer to OUT (.npz). `rate` prints the
images a second in float32, with channels first and with channels last. WEIGHTS (.npz) has PyTorch's names and layout;
IMAGES (.npy) is uint8 [B, H, W, 3].
"""

import sys
import time

import numpy as np
import torch
from torch.nn import functional as F

SIZE = 299


class Inception:
    """Written from TensorFlow's graph as one function of the images; `seen` keeps what passed through each layer."""

    def __init__(self, weights, keep=False):
        self.weights = weights
        self.keep = keep
        self.seen = {}

    def __call__(self, x):
        unit = self.unit
        x = self.note("resized", x)
        x = (x - 128) * 0.0078125
        x = unit(x, "Conv2d_1a_3x3", stride=2)
        x = unit(x, "Conv2d_2a_3x3")
        x = unit(x, "Conv2d_2b_3x3", padding=1)
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = unit(x, "Conv2d_3b_1x1")
        x = unit(x, "Conv2d_4a_3x3")
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.block(
                x, name, ["1x1"], ["5x5_1", "5x5_2"], ["3x3dbl_1", "3x3dbl_2", "3x3dbl_3"], [self.mean, "_pool"]
            )
        x = self.block(x, "Mixed_6a", ["3x3/2"], ["3x3dbl_1", "3x3dbl_2", "3x3dbl_3/2"], [self.reduce])
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            twice = [f"7x7dbl_{i}" for i in range(1, 6)]
            x = self.block(x, name, ["1x1"], ["7x7_1", "7x7_2", "7x7_3"], twice, [self.mean, "_pool"])
            if name == "Mixed_6d":
                sixth = x
        four = [f"7x7x3_{i}" for i in range(1, 4)] + ["7x7x3_4/2"]
        x = self.block(x, "Mixed_7a", ["3x3_1", "3x3_2/2"], four, [self.reduce])
        for name, pool in (("Mixed_7b", self.mean), ("Mixed_7c", self.highest)):
            pairs = ["3x3_2a", "3x3_2b"], ["3x3dbl_3a", "3x3dbl_3b"]
            x = self.block(x, name, ["1x1"], ["3x3_1", pairs[0]], ["3x3dbl_1", "3x3dbl_2", pairs[1]], [pool, "_pool"])
        features = self.note("features", x.mean(dim=(2, 3)))
        # mixed_6/conv in TensorFlow's layout, [B, 17, 17, 7], row by row.
        self.note("spatial", torch.stack([sixth[:, c] for c in range(7)], dim=-1).reshape(len(x), -1))
        return self.note("logits", features.matmul(self.weights["fc.weight"].t()))

    def note(self, name, x):
        if self.keep:
            self.seen[name] = x
        return x

    def unit(self, x, name, stride=1, padding=0):
        get = lambda part: self.weights[f"{name}.{part}"]  # noqa: E731
        self.note(f"{name} in", x)
        x = F.conv2d(x, get("conv.weight"), stride=stride, padding=padding)
        x = F.batch_norm(x, get("bn.running_mean"), get("bn.running_var"), get("bn.weight"), get("bn.bias"), eps=0.001)
        return self.note(name, F.relu(x, inplace=True))

    def block(self, x, name, *branches):
        parts = []
        for steps in branches:
            y = x
            for step in steps:
                if isinstance(step, list):
                    y = torch.cat([self.branch(y, name, one) for one in step], dim=1)
                elif isinstance(step, str):
                    y = self.branch(y, name, step)
                else:
                    y = step(y)
            parts.append(y)
        return self.note(name, torch.cat(parts, dim=1))

    def branch(self, x, block, name):
        """One unit of a branch: "name", which keeps the size of the map, or "name/2" with stride 2 and no padding."""
        name, _, stride = name.partition("/")
        name = f"{block}.branch{name}"
        height, width = self.weights[f"{name}.conv.weight"].shape[2:]
        if stride:
            return self.unit(x, name, stride=2)
        return self.unit(x, name, padding=((height - 1) // 2, (width - 1) // 2))

    @staticmethod
    def mean(x):
        return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)

    @staticmethod
    def highest(x):
        return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)

    @staticmethod
    def reduce(x):
        return F.max_pool2d(x, kernel_size=3, stride=2)


def resized_as_tensorflow(x):
    """Bilinear without half pixels, which `interpolate` has not: between the two nearest rows, then columns."""
    for axis in (2, 3):
        size = x.shape[axis]
        position = torch.arange(SIZE, dtype=x.dtype) * size / SIZE
        lower = position.floor().long()
        upper = (lower + 1).clamp(max=size - 1)
        share = (position - lower).reshape([-1, 1] if axis == 2 else [-1])
        x = x.index_select(axis, lower) * (1 - share) + x.index_select(axis, upper) * share
    return x


def write_layers(weights, images, out):
    network = Inception({name: value.double() for name, value in weights.items()}, keep=True)
    with torch.no_grad():
        network(resized_as_tensorflow(images.permute(0, 3, 1, 2).double()))
    np.savez(out, **{name: value.numpy() for name, value in network.seen.items()})


def print_rates(weights, images):
    last = torch.channels_last
    converted = {n: v.contiguous(memory_format=last) if v.dim() == 4 else v for n, v in weights.items()}
    for network, layout in ((Inception(weights), torch.contiguous_format), (Inception(converted), last)):
        compute(network, images, layout)  # the first batch is slower
        start = time.perf_counter()
        compute(network, images, layout)
        print(len(images) / (time.perf_counter() - start))


def compute(network, images, layout):
    with torch.no_grad():
        x = F.interpolate(images.permute(0, 3, 1, 2).float(), (SIZE, SIZE), mode="bilinear")
        network(x.contiguous(memory_format=layout))


if __name__ == "__main__":
    command, weight_file, image_file, *outputs = sys.argv[1:]
    with np.load(weight_file) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    pixels = torch.from_numpy(np.load(image_file))
    {"layers": write_layers, "rate": print_rates}[command](arrays, pixels, *outputs)
