import numpy as np
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.metrics import moments
from latent_diffusion.evaluation.statistics import has_statistics, read_statistics, write_statistics

RNG = np.random.default_rng(0)
MOMENTS = {"features": moments(RNG.standard_normal((20, 4))), "spatial": moments(RNG.standard_normal((20, 3)))}


def test_what_is_written_is_read(tmp_path, extractor):
    path = tmp_path / "new" / "reference.npz"
    write_statistics(path, extractor, MOMENTS, 20)
    found = read_statistics(path, extractor)
    assert found.count == 20
    for name, expected in MOMENTS.items():
        assert np.array_equal(found.moments[name].mean, expected.mean)
        assert np.array_equal(found.moments[name].covariance, expected.covariance)
    with np.load(path) as file:  # what ADM's and pytorch-fid's programs look for
        assert np.array_equal(file["mu"], MOMENTS["features"].mean)
        assert np.array_equal(file["sigma_s"], MOMENTS["spatial"].covariance)


def test_files_of_other_programs_are_read(tmp_path, extractor):
    mean, covariance = MOMENTS["features"].mean, MOMENTS["features"].covariance
    np.savez(tmp_path / "a.npz", mu=mean.astype(np.float32), sigma=covariance)
    found = read_statistics(tmp_path / "a.npz", extractor)
    assert found.count is None
    assert found.moments.keys() == {"features"}
    assert found.moments["features"].mean.dtype == np.float64


def test_statistics_are_told_from_images(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    np.savez(tmp_path / "both.npz", arr_0=np.zeros(3), mu=np.zeros(3))
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    names = ("images.npz", "both.npz", "damaged.npz", "none.npz")
    assert [has_statistics(tmp_path / name) for name in names] == [False, True, False, False]


def test_the_fingerprint_is_that_of_the_moments(tmp_path, extractor):
    for name, count in (("a.npz", 20), ("b.npz", 30)):
        write_statistics(tmp_path / name, extractor, MOMENTS, count)
    write_statistics(tmp_path / "c.npz", extractor, {"features": MOMENTS["features"]}, 20)
    prints = [read_statistics(tmp_path / name, extractor).fingerprint for name in ("a.npz", "b.npz", "c.npz")]
    assert prints[0] == prints[1] != prints[2]


def test_statistics_of_another_extractor_are_refused(tmp_path, extractor):
    write_statistics(tmp_path / "a.npz", extractor, MOMENTS, 20)
    extractor.identity = "averages-2"
    with pytest.raises(InputError, match="were made by averages-1, not by averages-2"):
        read_statistics(tmp_path / "a.npz", extractor)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(4)}, "holds no array sigma"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, r"mu in .* is float64 \[5\], where \[4\] was expected"),
        ({"mu": np.zeros(4), "sigma": np.eye(3)}, r"sigma in .* is float64 \[3, 3\]"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "mu in .* not finite"),
        ({"mu": np.array([None] * 4), "sigma": np.eye(4)}, "cannot read mu of .*: it holds objects"),  # a pickle
        ({"mu": np.zeros(4), "sigma": np.eye(4), "count": np.array("abc")}, "count in .* is <U3"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "count": np.array([1, 2])}, r"count in .* is int64 \[2\]"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "extractor": np.array("a" * 9999)}, "extractor in .* is <U9999"),
    ],
)
def test_damaged_statistics_are_named(tmp_path, extractor, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        read_statistics(tmp_path / "a.npz", extractor)
