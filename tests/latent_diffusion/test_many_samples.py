import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from latent_diffusion import many_samples
from latent_diffusion.guidance import ALL_STEPS
from latent_diffusion.sample_folder import SampleFolder

SEED, BATCH = 3, 4


@dataclass
class Noise:
    """An `ImageSampler` of images of noise, which also depend on the members of their batch.

    Attributes:
        drawn: arguments of all calls.
    """

    model: Any
    vae: Any
    sampler: Any
    guidance_scale: float = 1.5
    guidance_interval: tuple[float, float] = ALL_STEPS
    amp_dtype: str | None = None
    drawn: list = field(default_factory=list)

    def draw_samples(self, seed, indices) -> np.ndarray:
        self.drawn.append((seed, list(indices)))
        members = [seed, *indices]
        return np.stack([np.random.default_rng([i, *members]).integers(0, 256, (5, 6, 3), "uint8") for i in indices])


@pytest.fixture
def sampler() -> Noise:
    model, vae = paddle.nn.Linear(2, 3), paddle.nn.Linear(3, 2)
    vae.config = SimpleNamespace(scaling_factor=0.5)
    return Noise(model, vae, SimpleNamespace(name="ddpm", steps=3))


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
    assert expected.shape == (10, 5, 6, 3) and len({image.tobytes() for image in expected}) == 10
    for processes in (2, 3, 5):
        np.testing.assert_array_equal(sample(str(processes), 10, processes), expected)


def test_a_process_draws_its_own_batches_only(sampler, tmp_path):
    folder = SampleFolder(tmp_path / "images", 18)
    folder.prepare({})
    many_samples.fill(folder, sampler, SEED, BATCH, 1, 3)
    assert set(range(18)) - set(folder.missing(range(18))) == {4, 5, 6, 7, 16, 17}


def test_the_last_batch_is_drawn_whole(sample, sampler):
    sample("images", 6)
    assert sampler.drawn == [(SEED, [0, 1, 2, 3]), (SEED, [4, 5, 6, 7])]


def test_fewer_images_are_the_first_of_more(sample):
    few = sample("grows", 5)
    more = sample("grows", 10)
    np.testing.assert_array_equal(more[:5], few)
    np.testing.assert_array_equal(more, sample("at once", 10))


def test_only_missing_images_are_drawn(sample, sampler, tmp_path):
    expected = sample("images", 10)
    for name in ("000001.png", "000009.png"):
        (tmp_path / "images" / name).unlink()
    untouched = (tmp_path / "images/000000.png").stat().st_mtime_ns
    sampler.drawn.clear()
    np.testing.assert_array_equal(sample("images", 10), expected)
    assert [indices[0] for _, indices in sampler.drawn] == [0, 8]
    assert (tmp_path / "images/000000.png").stat().st_mtime_ns == untouched


def test_a_run_makes_the_folder_and_its_archive(sampler, tmp_path, capsys):
    folder = SampleFolder(tmp_path / "images", 3)
    many_samples.sample(folder, sampler, SEED, BATCH, {"device": "cpu"})
    with np.load(tmp_path / "images.npz") as archive:
        np.testing.assert_array_equal(archive["arr_0"], sampler.draw_samples(SEED, range(4))[:3])
    assert f"wrote 3 images to {folder.path} and {folder.path}.npz" in capsys.readouterr().out
    folder.prepare(many_samples.settings(sampler, SEED, BATCH) | {"device": "cpu"})


def test_settings_tell_what_images_are_made_with(sampler):
    own = many_samples.settings(sampler, SEED, BATCH)
    assert own == many_samples.settings(sampler, SEED, BATCH)
    assert "guidance_interval" not in own  # nor in folders from before there was one
    assert own["sampler"] == "ddpm" and own["num_sampling_steps"] == 3 and own["scaling_factor"] == 0.5

    def differing(other: Noise, seed: int = SEED, batch_size: int = BATCH) -> list[str]:
        return [key for key, value in many_samples.settings(other, seed, batch_size).items() if value != own[key]]

    assert differing(sampler, seed=4) == ["seed"] and differing(sampler, batch_size=2) == ["batch_size"]
    assert differing(dataclasses.replace(sampler, guidance_scale=4.0)) == ["cfg_scale"]
    assert differing(dataclasses.replace(sampler, sampler=SimpleNamespace(name="ddim", steps=3))) == ["sampler"]
    assert many_samples.settings(dataclasses.replace(sampler, guidance_interval=(0.1, 0.8)), SEED, BATCH) == own | {
        "guidance_interval": [0.1, 0.8]
    }
    with paddle.no_grad():
        sampler.model.bias.add_(paddle.full([3], 1e-3))
    assert differing(sampler) == ["model"]
