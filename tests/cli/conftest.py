"""What the tests of the commands share: a tiny model, small features and the training command for them."""

import json
from pathlib import Path

import pytest

from .commands import LAUNCH, TINY, TRAIN, Command, write_features, write_reference


@pytest.fixture(scope="session")
def config_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="session")
def feature_path(tmp_path_factory) -> Path:
    """Forty images: five steps of eight are an epoch."""
    return write_features(tmp_path_factory.mktemp("data") / "features", 40)


@pytest.fixture(scope="session")
def evaluation_flags(tmp_path_factory) -> tuple[object, ...]:
    """Of evaluations at the third and the last step: of two batches, which is one for each of two processes."""
    reference = write_reference(tmp_path_factory.mktemp("reference") / "images.npz")
    return ("--eval_steps", 3, "--eval_samples", 40, "--eval_reference", reference, "--eval_extractor", "pixels")


@pytest.fixture(scope="session")
def train_command(config_file, feature_path):
    """`train_command(folder, *flags, processes=1)`: four steps of the tiny model into folder/out."""

    def make(folder: Path, *flags: object, processes: int = 1) -> Command:
        folder.mkdir(exist_ok=True)
        launcher = LAUNCH if processes == 2 else ()
        own = ("--do_train", "--config_file", config_file, "--feature_path", feature_path, "--output_dir", "out")
        own += ("--max_steps", 4, "--logging_steps", 1, "--image_logging_steps", 0)
        return Command([str(part) for part in (*launcher, TRAIN, *own, *flags)], folder)

    return make
