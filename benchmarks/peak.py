"""The machine's peak: what large float32 matrix products reach."""

import sys
from dataclasses import dataclass
from pathlib import Path

from .contest import PEERS, Contestant, run

PROGRAM = PEERS / "matrix_product.py"


@dataclass(frozen=True)
class Peak:
    """FLOP/s of each framework on one device, "cpu" or "gpu"."""

    place: str
    rates: dict[str, float]

    @property
    def flops(self) -> float:
        """Of the faster framework: what counts as the machine's peak."""
        return max(self.rates.values())

    def share(self, flops: float, seconds: float) -> float:
        """The share of the peak that a computation of `flops` operations in `seconds` reaches (on a GPU the MFU)."""
        return flops / seconds / self.flops

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in self.rates.items())
        return f"matrix product on a {self.place}, float32: {rates}; the largest counts as the peak"


def matrix_peak(device: str | None, peer: Path | None) -> Peak:
    """Measures the peak in Paddle and, with an interpreter that has it, in PyTorch.

    Args:
        device: "cpu", "gpu" or None for the GPU if there is one.
        peer: interpreter of PyTorch.

    Raises:
        InputError: the device is not there.
    """
    own = run(Contestant("Paddle", [sys.executable, PROGRAM, "paddle", *([device] if device else [])]))
    rates = {"Paddle": own["flops"]}
    if peer:
        rates["PyTorch"] = run(Contestant("PyTorch", [peer, PROGRAM, "torch", own["place"]]))["flops"]
    return Peak(own["place"], rates)
