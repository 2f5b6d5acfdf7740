"""Agreement with diffusers and peft (PyTorch): stored values, and the packages themselves where they are installed."""

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

from sdxl_lora.lora import write_lora
from sdxl_lora.micro_conditioning import make_time_ids
from sdxl_lora.objective import Prediction
from sdxl_lora.pretrained import load_noise_schedule
from sdxl_lora.text_encoders import TextEncoders
from tests.data.sdxl_lora.formula import batch
from tests.formulations import ON_CPU, computing_with
from tests.peer import needs_peer, run_peer

DATA = Path(__file__).parent.parent / "data/sdxl_lora"
GRADIENT = "gradient."


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(DATA / "reference.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def tensors() -> dict[str, paddle.Tensor]:
    return {name: paddle.to_tensor(value) for name, value in batch().items()}


def assert_close(found: paddle.Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Equal but for rounding, measured by the largest of the expected values."""
    assert found.shape == list(expected.shape)
    assert np.abs(found.numpy() - expected).max() <= tolerance * np.abs(expected).max()


def check_step(model, tensors, reference, **condition) -> None:
    """The prediction, the loss and the gradients of a step."""
    prediction = model(paddle.to_tensor(reference["noisy"]), tensors["t"], tensors["time_ids"], **condition)
    assert_close(prediction, reference["prediction"])
    loss = paddle.nn.functional.mse_loss(prediction, tensors["noise"])
    assert_close(loss, reference["loss"])
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if not p.stop_gradient}
    for name, gradient in gradients.items():
        expected = reference[GRADIENT + name]
        assert np.abs(expected).max() > 0
        assert_close(gradient.T, expected, 1e-4)  # PyTorch in float32 differs from this by up to 7e-5
    parts = ("unet.",) if model.text_encoders is None else ("unet.", "text_encoder")
    assert gradients.keys() == {
        name.removeprefix(GRADIENT)
        for name in reference
        if name.startswith(GRADIENT) and name.removeprefix(GRADIENT).startswith(parts)
    }


def test_training_a_unet_agrees(make_lora_model, tensors, reference):
    conditions = {name: paddle.to_tensor(reference[name]) for name in ("contexts", "pooled")}
    check_step(make_lora_model(), tensors, reference, **conditions)


@pytest.mark.parametrize("formulation", ON_CPU)
def test_training_the_text_encoders_too_agrees(make_lora_model, tensors, reference, formulation):
    model = make_lora_model(train_text_encoder=True)
    tokens = {name: tensors[name] for name in ("tokens", "tokens_2")}
    with computing_with(formulation):
        for found, name in zip(model.text_encoders.encode(**tokens), ("contexts", "pooled"), strict=True):
            assert_close(found, reference[name])
        check_step(model, tensors, reference, **tokens)


def test_noise_is_added_as_there(diffusers_pipeline, reference):
    schedule, prediction = load_noise_schedule(str(diffusers_pipeline))
    values = batch()
    kept = schedule.alphas_cumprod[values["t"]][:, None, None, None]
    noisy = np.sqrt(kept) * values["latents"] + np.sqrt(1 - kept) * values["noise"]
    np.testing.assert_allclose(noisy, reference["noisy"], rtol=0, atol=1e-6)
    assert prediction is Prediction.EPSILON


RUN_PEER = """
import json, sys
import numpy as np, torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

data, folder, texts, *loras = json.loads(sys.argv[1])
pipeline = StableDiffusionXLPipeline.from_pretrained(folder, vae=AutoencoderKL())
batch = {name: torch.from_numpy(value) for name, value in np.load("batch.npz").items()}
settings = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
values = {
    "tokens": pipeline.tokenizer(texts, **settings).input_ids,
    "tokens_2": pipeline.tokenizer_2(texts, **settings).input_ids,
    "time_ids": pipeline._get_add_time_ids((480, 640), (3, 12), (64, 64), torch.float32, 32).numpy(),
}
for lora in loras:
    if lora != "base":
        pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        contexts, _, pooled, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
        conditions = {"time_ids": batch["time_ids"], "text_embeds": pooled}
        prediction = pipeline.unet(batch["noise"], batch["t"], contexts, added_cond_kwargs=conditions).sample
    for name, value in (("contexts", contexts), ("pooled", pooled), ("prediction", prediction)):
        values[f"{lora}.{name}"] = value.numpy()
    pipeline.unload_lora_weights()
np.savez("peer.npz", **values)

sys.path.insert(0, data)
import make_reference
make_reference.main("reference.npz")
"""


# The pipeline as it is, with a LoRA of the UNet, and with one of the text encoders, too.
LORAS = {"base": False, "unet": False, "all": True}
TEXTS = ["the cat", "wow! a cat"]


@pytest.fixture(scope="module")
def peer(diffusers_pipeline, make_lora_model, tmp_path_factory) -> Path:
    """A folder with what diffusers computes of it, and the reference once more."""
    folder = tmp_path_factory.mktemp("peer")
    for name in ("unet", "all"):
        write_lora(folder / name, make_lora_model(LORAS[name]).state_dict())
    np.savez(folder / "batch.npz", **batch())
    run_peer(folder, "-c", RUN_PEER, json.dumps([str(DATA), str(diffusers_pipeline), TEXTS, *LORAS]))
    return folder


@needs_peer
def test_the_stored_values_are_those_of_diffusers(reference, peer):
    with np.load(peer / "reference.npz") as file:
        assert set(file) == reference.keys()
        for name, value in file.items():
            np.testing.assert_allclose(value, reference[name], rtol=0, atol=1e-6)


@needs_peer
def test_diffusers_computes_the_same_with_a_lora_from_here(diffusers_pipeline, make_lora_model, tensors, peer):
    with np.load(peer / "peer.npz") as file:
        peer = dict(file)
    encoders = TextEncoders.load(str(diffusers_pipeline))
    tokens = [encoders.tokenize(text) for text in TEXTS]
    tokens = {name: np.stack([each[name] for each in tokens]) for name in tokens[0]}
    for name, found in tokens.items():
        np.testing.assert_array_equal(found, peer[name])
    tokens = {name: paddle.to_tensor(value) for name, value in tokens.items()}
    inputs = [tensors[name] for name in ("noise", "t", "time_ids")]
    for name, train_text_encoder in LORAS.items():
        model = make_lora_model(train_text_encoder)
        contexts, pooled = (model.text_encoders or encoders).encode(**tokens)
        assert_close(contexts, peer[f"{name}.contexts"])
        assert_close(pooled, peer[f"{name}.pooled"])
        if name == "base":
            for parameter in model.parameters():
                parameter.set_value(paddle.zeros_like(parameter))
        conditions = tokens if train_text_encoder else {"contexts": contexts, "pooled": pooled}
        assert_close(model(*inputs, **conditions), peer[f"{name}.prediction"])
    for name, other in (("base", "unet"), ("unet", "all")):
        assert np.abs(peer[f"{name}.prediction"] - peer[f"{other}.prediction"]).max() > 0.1


@needs_peer
def test_sizes_are_told_as_there(peer):
    with np.load(peer / "peer.npz") as file:
        expected = file["time_ids"][0]
    image = Image.new("RGB", (640, 480))
    np.testing.assert_array_equal(make_time_ids(image, (3, 12), 64), expected)
