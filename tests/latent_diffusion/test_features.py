import os

import numpy as np
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.features import (
    FeatureStore,
    TrainingStream,
    list_arrays,
    read_array,
    read_floats,
)
from latent_diffusion.objectives import LearnedRangeDDPM
from latent_diffusion.schedules import NoiseSchedule


def save(path, array, **settings):
    np.save(path, array, **settings)
    return path


@pytest.mark.parametrize("shape", [(4, 2, 2), (1, 4, 2, 2), (1, 1, 4, 2, 2)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_array_is_read_without_its_leading_ones(tmp_path, shape, dtype):
    values = np.arange(16).reshape(shape).astype(dtype)
    array = read_array(save(tmp_path / "a.npy", values), (4, 2, 2))
    assert array.dtype == dtype and array.shape == (4, 2, 2)
    np.testing.assert_array_equal(array, values.reshape(4, 2, 2))


def test_a_missing_array_is_named(tmp_path):
    with pytest.raises(InputError, match=r"a\.npy is missing"):
        read_array(tmp_path / "a.npy", (4, 2, 2))


@pytest.mark.parametrize("length", [0, 5, 60, 140])
def test_a_truncated_array_is_named(tmp_path, length):
    path = save(tmp_path / "a.npy", np.zeros((4, 2, 2), np.float32))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"cannot read the feature file .*a\.npy .*extract it again") as error:
        read_array(path, (4, 2, 2))
    assert "\n" not in str(error.value)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the file was executed",)


def test_a_pickled_array_is_refused_and_not_executed(tmp_path):
    with pytest.raises(InputError, match=r"a\.npy"):
        read_array(save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True), (1,))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, bad):
    values = np.zeros((4, 2, 2), np.float16)
    values[2, 1, 0] = bad
    with pytest.raises(InputError, match=r"a\.npy holds values that are not finite"):
        read_array(save(tmp_path / "a.npy", values), (4, 2, 2))


@pytest.mark.parametrize("shape", [(4, 2, 3), (4, 2), (2, 4, 2, 2)])
def test_another_shape_is_refused(tmp_path, shape):
    with pytest.raises(InputError, match=r"a\.npy has shape .*expected \(4, 2, 2\)"):
        read_array(save(tmp_path / "a.npy", np.zeros(shape, np.float32)), (4, 2, 2))


@pytest.mark.parametrize("values", [np.array(["text"]), np.array([1j]), np.array([True])])
def test_what_is_no_array_of_numbers_is_refused(tmp_path, values):
    with pytest.raises(InputError, match=r"a\.npy \(its header is not that of an array of numbers\)"):
        read_array(save(tmp_path / "a.npy", values), (1,))


def test_an_archive_of_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", values=np.zeros(3))
    with pytest.raises(InputError, match=r"a\.npz \(it does not begin as an \.npy file does\)"):
        read_array(tmp_path / "a.npz", (3,))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("array", [np.arange(12.0).reshape(3, 4), np.arange(12, dtype=">i2").reshape(3, 4).T])
def test_every_version_and_order_of_the_format_is_read(tmp_path, version, array):
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version)
    found = read_array(tmp_path / "a.npy", array.shape)
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, array)


def test_a_file_with_more_bytes_than_its_header_says_is_refused(tmp_path):
    path = save(tmp_path / "a.npy", np.zeros(3))
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(InputError, match=r"a\.npy \(it has 153 bytes, its header says 152\)"):
        read_array(path, (3,))


def test_a_large_file_is_not_read_into_memory(tmp_path):
    path = save(tmp_path / "a.npy", np.zeros(3))
    os.truncate(path, 1 << 40)
    with pytest.raises(InputError, match=r"a\.npy \(it has 1099511627776 bytes, more than"):
        read_array(path, (3,))


def test_a_damaged_header_is_refused_without_a_warning(tmp_path, recwarn):
    """Evaluating this one would print that the number is written in a strange way."""
    path = save(tmp_path / "a.npy", np.zeros(3))
    path.write_bytes(path.read_bytes().replace(b"(3,)", b"(3if"))
    with pytest.raises(InputError, match=r"a\.npy \(its header is not that of an array of numbers\)"):
        read_array(path, (3,))
    assert not recwarn


@pytest.mark.parametrize("values", [np.zeros(3, np.int64), np.full(3, 1e300)])
def test_what_is_no_float32_is_refused(tmp_path, values):
    with pytest.raises(InputError, match=r"a\.npy holds (int64, not floating-point|values that are not finite)"):
        read_floats(save(tmp_path / "a.npy", values), (3,))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_floats_become_float32(tmp_path, dtype):
    found = read_floats(save(tmp_path / "a.npy", np.array([0.5, -2], dtype)), (2,))
    assert found.dtype == np.float32 and found.tolist() == [0.5, -2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(InputError, match=r"a\.npy \(it is no regular file\)"):
        read_array(tmp_path / "a.npy", (3,))


def test_an_error_names_a_file_in_one_line_whatever_its_name_is(tmp_path):
    with pytest.raises(InputError) as error:
        read_array(tmp_path / os.fsdecode(b"a\nerror: \xff.npy"), (3,))
    assert r"a\nerror: \udcff.npy is missing" in str(error.value)


def test_arrays_are_listed_sorted_and_alone(tmp_path):
    for name in ("b.npy", "10.npy", "a.npy", "notes.txt"):
        (tmp_path / name).touch()
    assert list_arrays(tmp_path) == ["10.npy", "a.npy", "b.npy"]


def test_arrays_named_by_numbers_are_listed_by_number(tmp_path):
    for name in ("10", "9", "002", "0"):
        save(tmp_path / f"{name}.npy", np.zeros(1))
    assert list_arrays(tmp_path) == ["0.npy", "002.npy", "9.npy", "10.npy"]


def test_a_folder_without_arrays_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no .npy file"):
        list_arrays(tmp_path)
    with pytest.raises(InputError, match="cannot list the feature folder .*nowhere"):
        list_arrays(tmp_path / "nowhere")


class Numbers(FeatureStore):
    """Latents that hold their index; the condition is a random number."""

    latent_shape = (1, 2, 2)

    def __init__(self, length: int = 10, bad: int | None = None):
        self.length, self.bad = length, bad

    def __len__(self) -> int:
        return self.length

    def sample(self, index, rng):
        if index == self.bad:
            raise InputError(f"number {index} is bad")
        return {"latents": np.full((1, 2, 2), index, np.float32), "draw": rng.random(3)}


def stream(seed: int = 0, **settings) -> TrainingStream:
    return TrainingStream(Numbers(**settings), LearnedRangeDDPM(NoiseSchedule.linear()), seed)


def indices(stream: TrainingStream, epoch: int) -> list[int]:
    return [int(stream[epoch * len(stream) + k]["latents"][0, 0, 0]) for k in range(len(stream))]


def test_the_same_position_gives_the_same_sample():
    first, again = stream()[17], stream()[17]
    assert first.keys() == again.keys() == {"latents", "draw", "t", "noise"}
    for name in first:
        np.testing.assert_array_equal(first[name], again[name], err_msg=name)


def test_an_image_is_drawn_anew_in_every_epoch_and_for_every_seed():
    def find(seed, epoch):
        numbers = stream(seed)
        return numbers[10 * epoch + indices(numbers, epoch).index(4)]

    samples = [find(0, 0), find(0, 1), find(1, 0)]
    for name in ("draw", "noise"):
        assert len({sample[name].tobytes() for sample in samples}) == 3


def test_every_epoch_holds_every_index_once_in_another_order():
    numbers = stream(length=50)
    epochs = [indices(numbers, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3
    assert all(order != sorted(order) for order in epochs)
    assert indices(stream(seed=1, length=50), 0) != epochs[0]


def test_damaged_headers_are_named(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4, 8, 8), np.float32))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(whole)
        for position in rng.integers(128, size=rng.integers(1, 6)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert read_array(path, (4, 8, 8)).shape == (4, 8, 8)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_a_header_that_claims_a_huge_array_is_named(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4, 8, 8), np.float32))
    path.write_bytes(path.read_bytes().replace(b"(4, 8, 8), }            ", b"(99999999999, 9999), }  "))
    with pytest.raises(InputError, match=r"cannot read the feature file .*a\.npy"):
        read_array(path, (4, 8, 8))
