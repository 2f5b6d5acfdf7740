"""Floating-point operations a second of a large float32 matrix product, the best of several sizes.

python matrix_product.py {paddle,torch} [{cpu,gpu}]
"""

import os
import sys
from pathlib import Path

from timing import print_figures, seconds

SIZES = (1024, 2048, 4096)
REPEATS = 5


def best_rate(multiply, cuda):
    """FLOP/s; `multiply(size)` returns what computes one product."""
    rates = []
    for size in SIZES:
        product = multiply(size)
        product()  # the first is slower
        rates += [2 * size**3 / seconds(product, cuda) for _ in range(REPEATS)]
    return max(rates)


def with_paddle(device):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from latent_diffusion import runtime

    runtime.start()
    import paddle

    from latent_diffusion.device import select

    place = select(device)

    def multiply(size):
        a, b = paddle.rand([size, size]), paddle.rand([size, size])
        return lambda: paddle.matmul(a, b)

    print_figures(flops=best_rate(multiply, paddle.device.cuda if place == "gpu" else None), place=place)


def with_torch(device):
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    place = "cuda" if device == "gpu" else "cpu"

    def multiply(size):
        a, b = torch.rand([size, size], device=place), torch.rand([size, size], device=place)
        return lambda: torch.matmul(a, b)

    print_figures(flops=best_rate(multiply, torch.cuda if device == "gpu" else None), place=device)


if __name__ == "__main__":
    {"paddle": with_paddle, "torch": with_torch}[sys.argv[1]](sys.argv[2] if len(sys.argv) > 2 else None)
