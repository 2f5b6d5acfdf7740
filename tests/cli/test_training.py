"""The training command, alone and under the launcher: what it logs, saves and resumes."""

import json
from pathlib import Path

import numpy as np
import pytest

from dit.image_sampling import ImageSampler
from dit.pretrained import load_dit
from dit.sampling import make_sampler
from latent_diffusion.evaluation.metrics import frechet_distance, moments
from latent_diffusion.evaluation.pixels import Pixels
from latent_diffusion.vae import load_vae
from latent_diffusion.weights import read_paddle

from .commands import TINY, TRAIN, Command, Result, run_all, without_later, write_features

# The published command, word for word; four flags follow it.
PUBLISHED = """--do_train --output_dir ./image_generation_dit_output_trainer --per_device_train_batch_size 16
    --gradient_accumulation_steps 1 --learning_rate 1e-4 --weight_decay 0.0 --max_steps 1000000000
    --lr_scheduler_type constant --warmup_steps 0 --image_logging_steps 1000 --logging_steps 50 --save_steps 5000
    --save_total_limit 50 --seed 23 --dataloader_num_workers 4 --vae_name_or_path stabilityai/sd-vae-ft-mse
    --num_inference_steps 25 --max_grad_norm -1"""

# Eight samples a step, in one way or another; what is learned shows at once.
EIGHT = ("--per_device_train_batch_size", 8)
FOUR = ("--per_device_train_batch_size", 4)
FAST = ("--learning_rate", "1e-3", "--ema_decay", "0.5")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(root, train_command, config_file, feature_path, vae_folder, evaluation_flags):
    """Results by name; each ran in the folder of its name and wrote to `out` there."""
    published = [*PUBLISHED.split(), "--config_file", config_file, "--feature_path", feature_path]
    published = [str(part) for part in (*published, "--max_steps", 4, "--output_dir", "out")]
    (root / "published").mkdir()
    (root / "published_two").mkdir()
    launcher = train_command(root / "unused", processes=2).arguments[:5]
    sampling = ("--num_inference_steps", 2, "--vae_name_or_path", vae_folder, *evaluation_flags)
    images = ("--image_logging_steps", 2, *sampling)
    indifferent = ("--recompute", "--enable_xformers_memory_efficient_attention", "--fp16", "--fp16_opt_level", "O2")
    return run_all(
        {
            "published_two": Command([*launcher, TRAIN, *published], root / "published_two"),
            "two": train_command(root / "two", *FOUR, *FAST, *sampling, "--save_steps", 2, processes=2),
            "sharded": train_command(
                root / "sharded", *FOUR, *FAST, *sampling, "--save_steps", 2, "--sharding", "stage1", processes=2
            ),
            "published": Command([TRAIN, *published], root / "published"),
            "one": train_command(root / "one", *EIGHT, *FAST, *images, "--save_steps", 1, "--save_total_limit", 3),
            "accumulated": train_command(
                root / "accumulated", *FOUR, *FAST, "--gradient_accumulation_steps", 2, *indifferent
            ),
        }
    )


@pytest.fixture(scope="module")
def later(root, runs, train_command, tmp_path_factory, vae_folder, evaluation_flags):
    """Runs that go on where an earlier one was, or fail there."""
    for name in ("one", "two", "sharded"):
        runs[name].ok()
    without_later(root / "one", root / "one_resumed", 2)
    for name in ("two", "sharded"):
        (root / f"{name}_resumed").mkdir()
    without_later(root / "one", root / "finished", 4)
    without_later(root / "one", root / "rewound", 4)
    without_later(root / "one", root / "other_model", 4)
    other = root / "other.json"
    other.write_text(json.dumps(TINY | {"num_attention_heads": 4, "attention_head_dim": 8}))
    for name in ("exploding", "bad_file", "overwritten"):
        without_later(root / "one", root / name, 2)
    resume_two = ("--resume_from_checkpoint", root / "two" / "out" / "checkpoint-2")
    resume_sharded = ("--resume_from_checkpoint", root / "sharded" / "out" / "checkpoint-2")
    sampling = ("--num_inference_steps", 2, "--vae_name_or_path", vae_folder, *evaluation_flags)
    spoiled, _ = spoiled_features(tmp_path_factory.mktemp("spoiled") / "features")
    return run_all(
        {
            "two_resumed": train_command(root / "two_resumed", *FOUR, *FAST, *resume_two, processes=2),
            "sharded_resumed": train_command(
                root / "sharded_resumed", *FOUR, *FAST, *resume_sharded, "--sharding", "stage1", processes=2
            ),
            "finished": train_command(
                root / "finished", *EIGHT, *FAST, "--report_to", "none", "--image_logging_steps", 1
            ),
            "rewound": train_command(
                root / "rewound",
                *FOUR,
                *FAST,
                "--max_steps",
                3,
                "--resume_from_checkpoint",
                "../rewound/out/checkpoint-2",
                "--save_total_limit",
                1,
            ),
            "other_model": train_command(
                root / "other_model",
                *EIGHT,
                *FAST,
                "--config_file",
                other,
                "--resume_from_checkpoint",
                "out/checkpoint-2",
            ),
            "one_resumed": train_command(root / "one_resumed", *EIGHT, *FAST, *sampling),
            "exploding": train_command(root / "exploding", *EIGHT, "--learning_rate", "1e30", "--save_steps", 2),
            "bad_file": train_command(
                root / "bad_file", *EIGHT, "--feature_path", spoiled, "--max_steps", 50, "--dataloader_num_workers", 2
            ),
            "overwritten": train_command(
                root / "overwritten", *EIGHT, "--overwrite_output_dir", "--max_steps", 1, "--use_ema", "False"
            ),
        }
    )


def spoiled_features(root: Path) -> tuple[Path, Path]:
    """More features than are opened up front; one of the others is not finite."""
    write_features(root, 300)
    names = sorted(path.name for path in (root / "imagenet64_features").iterdir())
    opened = set(np.linspace(0, 299, 256, dtype=int))
    bad = root / "imagenet64_features" / names[next(i for i in range(300) if i not in opened)]
    np.save(bad, np.full((1, 4, 8, 8), np.nan, np.float32))
    return root, bad


def state(folder: Path, name: str) -> dict[str, np.ndarray]:
    return flat(read_paddle(folder / "out" / "checkpoint-4" / name))


def flat(values: dict, prefix: str = "") -> dict[str, np.ndarray]:
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": np.asarray(value)}
    return found


def assert_equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys() and first
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").glob("*checkpoint-*"))


@pytest.mark.parametrize("name", ["published", "published_two"])
def test_the_published_command_runs(root, runs, name):
    runs[name].ok()
    assert "Traceback" not in runs[name].err
    assert checkpoints(root / name) == ["checkpoint-4"]
    processes = 2 if name == "published_two" else 1
    assert f"40 images, 4 steps of 16 x 1 x {processes} samples" in runs[name].out


def test_a_vae_that_cannot_be_had_is_one_warning(runs):
    warnings = [line for line in runs["published"].err.splitlines() if line.strip()]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: no images will be logged: the VAE 'stabilityai/sd-vae-ft-mse'")
    assert (runs["published_two"].out + runs["published_two"].err).count("no images will be logged") == 1


def test_a_checkpoint_has_its_files(root, runs):
    runs["one"].ok()
    files = {path.name for path in (root / "one/out/checkpoint-4").iterdir()}
    assert files == {
        "config.json",
        "ema_state.pdparams",
        "manifest.json",
        "model_state.pdparams",
        "optimizer.pdopt",
        "rng_state.pth",
        "scheduler.pdparams",
        "trainer_state.json",
        "training_args.bin",
    }
    assert json.loads((root / "one/out/checkpoint-4/trainer_state.json").read_text())["global_step"] == 4


def test_the_newest_checkpoints_are_kept(root, runs):
    runs["one"].ok()
    assert checkpoints(root / "one") == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("other", ["two", "sharded", "accumulated"])
def test_losses_do_not_depend_on_how_a_step_is_shared(runs, other):
    """One process of 8, two of 4, two of 4 with sharding, and twice 4 accumulated see the same samples."""
    for name in ("loss", "mse", "vb", "grad_norm"):
        one, shared = (np.array(runs[run].ok().logged(name), dtype=float) for run in ("one", other))
        assert len(one) == 4
        np.testing.assert_allclose(shared, one, rtol=2e-3, err_msg=name)
    assert len(set(runs["one"].logged("loss"))) == 4


@pytest.mark.parametrize("other", ["two", "sharded", "accumulated"])
def test_weights_do_not_depend_on_how_a_step_is_shared(root, runs, other):
    runs[other].ok()
    for file in ("model_state.pdparams", "ema_state.pdparams"):
        one, shared = state(root / "one", file), state(root / other, file)
        assert one.keys() == shared.keys()
        difference = max(np.abs(one[name] - shared[name]).max() for name in one)
        moved = max(np.abs(one[name] - start).max() for name, start in state_at(root / "one", 2, file).items())
        # Adam moves a weight by up to the learning rate where its gradient is all but zero, whatever its sign.
        assert np.mean([np.abs(one[name] - shared[name]).mean() for name in one]) < 1e-4 * moved + 1e-6
        assert difference < 5e-3


def state_at(folder: Path, step: int, file: str) -> dict[str, np.ndarray]:
    return flat(read_paddle(folder / f"out/checkpoint-{step}" / file))


def test_the_average_lags_behind_the_weights(root, runs):
    runs["one"].ok()
    weights, before = (state_at(root / "one", step, "model_state.pdparams") for step in (4, 3))
    average, average_before = (state_at(root / "one", step, "ema_state.pdparams") for step in (4, 3))
    assert weights.keys() == average.keys()
    assert any((weights[name] != before[name]).any() for name in weights)
    for name in weights:
        np.testing.assert_allclose(average[name], (average_before[name] + weights[name]) / 2, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["one", "two", "sharded"])
def test_a_resumed_run_is_bitwise_the_same(root, runs, later, name):
    later[f"{name}_resumed"].ok()
    assert "resuming from" in later[f"{name}_resumed"].out
    whole, resumed = root / name, root / f"{name}_resumed"
    files = {path.name for path in (whole / "out/checkpoint-4").iterdir()}
    assert files == {path.name for path in (resumed / "out/checkpoint-4").iterdir()}
    optimizers = [file for file in sorted(files) if file.startswith("optimizer")]
    assert len(optimizers) == (2 if name == "sharded" else 1)
    for file in ("model_state.pdparams", "ema_state.pdparams", "scheduler.pdparams", *optimizers):
        assert_equal(state(whole, file), state(resumed, file))
    assert later[f"{name}_resumed"].logged("loss") == runs[name].logged("loss")[2:]


def evaluated(result: Result) -> str:
    """The line of the first evaluation, without how long it took."""
    (line,) = [line for line in result.ok().out.splitlines() if line.startswith("step 3: Frechet distance (pixels)")]
    return line.rpartition(";")[0]


def best_of(folder: Path) -> dict:
    return json.loads((folder / "out/best/evaluation.json").read_text())


def test_the_distance_is_that_of_the_samples_of_the_averaged_weights(root, runs, vae_folder, evaluation_flags):
    assert evaluated(runs["one"]).endswith("the best so far")
    best, found = root / "one/out/best", best_of(root / "one")
    assert_equal(read_paddle(best / "ema_state.pdparams"), state_at(root / "one", found["step"], "ema_state.pdparams"))
    sampler = ImageSampler(load_dit(best, None, True), load_vae(str(vae_folder)), make_sampler("ddim", 2), 1.0)
    samples = [sampler.draw_samples(0, indices) for indices in (range(32), range(32, 40))]
    with np.load(evaluation_flags[5]) as file:
        real = moments(Pixels()(file["arr_0"])["features"])
    expected = frechet_distance(real, moments(Pixels()(np.concatenate(samples))["features"]))
    assert found["fid"] == pytest.approx(expected, rel=1e-6)
    assert f"step {found['step']}: Frechet distance (pixels) of 40 samples {expected:.5g}, the best" in runs["one"].out


@pytest.mark.parametrize("other", ["two", "sharded"])
def test_processes_that_share_an_evaluation_find_the_same(root, runs, other):
    """As far as their weights are the same: those differ in the last digits."""
    runs[other].ok()
    expected = best_of(root / "one")
    assert best_of(root / other) == expected | {"fid": pytest.approx(expected["fid"], rel=1e-6)}
    for step in (3, 4):
        assert runs[other].out.count(f"step {step}: Frechet distance") == 1


def test_a_resumed_run_finds_the_same_distance(root, runs, later):
    assert evaluated(later["one_resumed"]) == evaluated(runs["one"])
    assert best_of(root / "one_resumed") == best_of(root / "one")


def test_flags_without_effect_on_a_cpu_say_so_once(runs):
    notes = runs["accumulated"].ok().err
    assert notes.count("float16 has no effect on a CPU") == 1
    assert notes.count("memory-efficient attention needs a GPU") == 1
    assert "Traceback" not in notes


def test_visualdl_has_the_curves_and_the_images(root, runs):
    from visualdl import LogReader

    runs["one"].ok()
    (log,) = (root / "one/out/runs").rglob("vdlrecords*")
    reader = LogReader(file_path=str(log))
    tags = reader.get_tags()
    expected = ("loss", "mse", "vb", "learning_rate", "grad_norm", "samples_per_second")
    assert {f"train/{name}" for name in expected} <= set(tags["scalar"])
    records = reader.get_data("scalar", "train/loss")
    assert [record.id for record in records] == [1, 2, 3, 4]
    np.testing.assert_allclose([r.value for r in records], np.array(runs["one"].logged("loss"), float), rtol=1e-3)
    distances = reader.get_data("scalar", "eval/fid")
    assert [record.id for record in distances] == [3, 4]
    assert min(record.value for record in distances) == pytest.approx(best_of(root / "one")["fid"], rel=1e-6)
    assert set(tags["image"]) == {"samples/guidance_1", "samples/guidance_4"}
    for tag in tags["image"]:
        assert [record.id for record in reader.get_data("image", tag)] == [2, 4]


def test_a_loss_that_is_not_finite_ends_the_run(root, later):
    """At the second step with that learning rate: it holds from the first step after resuming."""
    result = later["exploding"]
    assert result.code == 1
    errors = [line for line in result.err.splitlines() if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("error:") and "is not finite at step 4 (" in errors[0]
    assert checkpoints(root / "exploding") == ["checkpoint-2"]
    assert content(root / "exploding/out/checkpoint-2") == content(root / "one/out/checkpoint-2")


def test_a_bad_file_met_during_training_ends_the_run_and_is_named(root, later):
    result = later["bad_file"]
    assert result.code == 1
    errors = [line for line in result.err.splitlines() if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("error: the feature file") and "not finite" in errors[0]
    assert checkpoints(root / "bad_file") == ["checkpoint-2"]
    assert content(root / "bad_file/out/checkpoint-2") == content(root / "one/out/checkpoint-2")


def test_a_run_that_overwrites_keeps_the_earlier_checkpoints_aside(root, later):
    later["overwritten"].ok()
    assert "from step 0" in later["overwritten"].out and "overwritten-1" in later["overwritten"].err
    out = root / "overwritten/out"
    assert checkpoints(root / "overwritten") == ["checkpoint-1"]
    assert content(out / "overwritten-1/checkpoint-2") == content(root / "one/out/checkpoint-2")
    assert not (out / "checkpoint-1/ema_state.pdparams").exists()


def test_a_finished_run_says_so_and_changes_nothing(root, later):
    result = later["finished"].ok()
    assert "which is at step 4: nothing is left to train" in result.out
    assert "warning" not in result.err  # no VAE is looked for where images would go nowhere
    assert content(root / "finished/out/checkpoint-4") == content(root / "one/out/checkpoint-4")


def test_resuming_from_an_earlier_checkpoint_sets_the_later_ones_aside(root, later):
    result = later["rewound"].ok()
    assert "overwritten-1" in result.err and "the order of data changes" in result.err
    assert checkpoints(root / "rewound") == ["checkpoint-3"]
    aside = root / "rewound/out/overwritten-1"
    assert content(aside / "best") == content(root / "one/out/best")
    assert content(aside / "checkpoint-4") == content(root / "one/out/checkpoint-4")


def test_a_checkpoint_of_another_model_is_not_resumed(root, later):
    """Heads of another width have the same weights: only the configuration tells. Nothing is moved aside for it."""
    result = later["other_model"]
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert "num_attention_heads 2, not 4" in line
    assert content(root / "other_model/out/checkpoint-4") == content(root / "one/out/checkpoint-4")
