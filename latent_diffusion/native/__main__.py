"""`python -m latent_diffusion.native` builds the kernels for this machine; without them all still works, slower."""

from ..errors import InputError
from .library import build

if __name__ == "__main__":
    try:
        print(f"built {build()}")
    except InputError as error:
        print(f"note: {error}; Paddle's own operations are used, which is slower on a CPU")
