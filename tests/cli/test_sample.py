"""`sample.py`, `sample_ddp.py` and the benchmark of sampling, run for real on the reference model."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import sample_ddp
from dit.configuration import DiTConfig

from .commands import LAUNCH, REPOSITORY, TINY, Command, Result
from .forks import run, run_all

SAMPLE, SAMPLE_MANY = str(REPOSITORY / "sample.py"), str(REPOSITORY / "sample_ddp.py")
BENCHMARK = str(REPOSITORY / "benchmarks" / "sampling.py")
GRID_SIZE = (4 * 66 + 4, 2 * 66 + 4)

# MindONE's keys.
YAML = """
model_name: model.json
image_size: 64
dit_checkpoint: official.pt
vae_checkpoint: vae
sd_scale_factor: 0.4
use_fp16: True
enable_flash_attention: False
sampling_steps: 4
guidance_scale: 1.5
seed: 42
ddim_sampling: True
"""
OWN = ("--model", "model.json", "--ckpt", "official.pt", "--vae", "vae")
PICTURES = {
    "yaml": ("-c", "mindone.yaml"),
    "flags": (*OWN, "--sd-scale-factor", 0.4, "--num-sampling-steps", 4, "--cfg-scale", 1.5, "--seed", 42)
    + ("--sampler", "ddim"),
    "overridden": ("-c", "mindone.yaml", "--seed", 7, "--sampler", "dpm-solver++", "--image-size", 64),
    "named": (*OWN, "--num-sampling-steps", 3, "--id2label", "names.json", "--class-labels", "Tabby Cat", 9, 9),
    "by the same numbers": (*OWN, "--num-sampling-steps", 3, "--class-labels", 1, 9, 9, "--device", "cpu"),
}
BAD = {
    "no weights": ((SAMPLE, "--image-size", 512, "--seed", 1), "models/DiT-XL-2-512x512.pt; name them with --ckpt, or"),
    "unpublished": ((SAMPLE_MANY, "--model", "DiT-L/4"), "give the weights of another model with --ckpt"),
    "unknown key": ((SAMPLE, "-c", "typo.yaml"), "typo.yaml has the unknown key 'sampling_step'"),
    "mindspore": ((SAMPLE, "--ckpt", "models/DiT-XL-2-256x256.ckpt"), "is a MindSpore file"),
    "no folder": ((SAMPLE, *OWN, "--output", "nowhere/a.png"), "the folder nowhere of --output does not exist"),
    "no picture": ((SAMPLE, *OWN, "--output", "a.jpg"), "--output a.jpg is no name of a .png file"),
    "unknown name": (
        (SAMPLE, *OWN, "--id2label", "names.json", "--class-labels", "tabby cats"),
        "the class name 'tabby cats' is unknown; similar ones are tabby cat",
    ),
    "contradiction": ((SAMPLE, *OWN, "--image-size", 256), "--image-size 256 contradicts official.pt, which is of 64"),
    "negative seed": ((SAMPLE, *OWN, "--seed", -1), "argument --seed: must be at least 0, not -1"),
    "negative seeds": ((SAMPLE_MANY, *OWN, "--global-seed", -1), "must be at least 0, not -1"),
    "samples in a file": (
        (SAMPLE_MANY, *OWN, "--num-sampling-steps", 3, "--sample-dir", "model.json"),
        "cannot make or write into the folder model.json/",
    ),
    "bad interval": (
        (SAMPLE, *OWN, "--guidance-interval", 0.8, 0.1),
        "the guidance interval 0.8 to 0.1 must have 0 <=",
    ),
    "unknown sampler": ((SAMPLE, *OWN, "--sampler", "euler"), "unknown sampler 'euler'; known are ddpm, ddim"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vae_folder):
    """Where the commands are run: weights, configuration, VAE, YAML files and class names."""
    folder = tmp_path_factory.mktemp("sample")
    shutil.copy(REPOSITORY / "tests/data/dit/official.pt", folder)
    shutil.copytree(vae_folder, folder / "vae")
    (folder / "model.json").write_text(json.dumps(TINY | {"num_layers": 3, "num_attention_heads": 4}))
    (folder / "mindone.yaml").write_text(YAML)
    (folder / "typo.yaml").write_text("sampling_step: 4\n")
    (folder / "names.json").write_text(json.dumps({"1": "tabby, tabby cat", "2": "dog"}))
    return folder


def command(folder, *words: object) -> Command:
    return Command([str(word) for word in words], folder)


@pytest.fixture(scope="module")
def pictures(folder) -> dict[str, Result]:
    return run_all(
        {name: command(folder, SAMPLE, *words, "--output", f"{name}.png") for name, words in PICTURES.items()}
    )


def test_a_picture_shows_eight_classes_and_is_named(pictures, folder):
    result = pictures["flags"].ok()
    assert "wrote flags.png: 8 images of classes [0, 1, 2, 3, 5, 6, 7, 9] in " in result.out
    assert "sampling: 4/4" in result.err
    with Image.open(folder / "flags.png") as picture:
        assert picture.size == GRID_SIZE and np.asarray(picture).std() > 10


def test_the_keys_of_mindone_mean_the_flags(pictures, folder):
    assert "note: float16 has no effect on a CPU" in pictures["yaml"].ok().err
    assert (folder / "yaml.png").read_bytes() == (folder / "flags.png").read_bytes()


def test_the_command_line_overrides_the_file(pictures, folder):
    pictures["overridden"].ok()
    assert (folder / "overridden.png").read_bytes() != (folder / "yaml.png").read_bytes()


def test_names_mean_classes_and_each_image_has_noise_of_its_own(pictures, folder):
    pictures["by the same numbers"].ok()
    assert "3 images of classes [1, 9, 9]" in pictures["named"].ok().out
    assert (folder / "named.png").read_bytes() == (folder / "by the same numbers.png").read_bytes()
    with Image.open(folder / "named.png") as picture:
        pixels = np.asarray(picture)
    assert np.any(pixels[3:67, 69:133] != pixels[3:67, 135:199])


@pytest.fixture(scope="module")
def refusals(folder) -> dict[str, Result]:
    return run_all({name: command(folder, *words) for name, (words, _) in BAD.items()})


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_ends_with_one_line(refusals, case):
    result = refusals[case]
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and BAD[case][1] in line


# Three batches, the last of one image.
MANY = (*OWN, "--num-sampling-steps", 3, "--num-fid-samples", 5, "--per-proc-batch-size", 2, "--no-tf32")
MANY_NAME = "DiT-3x64-2-official-size-64-vae-vae-cfg-1.5-seed-0"

# Kills itself in the middle of writing the fourth image.
KILLED = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from latent_diffusion.sample_folder import SampleFolder
save = SampleFolder.save
def save_or_die(self, index, image):
    if index == 3:
        (self.path / ".000003.png.0.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, index, image)
SampleFolder.save = save_or_die
runpy.run_path({SAMPLE_MANY!r}, run_name="__main__")
"""


def many(folder, name: str, *launcher: str) -> Command:
    return command(folder, *launcher, SAMPLE_MANY, *MANY, "--sample-dir", name)


@pytest.fixture(scope="module")
def archives(folder) -> dict[str, bytes]:
    """The .npz files of one process, of two, and of a run that was killed and continued."""
    killed = command(folder, "-c", KILLED, *MANY, "--sample-dir", "killed")
    results = run_all({"one": many(folder, "one"), "killed": killed, "two": many(folder, "two", *LAUNCH)})
    assert results["killed"].code == -9
    assert (folder / "killed" / MANY_NAME / ".000003.png.0.tmp").is_file()
    assert not (folder / "killed" / f"{MANY_NAME}.npz").exists()
    results["killed"] = run(many(folder, "killed"))
    for name, result in results.items():
        assert f"wrote 5 images to {name}/{MANY_NAME}" in result.ok().out
    return {name: (folder / name / f"{MANY_NAME}.npz").read_bytes() for name in ("one", "two", "killed")}


def test_the_archive_holds_the_images_of_the_folder(archives, folder):
    images = sorted((folder / "one" / MANY_NAME).glob("*.png"))
    assert [path.name for path in images] == [f"{i:06d}.png" for i in range(5)]
    with np.load(folder / "one" / f"{MANY_NAME}.npz") as archive:
        pixels = archive["arr_0"]
    assert pixels.dtype == np.uint8 and pixels.shape == (5, 64, 64, 3)
    for path, expected in zip(images, pixels, strict=True):
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(image), expected)
    assert len({image.tobytes() for image in pixels}) == 5


@pytest.mark.parametrize("other", ["two", "killed"])
def test_processes_and_interruptions_change_nothing(archives, folder, other):
    assert archives[other] == archives["one"]
    assert {path.name for path in (folder / other / MANY_NAME).iterdir()} == {
        path.name for path in (folder / "one" / MANY_NAME).iterdir()
    }


def test_other_settings_or_fewer_images_are_refused(archives, folder):
    results = run_all(
        {
            "sampler": command(folder, SAMPLE_MANY, *MANY, "--sample-dir", "one", "--sampler", "ddim"),
            "fewer": command(folder, SAMPLE_MANY, *MANY, "--sample-dir", "one", "--num-fid-samples", 4),
        }
    )
    assert "was made with sampler 'ddpm', not 'ddim'" in results["sampler"].err
    assert "holds 000004.png (1 such), which is not among the 4 images" in results["fewer"].err
    assert all(result.code == 1 and len(result.err.splitlines()) == 1 for result in results.values())


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ((), MANY_NAME),
        (("--guidance-interval", "0", "1"), MANY_NAME),
        (("--guidance_interval", "0.1", "0.85"), MANY_NAME.replace("-seed", "-interval-0.1-0.85-seed")),
    ],
)
def test_the_folder_is_named_by_a_guidance_interval_only_where_there_is_one(monkeypatch, flags, name):
    monkeypatch.setattr(sys, "argv", [SAMPLE_MANY, *map(str, MANY), *flags])
    config = DiTConfig.from_dict(TINY | {"num_layers": 3, "num_attention_heads": 4})
    assert sample_ddp._folder_name(sample_ddp.parse_arguments(), config) == name


def test_the_benchmark_prints_a_row_for_each_sampler(folder):
    words = ("--model", "DiT-S/8", "--image-size", 64, "--num-sampling-steps", 2, "--batch-size", 1, "--device", "cpu")
    table = run(command(folder, BENCHMARK, *words)).ok().out
    assert "DiT-S/8 on a cpu, 64x64, batches of 1" in table and "s/image, 250 DDPM steps, 64x64" in table
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| d")]
    assert rows == ["ddpm", "ddim", "dpm-solver++"]
