"""`sample_t2i.py`, run for real on the reference model."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from latent_diffusion.files import read_lines
from latent_diffusion.text_encoder import TextEncoder
from latent_diffusion.vae import load_vae
from uvit_ldm.image_sampling import ImageSampler
from uvit_ldm.pretrained import read_pretrained
from uvit_ldm.prompts import Prompts
from uvit_ldm.sampling import make_sampler

from .commands import LAUNCH, REPOSITORY, TINY, Command, Result, ends, in_turn
from .forks import run_all

SAMPLE = str(REPOSITORY / "sample_t2i.py")
PROMPTS = ["the cat", "the digit 3", "a dog on the grass"]
CAPTIONS = {
    "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)],
    "annotations": [{"image_id": i, "caption": f"the digit\n{i}"} for i in range(3)],
}

# Three batches, the last of one image; more images than prompts.
PARTS = ("--text_encoder_name_or_path", "clip", "--tokenizer_name_or_path", "clip", "--vae", "vae")
WEIGHTS = ("--ckpt", "nnet.pth", "--unet_config_file", "uvit.json", *PARTS, "--num-sampling-steps", 2, "--seed", 5)
OWN = (SAMPLE, *WEIGHTS, "--num-fid-samples", 5, "--per-proc-batch-size", 2)
MANY = (*OWN, "--prompts", "prompts.txt")
NAME = "UViT-4x64-2-nnet-prompts-prompts-size-64-vae-vae-cfg-2.0-seed-5"

# Two images are lost before the second command.
LOST = """
    (archive,) = Path("one").glob("*.npz")
    archive.rename("first.npz")
    for index in (1, 4):
        (archive.with_suffix("") / f"{index:06d}.png").unlink()
"""
RUNS = {
    "one": (*MANY, "--sample-dir", "one"),
    "resumed": (*MANY, "--sample-dir", "one"),
    "captions": (*OWN, "--captions-file", "captions.json", "--sampler", "dpm-solver++"),
}
BAD = {
    "no weights": ((*MANY, "--ckpt", "nowhere"), "found no weights at nowhere; name them with --ckpt"),
    "no prompts": (OWN, "one of the arguments --prompts --captions-file is required"),
    "blank prompts": ((*OWN, "--prompts", "blank.txt"), "the file of prompts blank.txt holds no prompt"),
    "bad interval": ((*MANY, "--guidance-interval", 0.9, 0.3), "the guidance interval 0.9 to 0.3 must have 0 <="),
    "no configuration": ((*MANY, "--model", "nowhere.json"), "nowhere.json"),
    "unknown sampler": ((*MANY, "--sampler", "ddpm"), "unknown sampler 'ddpm'; known are ddim, dpm-solver++"),
    "other prompts": (
        (*OWN, "--prompts", "other/prompts.txt", "--sample-dir", "one"),
        f"one/{NAME} was made with prompts '",
    ),
    "fewer images": ((*MANY, "--num-fid-samples", 4, "--sample-dir", "one"), "000004.png (1 such), which is not among"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vae_folder, coco_clip_folder) -> Path:
    """Where the commands are run: official weights, their configuration, VAE, text encoder and prompts."""
    folder = tmp_path_factory.mktemp("t2i")
    (folder / "nnet.pth").write_bytes(gzip.decompress((REPOSITORY / "tests/data/uvit/uvit_ema.pth.gz").read_bytes()))
    config = {key: value for key, value in TINY.items() if key != "num_classes"}
    config |= {"num_layers": 4, "num_attention_heads": 4, "clip_dim": 32, "num_text_tokens": 7}
    (folder / "uvit.json").write_text(json.dumps(config))
    (folder / "vae").symlink_to(vae_folder)
    (folder / "clip").symlink_to(coco_clip_folder)
    (folder / "other").mkdir()
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "other/prompts.txt").write_text("the dog\n")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "captions.json").write_text(json.dumps(CAPTIONS))
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[str, Result]:
    commands = RUNS | {name: words for name, (words, _) in BAD.items()}
    launched = [str(word) for word in (*LAUNCH, *MANY, "--sample-dir", "two")]
    done = run_all({"in turn": in_turn(commands.values(), folder, LOST), "two": Command(launched, folder)})
    return {"two": done["two"].ok()} | dict(zip(commands, ends(done["in turn"]), strict=True))


def images(path: Path) -> np.ndarray:
    with np.load(path) as archive:
        return archive["arr_0"]


def test_the_images_are_those_of_the_prompts_in_turn(results, folder):
    assert f"wrote 5 images to one/{NAME} and one/{NAME}.npz\nwrote one/{NAME}.prompts.txt" in results["one"].ok().out
    assert read_lines(folder / "one" / f"{NAME}.prompts.txt") == [*PROMPTS, *PROMPTS[:2]]
    model = read_pretrained(folder / "nnet.pth", folder / "uvit.json").network()
    vae = load_vae(str(folder / "vae"))
    vae.register_to_config(scaling_factor=model.config.scaling_factor)
    prompts = Prompts(PROMPTS, TextEncoder.load(str(folder / "clip"), str(folder / "clip"), 7))
    expected = ImageSampler(model, vae, make_sampler("ddim", 2), 2.0, captions=prompts).draw_samples(5, range(5))
    # Batches of other sizes there, and one thread.
    assert np.abs(images(folder / "first.npz").astype(int) - expected).max() <= 1


def test_processes_and_interruptions_change_nothing(results, folder):
    expected = (folder / "first.npz").read_bytes()
    results["resumed"].ok()
    for run in ("one", "two"):
        assert (folder / run / f"{NAME}.npz").read_bytes() == expected
        assert read_lines(folder / run / f"{NAME}.prompts.txt") == [*PROMPTS, *PROMPTS[:2]]


def test_captions_of_coco_are_drawn_in_random_order(results, folder):
    results["captions"].ok()
    name = NAME.replace("prompts-prompts", "prompts-captions")
    lines = read_lines(folder / "samples" / f"{name}.prompts.txt")
    assert {*lines[:3]} == {"the digit 0", "the digit 1", "the digit 2"} and lines[3:] == lines[:2]
    assert len({image.tobytes() for image in images(folder / "samples" / f"{name}.npz")}) == 5


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_ends_with_one_line(results, case):
    result = results[case]
    (line,) = result.err.splitlines()
    assert result.code == 1 and line.startswith("error: ") and BAD[case][1] in line
