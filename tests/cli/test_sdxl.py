"""SDXL LoRA: the published scripts and commands, and those of the README, on a tiny pipeline and a few images.

They run in a folder that mirrors the repository. What they would download lies where its name on the hub leads to.
"""

import io
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import load_file

from demo.tiny_sdxl import write_pipeline
from latent_diffusion.reading import read_json

from .commands import LAUNCH, REPOSITORY, Command, Result, ends, in_turn, run, run_all

CAPTIONS = ["a red three", "a blue three", "a red seven"]

# What the README says, and what is added to make it small: the last of two equal flags counts.
SCRIPTS = """
bash scripts/train_1p_text_to_image_sdxl_lora.sh
bash scripts/train_1p_text_to_image_sdxl_lora.sh --max_train_steps=200
bash scripts/train_8p_text_to_image_sdxl_lora.sh
bash scripts/train_8p_text_to_image_sdxl_lora.sh --max_train_steps=200
"""
LOCAL = r"""
python train_text_to_image_lora_sdxl.py \
    --pretrained_model_name_or_path models/stable-diffusion-xl-base-1.0 \
    --vae_name models/sdxl-vae-fp16-fix \
    --dataset_name data/pokemon \
    --resolution 1024 \
    --random_flip \
    --cache_latents \
    --train_batch_size 1 \
    --gradient_accumulation_steps 4 \
    --gradient_checkpointing \
    --mixed_precision bf16 \
    --max_train_steps 10000 \
    --validation_prompts "a cute dragon" "a red bird" \
    --output_dir output/pokemon_lora
"""
MERGE = """
python scripts/merge_sdxl_lora.py --pretrained_model_name_or_path models/stable-diffusion-xl-base-1.0 --lora_path output/pokemon_lora --output_path output/pokemon_pipeline
"""  # noqa: E501
SNIPPET = """
from ppdiffusers import StableDiffusionXLPipeline

pipe = StableDiffusionXLPipeline.from_pretrained("models/stable-diffusion-xl-base-1.0")
pipe.load_lora_weights("output/pokemon_lora")
paddle.seed(0)
pipe("a cute dragon").images[0].save("dragon.png")
"""
TREES = ("data/pokemon", "output/pokemon_lora")

# As it was published, for ppdiffusers.
PUBLISHED = r"""
python -u train_text_to_image_lora_sdxl.py \
  --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 \
  --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix \
  --dataset_name=lambdalabs/naruto-blip-captions --caption_column="text" \
  --resolution=1024 --random_flip \
  --train_batch_size=1 \
  --num_train_epochs=2 --checkpointing_steps=500 \
  --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 \
  --mixed_precision="fp16" \
  --seed=42 \
  --output_dir="sd-pokemon-model-lora-sdxl" \
  --validation_prompt="cute dragon creature"
"""

SHORT = "--resolution 64 --max_train_steps 4 --checkpointing_steps 2 --logging_steps 2 --num_inference_steps 2"
FAST = "--learning_rate 1e-2 --cache_latents"
LIKE_THE_SCRIPT = f"{SHORT} {FAST} --random_flip --seed 42 --train_batch_size 2 --report_to none"

# Of a run that ended: its checkpoint stays.
REMOVE_WEIGHTS = """
for file in Path("resumed").glob("*.safetensors"):
    file.unlink()
"""

# Runs without the project: how much the LoRA changes, and whether the merged pipeline draws the same.
STOCK = """
import importlib.util, sys
sys.path.remove("")
assert not any(map(importlib.util.find_spec, ("sdxl_lora", "latent_diffusion")))
import numpy as np, paddle
from ppdiffusers import StableDiffusionXLPipeline
def draw(pipe):
    paddle.seed(0)
    return pipe("a red three", num_inference_steps=2, output_type="np").images[0]
pipe = StableDiffusionXLPipeline.from_pretrained("models/stable-diffusion-xl-base-1.0")
base = draw(pipe)
pipe.load_lora_weights("output/pokemon_lora")
tuned = draw(pipe)
merged = draw(StableDiffusionXLPipeline.from_pretrained("output/pokemon_pipeline"))
print(np.abs(tuned - base).max(), np.abs(merged - tuned).max())
"""

BAD = {
    "--image_column picture": "picture",
    "--caption_column caption": "caption",
    "--resolution 60": "--resolution 60 is no multiple of 8",
    "--pretrained_model_name_or_path models/sdxl-vae-fp16-fix": "fix holds no folder text_encoder",
    "--dataset_name nowhere": "nowhere",
    "--vae_name nowhere": "nowhere",
    "--rank 0": "--rank must be at least 1",
    "--max_training_steps 3": "unknown argument '--max_training_steps'",
}


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mirror")
    for name in ("train_text_to_image_lora_sdxl.py", "scripts", "sdxl_lora", "latent_diffusion"):
        (folder / name).symlink_to(REPOSITORY / name)
    write_pipeline(folder / "models/stable-diffusion-xl-base-1.0", CAPTIONS)
    (folder / "models/sdxl-vae-fp16-fix").symlink_to("stable-diffusion-xl-base-1.0/vae")
    write_dataset(folder / "data/pokemon")
    for name, target in (
        ("stabilityai/stable-diffusion-xl-base-1.0", "models/stable-diffusion-xl-base-1.0"),
        ("madebyollin/sdxl-vae-fp16-fix", "models/sdxl-vae-fp16-fix"),
        ("lambdalabs/naruto-blip-captions", "data/pokemon"),
    ):
        (folder / name).parent.mkdir()
        (folder / name).symlink_to(folder / target)
    return folder


def write_dataset(folder: Path) -> None:
    """Six images in the tree of a downloaded data set."""
    (folder / "data").mkdir(parents=True)
    for name in ("README.MD", "data/dataset_infos.json", "dataset_infos.json"):
        (folder / name).write_text("{}")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (64 + i, 72, 3), np.uint8)).save(file := io.BytesIO(), "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    table = pa.table({"image": rows, "text": [CAPTIONS[i % len(CAPTIONS)] for i in range(6)]})
    parquet.write_table(table, folder / "data/train-0001.parquet")


def command(text: str, folder: Path, added: str = "", launcher: tuple[str, ...] = ()) -> Command:
    """A command with flags after it, and a launcher before the script."""
    program, *words = shlex.split(text.replace("\\\n", " ") + added)
    words = [word for word in words if word != "-u"]
    variables = {"HF_HOME": str(folder / "huggingface")}
    if program == "python":
        return Command([*launcher, *words], folder, variables=variables)
    return Command(words, folder, program, variables | {"PYTHON": sys.executable})


@pytest.fixture(scope="module")
def results(mirror) -> dict[str, Result]:
    one, eight = (SCRIPTS.split("\n")[number] for number in (1, 3))
    small = f" {SHORT} --max_train_steps 2 --use_ema --sharding stage1 --train_text_encoder --gradient_checkpointing"
    base = ["--pretrained_model_name_or_path", "models/stable-diffusion-xl-base-1.0", "--dataset_name", "data/pokemon"]
    trainer = ["train_text_to_image_lora_sdxl.py", *base]
    resumed = [*trainer, *shlex.split(f"{LIKE_THE_SCRIPT} --output_dir resumed")]
    half = [*resumed, "--max_train_steps", 2]
    commands = {
        "published": command(PUBLISHED, mirror, small, LAUNCH),
        "two": command(
            eight.replace("8p_", "").replace(".sh", ".sh 2"),
            mirror,
            f" {SHORT} {FAST} --output_dir two --report_to none",
        ),
        "one": command(one, mirror, f" {LIKE_THE_SCRIPT}"),
        "local": command(LOCAL, mirror, f" {SHORT} {FAST}"),
        "resumed": in_turn([half, half, resumed], mirror, REMOVE_WEIGHTS),
        "bad": in_turn(
            [[*trainer, *shlex.split(f"{SHORT} --output_dir bad {flags}")] for flags in BAD], mirror, "pass"
        ),
    }
    for each in commands.values():
        each.variables |= {"HF_HOME": str(mirror / "huggingface")}
    return run_all(commands)


@pytest.fixture(scope="module")
def merged(results, mirror) -> Path:
    """The mirror after merging."""
    results["local"].ok()
    run(command(MERGE, mirror)).ok()
    return mirror


def lora_weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_the_script_prints_final_loss_and_speed_and_leaves_weights_and_logs(results, mirror):
    out = results["one"].ok().out
    assert re.search(r"^final loss \d\.\d{4} \(mean of the last 4 steps\), FPS not measured: too few steps$", out, re.M)
    output = mirror / "output/sdxl_lora_1p"
    for name in ("pytorch_lora_weights.safetensors", "paddle_lora_weights.safetensors"):
        assert (output / name).is_file() and (output / "checkpoint-2" / name).is_file()
    assert read_json(output / "checkpoint-4/config.json") == {"rank": 4, "train_text_encoder": False}


def test_two_processes_learn_what_one_does(results, mirror):
    assert "final loss" in results["two"].ok().out
    theirs = lora_weights(mirror / "two")
    for name, value in lora_weights(mirror / "output/sdxl_lora_1p").items():
        np.testing.assert_allclose(theirs[name], value, atol=1e-4)
    assert (mirror / "two/log/workerlog.1").is_file()


def test_a_resumed_run_learns_the_same_bits(results, mirror):
    first, again, second = ends(results["resumed"])
    assert "final loss" in first.ok().out and "resuming from resumed/checkpoint-2" in second.ok().out
    assert "nothing is left to train" in again.ok().out
    assert "LoRA weights of step 2 are in resumed" in again.out and "final loss" not in again.out
    ours, theirs = (
        (mirror / folder / "pytorch_lora_weights.safetensors").read_bytes()
        for folder in ("output/sdxl_lora_1p", "resumed")
    )
    assert ours == theirs


def test_the_published_command_trains_the_text_encoders_in_two_processes_with_sharding(results, mirror):
    assert "final loss" in results["published"].ok().out
    output = mirror / "sd-pokemon-model-lora-sdxl"
    assert {name.partition(".")[0] for name in lora_weights(output)} == {"unet", "text_encoder", "text_encoder_2"}
    assert len(list((output / "checkpoint-2").glob("optimizer.shard*.pdopt"))) == 2


def test_prompts_are_drawn_after_each_epoch_and_at_the_end(results, mirror):
    from visualdl import LogReader

    results["local"].ok()
    (log,) = (mirror / "output/pokemon_lora/runs").rglob("vdlrecords.*.log")
    reader = LogReader(file_path=str(log))
    assert reader.get_tags()["image"] == ["samples/validation"]
    # Six images are an epoch: one and a half steps of four.
    assert [record.id for record in reader.get_data("image", "samples/validation")] == [2, 4]


def test_the_trees_of_the_readme_are_what_is_there(results, mirror):
    results["local"].ok()
    names = {path.name for path in (mirror / "output/pokemon_lora").iterdir() if not path.name.startswith(".")}
    trees = dict(zip(TREES, ({path.name for path in (mirror / TREES[0]).rglob("*")}, names), strict=True))
    for tree in re.findall(r"^```text\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL):
        if (name := tree.split(maxsplit=1)[0]) in trees:
            written = {entry.replace("10000", "4") for entry in re.findall(r"[├└]── (\S+)", tree)}
            assert written == trees.pop(name) - {"checkpoint-2"}
    assert not trees


def test_ppdiffusers_alone_loads_the_lora_and_the_merged_pipeline_as_the_readme_does(merged):
    drawn = run(Command(["-c", STOCK + SNIPPET], merged)).ok()
    change, difference = map(float, drawn.out.splitlines()[-1].split())
    assert change > 0.01 and difference < 1e-3
    assert Image.open(merged / "dragon.png").size == (64, 64)


@pytest.mark.parametrize("number", range(len(BAD)), ids=list(BAD))
def test_a_wrong_flag_is_one_sentence_that_names_it(results, number):
    end = ends(results["bad"])[number]
    assert end.code == 1 and "Traceback" not in end.err
    (error,) = (line for line in end.err.splitlines() if line.startswith("error: "))
    assert list(BAD.values())[number] in error


def test_the_script_for_eight_devices_starts_eight_processes(mirror, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *device_count*) echo "$GPUS";; *) printf "%s\\n" "$@";; esac\n')
    python.chmod(0o755)
    eight = command(SCRIPTS.split("\n")[4], mirror, " --dataset_name=other")
    eight.variables |= {"PYTHON": str(python), "output_dir": "some place"}
    on_cpu, on_gpus, on_few = (
        run(Command(eight.arguments, mirror, "bash", eight.variables | {"GPUS": gpus})) for gpus in "084"
    )
    words = on_cpu.ok().out.splitlines()
    assert words[words.index("--log_dir") + 1] == "some place/log"
    assert words[words.index("--nproc_per_node") + 1] == "8"
    assert words[-2:] == ["--max_train_steps=200", "--dataset_name=other"]
    words = on_gpus.ok().out.splitlines()
    assert words[words.index("--gpus") + 1] == "0,1,2,3,4,5,6,7" and "--device" not in words
    for flags in (
        ["--train_data_dir", "images", "--output_dir", "there"],
        ["--train-data-dir=images", "--output-dir=there"],
    ):
        folder = Command([*eight.arguments[:1], *flags], mirror, "bash", eight.variables | {"GPUS": "8"})
        words = run(folder).ok().out.splitlines()
        assert "--dataset_name" not in words and words[words.index("--log_dir") + 1] == "there/log"
    assert on_few.code == 1 and "8 devices are asked for, and there are 4 GPUs" in on_few.err
