from argparse import Namespace
from pathlib import Path

import pytest

from dit.configuration import DiTConfig
from dit.sampling_arguments import (
    add_sampling_arguments,
    check_config,
    check_sampling_arguments,
    check_vae,
    config_file,
    find_checkpoint,
    model_name,
)
from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import InputError

# The keys of both generations of MindONE's files.
MINDONE = """
image_size: 512
model_name: "DiT-XL/2"
dit_checkpoint: "models/DiT-XL-2-512x512.ckpt"
vae_checkpoint: "models/sd-vae-ft-mse.ckpt"
sd_scale_factor: 0.18215
enable_flash_attention: False
sampling_steps: 50
guidance_scale: 1.5
ddim_sampling: True
"""
PRECISION = {"first": "use_fp16: True", "later": 'dtype: "fp16"\nuse_recompute: False\npatch_embedder: "conv"'}


def parse(*flags: str) -> Namespace:
    parser = ArgumentParser()
    add_sampling_arguments(parser, vae="mse", cfg_scale=4.0)
    return parser.parse_args(list(flags))


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """An empty folder to be in, and where the published file of 256 pixels would be in it."""
    monkeypatch.chdir(tmp_path)
    return Path("models/DiT-XL-2-256x256.pt")


def test_defaults_are_those_of_the_paper():
    flags = parse()
    assert (flags.sampler, flags.num_sampling_steps, flags.cfg_scale, flags.vae) == ("ddpm", 250, 4.0, "mse")
    assert flags.use_ema and flags.dtype == "fp32" and flags.device is None


@pytest.mark.parametrize("generation", PRECISION)
def test_the_files_of_mindone_are_read(tmp_path, generation):
    (tmp_path / "mindone.yaml").write_text(f"{MINDONE}\n{PRECISION[generation]}\n")
    flags = parse("-c", str(tmp_path / "mindone.yaml"), "--device_target", "GPU")
    assert (flags.model, flags.image_size, flags.ckpt) == ("DiT-XL/2", 512, Path("models/DiT-XL-2-512x512.ckpt"))
    assert (flags.vae, flags.sd_scale_factor) == ("models/sd-vae-ft-mse.ckpt", 0.18215)
    assert (flags.num_sampling_steps, flags.cfg_scale, flags.sampler) == (50, 1.5, "ddim")
    assert (flags.dtype, flags.device, flags.enable_flash_attention) == ("fp16", "gpu", False)


@pytest.mark.parametrize(
    ("flags", "sampler", "dtype"),
    [
        (["--ddim-sampling", "--use-fp16"], "ddim", "fp16"),
        (["--ddim_sampling", "False", "--use_fp16=False"], "ddpm", "fp32"),
        (["--ddim_sampling=True", "--sampler", "dpm-solver++"], "dpm-solver++", "fp32"),
    ],
)
def test_switches_of_mindone_set_the_same_values(flags, sampler, dtype):
    flags = parse(*flags)
    assert (flags.sampler, flags.dtype) == (sampler, dtype)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cfg-scale", "0.5"], "must be at least 1, not 0.5"),
        (["--cfg-scale", "nan"], "must be at least 1, not nan"),
        (["--cfg-scale", "inf"], "must be finite, not inf"),
        (["--guidance_scale", "much"], "invalid float value: 'much'"),
        (["--num-sampling-steps", "0"], "must be at least 1, not 0"),
        (["--device", "ascend"], "invalid choice: 'ascend'"),
        (["--ddim-sampling", "maybe"], "expected true or false"),
    ],
)
def test_a_value_that_cannot_be_is_refused(flags, message):
    with pytest.raises(InputError, match=message):
        parse(*flags)


@pytest.mark.parametrize("folder", ["pretrained_models", "models"])
def test_published_weights_are_found_where_they_are_kept(weights, folder):
    path = Path(folder) / "DiT-XL-2-512x512.pt"
    path.parent.mkdir()
    path.touch()
    assert find_checkpoint(parse("--image-size", "512")) == path
    with pytest.raises(InputError, match="no weights at"):
        find_checkpoint(parse())


def test_missing_weights_say_where_they_were_looked_for_and_how_to_get_them(weights):
    with pytest.raises(InputError) as error:
        find_checkpoint(parse("--model", "DiT-XL/2"))
    assert str(error.value) == (
        "found no weights at pretrained_models/DiT-XL-2-256x256.pt or models/DiT-XL-2-256x256.pt; name them with "
        "--ckpt, or get them with: curl -L --create-dirs -o pretrained_models/DiT-XL-2-256x256.pt "
        "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"
    )
    with pytest.raises(
        InputError, match=f"no weights at {weights}; name them with --ckpt, or get them .* -o {weights}"
    ):
        find_checkpoint(parse("--ckpt", str(weights)))
    with pytest.raises(InputError, match="no weights at mine.pt; name them with --ckpt$"):
        find_checkpoint(parse("--ckpt", "mine.pt"))


@pytest.mark.parametrize(
    "flags", [["--model", "DiT-L/4"], ["--image-size", "128"], ["--num-classes", "10"], ["--model", "config.json"]]
)
def test_only_published_weights_need_no_path(weights, flags):
    with pytest.raises(InputError, match="only DiT-XL/2 at 256 and 512 pixels .* is published; .* --ckpt"):
        find_checkpoint(parse(*flags))


def test_a_folder_may_be_named_as_a_file_of_mindspore(weights):
    Path("1000.ckpt").mkdir()
    assert find_checkpoint(parse("--ckpt", "1000.ckpt")) == Path("1000.ckpt")


def test_files_of_mindspore_are_refused(weights):
    with pytest.raises(InputError, match=f"{weights.stem}.ckpt is a MindSpore file.*curl .* -o {weights} "):
        find_checkpoint(parse("--ckpt", str(weights.with_suffix(".ckpt"))))
    with pytest.raises(InputError, match="vae.ckpt is a MindSpore file"):
        check_vae("vae.ckpt")


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf"])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(InputError, match=f"--sd-scale-factor:? must be .*finite.*, not {scale}"):
        check_sampling_arguments(parse("--sd-scale-factor", scale))


def test_a_guidance_interval_is_two_numbers_in_order(tmp_path):
    assert parse().guidance_interval == (0.0, 1.0)
    (tmp_path / "flags.yaml").write_text("guidance_interval: [0.1, 0.8]\n")
    assert parse("-c", str(tmp_path / "flags.yaml")).guidance_interval == [0.1, 0.8]
    with pytest.raises(InputError, match="guidance interval 0.8 to 0.1 must have"):
        check_sampling_arguments(parse("--guidance_interval", "0.8", "0.1"))


def test_a_model_is_a_published_name_or_a_file(weights):
    Path("mine.json").touch()
    assert config_file(parse("--model", "mine.json")) == Path("mine.json")
    assert config_file(parse("--model", "DiT-B/4")) is None
    with pytest.raises(InputError, match="--model DiT-XL/3 is neither a configuration file nor one of DiT-XL/2"):
        config_file(parse("--model", "DiT-XL/3"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "DiT-L/4"], "--model DiT-L/4 contradicts weights, which is of DiT-B/4"),
        (["--image-size", "512"], "--image-size 512 contradicts weights, which is of 256"),
        (["--num-classes", "10"], "--num-classes 10 contradicts weights, which is of 1000"),
    ],
)
def test_weights_that_contradict_the_flags_are_refused(flags, message):
    config = DiTConfig.from_name("DiT-B/4")
    check_config(parse("--model", "DiT-B/4", "--image-size", "256", "--num-classes", "1000"), config, Path("weights"))
    check_config(parse(), config, Path("weights"))
    with pytest.raises(InputError, match=message):
        check_config(parse(*flags), config, Path("weights"))


def test_networks_have_names():
    assert model_name(DiTConfig.from_name("DiT-S/8", image_size=512, num_classes=10)) == "DiT-S/8"
    assert model_name(DiTConfig(8, 2, 4, 3, 4, 16)) == "DiT-3x64/2"
