import io
import tarfile

import numpy as np
import paddle
import pytest
from PIL import Image

from dit.configuration import DiTConfig
from dit.images import ImageStore
from latent_diffusion.errors import InputError
from latent_diffusion.images import read_image
from latent_diffusion.vae import encode_latents, encode_moments, load_vae, sample_moments

CONFIG = DiTConfig(sample_size=8, patch_size=2, in_channels=4, num_layers=1, num_attention_heads=1,
                   attention_head_dim=16, num_classes=2, class_dropout_prob=0.25)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(tmp_path / name / "0.png")
    return tmp_path


def test_images_are_cropped_mirrored_half_of_the_time_and_labels_dropped(folder):
    store = ImageStore(folder, CONFIG)
    expected = read_image(folder / "dog/0.png", 64)
    samples = [store.sample(1, np.random.default_rng(seed)) for seed in range(200)]
    mirrored = [np.array_equal(sample["images"], expected[:, ::-1]) for sample in samples]
    assert all(m or np.array_equal(s["images"], expected) for m, s in zip(mirrored, samples, strict=True))
    assert 70 < sum(mirrored) < 130
    dropped = sum(int(sample["labels"]) == 2 for sample in samples)
    assert 30 < dropped < 70 and all(int(sample["labels"]) in (1, 2) for sample in samples)
    noise = np.stack([sample["posterior_noise"] for sample in samples])
    assert noise.shape == (200, 4, 8, 8) and noise.dtype == np.float32 and abs(noise.std() - 1) < 0.02


def test_images_are_encoded_to_scaled_samples_of_the_posterior(folder, vae_folder):
    vae, store = load_vae(str(vae_folder)), ImageStore(folder, CONFIG)
    sample = store.sample(1, np.random.default_rng(0))
    batch = {name: paddle.to_tensor(value[None]) for name, value in sample.items()}
    latents = encode_latents(vae, batch["images"], batch["posterior_noise"])
    moments = encode_moments(vae, sample["images"][None])
    expected = sample_moments(moments, sample["posterior_noise"]) * vae.config.scaling_factor
    np.testing.assert_allclose(latents.numpy(), expected, atol=1e-5)
    assert expected.std() > 0.1


def test_the_same_generator_gives_the_same_sample(folder):
    store = ImageStore(folder, CONFIG)
    first, again = (store.sample(0, np.random.default_rng(3)) for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])


def test_a_class_that_the_model_has_not_is_named(folder):
    (folder / "eel").mkdir()
    Image.new("RGB", (70, 70)).save(folder / "eel/0.png")
    with pytest.raises(InputError, match="images of class 2; the model has classes 0 to 1"):
        ImageStore(folder, CONFIG)


def test_a_broken_image_is_named(folder):
    (folder / "cat/0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot read the image .*cat/0\.png"):
        ImageStore(folder, CONFIG).sample(0, np.random.default_rng(0))


def test_a_broken_image_in_a_shard_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {"0.jpg": b"no image", "0.cls": b"1"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for path in (tmp_path, tmp_path / "a.tar"):
        with pytest.raises(InputError, match=r"cannot read the image .*a\.tar \(the image at byte 512\)"):
            ImageStore(path, CONFIG).sample(0, np.random.default_rng(0))
