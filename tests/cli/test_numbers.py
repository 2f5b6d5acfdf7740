"""Real runs in which a loss, a gradient or the weights of one process go wrong."""

from pathlib import Path

import numpy as np
import pytest

from latent_diffusion.weights import read_paddle

from .commands import LAUNCH, LOOP, TRAIN, Command, Result
from .forks import run_all

DISTURBED = str(Path(__file__).parent / "disturbed.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("numbers")


@pytest.fixture(scope="module")
def runs(root, config_file, feature_path) -> dict[str, Result]:
    """Results by name, of 4 steps of 4 samples; each ran in the folder of its name."""
    trainer = [TRAIN, "--do_train", "--config_file", config_file, "--feature_path", feature_path, "--output_dir", "out"]
    trainer += ["--max_steps", 4, "--save_steps", 2, "--logging_steps", 1, "--report_to", "none", "--ema_decay", 0.5]
    trainer += ["--image_logging_steps", 0]
    loop = [LOOP, "--model", config_file, "--feature-path", feature_path, "--results-dir", "out", "--max-steps", 4]
    loop += ["--ckpt-every", 2, "--log-every", 1, "--num-workers", 0, "--ema-decay", 0.5, "--global-batch-size", 4]

    def command(name: str, fault: str, arguments: list, *flags: object, launcher: tuple = ()) -> Command:
        (root / name).mkdir()
        return Command([str(part) for part in (*launcher, DISTURBED, fault, *arguments, *flags)], root / name)

    two, four = ("--per_device_train_batch_size", 2), ("--per_device_train_batch_size", 4)
    return run_all(
        {
            "trainer_two": command("trainer_two", "loss:3", trainer, *two, launcher=LAUNCH),
            "loop_two": command("loop_two", "weights:3", loop, launcher=LAUNCH),
            "trainer_skip": command("trainer_skip", "gradient:3", trainer, *four, "--on_nonfinite", "skip"),
            "loop_skip": command("loop_skip", "loss:3", loop, "--on-nonfinite", "skip", "--lr", "1e-3"),
            "loop": command("loop", "gradient:3", loop),
        }
    )


def only_error(result: Result) -> str:
    assert result.code == 1
    (line,) = {line for line in (result.out + result.err).splitlines() if line.startswith("error: ")}
    assert "Traceback" not in result.out + result.err
    return line


def test_a_loss_of_another_process_ends_the_run_and_is_named(root, runs):
    error = only_error(runs["trainer_two"])
    assert error.startswith("error: the loss is not finite at step 3 (loss of image ") and " of process 1)" in error
    assert "checkpoints in out are intact; try a lower --learning_rate" in error and "--on_nonfinite skip" in error
    assert [path.name for path in (root / "trainer_two/out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_gradient_ends_the_run_and_is_named(root, runs):
    error = only_error(runs["loop"])
    assert error.startswith("error: the gradient is not finite at step 4 (image ")
    assert "; first in the gradient of blocks.0.mlp.fc1.bias); training stops" in error
    assert [path.name for path in root.glob("loop/out/*/checkpoint-*")] == ["checkpoint-2"]


def test_weights_that_differ_are_found_before_they_are_saved(root, runs):
    error = only_error(runs["loop_two"])
    assert error.startswith(
        "error: at step 4 the weights of process 1 are not those of process 0 (the first is blocks.0"
    )
    assert [path.name for path in root.glob("loop_two/out/*/checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(("name", "made"), [("trainer_skip", 2), ("loop_skip", 3)])
def test_a_step_that_is_left_out_changes_nothing(root, runs, name, made):
    """The gradient stays bad after step 3, the loss does not: two or three of four steps are made."""
    result = runs[name].ok()
    assert "step 3 is left out: the " in result.out
    before, after = (next((root / name).rglob(f"checkpoint-{step}")) for step in (2, 4))
    # Paddle keeps the power that the next step will use.
    optimizer = read_paddle(after / "optimizer.pdopt")
    power = next(value for key, value in optimizer.items() if "beta1_pow" in key)
    np.testing.assert_allclose(power, 0.9 ** (made + 1), rtol=1e-6)
    for file in ("model_state.pdparams", "ema_state.pdparams"):
        weights = [read_paddle(folder / file)["x_embedder.proj.weight"] for folder in (before, after)]
        assert np.array_equal(*weights) == (made == 2)
