from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from latent_diffusion import runtime
from latent_diffusion.errors import InputError
from latent_diffusion.sampling import sample_generators
from latent_diffusion.vae import load_vae

runtime.import_paddlenlp()

from sdxl_lora.image_sampling import Condition, ImageSampler  # noqa: E402
from sdxl_lora.modeling import SDXLLoRA  # noqa: E402
from sdxl_lora.pretrained import load_scheduler, load_unet, zeros_for_empty_prompt  # noqa: E402
from sdxl_lora.text_encoders import TextEncoders  # noqa: E402
from sdxl_lora.trainer import LOSS_STEPS, Encoders, FinalLossCallback, LoRATrainer  # noqa: E402

PROMPTS = ["the digit three", "a cat in the rain"]


@pytest.fixture(scope="module")
def encoders(tiny_pipeline) -> TextEncoders:
    return TextEncoders.load(str(tiny_pipeline))


@pytest.fixture(scope="module")
def model(tiny_pipeline) -> SDXLLoRA:
    paddle.seed(0)
    return SDXLLoRA(load_unet(str(tiny_pipeline)), rank=2)


def make_sampler(tiny_pipeline, **changed) -> ImageSampler:
    settings = {"resolution": 64, "steps": 2, "guidance_scale": 5.0, "zeros_for_empty": True} | changed
    return ImageSampler(load_vae(str(tiny_pipeline / "vae")), load_scheduler(str(tiny_pipeline)), **settings)


def test_an_image_is_that_of_ppdiffusers_for_the_same_noise(tiny_pipeline, encoders, model):
    from ppdiffusers import StableDiffusionXLPipeline

    sampler = make_sampler(tiny_pipeline)
    drawn = sampler.draw(model, *sampler.encode(PROMPTS, encoders), sample_generators(3, [0, 1]))
    noise = [rng.standard_normal((4, 8, 8), dtype=np.float32) for rng in sample_generators(3, [0, 1])]
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(tiny_pipeline))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=5.0,
        latents=paddle.to_tensor(np.stack(noise)),
        output_type="np",
    ).images
    assert drawn.shape == (2, 64, 64, 3) and drawn.dtype == np.uint8
    assert np.abs(drawn / 255 - theirs).max() < 1 / 255


def test_an_image_depends_on_its_seed_and_number_alone(tiny_pipeline, encoders, model):
    sampler = make_sampler(tiny_pipeline)
    condition, empty = sampler.encode([PROMPTS[0]] * 5, encoders)
    all_five = sampler.draw(model, condition, empty, sample_generators(0, range(5)))
    alone = sampler.draw(model, condition[:1], empty, sample_generators(0, [4]))
    assert np.abs(all_five[4].astype(int) - alone[0]).max() <= 1
    assert (all_five[3] != all_five[4]).any()


def test_drawing_leaves_generators_and_mode_as_they_were(tiny_pipeline, encoders, model):
    sampler = make_sampler(tiny_pipeline)
    paddle.seed(7)
    expected = paddle.randn([4]).numpy()
    paddle.seed(7)
    model.train()
    sampler.draw(model, *sampler.encode(PROMPTS[:1], encoders), sample_generators(0, [0]))
    assert model.training
    np.testing.assert_array_equal(paddle.randn([4]).numpy(), expected)


def test_guidance_leads_away_from_what_the_pipeline_says(tiny_pipeline, encoders, model):
    generators = [0]
    zeros, empty = (
        sampler.draw(model, *sampler.encode(PROMPTS[:1], encoders), sample_generators(0, generators))
        for sampler in (make_sampler(tiny_pipeline, zeros_for_empty=flag) for flag in (True, False))
    )
    assert zeros_for_empty_prompt(str(tiny_pipeline)) and (zeros != empty).any()
    np.testing.assert_array_equal(
        make_sampler(tiny_pipeline, zeros_for_empty=False).encode(PROMPTS, encoders)[1].pooled.numpy(),
        Condition.of([""], encoders).pooled.numpy(),
    )


def test_latents_that_are_not_finite_are_said_to_be_the_vaes(tiny_pipeline):
    vae = load_vae(str(tiny_pipeline / "vae"))
    vae.quant_conv.weight.set_value(paddle.full_like(vae.quant_conv.weight, 3e38))
    inputs = {"images": paddle.full([1, 64, 64, 3], 200, "uint8"), "posterior_noise": paddle.ones([1, 4, 8, 8])}
    with pytest.raises(InputError, match="give --vae_name madebyollin/sdxl-vae-fp16-fix or --mixed_precision bf16"):
        LoRATrainer.latents(SimpleNamespace(encoders=Encoders(vae, None)), inputs)


def logged(steps_and_losses: list[tuple[int, float]], since: int = 0) -> tuple[float, int]:
    """What `FinalLossCallback` gives after logs at these steps, of a run that began after step `since`."""
    callback = FinalLossCallback()
    callback.on_train_begin(None, SimpleNamespace(global_step=since), None)
    for step, loss in steps_and_losses:
        callback.on_log(None, SimpleNamespace(global_step=step), None, logs={"loss": loss})
    return callback.mean()


def test_the_final_loss_is_the_mean_over_the_last_steps():
    assert logged([(10, 1.0), (20, 3.0), (25, 5.0)]) == (pytest.approx((10 + 30 + 25) / 25), 25)
    assert logged([(35, 1.0), (40, 3.0)], since=30) == (pytest.approx((5 + 15) / 10), 10)
    many = [(step, float(step)) for step in range(10, 501, 10)]
    mean, steps = logged(many)
    assert steps == LOSS_STEPS and mean == pytest.approx(np.mean(np.arange(410, 501, 10)))
    assert logged([]) == (0.0, 0)
