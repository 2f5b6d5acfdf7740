import json
from pathlib import Path

import pytest

from latent_diffusion.errors import InputError
from uvit_ldm.captions import CaptionedImage, choose_captions, read_captions, read_prompts_file


def write(folder: Path, images: object, annotations: object = ()) -> Path:
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def image(number: object, name: object = "a.jpg") -> dict:
    return {"id": number, "file_name": name}


def caption(image_id: object, text: object, number: int = 0) -> dict:
    return {"image_id": image_id, "id": number, "caption": text}


def test_images_are_ordered_by_id_and_captions_as_in_the_file(tmp_path):
    """As pycocotools lists them: ids as numbers, captions not by their ids. An image without captions is left out."""
    path = write(
        tmp_path,
        [image(10, "b/10.jpg"), image(9, "9.jpg"), image(2, "2.jpg")],
        [caption(10, "late", 7), caption(9, "a cat", 5), caption(10, "early", 1)],
    )
    assert read_captions(path) == [
        CaptionedImage(9, Path("9.jpg"), ["a cat"]),
        CaptionedImage(10, Path("b/10.jpg"), ["late", "early"]),
    ]


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.jpg", "a/../../b.jpg", "", ".", "a\0.jpg", "\ud800.jpg"])
def test_an_image_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"captions\.json names the image .*, which is no path below the folder"):
        read_captions(write(tmp_path, [image(1, name)], [caption(1, "a cat")]))


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        (3, [], "holds no list 'images'"),
        ([image(1)], {}, "holds no list 'annotations'"),
        (["a.jpg"], [], "no valid 'id' in entry 0 of 'images'"),
        ([image("1")], [], "no valid 'id' in entry 0 of 'images'"),
        ([image(-1)], [], "no valid 'id' in entry 0 of 'images'"),
        ([image(2**63)], [], "no valid 'id' in entry 0 of 'images'"),
        ([image(1), image(2, None)], [], "no valid 'file_name' in entry 1 of 'images'"),
        ([image(1)], [caption(1, 3)], "no valid 'caption' in entry 0 of 'annotations'"),
        ([image(1)], [caption(1, "half \ud83d")], "no valid 'caption' in entry 0 of 'annotations'"),
        ([image(1)], [caption(2, "a cat")], "has a caption of the image 2, but no such image"),
        ([image(1), image(1)], [], "two images of the id 1"),
        ([image(1)], [], "has no image with a caption"),
    ],
)
def test_what_is_no_captions_file_is_named(tmp_path, images, annotations, message):
    with pytest.raises(InputError, match=rf"captions\.json .*{message}"):
        read_captions(write(tmp_path, images, annotations))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_named(tmp_path, content):
    (tmp_path / "captions.json").write_bytes(content)
    with pytest.raises(InputError, match=r"captions\.json is not JSON") as error:
        read_captions(tmp_path / "captions.json")
    assert "\n" not in str(error.value)


def test_a_missing_captions_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the captions file .*nowhere\.json"):
        read_captions(tmp_path / "nowhere.json")


def test_prompts_are_the_lines_that_are_not_blank(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat \n\n  \nein Mädchen\n")
    assert read_prompts_file(tmp_path / "prompts.txt") == ["a cat", "ein Mädchen"]


@pytest.mark.parametrize(("content", "message"), [(b" \n", "holds no prompt"), (b"\xff", "is not UTF-8")])
def test_a_bad_file_of_prompts_is_named(tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"prompts\.txt {message}"):
        read_prompts_file(tmp_path / "prompts.txt")
    with pytest.raises(InputError, match=r"cannot read .*nowhere"):
        read_prompts_file(tmp_path / "nowhere")


def test_of_each_image_one_caption_is_chosen():
    images = [CaptionedImage(i, Path("a.jpg"), [f"{i}-{k}" for k in range(5)]) for i in range(40)]
    chosen = choose_captions(images, 3)
    assert chosen == choose_captions(images, 3) != choose_captions(images, 4)
    numbers, captions = zip(*(text.split("-") for text in chosen), strict=True)
    assert sorted(map(int, numbers)) == list(range(40)) != list(map(int, numbers))
    assert set(captions) == set("01234")


def test_chosen_captions_are_in_one_line():
    assert choose_captions([CaptionedImage(1, Path("a.jpg"), [" a cat\r\n on\u2028a mat\n"])], 0) == ["a cat on a mat"]
