from pathlib import Path

import pytest

from latent_diffusion.command_line import ArgumentParser, check_number
from latent_diffusion.errors import InputError


@pytest.fixture
def parse(tmp_path):
    """`parse("--flag", ..., yaml="...")` -> the parsed flags; the YAML text comes from a file given with -c."""
    parser = ArgumentParser()
    parser.add_config()
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--use_flip", action="store_true")
    parser.add_argument("--lr", "--start_learning_rate", type=float, default=1e-4)
    parser.add_argument("--class-labels", nargs="+")
    parser.add_argument("--vae", default="mse")
    parser.add_switch("--recompute")

    def run(*flags: str, yaml: str | None = None):
        if yaml is not None:
            path = tmp_path / "flags.yaml"
            path.write_text(yaml)
            flags = ("-c", str(path), *flags)
        return parser.parse_args(flags)

    return run


@pytest.mark.parametrize("flag", ["--image-size", "--image_size"])
@pytest.mark.parametrize("separate", [True, False])
def test_a_flag_has_two_spellings(parse, flag, separate):
    assert parse(*([flag, "512"] if separate else [f"{flag}=512"])).image_size == 512
    assert parse("--use-flip").use_flip


def test_a_value_is_left_as_it_is(parse):
    assert parse("--vae", "some_vae-x").vae == "some_vae-x"


@pytest.mark.parametrize("flags", [("--images", "1"), ("--image", "1"), ("--use",)])
def test_an_unknown_or_shortened_flag_is_refused(parse, flags):
    with pytest.raises(InputError, match=f"{flags[0]}.*--help lists the flags"):
        parse(*flags)


@pytest.mark.parametrize(("flags", "expected"), [((), False), (("--recompute",), True), (("--recompute", "no"), False)])
def test_a_switch_stands_alone_or_takes_a_value(parse, flags, expected):
    assert parse(*flags).recompute is expected


def test_a_switch_takes_no_other_value(parse):
    with pytest.raises(InputError, match="expected true or false, not 'maybe'"):
        parse("--recompute", "maybe")


def test_a_file_gives_values_and_the_command_line_overrides_them(parse):
    yaml = "image_size: 512\nrecompute: True\nstart_learning_rate: 1e-5\nclass_labels: [207, 360]\nvae: ''\n"
    flags = parse("--image-size", "64", "--recompute", "False", yaml=yaml)
    assert (flags.image_size, flags.recompute, flags.lr, flags.class_labels) == (64, False, 1e-5, ["207", "360"])
    assert flags.vae == "mse"  # an empty value is no value
    assert parse(yaml=yaml).recompute is True


@pytest.mark.parametrize("key", ["unknown_key", "config"])
def test_an_unknown_key_is_named_with_its_file(parse, key):
    with pytest.raises(InputError, match=rf"flags\.yaml has the unknown key '{key}'"):
        parse(yaml=f"image_size: 512\n{key}: 1\n")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("image_size: big", "argument --image-size: invalid int value: 'big'"),
        ("image_size: {a: 1}", r"the key 'image_size' in .*flags\.yaml must hold one value"),
        ("- 1", r"flags\.yaml must hold keys and values"),
        ("a: [", r"flags\.yaml is not YAML"),
        ("!!python/object/apply:os.getcwd []", r"flags\.yaml is not YAML"),
    ],
)
def test_a_bad_file_is_one_sentence(parse, yaml, message):
    with pytest.raises(InputError, match=message) as error:
        parse(yaml=yaml)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(parse):
    with pytest.raises(InputError, match=r"cannot read the configuration file nowhere\.yaml"):
        parse("-c", "nowhere.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--path", ""], "argument --path: must not be empty; leave the flag out"),
        (["--rate", "nan"], "argument --rate: must be finite and below 3e\\+38, not nan"),
        (["--rate=-inf"], "argument --rate: must be finite"),
        (["--count", "9223372036854775808"], "argument --count: must be finite and below 9e\\+18"),
    ],
)
def test_values_that_no_flag_can_have_are_refused(flags, message):
    parser = ArgumentParser()
    parser.add_argument("--path", type=Path)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--count", type=int)
    with pytest.raises(InputError, match=message):
        parser.parse_args(flags)


def test_an_empty_text_may_be_the_default():
    parser = ArgumentParser()
    parser.add_argument("--device", default="cpu or gpu")
    parser.add_argument("--sharding", default="")
    assert parser.parse_args(["--sharding", ""]).sharding == ""


@pytest.mark.parametrize("value", [0, 10, float("nan")])
def test_a_number_out_of_its_range_is_refused(value):
    with pytest.raises(InputError, match=f"--steps must be at least 1 and less than 10, not {value}"):
        check_number("--steps", value, 1, 10)
