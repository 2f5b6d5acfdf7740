"""A training step of LoRA in the UNet with this project: forward, loss, backward, clipping and AdamW, on one batch."""

import sys
from pathlib import Path

from lora_steps import RANK, random_batch
from timing import print_figures
from training_steps import measure, parse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402


@command
def main() -> None:
    arguments = parse(__doc__, "--recompute")
    settings = runtime.start()
    runtime.import_paddlenlp()
    import paddle
    from ppdiffusers import UNet2DConditionModel

    from latent_diffusion import device
    from sdxl_lora.modeling import SDXLLoRA
    from sdxl_lora.pretrained import freeze

    cuda = paddle.device.cuda if device.select(arguments.device) == "gpu" else None
    paddle.seed(0)
    unet = UNet2DConditionModel(**arguments.config)
    freeze(unet)
    model = SDXLLoRA(unet, RANK)
    model.train()
    model.enable_recompute = arguments.recompute
    optimizer = paddle.optimizer.AdamW(
        1e-4, parameters=model.parameters(), weight_decay=0.01, grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0)
    )
    batch = random_batch(arguments.config, arguments.batch_size)
    values = {name: paddle.to_tensor(value) for name, value in batch.items()}

    def step() -> None:
        found = model(values["latents"], values["t"], values["time_ids"], values["contexts"], values["pooled"])
        paddle.nn.functional.mse_loss(found, values["noise"]).backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)

    print_figures(settings=settings, **measure(step, arguments, cuda))


if __name__ == "__main__":
    main()
