"""PyTorch and its libraries, in the interpreter that the variable PEER_PYTHON names."""

import os
import subprocess
from pathlib import Path

import pytest

needs_peer = pytest.mark.skipif(
    "PEER_PYTHON" not in os.environ, reason="PEER_PYTHON names no interpreter with torch, diffusers and transformers"
)


def run_peer(folder: Path, *arguments: str) -> str:
    """What `PEER_PYTHON *arguments` prints, run in a folder and without the network."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [os.environ["PEER_PYTHON"], *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
