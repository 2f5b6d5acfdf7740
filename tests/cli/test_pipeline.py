"""From images to images: the commands one after the other, with the defaults of the published ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .commands import CONVERT, EXTRACT, TINY, TRAIN, Command, run

# The published snippet in float32, as a CPU needs it, without its last line, which asks for the memory of a GPU.
SNIPPET = """
from ppdiffusers import DiTPipeline, DPMSolverMultistepScheduler, DDIMScheduler
import paddle
from paddlenlp.trainer import set_seed

dtype=paddle.float32
pipe=DiTPipeline.from_pretrained("./DiT_XL_2_256", paddle_dtype=dtype)

#pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

words = ["white shark"]
class_ids = pipe.get_label_ids(words)

set_seed(42)
generator = paddle.Generator().manual_seed(0)

image = pipe(class_labels=class_ids, num_inference_steps=25, generator=generator).images[0]
image.save("white_shark.png")
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, vae_folder) -> Path:
    """A folder in which images were extracted, trained on, exported and sampled with as few flags as can be."""
    folder = tmp_path_factory.mktemp("workspace")
    rng = np.random.default_rng(0)
    for name in ("images/cat/1.png", "images/cat/2.png", "images/dog/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 64, 3), dtype=np.uint8)).save(folder / name)
    (folder / "tiny.json").write_text(json.dumps(TINY | {"num_classes": 1000}))
    extract = ["--data-path", "images", "--image-size", "64", "--vae", str(vae_folder), "--use_flip"]
    train = ["--do_train", "--config_file", "tiny.json", "--max_steps", "1", "--image_logging_steps", "0", "--use_flip"]
    results = [
        run(Command(arguments, folder)).ok()
        for arguments in (
            [EXTRACT, *extract],
            [TRAIN, *train],
            [CONVERT, "--vae_name_or_path", str(vae_folder)],
            ["-c", SNIPPET],
        )
    ]
    (folder / "out.json").write_text(json.dumps([result.out for result in results]))
    return folder


def test_each_command_says_what_it_did(workspace):
    extract, train, convert, _ = json.loads((workspace / "out.json").read_text())
    assert "encoded 3 images, 0 were there already" in extract
    assert "3 images, 1 steps" in train
    assert "image_generation_dit_output_trainer/checkpoint-1/ema_state.pdparams" in convert
    assert "wrote DiT_XL_2_256" in convert


def test_every_folder_is_where_it_is_by_default(workspace):
    features = workspace / "data/fastdit_imagenet256"
    assert len(list((features / "imagenet64_features").glob("*.npy"))) == 3
    assert len(list((features / "imagenet64_features_flip").glob("*.npy"))) == 3
    assert (workspace / "image_generation_dit_output_trainer/checkpoint-1/model_state.pdparams").is_file()
    assert (workspace / "DiT_XL_2_256/transformer/model_state.pdparams").is_file()


def test_the_snippet_draws_an_image(workspace):
    with Image.open(workspace / "white_shark.png") as image:
        assert image.size == (64, 64) and image.mode == "RGB"
