"""Pipelines with a LoRA merged in."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion.errors import InputError
from scripts import merge_sdxl_lora
from sdxl_lora.export import merge_pipeline
from sdxl_lora.lora import TORCH_FILE, write_lora
from sdxl_lora.modeling import SDXLLoRA
from sdxl_lora.pretrained import load_unet
from sdxl_lora.text_encoders import TextEncoders

PROMPT = "a cat in the rain"


@pytest.fixture(scope="module")
def model(tiny_pipeline) -> SDXLLoRA:
    """The tiny pipeline with random LoRA everywhere."""
    model = SDXLLoRA(load_unet(str(tiny_pipeline)), 2, TextEncoders.load(str(tiny_pipeline)))
    for parameter in model.parameters():
        parameter.set_value(0.3 * paddle.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def lora(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    write_lora(folder, model.state_dict())
    return folder


@pytest.fixture(scope="module")
def merged(tiny_pipeline, lora, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "pipeline"
    merge_pipeline(str(tiny_pipeline), lora, folder)
    return folder


def draw(pipeline, prompt: str = PROMPT) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    latents = paddle.to_tensor(np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32))
    return pipeline(
        prompt, height=64, width=64, num_inference_steps=2, guidance_scale=3.0, latents=latents, output_type="np"
    ).images


def load(folder: Path):
    from ppdiffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(str(folder))


def test_a_merged_pipeline_draws_what_the_base_draws_with_the_lora(merged, tiny_pipeline, model):
    pipeline = load(merged)
    found = draw(pipeline)
    base = load(tiny_pipeline)
    before = draw(base)
    base.unet, (base.text_encoder, base.text_encoder_2) = model.unet, model.text_encoders.models
    expected = draw(base)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(found - before).max() > 0.01 and expected.std() > 0.01
    assert pipeline.config.force_zeros_for_empty_prompt is True


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_merged_folder_holds_a_whole_pipeline_and_no_places(merged, tiny_pipeline, lora):
    assert files(merged) == files(tiny_pipeline)
    texts = [(merged / name).read_text() for name in files(merged) if name.endswith(".json")]
    for place in (tiny_pipeline, lora, merged):
        assert not any(str(place.parent) in text or place.name in text for text in texts)


def test_a_pipeline_of_diffusers_is_merged_with_another_vae(
    diffusers_pipeline, tiny_pipeline, make_lora_model, tmp_path
):
    write_lora(tmp_path / "lora", make_lora_model().state_dict())
    with pytest.raises(InputError, match=r"holds no folder vae: it is no pipeline"):
        merge_pipeline(str(diffusers_pipeline), tmp_path / "lora", tmp_path / "out")
    vae = str(tiny_pipeline / "vae")
    merge_pipeline(str(diffusers_pipeline), tmp_path / "lora" / TORCH_FILE, tmp_path / "out", vae)
    assert np.isfinite(draw(load(tmp_path / "out"), "the cat!")).all()
    assert TextEncoders.load(str(tmp_path / "out")).tokenize("!")["tokens_2"].tolist() == [98, 0, 99] + [0] * 13


def test_what_guidance_leads_away_from_is_kept(tiny_pipeline, lora, tmp_path):
    base = shutil.copytree(tiny_pipeline, tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": False}
    (base / "model_index.json").write_text(json.dumps(index))
    merge_pipeline(str(base), lora, tmp_path / "out")
    assert json.loads((tmp_path / "out/model_index.json").read_text())["force_zeros_for_empty_prompt"] is False


def test_a_lora_of_another_model_is_refused_and_nothing_is_left(tiny_pipeline, model, tmp_path):
    name, value = next(iter(model.state_dict().items()))
    write_lora(tmp_path / "lora", model.state_dict() | {name: paddle.zeros([48, value.shape[1]])})
    with pytest.raises(InputError, match=r"attn1\.to_q is for a weight of shape \[48, 64\], here it has \[64, 64\]"):
        merge_pipeline(str(tiny_pipeline), tmp_path / "lora", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_a_failed_merge_leaves_the_old_folder(tiny_pipeline, lora, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model_index.json").touch()

    def fail(*_arguments):
        raise OSError("disk full")

    monkeypatch.setattr("sdxl_lora.export.save_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        merge_pipeline(str(tiny_pipeline), lora, tmp_path / "out")
    assert files(tmp_path) == {"out/model_index.json"}


def test_the_command_writes_what_its_flags_name(tiny_pipeline, lora, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("sdxl_lora.export.merge_pipeline", lambda *arguments: calls.append(arguments))
    flags = ["--pretrained_model_name_or_path", "base", "--lora_path", str(lora), "--output_path", str(tmp_path)]
    for more, vae in (([], None), (["--vae_name", "vae"], "vae")):
        monkeypatch.setattr(sys, "argv", ["merge_sdxl_lora.py", *flags, *more])
        merge_sdxl_lora.main()
        assert calls.pop() == ("base", lora, tmp_path, vae)
        assert f"wrote {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["base", "lora", "."])
def test_what_is_merged_is_not_replaced_by_it(tiny_pipeline, lora, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_pipeline, "base")
    shutil.copytree(lora, "lora")
    before = files(tmp_path)
    with pytest.raises(InputError, match=f"^{re.escape(output)} would be replaced, and (base|lora) is in it; choose"):
        merge_pipeline("base", Path("lora"), Path(output))
    assert files(tmp_path) == before
