"""Runs a training command in which a number goes wrong: `python disturbed.py KIND:STEP COMMAND ...`.

KIND is `loss` (of the last sample of a batch), `gradient` (of one parameter) or `weights` (of one parameter). It goes
wrong in the last process of the run, at one step.
"""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from latent_diffusion import runtime  # noqa: E402

runtime.start()  # before anything imports paddle

import paddle  # noqa: E402

from latent_diffusion import step_guard  # noqa: E402
from latent_diffusion.objectives import LearnedRangeDDPM  # noqa: E402

PARAMETER = "blocks.0.mlp.fc1.bias"


def disturb_loss(at: int) -> None:
    losses, calls = LearnedRangeDDPM.losses, iter(range(1, 1_000_000))

    def disturbed(self, *args, **kwargs):
        found = losses(self, *args, **kwargs)
        if next(calls) == at:
            bad = paddle.zeros_like(found["loss"])
            bad[-1] = float("nan")
            found["loss"] = found["loss"] + bad
        return found

    LearnedRangeDDPM.losses = disturbed


def disturb_parameter(at: int, change) -> None:
    """Changes the parameter and its gradient right before the guard looks at the step."""
    add, calls = step_guard.StepGuard.add, iter(range(1, 1_000_000))

    def disturbed(self, losses):
        if next(calls) == at:
            change(dict(self._model.named_parameters())[PARAMETER])
        add(self, losses)

    step_guard.StepGuard.add = disturbed


def flip_a_weight(parameter: paddle.Tensor) -> None:
    parameter.set_value(parameter + 1e-6)


def spoil_gradient(parameter: paddle.Tensor) -> None:
    parameter.register_hook(lambda gradient: gradient * float("inf"))


def main() -> None:
    kind, step = sys.argv[1].split(":")
    if os.environ.get("PADDLE_TRAINER_ID", "0") == str(int(os.environ.get("PADDLE_TRAINERS_NUM", 1)) - 1):
        if kind == "loss":
            disturb_loss(int(step))
        else:
            disturb_parameter(int(step), {"weights": flip_a_weight, "gradient": spoil_gradient}[kind])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
