import io
import tarfile
from pathlib import Path

import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.webdataset import TarImages, list_shards


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_images_are_read_by_index(tmp_path):
    write_tar(tmp_path / "b.tar", {"z.cls": b"7", "z.png": b"third"})
    members = {"x/0.jpg": b"first", "x/0.cls": b"3\n", "x/0.json": b"{}", "1.JPEG": b"2", "1.cls": b"12"}
    write_tar(tmp_path / "a.tar", members)
    images = TarImages(tmp_path)
    assert len(images) == 3
    assert [images.read(i) for i in (2, 0, 1)] == [b"third", b"first", b"2"]
    assert images.labels.tolist() == [3, 12, 7]
    assert "b.tar" in images.name(2)


def test_an_image_without_its_class_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "0.cls": b"0", "1.jpg": b"x"})
    with pytest.raises(InputError, match=r"a\.tar holds the image '1' without its class: 1\.cls is missing"):
        TarImages(tmp_path)


@pytest.mark.parametrize("text", [b"cat", b"-1", b"", b"9" * 40])
def test_a_class_that_is_no_number_is_named(tmp_path, text):
    write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "0.cls": text})
    with pytest.raises(InputError, match=r"0\.cls in .*a\.tar does not hold a class number"):
        TarImages(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x" * 2000, "0.cls": b"0"})
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(InputError, match=r"cannot read the tar shard .*a\.tar"):
        TarImages(tmp_path)


def test_shards_without_images_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.txt": b"x"})
    with pytest.raises(InputError, match="hold no images with classes"):
        TarImages(tmp_path)


def test_one_shard_is_enough(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "0.cls": b"4"})
    write_tar(tmp_path / "b.tar", {"0.jpg": b"x", "0.cls": b"5"})
    assert TarImages(path).labels.tolist() == [4]
    assert list_shards(tmp_path) == [path, tmp_path / "b.tar"] and list_shards(tmp_path / "none.tar") == []


def test_the_key_ends_at_the_first_dot_and_the_kind_follows_the_last(tmp_path):
    """What WebDataset takes for no member of a sample is passed over."""
    members = {"x.d/v.1.jpg": b"v", "x.d/v.cls": b"1", "w.jpg": b"w", "w.txt.cls": b"2", "._w.jpg": b"?", "jpg": b"?"}
    images = TarImages(write_tar(tmp_path / "a.tar", members))
    assert images.labels.tolist() == [1, 2] and [images.read(i) for i in (0, 1)] == [b"v", b"w"]


@pytest.mark.parametrize("second", ["0.png", "0.left.jpg", "0.left.cls"])
def test_a_second_image_or_class_of_a_sample_is_named(tmp_path, second):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "0.cls": b"0", second: b"1"})
    with pytest.raises(InputError, match=rf"^{second} in .*a\.tar is the second of its kind"):
        TarImages(path)


def test_a_class_without_an_image_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "0.cls": b"0", "1.npy": b"x", "1.cls": b"1"})
    with pytest.raises(InputError, match=r"a\.tar holds the class 1\.cls without an image"):
        TarImages(path)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_is_named(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "0.cls": b"0", "1.cls": b"1"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = kind, "0.jpg"
        tar.addfile(link)
    with pytest.raises(InputError, match=r"^1\.jpg in .*a\.tar is a link; pack the files themselves"):
        TarImages(path)


def test_a_damaged_header_does_not_pass_for_the_end_of_a_shard(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "0.cls": b"0", "1.jpg": b"y", "1.cls": b"1"})
    content = bytearray(path.read_bytes())
    content[2048] ^= 1  # in the name of the third member
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tar: it is damaged or cut off at byte 2048"):
        TarImages(tmp_path)


def test_a_shard_that_is_cut_off_between_two_members_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "0.cls": b"0", "1.jpg": b"y", "1.cls": b"1"})
    path.write_bytes(path.read_bytes()[:2048])
    with pytest.raises(InputError, match=r"a\.tar: it is damaged or cut off at byte 2048"):
        TarImages(tmp_path)
