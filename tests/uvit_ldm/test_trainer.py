"""The trainer's own parts: its flags, its optimizer, its loss, and the images it logs."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from latent_diffusion import meter
from latent_diffusion.errors import InputError
from latent_diffusion.runtime import import_paddlenlp
from latent_diffusion.vae import decode_latents, load_vae
from uvit_ldm.feature_files import read_prompts, write_prompt
from uvit_ldm.features import open_features
from uvit_ldm.objective import make_objective
from uvit_ldm.sampling import make_sampler, sample_latents

from .conftest import DATA

import_paddlenlp()

from paddlenlp.trainer.integrations import VisualDLCallback  # noqa: E402

from uvit_ldm import trainer as trainer_module  # noqa: E402
from uvit_ldm.trainer import UViTArguments, UViTTrainer, UViTTrainingArguments  # noqa: E402

FEATURES = DATA / "coco_features_tiny"


@pytest.fixture
def store(tiny_config):
    return open_features(FEATURES, tiny_config)


@pytest.fixture
def make_trainer(make_uvit, store, tmp_path):
    """`make_trainer(**settings)`: a trainer of the reference model with these training arguments."""

    def make(**settings) -> UViTTrainer:
        args = UViTTrainingArguments(
            output_dir=str(tmp_path), do_train=True, max_steps=1, report_to="none", device="cpu", **settings
        )
        return UViTTrainer(make_uvit(), make_objective(), store, None, args)

    return make


def test_weight_decay_applies_to_every_parameter(make_trainer):
    """Biases, norms and positions, too: with gradients of zero nothing else moves them."""
    trainer = make_trainer(learning_rate=0.1, weight_decay=0.5, adam_beta1=0.9, adam_beta2=0.9)
    trainer.create_optimizer_and_scheduler(1)
    before = {name: value.numpy().copy() for name, value in trainer.model.named_parameters()}
    paddle.add_n([(0.0 * value).sum() for value in trainer.model.parameters()]).backward()
    trainer.optimizer.step()
    for name, value in trainer.model.named_parameters():
        assert np.abs(before[name]).max() > 0
        np.testing.assert_allclose(value.numpy(), 0.95 * before[name], rtol=1e-5, err_msg=name)


def test_the_loss_is_the_references(make_trainer, golden):
    arrays, trainer = golden("losses_batches"), make_trainer()
    names = {"latents": "x0", "t": "n", "noise": "eps", "contexts": "context"}
    batch = {name: paddle.to_tensor(arrays[array][0]) for name, array in names.items()}
    assert abs(float(trainer.compute_loss(trainer.model, batch)) - arrays["loss_mean"][0]) <= 1e-5


def test_the_length_of_a_prompt_must_be_that_of_the_configuration(tiny_config, tmp_path):
    tiny_config.save(tmp_path / "tiny.json")
    flags = {"unet_config_file": str(tmp_path / "tiny.json")}
    for length in (None, 7):
        assert UViTArguments(**flags, model_max_length=length).model_config() == tiny_config
    with pytest.raises(InputError, match=r"--model_max_length 77 contradicts .*tiny\.json, .* num_text_tokens 7"):
        UViTArguments(**flags, model_max_length=77).model_config()


# Evaluation


class Evaluation:
    """As `TrainingEvaluation`, of a distance that takes a while."""

    notes = ()

    def __init__(self, clock: list[float]):
        self.clock = clock

    def keep_best_in(self, folder: Path, after: int) -> None:
        pass

    def due(self, step: int, last: int) -> bool:
        return True

    def run(self, step, model, ema, is_to_stop) -> None:
        self.clock[0] += 50.0


def test_evaluations_and_logged_images_are_not_in_the_rates(make_trainer, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock[0])
    trainer = make_trainer()
    trainer.evaluate_with(Evaluation(clock), after=0)
    visualdl = VisualDLCallback(SimpleNamespace(add_image=lambda *_: None))
    trainer.add_callback(visualdl)
    trainer.log_images(lambda model: clock.__setitem__(0, clock[0] + 30.0) or {}, every=1)
    trainer._meter.start()
    trainer._meter.add({"loss": paddle.to_tensor(1.0)})
    clock[0] += 4.0
    trainer.evaluate()
    trainer.callback_handler.callbacks[-1].on_step_end(None, trainer.state, None, model=trainer.model)
    assert clock[0] == 184.0 and trainer._meter.read()["steps_per_second"] == 1 / 4


def test_a_step_is_evaluated_before_its_checkpoint_is_saved(make_trainer, monkeypatch):
    """Else an evaluation that is interrupted would not be made again."""
    trainer, order = make_trainer(), []
    for name in ("evaluate", "_save_checkpoint"):
        monkeypatch.setattr(trainer, name, lambda *_, name=name, **__: order.append(name))
    trainer.control.should_evaluate = trainer.control.should_save = True
    trainer._maybe_log_save_evaluate(None, trainer.model, 0, None)
    assert order == ["evaluate", "_save_checkpoint"]


# Logged images


@pytest.fixture
def make_drawer(tiny_config, store, vae_folder, coco_clip_folder):
    """`make_drawer(**flags)`: what draws the logged images."""

    def make(config=tiny_config, feature_path: Path = FEATURES, **flags):
        own = {
            "vae_name_or_path": str(vae_folder),
            "text_encoder_name_or_path": str(coco_clip_folder),
            "tokenizer_name_or_path": str(coco_clip_folder),
            "num_inference_steps": 2,
        }
        arguments = UViTArguments(feature_path=str(feature_path), **own | flags)
        return trainer_module._image_drawer(config, arguments, store, 3)

    return make


@pytest.fixture
def captions(monkeypatch) -> list[list[str]]:
    """The captions of each grid that is drawn."""
    seen, captioned_grid = [], trainer_module.captioned_grid

    def recorded(images, texts, columns):
        seen.append(list(texts))
        return captioned_grid(images, texts, columns)

    monkeypatch.setattr(trainer_module, "captioned_grid", recorded)
    return seen


def test_the_prompts_of_the_features_are_drawn(make_drawer, uvit, store, vae_folder, captions):
    prompts = read_prompts(FEATURES, (7, 32))
    grids = make_drawer()(uvit)
    assert grids.keys() == {"guidance_2", "guidance_7.5"}
    assert captions == 2 * [[text for text, _ in prompts]]
    vae = load_vae(str(vae_folder))
    vae.register_to_config(scaling_factor=0.2301)
    contexts, sampler = np.stack([context for _, context in prompts]), make_sampler("ddim", 2)
    for name, grid in grids.items():
        scale = float(name.removeprefix("guidance_"))
        latents = sample_latents(uvit, contexts, store.empty_context, sampler, guidance_scale=scale, seed=3)
        expected = decode_latents(vae, latents)
        assert grid.dtype == np.uint8 and grid.ndim == 3
        for column in range(2):
            left = 3 + 66 * column  # a border of 2 pixels around the grid, one of 1 around each image
            np.testing.assert_array_equal(grid[3:67, left : left + 64], expected[column])


def test_given_prompts_are_drawn_in_their_place(make_drawer, uvit, coco_text_encoder, captions, monkeypatch):
    seen, sample = [], trainer_module.sample_latents
    monkeypatch.setattr(
        trainer_module,
        "sample_latents",
        lambda model, contexts, *r, **k: seen.append(contexts) or sample(model, contexts, *r, **k),
    )
    prompts = ["the digit three", "a cat", "the"]
    make_drawer(validation_prompts=prompts)(uvit)
    assert captions == [prompts, prompts]
    np.testing.assert_allclose(seen[0], coco_text_encoder.encode(prompts), rtol=0, atol=1e-6)


def test_no_more_prompts_are_drawn_than_fit_into_a_grid(make_drawer, uvit, store, captions, tmp_path):
    shutil.copytree(FEATURES, tmp_path / "features")
    for number in range(2, 12):
        write_prompt(tmp_path / f"features/run_vis/{number}.npy", f"prompt {number}", store.empty_context)
    make_drawer(feature_path=tmp_path / "features")(uvit)
    assert len(captions[0]) == 8 and captions[0][2:] == [f"prompt {number}" for number in range(2, 8)]


def test_drawing_leaves_the_generator_and_the_mode_alone(make_drawer, uvit):
    draw = make_drawer()
    uvit.train()
    paddle.seed(0)
    expected = paddle.rand([4]).numpy()
    paddle.seed(0)
    draw(uvit)
    np.testing.assert_array_equal(paddle.rand([4]).numpy(), expected)
    assert uvit.training


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"vae_name_or_path": "./nowhere"},
            "warning: no images will be logged: the VAE folder ./nowhere does not exist",
        ),
        (
            {"validation_prompts": ["a"], "text_encoder_name_or_path": "./nowhere"},
            "warning: no images will be logged: the text encoder folder ./nowhere does not exist",
        ),
        (
            {"validation_prompts": ["a"], "tokenizer_name_or_path": "./nowhere"},
            "warning: no images will be logged: the tokenizer folder ./nowhere does not exist",
        ),
    ],
)
def test_what_cannot_be_had_is_one_warning(make_drawer, capsys, flags, message):
    assert make_drawer(**flags) is None
    assert capsys.readouterr().err.splitlines() == [message]


def test_a_text_encoder_of_another_width_is_one_warning(make_drawer, tiny_config, capsys):
    assert make_drawer(dataclasses.replace(tiny_config, clip_dim=16), validation_prompts=["a"]) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no images will be logged: the text encoder")
    assert "gives contexts of width 32, the model takes 16" in line


def test_features_without_prompts_are_one_note(make_drawer, capsys, tmp_path):
    assert make_drawer(feature_path=tmp_path) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{tmp_path} has no run_vis; --validation_prompts names prompts")


def test_damaged_prompts_end_the_run_before_it_begins(make_drawer, tmp_path):
    shutil.copytree(FEATURES, tmp_path / "features")
    (tmp_path / "features/run_vis/1.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match=r"run_vis/1\.npy"):
        make_drawer(feature_path=tmp_path / "features")


def test_nothing_is_drawn_or_evaluated_at_a_step_after_which_the_run_ends_on_request(make_trainer):
    trainer = make_trainer()
    due = trainer._unless_stopping(lambda step, last: True)
    assert due(1, 2)
    trainer._guard.should_stop = True
    assert not due(1, 2)
