"""`evaluate.py`, run for real with an extractor that needs no weights."""

import json

import numpy as np
import pytest
from PIL import Image

from latent_diffusion.evaluation import report
from latent_diffusion.evaluation.clip_score import CLIPScorer
from latent_diffusion.evaluation.pixels import Pixels
from latent_diffusion.evaluation.side import Side

from ..latent_diffusion.evaluation.test_clip_score import write_whole_clip
from .commands import LAUNCH, REPOSITORY, Command
from .forks import run_all

EVALUATE = str(REPOSITORY / "evaluate.py")
CLIP = ("--clip", "clip", "--prompts", "prompts.txt")
PIXELS = ("--extractor", "pixels", "--batch-size", 8)

# Flags, and what the error says.
BAD = {
    "nothing": (("--reference", "real"), "give --samples, or --save-statistics"),
    "no reference": (("--reference", "nowhere", "--samples", "fake.npz"), "nowhere does not exist"),
    "no weights": (
        ("--reference", "real", "--samples", "fake.npz"),
        "pt_inception-2015-12-05-6726825d.pth, in pretrained_models or models; name them with --weights (in training",
    ),
    "replaced reference": (
        ("--reference", "fake.npz", "--save-statistics", "./fake.npz"),
        "--save-statistics fake.npz would replace what it is computed from",
    ),
    "no name of JSON": (("--reference", "real", "--samples", "fake.npz", "--output", "real"), "ends in .json"),
    "not needed": (("--reference", "real", "--samples", "fake.npz", *PIXELS, "--weights", "two.txt"), "has no weights"),
    "few prompts": (
        ("--reference", "real", "--samples", "fake.npz", *PIXELS, "--clip", "clip", "--prompts", "two.txt"),
        "two.txt has 2 lines and fake.npz 50 images",
    ),
    "clip alone": (("--reference", "real", "--samples", "fake.npz", "--clip", "clip"), "belong together"),
    "damaged": (("--reference", "damaged.npz", "--samples", "fake.npz", *PIXELS), "cannot read arr_0 of damaged.npz"),
    "one image": (("--reference", "real", "--samples", "one.npz", *PIXELS), "at least 2 are needed"),
    "no image": (("--reference", "real", "--samples", "text", *PIXELS), "the folder text holds no images"),
    "statistics of others": (("--reference", "other.npz", "--samples", "fake.npz", *PIXELS), "or of another extractor"),
}


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip_folder):
    root = tmp_path_factory.mktemp("evaluate")
    (root / "clip").mkdir()
    write_whole_clip(clip_folder, root / "clip")
    for number, image in enumerate(images(60, 0)):
        path = root / "real" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.savez(root / "fake.npz", arr_0=images(50, 1))
    (root / "fake-cfg-1.5").mkdir()
    for number, image in enumerate(images(50, 1)):
        Image.fromarray(image).save(root / "fake-cfg-1.5" / f"{number}.png")
    np.savez(root / "one.npz", arr_0=images(1, 1))
    np.savez(root / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    (root / "damaged.npz").write_bytes(b"PK\x03\x04 cut off")
    (root / "text").mkdir()
    (root / "text" / "notes.txt").write_text("nothing to see")
    (root / "prompts.txt").write_text("".join(f"a picture of {number}\n" for number in range(50)))
    (root / "two.txt").write_text("one\ntwo\n")
    return root


@pytest.fixture(scope="module")
def results(folder):
    both = ("--reference", "real", "--samples", "fake.npz", *PIXELS)
    commands = {
        "one": [EVALUATE, *both, "--output", "one.json", "--cache", "cache-1"],
        "clip": [EVALUATE, *both, "--output", "clip.json", "--cache", "cache-3", *CLIP],
        "two": [
            *LAUNCH,
            EVALUATE,
            *both,
            "--output",
            "two.json",
            "--cache",
            "cache-2",
            "--save-statistics",
            "real.npz",
        ],
        **{name: [EVALUATE, *flags] for name, (flags, _) in BAD.items()},
    }
    first = run_all({name: Command([str(word) for word in words], folder) for name, words in commands.items()})
    later = {
        "saved": [EVALUATE, "--reference", "real.npz", "--samples", "fake-cfg-1.5", *PIXELS, "--cache", "cache-1"],
        "reference alone": [
            EVALUATE,
            "--reference",
            "real",
            *PIXELS,
            "--save-statistics",
            "a/b.npz",
            "--cache",
            "cache-1",
        ],
    }
    return first | run_all({name: Command([str(word) for word in words], folder) for name, words in later.items()})


def test_the_figures_are_printed_and_written(folder, results):
    paths = sorted((folder / "real").glob("*/*.png"), key=lambda path: (path.parent.name, path.name))
    real, pixels = np.stack([np.asarray(Image.open(path)) for path in paths]), Pixels()
    sides = Side("real", pixels(real)), Side("fake", pixels(images(50, 1)))
    expected = report.compare(*sides).figures
    written = json.loads((folder / "one.json").read_text())
    assert {name: written[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert written["images"] == {"reference": 60, "samples": 50}
    out = results["one"].ok().out
    assert f"Frechet distance (pixels)  {expected['fid']:>10.4f}\n" in out
    assert "sFID                                -  there are no spatial features of real" in out
    assert "images                     real 60, fake.npz 50\n" in out
    assert "wrote one.json" in out


def test_two_processes_find_the_same(folder, results):
    results["two"].ok()
    assert (folder / "two.json").read_text() == (folder / "one.json").read_text()


def test_the_clip_score_is_the_mean_over_the_samples(folder, results):
    scorer, pixels = CLIPScorer.load(str(folder / "clip")), images(50, 1)
    expected = scorer.score(scorer.embed_images(pixels), [f"a picture of {number}" for number in range(50)])
    results["clip"].ok()
    assert json.loads((folder / "clip.json").read_text())["clip_score"] == pytest.approx(expected.mean(), rel=1e-4)
    assert f"CLIP score                 {expected.mean():>10.4f}" in results["clip"].out


def test_features_that_are_there_are_not_made_again(results):
    assert "pixels features of real" in results["one"].ok().err
    assert "features of" not in results["reference alone"].ok().err


def test_saved_statistics_give_the_same_distance(folder, results):
    results["saved"].ok()
    written, first = (json.loads((folder / name).read_text()) for name in ("fake-cfg-1.5.pixels.json", "one.json"))
    assert written["fid"] == first["fid"]
    assert "features of the images of real.npz" in written["not_computed"]["kid"]


def test_a_reference_can_be_stored_alone(folder, results):
    assert "wrote a/b.npz" in results["reference alone"].ok().out
    with np.load(folder / "a/b.npz") as stored, np.load(folder / "real.npz") as earlier:
        assert np.array_equal(stored["sigma"], earlier["sigma"])


def test_few_images_are_noted(results):
    assert "note: real has 60 images, not more than its features have dimensions (192)" in results["one"].err


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_said_in_one_line(results, name):
    assert results[name].code == 1
    assert results[name].err.splitlines()[-1].startswith("error: ")
    assert BAD[name][1] in results[name].err
    assert "Traceback" not in results[name].err
