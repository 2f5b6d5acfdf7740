import errno
import json
import os

import numpy as np
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.evaluation import feature_cache
from latent_diffusion.evaluation.feature_cache import extract
from latent_diffusion.evaluation.image_set import open_images

from .conftest import random_images, write_folder


@pytest.fixture
def images(tmp_path):
    return open_images(write_folder(tmp_path / "images", random_images(10)))


def test_features_are_those_of_the_extractor(tmp_path, images, extractor):
    found = extract(images, extractor, tmp_path / "cache", batch_size=4)
    expected = extractor(random_images(10))
    assert found.keys() == extractor.widths.keys()
    for name, values in found.items():
        assert values.dtype == np.float32
        assert np.allclose(values, expected[name], atol=1e-6)


def test_features_are_made_once(tmp_path, images, extractor):
    first = extract(images, extractor, tmp_path / "cache", batch_size=4)
    again = extract(images, extractor, tmp_path / "cache", batch_size=3)
    assert extractor.images == 10
    assert all(np.array_equal(first[name], again[name]) for name in first)


class Interrupted(Exception):
    pass


def test_an_interrupted_extraction_goes_on_with_what_is_missing(tmp_path, images, extractor, monkeypatch):
    uninterrupted = extract(images, extractor, tmp_path / "other", batch_size=4)
    extractor.images, compute = 0, type(extractor).__call__

    def fail_later(self, pixels):
        if self.images >= 4:
            raise Interrupted
        return compute(self, pixels)

    monkeypatch.setattr(type(extractor), "__call__", fail_later)
    with pytest.raises(Interrupted):
        extract(images, extractor, tmp_path / "cache", batch_size=4)
    monkeypatch.undo()
    found = extract(images, extractor, tmp_path / "cache", batch_size=4)
    assert extractor.images == 10
    assert all(np.array_equal(found[name], uninterrupted[name]) for name in found)


def test_other_weights_or_images_have_features_of_their_own(tmp_path, images, extractor):
    extract(images, extractor, tmp_path / "cache", batch_size=4)
    extractor.identity = "averages-2"
    extract(images, extractor, tmp_path / "cache", batch_size=4)
    assert extractor.images == 20
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*/manifest.json")]
    assert {manifest["extractor"] for manifest in manifests} == {"averages-1", "averages-2"}


def test_a_run_that_prepares_at_the_same_time_leaves_features_alone(tmp_path, images, extractor, monkeypatch):
    finished, once = [], feature_cache.allocate

    def while_another_run_is_quicker(*arguments):
        monkeypatch.setattr(feature_cache, "allocate", once)
        finished.append(extract(images, extractor, tmp_path / "cache", batch_size=4)["features"].copy())
        once(*arguments)

    monkeypatch.setattr(feature_cache, "allocate", while_another_run_is_quicker)
    found = extract(images, extractor, tmp_path / "cache", batch_size=4)
    assert np.array_equal(found["features"], finished[0])
    assert extractor.images == 10
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_full_disk_is_one_sentence(tmp_path, images, extractor, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(feature_cache, "write_rows", lambda *_, **__: full())
    with pytest.raises(InputError, match="No space left on device"):
        extract(images, extractor, tmp_path / "cache", batch_size=4)


def test_features_that_are_not_finite_stop_it(tmp_path, images, extractor, monkeypatch):
    compute = type(extractor).__call__

    def damaged(self, pixels):
        outputs = compute(self, pixels)
        if self.images > 4:
            outputs["spatial"][1, 2] = np.nan
        return outputs

    monkeypatch.setattr(type(extractor), "__call__", damaged)
    with pytest.raises(InputError, match="the spatial of images 4 to 7 of .* are not finite"):
        extract(images, extractor, tmp_path / "cache", batch_size=4)


def test_a_damaged_cache_is_named(tmp_path, images, extractor):
    extract(images, extractor, tmp_path / "cache", batch_size=4)
    (file,) = (tmp_path / "cache").glob("*/features.npy")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"features\.npy is damaged; remove the folder"):
        extract(images, extractor, tmp_path / "cache", batch_size=4)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, images, extractor):
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match="cannot make or write into the folder"):
        extract(images, extractor, tmp_path / "cache", batch_size=4)
