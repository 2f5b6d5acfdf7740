"""A training step with stock ppdiffusers in a plain Paddle loop, on one batch of random latents.

Networks: Transformer2DModel (DiT) and UViTT2IModel as they are, without this project's runtime settings; the loss is
this project's, which is the official codes'. The EMA is the usual loop over the parameters.
"""

import sys
from pathlib import Path

from timing import print_figures
from training_steps import measure, parse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import paddle  # noqa: E402
from paddle_batches import random_batch  # noqa: E402

DECAY = 0.9999


def main() -> None:
    arguments = parse(__doc__, "--recompute")
    paddle.set_device(arguments.device)
    config, model, objective, denoise = make(arguments.network, arguments.config)
    if arguments.recompute:
        model.enable_gradient_checkpointing()
    model.train()
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=model.parameters(), weight_decay=0.01)
    averages = [p.detach().clone() for p in model.parameters()]
    batch = random_batch(config, objective, arguments.batch_size)

    def step() -> None:
        losses = objective.losses(
            lambda x, t: denoise(x, t, batch["condition"]), batch["latents"], batch["t"], batch["noise"]
        )
        losses["loss"].mean().backward()
        optimizer.step()
        optimizer.clear_grad()
        with paddle.no_grad():
            for average, p in zip(averages, model.parameters(), strict=True):
                average.scale_(DECAY).add_(p * (1 - DECAY))

    figures = measure(step, arguments, paddle.device.cuda if arguments.device == "gpu" else None)
    print_figures(gradients=0, **figures)  # `clear_grad` keeps them: they are part of what is held between steps


def make(network: str, values: dict):
    """Configuration, network, objective, and how the network is called."""
    if network == "UViT":
        from ppdiffusers.models.uvit_t2i import UViTT2IModel

        from uvit_ldm.configuration import UViTConfig
        from uvit_ldm.objective import make_objective

        config = UViTConfig.from_dict(values)
        arguments = {name: value for name, value in values.items() if name != "scaling_factor"}
        model = UViTT2IModel(**arguments, out_channels=config.in_channels)
        return config, model, make_objective(), lambda x, t, context: model(x, t, context).sample
    from ppdiffusers import Transformer2DModel

    from dit.configuration import DiTConfig
    from dit.objective import make_objective
    from dit.transformer2d import transformer_arguments

    config = DiTConfig.from_dict(values)
    model = Transformer2DModel(**transformer_arguments(config))
    return config, model, make_objective(), lambda x, t, y: model(x, timestep=t, class_labels=y).sample


if __name__ == "__main__":
    main()
