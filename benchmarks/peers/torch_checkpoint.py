"""`torch.save` and `torch.load` of the same weights; the EMA as one call for all parameters, and as fast-DiT's loop."""

import os

import torch
from checkpoint_runs import measure, parse
from torch_dit import DiT

DECAY = 0.9999


def main():
    arguments = parse(__doc__)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = DiT(arguments.config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update():
        torch._foreach_lerp_(averages, parameters, 1 - DECAY)

    @torch.no_grad()
    def update_in_a_loop():
        for average, p in zip(averages, parameters, strict=True):
            average.mul_(DECAY).add_(p.data, alpha=1 - DECAY)

    measure(
        arguments,
        "weights.pt",
        sum(p.numel() for p in parameters),
        lambda path: torch.save(model.state_dict(), path),
        lambda path: model.load_state_dict(torch.load(path, weights_only=True)),
        {"ema": update, "ema_loop": update_in_a_loop},
    )


if __name__ == "__main__":
    main()
