"""Guided sampling with this project's `ImageSampler`, which sample.py uses; it reads ppdiffusers' pipeline folder."""

import sys
from pathlib import Path

from guided_sampling_runs import GUIDANCE, measure, parse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402


@command
def main() -> None:
    arguments = parse(__doc__)
    runtime.start()
    import paddle

    from dit.image_sampling import ImageSampler
    from dit.pretrained import load_dit
    from dit.sampling import make_sampler
    from latent_diffusion import device
    from latent_diffusion.sampling import sample_generators
    from latent_diffusion.vae import load_vae

    cuda = paddle.device.cuda if device.select(arguments.device) == "gpu" else None
    folder = Path(arguments.folder)
    networks = load_dit(folder), load_vae(str(folder / "vae"))

    def draw(labels, steps):
        sampler = ImageSampler(*networks, make_sampler("ddim", steps), GUIDANCE)
        sampler.draw(labels, sample_generators(0, range(len(labels))))

    measure(draw, arguments, cuda)


if __name__ == "__main__":
    main()
