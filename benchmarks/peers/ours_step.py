"""A training step of this project, as `dit/loop.py` makes it, on one batch of random latents.

Networks: DiT and UViT, each with its objective. Under `paddle.distributed.launch` each process takes its part of the
batch, and figures of memory are sums over the processes.
"""

import sys
from pathlib import Path

from timing import print_figures, seconds
from training_steps import measure, parse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.errors import InputError, command  # noqa: E402


@command
def main() -> None:
    arguments = parse(__doc__, "--recompute", "--bf16")
    settings = runtime.start()
    import paddle
    from paddle_batches import random_batch

    from latent_diffusion import device, distributed, precision
    from latent_diffusion.ema import EMA
    from latent_diffusion.optimizers import adamw, constant_with_warmup

    place = device.select(arguments.device)
    dtype, note = precision.choose("bfloat16" if arguments.bf16 else None, place)
    if note:
        raise InputError(note)
    cuda = paddle.device.cuda if place == "gpu" else None
    rank, world_size = distributed.start()
    paddle.seed(0)
    config, model, objective = make(arguments.network, arguments.config)
    let_gates_open(model)
    model.enable_recompute = arguments.recompute
    model.train()
    ema = EMA(model)
    schedule = constant_with_warmup(1e-4, 0)
    optimizer = adamw(model, schedule, weight_decay=0.01)
    parallel = paddle.DataParallel(model) if world_size > 1 else model
    batch = random_batch(config, objective, arguments.batch_size // world_size)
    ema_seconds = []

    def step() -> None:
        with distributed.averaging_gradients(parallel, arguments.recompute):
            with precision.autocast(dtype):
                losses = objective.losses(
                    lambda x, t: parallel(x, t, batch["condition"]), batch["latents"], batch["t"], batch["noise"]
                )
            losses["loss"].mean().backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        schedule.step()
        ema_seconds.append(seconds(lambda: ema.update(len(ema_seconds) + 1), cuda))

    figures = measure(step, arguments, cuda)
    for name in ("peak_memory", "memory_at_rest"):
        figures[name] = total(figures[name], world_size)
    if rank == 0:
        print_figures(
            gradients=world_size * 4 * sum(p.size for p in model.parameters() if not p.stop_gradient),
            ema_seconds=ema_seconds[arguments.warm_up :],
            settings=settings,
            **figures,
        )


def make(network: str, values: dict):
    """Configuration, network and objective."""
    if network == "UViT":
        from uvit_ldm.configuration import UViTConfig as Config
        from uvit_ldm.modeling import UViT as Network
        from uvit_ldm.objective import make_objective
    else:
        from dit.configuration import DiTConfig as Config
        from dit.modeling import DiT as Network
        from dit.objective import make_objective
    config = Config.from_dict(values)
    return config, Network(config), make_objective()


def let_gates_open(model) -> None:
    """Random values for what is zero at first: products with zeros are not those of training."""
    import paddle

    for p in model.parameters():
        if not p.any():
            paddle.nn.initializer.Normal(0.0, 0.02)(p)


def total(count: int, world_size: int) -> int:
    """The sum over the processes."""
    import paddle

    if world_size == 1:
        return count
    tensor = paddle.to_tensor(count)
    paddle.distributed.all_reduce(tensor)
    return int(tensor)


if __name__ == "__main__":
    main()
