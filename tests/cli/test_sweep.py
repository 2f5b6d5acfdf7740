"""`scripts/sweep_sampling.py`, run for real on the reference models of both systems."""

import csv
import gzip
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit.image_sampling import ImageSampler
from dit.pretrained import load_dit
from dit.sampling import make_sampler
from latent_diffusion.evaluation.extractors import make_extractor
from latent_diffusion.evaluation.report import compare
from latent_diffusion.evaluation.side import Side
from latent_diffusion.evaluation.sweep import COMPARED
from latent_diffusion.vae import load_vae

from .commands import LAUNCH, REPOSITORY, TINY, Command, Result, ends, in_turn
from .forks import run_all

SWEEP = str(REPOSITORY / "scripts" / "sweep_sampling.py")
DATA = REPOSITORY / "tests" / "data"

COUNT, BATCH = 12, 5
COMMON = ("--vae", "vae", "--extractor", "pixels", "--num-samples", COUNT, "--batch-size", BATCH)
DIT = (SWEEP, "--model", "model.json", "--ckpt", "official.pt", "--reference", "real.npz", *COMMON)
GRID = ("--samplers", "ddim", "ddpm", "--steps", 3, "--cfg-scales", 1, 4, "--guidance-intervals", "0:1", "0.3:0.9")
UVIT = (SWEEP, "--model", "uvit.json", "--ckpt", "nnet.pth", "--reference", "real.npz", *COMMON)
UVIT_GRID = ("--samplers", "ddim", "dpm-solver++", "--steps", 2, "--cfg-scales", 2, "--feature-path", "features")
# Of that scale samples are not finite.
HUGE = ("--cfg-scales", "1e38", 2)

# The last row is lost before the second command.
LOST = """
    table = Path("sweep/sweep.csv")
    table.with_name("whole.csv").write_bytes(table.read_bytes())
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
"""
SWEEPS = {
    "dit": (*DIT, *GRID),
    "resumed": (*DIT, *GRID, "--reference", "../sweeps/real.npz"),
    "uvit": (*UVIT, *UVIT_GRID, *HUGE, "--output-dir", "one"),
}
BAD = {
    "other seed": ((*DIT, *GRID, "--seed", 1), "sweep was made with seed 0, not 1; take another --output-dir or"),
    "other reference": ((*DIT, "--reference", "other.npz"), "sweep was made with reference '"),
    "other captions": (
        (*UVIT, *UVIT_GRID, "--feature-path", "others", "--output-dir", "one"),
        "one was made with captions '",
    ),
    "no reference": ((*DIT, "--reference", "nowhere"), "the reference nowhere does not exist; give --reference"),
    "unknown sampler": ((*DIT, "--samplers", "euler"), "unknown sampler 'euler'; known are ddpm, ddim"),
    "sampler of the other": ((*UVIT, *UVIT_GRID, "--samplers", "ddpm"), "unknown sampler 'ddpm'; known are ddim, dpm"),
    "no interval": ((*DIT, "--guidance-intervals", "0.3"), "expected LOW:HIGH, as 0.1:0.8, not '0.3'"),
    "bad interval": ((*DIT, "--guidance-intervals", "0.9:0.3"), "the guidance interval 0.9 to 0.3 must have"),
    "captions of classes": ((*DIT, "--feature-path", "features"), "--feature-path holds the captions of a U-ViT"),
    "no captions": (UVIT, "--ckpt is a U-ViT: give features of COCO"),
    "classes of captions": ((*UVIT, *UVIT_GRID, "--num-classes", 10), "--num-classes is for a DiT, and --ckpt is a"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vae_folder) -> Path:
    """Where the commands are run: weights and configurations of both systems, VAE, captions and real images."""
    folder = tmp_path_factory.mktemp("run") / "sweeps"
    folder.mkdir()
    shutil.copy(DATA / "dit/official.pt", folder)
    (folder / "nnet.pth").write_bytes(gzip.decompress((DATA / "uvit/uvit_ema.pth.gz").read_bytes()))
    (folder / "vae").symlink_to(vae_folder)
    (folder / "features").symlink_to(DATA / "uvit/coco_features_tiny")
    shutil.copytree(DATA / "uvit/coco_features_tiny", folder / "others")
    np.save(folder / "others/val/1_0.npy", np.zeros((7, 32), np.float32))
    (folder / "model.json").write_text(json.dumps(TINY | {"num_layers": 3, "num_attention_heads": 4}))
    uvit = {key: value for key, value in TINY.items() if key != "num_classes"}
    uvit |= {"num_layers": 4, "num_attention_heads": 4, "clip_dim": 32, "num_text_tokens": 7}
    (folder / "uvit.json").write_text(json.dumps(uvit))
    images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    for name in ("real", "other"):
        np.savez(folder / f"{name}.npz", arr_0=images)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[str, Result]:
    commands = SWEEPS | {name: words for name, (words, _) in BAD.items()}
    launched = [str(word) for word in (*LAUNCH, *UVIT, *UVIT_GRID, *HUGE, "--output-dir", "two")]
    done = run_all({"in turn": in_turn(commands.values(), folder, LOST), "two": Command(launched, folder)})
    return {"two": done["two"].ok()} | dict(zip(commands, ends(done["in turn"]), strict=True))


def rows(path: Path) -> list[dict[str, float | str]]:
    """The rows of a table without the time, which differs."""
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "seconds_per_image"} for row in csv.DictReader(file)
        ]


def test_each_setting_has_a_row_and_all_a_picture(results, folder):
    assert "wrote sweep/sweep.csv: 6 settings, 6 of them new; and sweep/sweep.png" in results["dit"].ok().out
    found = rows(folder / "sweep/whole.csv")
    assert [(row["sampler"], row["cfg_scale"], row["guidance_low"]) for row in found] == [
        (name, *setting) for name in ("ddim", "ddpm") for setting in (("1.0", "0.0"), ("4.0", "0.0"), ("4.0", "0.3"))
    ]
    assert len({row["fid"] for row in found}) == 6 and {row["inception_score"] for row in found} == {""}
    assert all(0 <= float(row[name]) <= 1 for row in found for name in ("precision", "recall"))
    with Image.open(folder / "sweep/sweep.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_the_figures_are_those_of_the_images(results, folder):
    model = load_dit(folder / "official.pt", folder / "model.json")
    sampler = ImageSampler(model, load_vae(str(folder / "vae")), make_sampler("ddim", 3), 4.0, (0.3, 0.9))
    images = np.concatenate([sampler.draw_samples(0, range(i, min(i + BATCH, COUNT))) for i in range(0, COUNT, BATCH)])
    with np.load(folder / "real.npz") as archive:
        real = archive["arr_0"]
    extractor = make_extractor("pixels")
    expected = compare(Side("real", extractor(real)), Side("drawn", extractor(images))).figures
    row = rows(folder / "sweep/whole.csv")[2]
    for name in ("fid", "precision", "recall"):
        # One thread there and several here.
        assert float(row[name]) == pytest.approx(expected[name], rel=1e-4)


def test_a_later_run_adds_what_is_missing(results, folder):
    assert "6 settings, 1 of them new" in results["resumed"].ok().out
    assert "1/1: ddpm, 3 steps, scale 4, guided from 0.3 to 0.9: Frechet distance (pixels) " in results["resumed"].out
    assert rows(folder / "sweep/sweep.csv") == rows(folder / "sweep/whole.csv")
    assert [path.name[:5] for path in (folder / "sweep/features").iterdir()] == ["real-"]


def test_two_processes_draw_the_same_for_captions(results, folder):
    assert "4 settings, 4 of them new" in results["uvit"].ok().out
    found = rows(folder / "one/sweep.csv")
    assert rows(folder / "two/sweep.csv") == found
    finite = [float(row["fid"]) for row in found if row["cfg_scale"] == "2.0"]
    assert len(set(finite)) == 2 and all(map(math.isfinite, finite))


def test_a_setting_whose_samples_are_not_finite_has_an_empty_row(results, folder):
    line = "1/4: ddim, 2 steps, scale 1e+38: Frechet distance (pixels) not computed, some samples are not finite\n"
    for name in ("uvit", "two"):
        assert line in results[name].ok().out
    empty = [row for row in rows(folder / "one/sweep.csv") if row["cfg_scale"] == "1e+38"]
    assert len(empty) == 2 and all({row[name] for name in COMPARED} == {""} for row in empty)


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_ends_with_one_line(results, case):
    result = results[case]
    (line,) = result.err.splitlines()
    assert result.code == 1 and line.startswith("error: ") and BAD[case][1] in line
