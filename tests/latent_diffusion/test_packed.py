import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from latent_diffusion import packed
from latent_diffusion.errors import InputError
from latent_diffusion.packed import ABSENT, MANIFEST, PackedReader, PackedWriter, as_float32, is_finite, is_packed
from latent_diffusion.records import CONTEXTS, ImageContents, TextContents

SHAPE = (2, 4, 2, 2)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Three records a shard."""
    monkeypatch.setattr(packed, "RECORDS_PER_SHARD", 3)


@pytest.fixture(params=["kernel", "python"])
def way(request, monkeypatch) -> None:
    """Records are read by the kernel, or where there is none."""
    if request.param == "python":
        monkeypatch.setattr(packed, "record_reader", lambda: None)
    elif packed.record_reader() is None:
        pytest.skip("the kernels are not built")


def records(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *SHAPE)).astype(np.float16)


def write(folder: Path, count: int = 8, skipped: tuple[int, ...] = ()) -> np.ndarray:
    """Records with their number as label, except those skipped; written in two parts that cross shards."""
    values = records(count)
    writer = PackedWriter(
        folder, ImageContents("moments", SHAPE, "float16", count, 64, 0.5, vae="tiny", classes=("cat",))
    )
    writer.claim()
    for part in (range(5, count), range(5)):
        kept = [number for number in part if number not in skipped]
        writer.write(kept, values[kept], kept)
    assert writer.absent() == list(skipped)
    writer.finish([f"{number}.png" for number in skipped])
    return values


def change(folder: Path, **values: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | values))


def test_what_was_written_is_read(tmp_path, way):
    values = write(tmp_path, skipped=(4,))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "labels.npy",
        "manifest.json",
        *(f"shard-0000{k}.npy" for k in range(3)),
    ]
    assert [len(np.load(tmp_path / f"shard-0000{k}.npy")) for k in range(3)] == [3, 3, 2]
    reader = PackedReader(tmp_path)
    assert reader.labels.tolist() == [0, 1, 2, 3, ABSENT, 5, 6, 7] and reader.skipped == ["4.png"]
    numbers, views = (5, 0, 2, 7, 3, 0), (0, 1, 1, 0, 1, 0)
    batch = reader.read(numbers, views)
    assert batch.dtype == np.float32
    np.testing.assert_array_equal(batch, values[numbers, views])
    found = list(reader)
    assert [(number, label) for number, _, label in found] == [(n, n) for n in (0, 1, 2, 3, 5, 6, 7)]
    np.testing.assert_array_equal(np.stack([record for _, record, _ in found]), np.delete(values, 4, axis=0))


def test_the_manifest_counts(tmp_path):
    write(tmp_path, skipped=(4,))
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert (manifest["records"], manifest["images"]) == (8, 7)
    assert [shard["records"] for shard in manifest["shards"]] == [3, 3, 2]
    assert manifest["layout"] == "packed" and manifest["version"] == 1 and manifest["classes"] == ["cat"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_kernel_and_python_read_the_same_bits(tmp_path, dtype, monkeypatch):
    """Any finite bits, of records from many shards in any order."""
    if packed.record_reader() is None:
        pytest.skip("the kernels are not built")
    rng = np.random.default_rng(0)
    values = np.frombuffer(rng.bytes(60 * np.prod(SHAPE) * np.dtype(dtype).itemsize), dtype).reshape(60, *SHAPE)
    values = np.where(np.isfinite(values), values, np.array(-0.0, dtype))
    writer = PackedWriter(tmp_path, ImageContents("latents", SHAPE, dtype, 60, 64, 0.5))
    writer.claim()
    writer.write(range(60), values, [0] * 60)
    writer.finish([])
    numbers, views = rng.permutation(60), rng.integers(2, size=60)
    reader = PackedReader(tmp_path)
    # What it would do after a failure.
    with monkeypatch.context() as patch:
        patch.setattr(reader, "_read_in_python", None)
        found = reader.read(numbers, views)
    monkeypatch.setattr(packed, "record_reader", lambda: None)
    expected = PackedReader(tmp_path).read(numbers, views)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(expected.view(np.uint32), values[numbers, views].astype(np.float32).view(np.uint32))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked to fetch")
def test_each_block_is_fetched_once(tmp_path, monkeypatch):
    """With what is around the records that are read, and of each shard that has a part of it."""
    fetched = []
    monkeypatch.setattr(packed, "FETCHED_BYTES", 128)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: fetched.append((start, size)))
    write(tmp_path)
    reader = PackedReader(tmp_path)
    # A record has 64 bytes and a header 128: records 0 and 1 are a block, 2 and 3 one that lies in two shards.
    for _ in range(2):
        reader.read([1, 0, 1], [0, 0, 1])
    assert fetched == [(128, 128)]
    for number in (2, 3, 3, 2):
        reader.read([number], [0])
    assert fetched[1:] == [(256, 128), (64, 128)]


def test_there_is_a_view_for_each_record(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError):
        PackedReader(tmp_path).read([0, 1], [0])


def test_a_forked_process_reads_with_what_was_loaded_before(tmp_path, way, monkeypatch):
    """The loader of libraries has a lock, which a thread of the first process may have held."""
    values = write(tmp_path)
    reader = PackedReader(tmp_path)
    monkeypatch.setattr(packed, "record_reader", None)

    def read() -> None:
        os._exit(not np.array_equal(reader.read([7], [1]), values[[7], [1]]))

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_shard_is_opened_when_it_is_first_read_and_stays_open(tmp_path, monkeypatch):
    """One open file a process, however often and wherever it is read."""
    monkeypatch.setattr(packed, "FETCHED_BYTES", 64)
    write(tmp_path)

    def open_files() -> int:
        return sum(tmp_path.name in str(path.resolve()) for path in Path("/proc/self/fd").iterdir() if path.exists())

    reader = PackedReader(tmp_path)
    assert open_files() == 0
    for _ in range(3):
        reader.read([0, 1, 7], [0, 1, 1])
    assert open_files() == 2
    (tmp_path / "shard-00000.npy").unlink()
    reader.read([1], [0])


def test_an_unfinished_folder_is_refused(tmp_path):
    writer = PackedWriter(tmp_path, ImageContents("latents", SHAPE, "float16", 8, 64, 0.5))
    writer.claim()
    assert is_packed(tmp_path)
    with pytest.raises(InputError, match="not complete"):
        PackedReader(tmp_path)


@pytest.mark.parametrize(("bad", "row"), [(np.nan, 2), (np.inf, 0)])
def test_a_record_that_is_not_finite_is_named_when_read(tmp_path, bad, row, way, monkeypatch):
    monkeypatch.setattr(packed, "HEAD_BYTES", 128)
    write(tmp_path)
    shard = np.load(tmp_path / "shard-00001.npy", mmap_mode="r+")
    shard[row, 1, 0, 0, 0] = bad
    shard.flush()
    reader = PackedReader(tmp_path)
    reader.read([4, 3 + row], [1, 0])
    with pytest.raises(InputError, match=rf"record {row} of .*shard-00001\.npy holds values that are not finite"):
        reader.read([4, 3 + row], [1, 1])


@pytest.mark.parametrize("values", [np.arange(0x7C00), np.arange(0x8000, 0xFC00)])
def test_every_finite_half_becomes_the_same_float32(values):
    """Subnormal numbers too."""
    halves = values.astype(np.uint16).view(np.float16)
    found = as_float32(halves)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), halves.astype(np.float32).view(np.uint32))


def test_every_half_is_known_to_be_finite_or_not():
    halves = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    assert [is_finite(half) for half in halves.reshape(-1, 1)] == np.isfinite(halves).tolist()
    assert is_finite(np.ones(2, np.float32)) and not is_finite(np.array([1, np.inf], np.float32))


@pytest.mark.parametrize("name", ["shard-00001.npy", "labels.npy"])
def test_changed_labels_or_a_changed_start_of_a_shard_are_named_when_opened(tmp_path, name):
    write(tmp_path)
    array = np.load(tmp_path / name, mmap_mode="r+")
    array[0] = 1
    array.flush()
    with pytest.raises(InputError, match=f"{name} is not the file whose checksum"):
        PackedReader(tmp_path)


def test_a_change_further_on_is_named_when_all_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "HEAD_BYTES", 128)
    write(tmp_path)
    array = np.load(tmp_path / "shard-00001.npy", mmap_mode="r+")
    array[0] = 1
    array.flush()
    reader = PackedReader(tmp_path)
    with pytest.raises(InputError, match="shard-00001.npy is not the file whose checksum"):
        list(reader)


def test_shards_that_changed_places_are_named(tmp_path):
    write(tmp_path)
    first, second = tmp_path / "shard-00000.npy", tmp_path / "shard-00001.npy"
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    with pytest.raises(InputError, match="shard-00000.npy is not the file whose checksum"):
        PackedReader(tmp_path)


def test_a_manifest_without_checksums_of_starts_is_read(tmp_path):
    """As an earlier version wrote it."""
    write(tmp_path)
    shards = json.loads((tmp_path / MANIFEST).read_text())["shards"]
    change(tmp_path, shards=[{k: v for k, v in shard.items() if k != "head_sha256"} for shard in shards])
    assert len(list(PackedReader(tmp_path))) == 8


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", ["shard-00002.npy", "labels.npy", MANIFEST])
def test_a_pipe_in_place_of_a_file_is_named(tmp_path, name):
    """Opening it as a file would wait for ever."""
    write(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}.* no regular file"):
        PackedReader(tmp_path)


def test_a_shard_that_is_cut_off_while_it_is_read_is_named(tmp_path, way):
    """A map of it would end the process."""
    write(tmp_path)
    reader = PackedReader(tmp_path)
    reader.read([0, 7], [0, 1])
    os.truncate(tmp_path / "shard-00002.npy", 128)
    reader.read([0], [0])
    with pytest.raises(InputError, match=r"shard-00002\.npy was cut off after it had been opened"):
        reader.read([7], [1])


def test_a_shard_that_is_replaced_after_it_was_opened_changes_nothing(tmp_path):
    values = write(tmp_path)
    reader = PackedReader(tmp_path)
    reader.read([7], [1])
    (tmp_path / "other.npy").write_bytes(b"another file")
    (tmp_path / "other.npy").replace(tmp_path / "shard-00002.npy")
    np.testing.assert_array_equal(reader.read([7], [1])[0], values[7, 1])


@pytest.mark.parametrize("name", ["shard-00002.npy", "labels.npy"])
@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data + b"0", lambda data: data[:20]])
def test_a_file_of_another_size_is_named(tmp_path, name, spoil):
    write(tmp_path)
    (tmp_path / name).write_bytes(spoil((tmp_path / name).read_bytes()))
    with pytest.raises(InputError, match=name) as error:
        PackedReader(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["shard-00002.npy", "labels.npy"])
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        PackedReader(tmp_path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, *SHAPE), np.float32),
        np.zeros((2, 2, 4, 1, 2), np.float16),
        np.zeros((2, *SHAPE), np.float16, order="F"),
        np.zeros((2, *SHAPE), ">f2"),
        np.array(["text"]),
    ],
)
def test_another_array_in_a_shard_is_named(tmp_path, array):
    write(tmp_path)
    np.save(tmp_path / "shard-00002.npy", array)
    with pytest.raises(InputError, match=r"shard-00002.npy (holds|\(its header is not that of an array of numbers)"):
        PackedReader(tmp_path)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the file was executed",)


def test_a_pickled_array_is_refused_and_not_executed(tmp_path):
    write(tmp_path)
    np.save(tmp_path / "shard-00002.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot read .*shard-00002.npy"):
        PackedReader(tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere.npy", "/etc/passwd", "a/b.npy", "..", "", "manifest.json", 3])
def test_a_file_elsewhere_is_not_opened(tmp_path, name):
    write(tmp_path)
    change(tmp_path, labels={"file": name, "sha256": "0"})
    with pytest.raises(InputError, match="manifest.json lists"):
        PackedReader(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layout": "other"}, "has layout 'other'"),
        ({"version": 2}, "has version 2, not 1"),
        ({"content": "pixels"}, "'pixels' for 'content'"),
        ({"record_shape": [2, 4, 2]}, "for 'record_shape'"),
        ({"record_shape": [3, 4, 2, 2]}, "for 'record_shape'"),
        ({"record_shape": [2, 5, 2, 2]}, "even number of channels"),
        ({"record_shape": [2, 4, -2, 2]}, "for 'record_shape'"),
        ({"dtype": "object"}, "for 'dtype'"),
        ({"records": 9}, "lists shards of 8 records, not 9"),
        ({"records": True}, "True for 'records'"),
        ({"scaling_factor": 0}, "for 'scaling_factor'"),
        ({"classes": [1]}, "for 'classes'"),
        ({"skipped": None}, "lists no skipped images"),
        ({"shards": 3}, "lists shards of 0 records"),
        ({"shards": ["a"]}, "lists a file without name"),
        ({"shards": [{"file": "a.npy", "sha256": "0", "records": "3"}]}, "how many records a.npy holds"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(tmp_path, values, message):
    write(tmp_path)
    change(tmp_path, **values)
    with pytest.raises(InputError, match=message):
        PackedReader(tmp_path)


@pytest.mark.parametrize("name", ["vae", "crop", "seed", "classes", "image_list_sha256"])
def test_what_a_manifest_does_not_say_is_unknown(tmp_path, name):
    write(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest[name]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert getattr(PackedReader(tmp_path).contents, name) is None


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_manifest_that_is_no_manifest_is_named(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError, match="manifest.json is damaged"):
        PackedReader(tmp_path)


def write_texts(folder: Path, shape=(1, 1, 5, 2)) -> np.ndarray:
    """Contexts of four captions of two images."""
    values = np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float16)
    writer = PackedWriter(folder, TextContents(CONTEXTS, shape, "float16", 4, "clip", "words", "a1b2"))
    writer.claim()
    writer.write(range(4), values, [0, 0, 0, 1])
    writer.finish([])
    return values


def test_features_of_texts_are_read(tmp_path):
    values = write_texts(tmp_path)
    reader = PackedReader(tmp_path, TextContents)
    assert reader.contents.context_shape == (5, 2) and reader.contents.text_encoder == "clip"
    assert reader.labels.tolist() == [0, 0, 0, 1]
    np.testing.assert_array_equal(reader.read([3], [0])[0], values[3, 0])
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["captions"] == manifest["records"] == 4 and not {"images", "resolution"} & manifest.keys()


def test_features_of_texts_are_none_of_images(tmp_path):
    write_texts(tmp_path / "texts")
    write(tmp_path / "images")
    with pytest.raises(InputError, match="texts/manifest.json has 'contexts' for 'content'"):
        PackedReader(tmp_path / "texts")
    with pytest.raises(InputError, match="images/manifest.json has .* which cannot be"):
        PackedReader(tmp_path / "images", TextContents)


@pytest.mark.parametrize(
    "values", [{"text_encoder": None}, {"tokenizer": 3}, {"record_shape": [1, 2, 5, 2]}, {"content": "moments"}]
)
def test_a_manifest_of_texts_that_cannot_be_is_refused(tmp_path, values):
    write_texts(tmp_path)
    change(tmp_path, **values)
    with pytest.raises(InputError, match=f"for '{next(iter(values))}', which cannot be"):
        PackedReader(tmp_path, TextContents)
