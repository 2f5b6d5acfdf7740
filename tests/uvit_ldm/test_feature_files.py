import os
import shutil

import numpy as np
import pytest

from latent_diffusion.errors import InputError
from uvit_ldm.feature_files import count_captions, read_prompts, write_prompt

from .conftest import DATA

TINY = DATA / "coco_features_tiny"


def touch(folder, *names: str) -> None:
    for name in names:
        (folder / f"{name}.npy").touch()


def test_captions_are_counted_by_image():
    assert count_captions(TINY / "train").tolist() == [2, 5, 3]
    assert count_captions(TINY / "val").tolist() == [4, 2]


def test_numbers_are_no_text(tmp_path):
    """In sorted text 10 comes before 9, and other files may lie beside."""
    touch(tmp_path, *map(str, range(12)), *(f"{i}_0" for i in range(12)), "10_1")
    (tmp_path / ".3.tmp").touch()
    assert count_captions(tmp_path).tolist() == [1] * 10 + [2, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "holds no <image>.npy"),
        (("0", "0_0", "2", "2_0"), r"1\.npy is missing: images are numbered"),
        (("1", "1_0"), r"0\.npy is missing: images are numbered"),
        (("0", "0_0", "1_0"), r"1\.npy is missing: the image has captions"),
        (("0", "0_0", "999999999_0"), r"999999999\.npy is missing"),
        (("0", "0_0", "1"), r"1_0\.npy is missing: an image has captions"),
        (("0", "0_0", "0_2"), r"0_1\.npy is missing: an image has captions"),
        (("0", "0_1"), r"0_0\.npy is missing: an image has captions"),
        (("0", "0_0", "cat"), r"cat\.npy is named neither"),
        (("0", "0_0", "00"), r"00\.npy is named neither"),
        (("0", "0_0", "0_0_0"), r"0_0_0\.npy is named neither"),
    ],
)
def test_what_is_missing_is_named(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(InputError, match=message):
        count_captions(tmp_path)


def test_prompts_are_read_in_the_order_of_their_numbers(tmp_path):
    features = shutil.copytree(TINY, tmp_path / "features")
    (features / "run_vis/1.npy").rename(features / "run_vis/10.npy")
    shutil.copy(features / "run_vis/0.npy", features / "run_vis/9.npy")
    prompts = read_prompts(features, (7, 32))
    train, skiers = (
        "A green train is coming down the tracks.",
        "A group of skiers are preparing to ski down a mountain.",
    )
    assert [prompt for prompt, _ in prompts] == [train, train, skiers]
    assert all(context.shape == (7, 32) and context.dtype == np.float32 for _, context in prompts)


def test_a_prompt_is_written_as_the_official_code_writes_it(tmp_path):
    for number, (prompt, context) in enumerate(read_prompts(TINY, (7, 32))):
        write_prompt(tmp_path / "prompt.npy", prompt, context)
        assert (tmp_path / "prompt.npy").read_bytes() == (TINY / f"run_vis/{number}.npy").read_bytes()


def test_features_may_have_no_prompts(tmp_path):
    assert read_prompts(tmp_path, (7, 32)) == []


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pair(*values) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def test_a_hostile_prompt_is_refused_and_not_executed(tmp_path):
    features, traces = shutil.copytree(TINY, tmp_path / "features"), [tmp_path / "first", tmp_path / "second"]
    context = np.zeros((7, 32), np.float32)
    for array in (pair(Bomb(traces[0]), context), pair("a cat", Bomb(traces[1]))):
        np.save(features / "run_vis/1.npy", array, allow_pickle=True)
        with pytest.raises(
            InputError, match=r"run_vis/1\.npy was refused: it asks for posix\.mkdir, which does not belong"
        ):
            read_prompts(features, (7, 32))
    assert not any(path.exists() for path in traces)
    np.load(features / "run_vis/1.npy", allow_pickle=True)
    assert traces[1].exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pair("a cat", np.zeros((7, 31), np.float32)), r"does not hold a prompt and its context of shape \(7, 32\)"),
        (pair("a cat", np.zeros((7, 32), int)), "does not hold a prompt"),
        (pair(3, np.zeros((7, 32), np.float32)), "does not hold a prompt"),
        (pair("a cat"), "does not hold a prompt"),
        (pair("a cat", np.full((7, 32), np.nan, np.float32)), "not finite"),
        (np.zeros((7, 32), np.float32), "was refused: it has an array of float32"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path, array, message):
    features = shutil.copytree(TINY, tmp_path / "features")
    np.save(features / "run_vis/1.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=message) as error:
        read_prompts(features, (7, 32))
    assert "run_vis/1.npy" in str(error.value) and "\n" not in str(error.value)


def test_a_prompt_without_number_is_named(tmp_path):
    features = shutil.copytree(TINY, tmp_path / "features")
    (features / "run_vis/0_1.npy").touch()
    with pytest.raises(InputError, match=r"run_vis/0_1\.npy is not named by a number"):
        read_prompts(features, (7, 32))
