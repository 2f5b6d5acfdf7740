import gc
import json
import shutil
import weakref
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from latent_diffusion import runtime
from latent_diffusion.errors import InputError
from latent_diffusion.sampling import sample_generators
from latent_diffusion.vae import load_vae

from .captioned import write_image_folder

runtime.import_paddlenlp()

from latent_diffusion.training_arguments import parse  # noqa: E402
from sdxl_lora.image_sampling import Condition, ImageSampler  # noqa: E402
from sdxl_lora.modeling import SDXLLoRA  # noqa: E402
from sdxl_lora.pretrained import load_scheduler, load_unet, zeros_for_empty_prompt  # noqa: E402
from sdxl_lora.text_encoders import TextEncoders  # noqa: E402
from sdxl_lora.trainer import LOSS_STEPS, Encoders, FinalLossCallback, LoRATrainer, train  # noqa: E402
from sdxl_lora.training_arguments import LoRAArguments, LoRATrainingArguments  # noqa: E402

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
    drawn = sampler.draw(model.unet, *sampler.encode(PROMPTS, encoders), sample_generators(3, [0, 1]))
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
    all_five = sampler.draw(model.unet, condition, empty, sample_generators(0, range(5)))
    alone = sampler.draw(model.unet, condition[:1], empty, sample_generators(0, [4]))
    assert np.abs(all_five[4].astype(int) - alone[0]).max() <= 1
    assert (all_five[3] != all_five[4]).any()


def test_drawing_leaves_generators_and_mode_as_they_were(tiny_pipeline, encoders, model):
    sampler = make_sampler(tiny_pipeline)
    paddle.seed(7)
    expected = paddle.randn([4]).numpy()
    paddle.seed(7)
    model.train()
    sampler.draw(model.unet, *sampler.encode(PROMPTS[:1], encoders), sample_generators(0, [0]))
    assert model.training
    np.testing.assert_array_equal(paddle.randn([4]).numpy(), expected)


def test_guidance_leads_away_from_what_the_pipeline_says(tiny_pipeline, encoders, model):
    generators = [0]
    zeros, empty = (
        sampler.draw(model.unet, *sampler.encode(PROMPTS[:1], encoders), sample_generators(0, generators))
        for sampler in (make_sampler(tiny_pipeline, zeros_for_empty=flag) for flag in (True, False))
    )
    assert zeros_for_empty_prompt(str(tiny_pipeline)) and (zeros != empty).any()
    np.testing.assert_array_equal(
        make_sampler(tiny_pipeline, zeros_for_empty=False).encode(PROMPTS, encoders)[1].pooled.numpy(),
        Condition.of([""], encoders).pooled.numpy(),
    )


def make_encoding_trainer(vae) -> LoRATrainer:
    """Able to encode images, and to do nothing else."""
    trainer = LoRATrainer.__new__(LoRATrainer)
    trainer.encoders, trainer._latents_are_finite = Encoders(vae, None), paddle.to_tensor(True)
    return trainer


def test_latents_that_are_not_finite_are_said_to_be_the_vaes(tiny_pipeline):
    vae = load_vae(str(tiny_pipeline / "vae"))
    vae.quant_conv.weight.set_value(paddle.full_like(vae.quant_conv.weight, 3e38))
    inputs = {"images": paddle.full([1, 64, 64, 3], 200, "uint8"), "posterior_noise": paddle.ones([1, 4, 8, 8])}
    trainer = make_encoding_trainer(load_vae(str(tiny_pipeline / "vae")))
    trainer.latents(inputs)
    assert trainer.advice().startswith("try a lower --learning_rate")
    trainer.encoders.vae = vae
    trainer.latents(inputs)
    assert trainer.advice().endswith("give --vae_name madebyollin/sdxl-vae-fp16-fix or --mixed_precision bf16")


def test_the_vae_keeps_its_precision_where_the_network_computes_in_half(tiny_pipeline):
    vae, levels = load_vae(str(tiny_pipeline / "vae")), []
    tracer = paddle.base.framework._dygraph_tracer()
    vae.encoder.register_forward_pre_hook(lambda *_: levels.append(tracer._amp_level))
    inputs = {"images": paddle.full([1, 64, 64, 3], 200, "uint8"), "posterior_noise": paddle.ones([1, 4, 8, 8])}
    # As in `paddle.amp.auto_cast` on a GPU; on a CPU that does nothing.
    before = tracer._amp_level, tracer._amp_dtype
    tracer._amp_level, tracer._amp_dtype = paddle.base.core.AmpLevel.O1, "float16"
    try:
        make_encoding_trainer(vae).latents(inputs)
    finally:
        tracer._amp_level, tracer._amp_dtype = before
    assert levels == [paddle.base.core.AmpLevel.O0]


def test_text_encoders_are_freed_where_captions_come_from_a_cache(tiny_pipeline, tmp_path, monkeypatch):
    flags = f"--pretrained_model_name_or_path {tiny_pipeline} --resolution 64 --cache_latents --device cpu"
    folder = write_image_folder(tmp_path / "images", PROMPTS)
    monkeypatch.setattr("sys.argv", ["train", *flags.split(), "--train_data_dir", str(folder)])
    kept, load = [], TextEncoders.load
    monkeypatch.setattr(TextEncoders, "load", lambda *given: _remembered(load(*given), kept))

    def run_training(trainer_class, objective, make_store, build_model, *others):
        model, _ = build_model(None)
        gc.collect()
        assert model.text_encoders is None and kept[0]() is None

    monkeypatch.setattr("sdxl_lora.trainer.run_training", run_training)
    train(*parse(LoRAArguments, LoRATrainingArguments, description=""))
    assert kept


def _remembered(made, kept: list[weakref.ref]):
    kept.append(weakref.ref(made))
    return made


def logged(steps_and_losses: list[tuple[int, float | None]], since: int = 0) -> tuple[float, int]:
    """What `FinalLossCallback` gives after logs at these steps, of a run that began after step `since`.

    Those without a loss are of steps that were left out; in between something else is logged.
    """
    callback = FinalLossCallback()
    callback.on_train_begin(None, SimpleNamespace(global_step=since), None)
    for step, loss in steps_and_losses:
        callback.on_log(None, SimpleNamespace(global_step=step - 1), None, logs={"distance": 1.0})
        loss = {} if loss is None else {"loss": loss}
        callback.on_log(None, SimpleNamespace(global_step=step), None, logs={"learning_rate": 0.1} | loss)
    return callback.mean()


def test_the_final_loss_is_the_mean_over_the_last_steps():
    assert logged([(10, 1.0), (20, 3.0), (25, 5.0)]) == (pytest.approx((10 + 30 + 25) / 25), 25)
    assert logged([(35, 1.0), (40, 3.0)], since=30) == (pytest.approx((5 + 15) / 10), 10)
    many = [(step, float(step)) for step in range(10, 501, 10)]
    mean, steps = logged(many)
    assert steps == LOSS_STEPS and mean == pytest.approx(np.mean(np.arange(410, 501, 10)))
    assert logged([]) == (0.0, 0)


def test_steps_that_were_left_out_count_in_no_mean():
    assert logged([(10, 1.0), (30, None), (40, 3.0)]) == (2.0, 20)


def test_parts_that_do_not_fit_are_refused_before_anything_is_encoded(tiny_pipeline, tmp_path, monkeypatch):
    shutil.copytree(tiny_pipeline, tmp_path / "base")
    config = tmp_path / "base/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"addition_time_embed_dim": None}))
    images = write_image_folder(tmp_path / "images", PROMPTS)
    flags = f"--resolution 64 --cache_latents --device cpu --train_data_dir {images} --output_dir {tmp_path / 'out'}"
    monkeypatch.setattr(
        "sys.argv", ["train", "--pretrained_model_name_or_path", str(tmp_path / "base"), *flags.split()]
    )
    with pytest.raises(InputError, match="values of sizes and pooled text, .* no refiner"):
        train(*parse(LoRAArguments, LoRATrainingArguments, description=""))
    assert not (tmp_path / "out").exists()
