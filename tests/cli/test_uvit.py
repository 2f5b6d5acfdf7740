"""Text to image: the published commands and snippet, one after the other, on a tiny model.

They run in a folder that mirrors the repository. What they would download lies where its name on the hub leads to.
"""

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_diffusion.weights import read_paddle
from uvit_ldm.pretrained import read_pretrained

from .commands import REPOSITORY, TINY, Command, run, run_all, write_reference

# Each as it was published.
TRAINING = r"""
python -u -m paddle.distributed.launch --gpus "0,1,2,3,4,5,6,7" train_txt2img_uvit_coco_trainer.py \
    --do_train \
    --output_dir ./output_dir/uvit_t2i_small_deep \
    --per_device_train_batch_size 32 \
    --gradient_accumulation_steps 1 \
    --learning_rate 0.0002 \
    --weight_decay 0.03 \
    --adam_beta1 0.9 \
    --adam_beta2 0.9 \
    --max_steps 1000000 \
    --lr_scheduler_type "constant_with_warmup" \
    --warmup_steps 5000 \
    --image_logging_steps 5000 \
    --logging_steps 5000 \
    --save_steps 10000 \
    --seed 1234 \
    --dataloader_num_workers 8 \
    --max_grad_norm -1 \
    --unet_config_file config/uvit_t2i_small_deep.json \
    --num_inference_steps 50 \
    --model_max_length 77 \
    --use_ema True \
    --overwrite_output_dir \
    --disable_tqdm True \
    --recompute True \
    --fp16 False \
    --fp16_opt_level "O1" \
    --enable_xformers_memory_efficient_attention True \
"""
EXPORT = r"""
python generate_pipelines.py \
    --model_file ./output_dir/uvit_t2i_small_deep/checkpoint-200000/model_state.pdparams \
    --output_path ./ldm_uvit_pipelines \
    --vae_name_or_path runwayml/stable-diffusion-v1-5/vae \
    --unet_config_file ./config/uvit_t2i_small_deep.json \
    --text_encoder_name_or_path runwayml/stable-diffusion-v1-5/text_encoder \
    --tokenizer_name_or_path runwayml/stable-diffusion-v1-5/tokenizer \
    --model_max_length 77
"""
SNIPPET = """
from ppdiffusers import LDMTextToImagePipeline
model_name_or_path = "./ldm_uvit_pipelines"
dtype=paddle.float16
pipe = LDMTextToImagePipeline.from_pretrained(model_name_or_path, paddle_dtype=dtype)
prompt = "an elephant under the sea"

pipe.enable_xformers_memory_efficient_attention()
pipe.apply_tome(ratio=0.5) # Can also use pipe.unet in place of pipe here

image = pipe(prompt, guidance_scale=7.5).images[0]
image.save("an_elephant_under_the_sea.png")
"""
SCRIPT = "run_train_ldm_uvit_small_deep.sh"

# In place of the numbers that need eight GPUs; the last of two equal flags counts.
PROCESSES = {'--gpus "0,1,2,3,4,5,6,7"': "--nproc_per_node 2"}
LAST_STEP = {"checkpoint-200000": "checkpoint-6"}
SHORT = (
    "--max_steps 6 --save_steps 3 --logging_steps 1 --image_logging_steps 3 --num_inference_steps 2 --warmup_steps 2"
)
FAST = "--learning_rate 1e-2 --ema_decay 0.5"
HALF = "--per_device_train_batch_size 2 --dataloader_num_workers 2 --model_max_length 7"

STOCK = """
import importlib.util, sys
assert not any(map(importlib.util.find_spec, ("uvit_ldm", "latent_diffusion", "dit")))
from ppdiffusers import LDMTextToImageUViTPipeline
pipe = LDMTextToImageUViTPipeline.from_pretrained(sys.argv[1])
pipe("the cat", height=64, width=64, num_inference_steps=2, guidance_scale=7.5).images[0].save("cat.png")
"""

# Commands one after the other in one process, as imports take most of the time of one that fails.
IN_TURN = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print("status", end.code)
"""
BAD = {
    "--learning_rte 1": "unknown argument '--learning_rte'",
    "--feature_path nowhere --model_max_length 7": "the feature folder nowhere/train does not exist; make it with",
    "--unet_config_file bad.json": "bad.json lacks the key 'patch_size'",
    "--eval_steps 2 --model_max_length 7": "--eval_steps and --eval_reference belong together",
    "--model_max_length 77": "--model_max_length 77 contradicts config/uvit_t2i_small_deep.json",
}


def command(text: str, folder: Path, replaced: dict[str, str], added: str = "") -> Command:
    """A published command with parts of it replaced, and flags after it."""
    for theirs, ours in replaced.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    interpreter, *words = shlex.split(text.replace("\\\n", " ") + added)
    assert interpreter == "python"
    return Command(words, folder)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory, vae_folder, coco_clip_folder, clip_folder) -> Path:
    folder = tmp_path_factory.mktemp("mirror")
    scripts = ("train_txt2img_uvit_coco_trainer.py", "generate_pipelines.py", SCRIPT)
    for name in ("uvit_ldm", "latent_diffusion", *scripts):
        (folder / name).symlink_to(REPOSITORY / name)
    for name in ("config", "data", "runwayml/stable-diffusion-v1-5", "elsewhere"):
        (folder / name).mkdir(parents=True)
    (folder / "data/coco256_features").symlink_to(REPOSITORY / "tests/data/uvit/coco_features_tiny")
    hub = folder / "runwayml/stable-diffusion-v1-5"
    (hub / "vae").symlink_to(vae_folder)
    for name in ("text_encoder", "tokenizer"):
        (hub / name).symlink_to(coco_clip_folder)
    (folder / "other_clip").symlink_to(clip_folder)
    config = {key: value for key, value in TINY.items() if key != "num_classes"}
    config |= {"clip_dim": 32, "num_text_tokens": 7}
    (folder / "config/uvit_t2i_small_deep.json").write_text(json.dumps(config))
    del config["patch_size"]
    (folder / "bad.json").write_text(json.dumps(config))
    write_reference(folder / "reference.npz")
    # What an earlier run left.
    earlier = folder / "output_dir/uvit_t2i_small_deep/checkpoint-9"
    earlier.mkdir(parents=True)
    (earlier / "trainer_state.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def runs(mirror):
    """Results by name. Commands of one stage do not depend on each other."""

    def train(added: str) -> Command:
        return command(TRAINING, mirror, PROCESSES, f"{SHORT} {FAST} {HALF} {added}")

    def failing() -> Command:
        launcher = {'-u -m paddle.distributed.launch --gpus "0,1,2,3,4,5,6,7"': ""}
        commands = [command(TRAINING, mirror, launcher, f"--output_dir out_bad {added}").arguments for added in BAD]
        return Command(["-c", IN_TURN, json.dumps(commands)], mirror)

    def script(output_dir: str, workers: int) -> Command:
        settings = {"PYTHON": sys.executable, "OUTPUT_DIR": output_dir, "BATCH_SIZE": "4", "MAX_STEPS": "6"}
        settings |= {"NUM_WORKERS": str(workers), "SAVE_STEPS": "3", "LOGGING_STEPS": "1", "WARMUP_STEPS": "2"}
        flags = shlex.split(
            f"{FAST} --image_logging_steps 2 --num_inference_steps 2 --validation_prompts 'the cat' --eval_steps 2 "
            "--eval_samples 5 --eval_reference reference.npz --eval_extractor pixels"
        )
        return Command([SCRIPT, *flags], mirror, "sh", settings)

    def export(added: str) -> Command:
        return command(EXPORT, mirror, LAST_STEP, f"--model_max_length 7 {added}")

    results = run_all(
        {
            "two": train(""),
            "one": script("out_one", workers=0),
            "failing": failing(),
        }
    )
    for name in ("two", "one"):
        results[name].ok()
    shutil.copytree(mirror / "out_one/checkpoint-3", mirror / "out_one_resumed/checkpoint-3")
    earlier = "output_dir/uvit_t2i_small_deep/checkpoint-3"
    results |= run_all(
        {
            "two_resumed": train(
                f"--output_dir out_two_resumed --resume_from_checkpoint {earlier} --image_logging_steps 0 "
                "--dataloader_num_workers 0"
            ),
            "one_resumed": script("out_one_resumed", workers=2),
            "export": export(""),
            "stock": export("--model_file out_one --output_path stock --pipeline LDMTextToImageUViTPipeline"),
            "other width": export("--model_file out_one --output_path out_bad --text_encoder_name_or_path other_clip"),
        }
    )
    for name in ("export", "stock"):
        results[name].ok()
    return results | run_all(
        {
            "snippet": Command(["-c", f"import paddle{SNIPPET}"], mirror),
            "stock snippet": Command(["-c", STOCK, str(mirror / "stock")], mirror / "elsewhere"),
        }
    )


OUTPUTS = {"two": "output_dir/uvit_t2i_small_deep", "one": "out_one"}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def test_the_published_command_trains_on_two_processes(mirror, runs):
    result = runs["two"].ok()
    assert "3 images, 6 steps of 2 x 1 x 2 samples on cpu, from step 0" in result.out
    assert "Traceback" not in result.err
    assert len(result.logged("loss")) == 6
    rates = [float(value) for value in result.logged("learning_rate")]
    assert rates == [0.005, 0.01, 0.01, 0.01, 0.01, 0.01]


def test_earlier_checkpoints_are_set_aside_not_overwritten(mirror, runs):
    folder = mirror / OUTPUTS["two"]
    assert checkpoints(folder) == ["checkpoint-3", "checkpoint-6"]
    assert checkpoints(folder / "overwritten-1") == ["checkpoint-9"]


def test_losses_do_not_depend_on_how_a_step_is_shared(runs):
    """Neither on processes nor on workers of the loader."""
    for name in ("loss", "grad_norm"):
        one, two = (np.array(runs[run].logged(name), dtype=float) for run in ("one", "two"))
        assert len(one) == 6 and len(set(one)) > 3
        np.testing.assert_allclose(two, one, rtol=2e-3, err_msg=name)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_resumed_run_is_bitwise_the_same(mirror, runs, name):
    resumed = runs[f"{name}_resumed"].ok()
    assert "resuming from" in resumed.out
    assert resumed.logged("loss") == runs[name].logged("loss")[3:]
    whole, again = mirror / OUTPUTS[name], mirror / f"out_{name}_resumed/checkpoint-6"
    for file in ("model_state.pdparams", "ema_state.pdparams", "optimizer.pdopt", "scheduler.pdparams"):
        np.testing.assert_equal(read_paddle(again / file), read_paddle(whole / "checkpoint-6" / file))
        assert (again / file).read_bytes() != (whole / "checkpoint-3" / file).read_bytes()


@pytest.mark.parametrize(("name", "steps", "prompts"), [("two", [3, 6], 2), ("one", [2, 4, 6], 1)])
def test_captioned_images_are_logged(mirror, runs, name, steps, prompts):
    """Of the two prompts in run_vis, and of that of --validation_prompts."""
    from visualdl import LogReader

    assert "no images will be logged" not in runs[name].err + runs[name].out
    (log,) = (mirror / OUTPUTS[name] / "runs").rglob("vdlrecords*")
    reader = LogReader(file_path=str(log))
    tags = reader.get_tags()
    assert {"train/loss", "train/learning_rate", "train/grad_norm"} <= set(tags["scalar"])
    assert set(tags["image"]) == {"samples/guidance_2", "samples/guidance_7.5"}
    for tag in tags["image"]:
        records = reader.get_data("image", tag)
        assert [record.id for record in records] == steps
        grid = np.asarray(Image.open(io.BytesIO(records[-1].image.encoded_image_string)))
        tiles = grid[2:-2, 2:-2].reshape(len(grid) - 4, 4, 66, 3).swapaxes(0, 1)
        drawn = [True] * prompts + [False] * (4 - prompts)
        assert [tile[:64].std() > 1 for tile in tiles] == drawn
        assert [tile[66:].min() < 64 for tile in tiles] == drawn  # letters below the image


def test_the_best_weights_are_kept(mirror, runs):
    """Samples of the captions of the val split, of which there are fewer."""
    lines = [line for line in runs["one"].out.splitlines() if ": Frechet distance (pixels) of 5 samples " in line]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4", "step 6"]
    best = mirror / "out_one/best"
    found = json.loads((best / "evaluation.json").read_text())
    assert f" {found['fid']:.5g}, the best so far" in lines[found["step"] // 2 - 1]
    assert read_pretrained(best).config.num_text_tokens == 7


TREE = """
ldm_uvit_pipelines
    model_index.json
    vqvae/model_state.pdparams
    vqvae/config.json
    bert/model_config.json
    bert/model_state.pdparams
    unet/model_state.pdparams
    unet/config.json
    scheduler/scheduler_config.json
    tokenizer/tokenizer_config.json
    tokenizer/special_tokens_map.json
"""


def test_the_published_export_writes_the_published_tree(mirror, runs):
    result = runs["export"]
    assert "differs from the network's by at most 0.0e+00" in result.out
    assert result.err.count("note:") == 1 and "holds the raw weights" in result.err
    root, *files = TREE.split()
    found = {str(path.relative_to(mirror / root)) for path in (mirror / root).rglob("*") if path.is_file()}
    assert found == {*files, "tokenizer/vocab.json", "tokenizer/merges.txt"}


def test_the_published_snippet_draws_an_image(mirror, runs):
    result = runs["snippet"].ok()
    with Image.open(mirror / "an_elephant_under_the_sea.png") as image:
        assert image.size == (64, 64) and image.mode == "RGB"
    notes = re.findall("note: .*", result.err)
    assert sorted(notes) == [
        "note: float16 needs a GPU: the pipeline computes in float32 on a CPU",
        "note: memory-efficient attention needs a GPU: it has no effect on a CPU",
    ]


def test_a_folder_for_ppdiffusers_alone_draws_without_this_repository(mirror, runs):
    assert "note: call the pipeline with height=64, width=64" in runs["stock"].out
    runs["stock snippet"].ok()
    with Image.open(mirror / "elsewhere/cat.png") as image:
        assert image.size == (64, 64)


def test_training_that_cannot_be_ends_with_one_line(mirror, runs):
    result = runs["failing"].ok()
    assert result.out.count("status 1\n") == len(BAD)
    for line, message in zip(result.err.splitlines(), BAD.values(), strict=True):
        assert line.startswith("error: ") and message in line
    assert not (mirror / "out_bad").exists()


def test_an_export_that_cannot_be_ends_with_one_line(mirror, runs):
    result = runs["other width"]
    assert result.code == 1
    assert result.err == "error: the text encoder gives contexts of width 16, the network takes clip_dim 32\n"
    assert not list(mirror.glob("*out_bad*"))


# The script, with a Python that shows how it would train.

STUB = """
class device:
    class cuda:
        device_count = staticmethod(lambda: {})
"""


@pytest.fixture
def show(tmp_path):
    """`show(count, *flags, **variables)`: the lines that the script prints on a machine with `count` GPUs."""

    def make(count: int, *flags: str, **variables: str) -> list[str]:
        (tmp_path / "paddle.py").write_text(STUB.format(count))
        fake = tmp_path / "a bin/python"
        fake.parent.mkdir()
        fake.write_text(
            f'#!/bin/sh\ncase "$*" in\n*--do_train*) echo "${{CUDA_VISIBLE_DEVICES-}}" "$@" ;;\n'
            f'*) PYTHONPATH={tmp_path} exec {sys.executable} "$@" ;;\nesac\n'
        )
        fake.chmod(0o755)
        search = {"PATH": f"{fake.parent}:/usr/bin:/bin"}
        command = Command([str(REPOSITORY / SCRIPT), *flags], tmp_path, "sh", search | variables)
        return run(command).ok().out.splitlines()

    return make


ALONE, SEVERAL = "{} -u train_txt2img_uvit_coco_trainer.py --do_train ", "-m paddle.distributed.launch --gpus {} train_"


@pytest.mark.parametrize(
    ("count", "variables", "said", "expected"),
    [
        (8, {}, "training on GPU 0,1,2,3,4,5,6,7", SEVERAL.format("0,1,2,3,4,5,6,7")),
        (1, {}, "training on GPU 0", ALONE.format("0")),
        (0, {}, "training on the CPU", ALONE.format("")),
        (2, {"CUDA_VISIBLE_DEVICES": "4,5"}, "training on GPU 4,5", SEVERAL.format("4,5")),
        (1, {"CUDA_VISIBLE_DEVICES": "3"}, "training on GPU 3", ALONE.format("3")),
        (0, {"CUDA_VISIBLE_DEVICES": ""}, "training on the CPU", ALONE.format("")),
        (0, {"GPUS": "0,1,2,3,4,5,6,7"}, "training on GPU 0,1,2,3,4,5,6,7", SEVERAL.format("0,1,2,3,4,5,6,7")),
        (8, {"GPUS": "0"}, "training on GPU 0", ALONE.format("0")),
        (8, {"GPUS": ""}, "training on the CPU", ALONE.format("")),
    ],
)
def test_the_script_trains_on_the_devices_there_are(show, count, variables, said, expected):
    first, line = show(count, **variables)
    assert first == said and expected.strip() in line
    assert line.endswith(" --device cpu") == (said == "training on the CPU")


def test_the_script_has_the_published_settings(show):
    _, line = show(8)
    published, own = (flags(text.replace("\\\n", " ")) for text in (TRAINING, line))
    left_to_defaults = {"--model_max_length", "--overwrite_output_dir", "--disable_tqdm"}
    assert published.keys() - own.keys() == left_to_defaults
    changed = {name for name in published.keys() & own.keys() if published[name] != own[name]}
    assert changed == {"--logging_steps"}
    assert own.keys() - published.keys() == {"--feature_path"}


def flags(text: str) -> dict[str, list[str]]:
    """The values of each flag."""
    found, name = {}, "program"
    for word in shlex.split(text):
        if word.startswith("--"):
            name = word
        found.setdefault(name, []).append(word)
    return {name: values for name, values in found.items() if name != "program"}


def test_variables_and_further_flags_override_the_script(show, tmp_path):
    variables = {"BATCH_SIZE": "4", "MAX_STEPS": "9", "OUTPUT_DIR": "out dir", "PYTHON": f"{tmp_path}/a bin/python"}
    _, line = show(1, "--seed", "7", "--weight_decay", "0", **variables)
    assert line.endswith(" --seed 7 --weight_decay 0")
    for part in ("--per_device_train_batch_size 4 ", "--max_steps 9 ", "--output_dir out dir "):
        assert part in line
