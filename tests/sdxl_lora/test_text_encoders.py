"""Two text encoders and their tokenizers, as one."""

import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion.errors import InputError
from sdxl_lora.text_encoders import TextEncoders


@pytest.fixture(scope="module")
def encoders(diffusers_pipeline) -> TextEncoders:
    return TextEncoders.load(str(diffusers_pipeline))


@pytest.fixture
def folder(diffusers_pipeline, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(diffusers_pipeline, tmp_path / "pipeline")


START, END, THE, CAT = 98, 99, 55, 57


def test_each_tokenizer_pads_with_its_own_token(encoders):
    tokens = encoders.tokenize("the cat")
    assert {name: value.dtype for name, value in tokens.items()} == {"tokens": np.int64, "tokens_2": np.int64}
    assert tokens["tokens"].tolist() == [START, THE, CAT, END] + [END] * 12
    assert tokens["tokens_2"].tolist() == [START, THE, CAT, END] + [0] * 12


def test_long_texts_are_cut_off_and_empty_ones_padded(encoders):
    long, empty = encoders.tokenize("the cat " * 20), encoders.tokenize("")
    assert long["tokens"].tolist() == [START, *([THE, CAT] * 7), END]
    assert empty["tokens_2"].tolist() == [START, END] + [0] * 14


def test_shapes_are_told(encoders):
    assert (encoders.max_length, encoders.context_shape, encoders.pooled_width) == (16, (16, 64), 32)


def test_texts_are_encoded_as_the_pipeline_encodes_them(tiny_pipeline):
    from ppdiffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(str(tiny_pipeline))
    encoders = TextEncoders.load(str(tiny_pipeline))
    texts = ["the digit three", ""]
    tokens = [encoders.tokenize(text) for text in texts]
    contexts, pooled = encoders.encode(
        *(paddle.to_tensor(np.stack([each[name] for each in tokens])) for name in ("tokens", "tokens_2"))
    )
    expected, _, expected_pooled, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
    np.testing.assert_allclose(contexts, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(pooled, expected_pooled, rtol=0, atol=1e-6)
    assert contexts.shape == [2, 16, 64] and pooled.shape == [2, 32]


def test_encoders_are_frozen_in_eval_mode_and_of_the_type_asked_for(diffusers_pipeline):
    for model in TextEncoders.load(str(diffusers_pipeline), "float16").models:
        assert not model.training
        assert {(p.dtype, p.stop_gradient) for p in model.parameters()} == {(paddle.float16, True)}


def test_half_precision_files_are_read(folder, encoders):
    from safetensors.numpy import load_file, save_file

    for part in ("text_encoder", "text_encoder_2"):
        weights = load_file(folder / part / "model.safetensors")
        halves = {name: value.astype(np.float16) for name, value in weights.items()}
        save_file(halves, folder / part / "model.fp16.safetensors")
        (folder / part / "model.safetensors").unlink()
    found = TextEncoders.load(str(folder))
    for model, other in zip(found.models, encoders.models, strict=True):
        for name, value in model.state_dict().items():
            assert value.dtype == paddle.float32
            np.testing.assert_allclose(value, other.state_dict()[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_a_pipeline_of_another_kind_is_refused(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=f"holds no folder {part}: it is no pipeline of Stable Diffusion XL"):
        TextEncoders.load(str(folder))


def change_config(folder: Path, part: str, **changes) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_encoders_of_different_lengths_are_refused(folder):
    from safetensors.numpy import load_file, save_file

    change_config(folder, "text_encoder_2", max_position_embeddings=8)
    file = folder / "text_encoder_2/model.safetensors"
    weights, name = load_file(file), "text_model.embeddings.position_embedding.weight"
    save_file(weights | {name: weights[name][:8]}, file)
    with pytest.raises(InputError, match="the text encoders of .* take 16 and 8 tokens, not the same"):
        TextEncoders.load(str(folder))


def test_a_second_encoder_without_a_projection_is_refused(folder):
    shutil.rmtree(folder / "text_encoder_2")
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")
    with pytest.raises(InputError, match=r"lacks the weight text_projection\.weight"):
        TextEncoders.load(str(folder))


def test_a_tokenizer_with_more_tokens_than_its_encoder_is_refused(folder):
    path = folder / "tokenizer_2/vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cat": 100}))
    with pytest.raises(InputError, match=r"tokenizer_2 has a token 100, but the text encoder .*text_encoder_2 only"):
        TextEncoders.load(str(folder))
