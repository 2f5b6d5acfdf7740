import zipfile

import numpy as np
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.npz import array_header, array_names, is_npz, read_array


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_numpy_reads_them(tmp_path, save):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6).reshape(2, 3)), "s": np.array("x")}
    save(tmp_path / "a.npz", **arrays)
    assert array_names(tmp_path / "a.npz") == {"a", "f", "s"}
    for name, expected in arrays.items():
        found = read_array(tmp_path / "a.npz", name)
        assert np.array_equal(found, expected) and found.dtype == expected.dtype
    assert str(array_header(tmp_path / "a.npz", "a")) == "float64 [2, 3]"


def test_objects_are_refused_unread(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([print], dtype=object))
    with pytest.raises(InputError, match=r"cannot read a of .*a\.npz: it holds objects"):
        read_array(tmp_path / "a.npz", "a")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00\x04\x00{'de", b"\x93NUMPY\x09\x00", b"text"])
def test_a_damaged_header_is_one_sentence(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(InputError, match=r"cannot read a of .*a\.npz: "):
        array_header(tmp_path / "a.npz", "a")


def test_what_is_no_archive_is_told_apart(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "a.zip").write_bytes(b"")
    assert not is_npz(tmp_path / "a.npz") and not is_npz(tmp_path / "a.zip") and not is_npz(tmp_path / "nowhere.npz")
    with pytest.raises(InputError, match=r"cannot read .*a\.npz: File is not a zip file"):
        array_names(tmp_path / "a.npz")
