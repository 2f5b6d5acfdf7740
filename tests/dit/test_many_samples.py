import copy
import dataclasses

import numpy as np
import paddle
import pytest

from dit import many_samples
from dit.image_sampling import ImageSampler
from dit.sampling import make_sampler
from latent_diffusion.sample_folder import SampleFolder
from latent_diffusion.vae import load_vae

SEED, BATCH = 3, 4


@pytest.fixture
def sampler(dit, vae_folder) -> ImageSampler:
    return ImageSampler(dit, load_vae(str(vae_folder)), make_sampler("ddpm", 3), 1.5)


@pytest.fixture
def sample(sampler, tmp_path):
    """`sample("name", count)` -> the images that so many processes, one after the other, put into a folder."""

    def run(name: str, count: int, processes: int = 1) -> np.ndarray:
        folder = SampleFolder(tmp_path / name, count)
        folder.prepare({})
        for rank in reversed(range(processes)):  # the first one waits for the others
            many_samples.fill(folder, sampler, SEED, BATCH, rank, processes)
        with np.load(folder.write_npz()) as archive:
            return archive["arr_0"]

    return run


def test_the_number_of_processes_changes_nothing(sample):
    expected = sample("one", 10)
    assert expected.shape == (10, 64, 64, 3) and len({image.tobytes() for image in expected}) == 10
    for processes in (2, 3, 5):
        np.testing.assert_array_equal(sample(str(processes), 10, processes), expected)


def test_a_process_draws_its_own_batches_only(sampler, tmp_path):
    folder = SampleFolder(tmp_path / "images", 18)
    folder.prepare({})
    many_samples.fill(folder, sampler, SEED, BATCH, 1, 3)
    assert set(range(18)) - set(folder.missing(range(18))) == {4, 5, 6, 7, 16, 17}


def test_fewer_images_are_the_first_of_more(sample, tmp_path):
    few = sample("grows", 5)
    more = sample("grows", 10)
    np.testing.assert_array_equal(more[:5], few)
    np.testing.assert_array_equal(more, sample("at once", 10))


def test_only_missing_images_are_drawn(sample, sampler, tmp_path, monkeypatch):
    expected = sample("images", 10)
    for name in ("000001.png", "000009.png"):
        (tmp_path / "images" / name).unlink()
    untouched = (tmp_path / "images/000000.png").stat().st_mtime_ns
    drawn = []
    draw = ImageSampler.draw
    monkeypatch.setattr(ImageSampler, "draw", lambda self, *args: drawn.append(args) or draw(self, *args))
    np.testing.assert_array_equal(sample("images", 10), expected)
    assert len(drawn) == 2 and (tmp_path / "images/000000.png").stat().st_mtime_ns == untouched


def test_label_and_noise_of_an_image_depend_on_seed_and_index(sampler, tmp_path, monkeypatch):
    """Also those computed beyond the wanted ones, in the last batch."""
    labels, noise = [], []
    draw = ImageSampler.draw

    def recorded(self, batch, generators):
        labels.extend(batch)
        noise.extend(copy.deepcopy(rng).standard_normal() for rng in generators)
        return draw(self, batch, generators)

    monkeypatch.setattr(ImageSampler, "draw", recorded)
    folder = SampleFolder(tmp_path / "images", 6)
    folder.prepare({})
    many_samples.fill(folder, sampler, SEED, BATCH)
    generators = [np.random.default_rng([SEED, i]) for i in range(8)]
    assert labels == [rng.integers(10) for rng in generators]
    assert noise == [rng.standard_normal() for rng in generators]


def test_settings_tell_what_images_are_made_with(sampler):
    own = many_samples.settings(sampler, SEED, BATCH)
    assert own == many_samples.settings(sampler, SEED, BATCH)
    assert own["sampler"] == "ddpm" and own["num_sampling_steps"] == 3 and own["scaling_factor"] == 0.5

    def differing(other: ImageSampler, seed: int = SEED, batch_size: int = BATCH) -> list[str]:
        return [key for key, value in many_samples.settings(other, seed, batch_size).items() if value != own[key]]

    assert differing(sampler, seed=4) == ["seed"] and differing(sampler, batch_size=2) == ["batch_size"]
    assert differing(dataclasses.replace(sampler, guidance_scale=4.0)) == ["cfg_scale"]
    assert differing(dataclasses.replace(sampler, sampler=make_sampler("ddim", 3))) == ["sampler"]
    with paddle.no_grad():
        sampler.model.final_layer.linear.bias.add_(paddle.full([32], 1e-3))
    assert differing(sampler) == ["model"]
