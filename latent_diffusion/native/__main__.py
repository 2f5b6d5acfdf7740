"""Builds the kernels for this machine; without them all still works, slower."""

from ..command_line import ArgumentParser
from ..errors import InputError
from .library import build

if __name__ == "__main__":
    ArgumentParser(prog="python -m latent_diffusion.native", description=__doc__).parse_args()
    try:
        print(f"built {build()}")
    except InputError as error:
        print(f"note: {error}; Paddle's own operations are used, which is slower on a CPU")
