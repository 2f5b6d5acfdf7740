"""Imports what every command needs, and names the system package of a shared library that is missing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402


@command
def main() -> None:
    runtime.start()
    # ppdiffusers imports OpenCV; the message about a library it lacks is clearer from here.
    import cv2  # noqa: F401
    import paddle

    runtime.import_paddlenlp()
    import ppdiffusers  # noqa: F401

    print(f"installed: Paddle {paddle.__version__} on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
