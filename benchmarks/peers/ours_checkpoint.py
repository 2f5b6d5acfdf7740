"""This project's file of weights as a checkpoint holds it, and its EMA."""

import sys
from pathlib import Path

from checkpoint_runs import measure, parse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402


@command
def main() -> None:
    arguments = parse(__doc__)
    runtime.start()
    from dit.configuration import DiTConfig
    from dit.modeling import DiT
    from latent_diffusion import device
    from latent_diffusion.checkpoint import MODEL, load_weights
    from latent_diffusion.ema import EMA
    from latent_diffusion.weights import write_paddle

    device.select("cpu")
    model = DiT(DiTConfig.from_dict(arguments.config))
    ema = EMA(model)
    measure(
        arguments,
        MODEL,
        sum(p.size for p in model.parameters() if not p.stop_gradient),
        lambda path: write_paddle(path, model.state_dict()),
        lambda path: load_weights(path, model),
        {"ema": lambda: ema.update(1)},
    )


if __name__ == "__main__":
    main()
