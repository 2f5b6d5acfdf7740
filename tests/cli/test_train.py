"""The plain loop, alone and under the launcher: the published command, what it shares with the Trainer, its resume."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit.feature_conversion import convert_features
from dit.pretrained import load_dit
from latent_diffusion.weights import read_paddle

from .commands import LAUNCH, LOOP, REPOSITORY, Command
from .forks import run_all

# The published command after the launcher's flags, word for word.
PUBLISHED = "--model DiT-XL/2 --feature-path ./data/fastdit_imagenet256 --global-batch-size 16"
FAST = ("--lr", "1e-3", "--ema-decay", "0.5")
EIGHT = ("--global-batch-size", 8)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def loop_command(config_file, feature_path):
    """`loop_command(folder, *flags, processes=1)`: four steps of the tiny model into folder/results."""

    def make(folder: Path, *flags: object, processes: int = 1) -> Command:
        folder.mkdir(exist_ok=True)
        launcher = LAUNCH if processes == 2 else ()
        own = ("--model", config_file, "--feature-path", feature_path, "--max-steps", 4, "--log-every", 1)
        own += ("--num-workers", 0, "--ckpt-every", 2)
        return Command([str(part) for part in (*launcher, LOOP, *own, *flags)], folder)

    return make


@pytest.fixture(scope="module")
def images(root) -> dict[str, Path]:
    """The same six images in two classes as folders and as tar shards."""
    rng = np.random.default_rng(0)
    folders, shards = root / "folders", root / "shards"
    shards.mkdir()
    for label, name in enumerate(("cat", "dog")):
        (folders / name).mkdir(parents=True)
        with tarfile.open(shards / f"{label}.tar", "w") as tar:
            for i in range(3):
                file = folders / name / f"{i}.png"
                Image.fromarray(rng.integers(0, 256, (70, 64 + 9 * i, 3), dtype=np.uint8)).save(file)
                tar.add(file, f"{name}_{i}.png")
                text = tarfile.TarInfo(f"{name}_{i}.cls")
                text.size = 1
                tar.addfile(text, io.BytesIO(str(label).encode()))
    return {"folders": folders, "shards": shards}


@pytest.fixture(scope="module")
def runs(root, loop_command, train_command, config_file, feature_path, vae_folder, images, evaluation_flags):
    """Results by name; each ran in the folder of its name."""
    for name in ("published", "yaml"):
        (root / name).mkdir()
    shutil.copytree(feature_path, root / "published/data/fastdit_imagenet256")
    published = [*LAUNCH, LOOP, *PUBLISHED.split(), "--model", config_file, "--max-steps", 2, "--log-every", 1]
    yaml = ["-c", REPOSITORY / "config/training/class_cond_train.yaml", "--data_path", images["folders"]]
    yaml += [
        "--model_name",
        config_file,
        "--image_size",
        64,
        "--num_classes",
        10,
        "--max_steps",
        1,
        "--vae",
        vae_folder,
    ]
    yaml += ["--global_batch_size", 2, "--num_workers", 1]
    convert_features(feature_path, root / "packed", "packed", scaling_factor=1.0)
    on_images = (*EIGHT, *FAST, "--vae", vae_folder, "--max-steps", 2)
    trainer = ("--per_device_train_batch_size", 8, "--learning_rate", "1e-3", "--ema_decay", "0.5", "--seed", 23)
    return run_all(
        {
            "published": Command([str(part) for part in published], root / "published"),
            "two": loop_command(root / "two", *EIGHT, *FAST, "--global-seed", 23, "--recompute", processes=2),
            "two_plain": loop_command(root / "two_plain", *EIGHT, *FAST, "--global-seed", 23, "--profile", processes=2),
            "trainer": train_command(root / "trainer", *trainer, "--save_steps", 2),
            "one": loop_command(
                root / "one", *EIGHT, *FAST, "--global_seed", 23, "--amp", "fp16", *evaluation_flags,
                "--vae", vae_folder,
            ),
            "packed": loop_command(
                root / "packed_run", *EIGHT, *FAST, "--global-seed", 23, "--feature-path", root / "packed", "--profile"
            ),
            "decayed": loop_command(
                root / "decayed", *EIGHT, *FAST, "--weight-decay", 0.1, "--warmup-steps", 2, "--amp", "bf16"
            ),
            "trainer_decayed": train_command(
                root / "trainer_decayed", *trainer, "--seed", 0, "--weight_decay", 0.1, "--warmup_steps", 2,
                "--lr_scheduler_type", "constant_with_warmup", "--profile", "--bf16",
            ),
            "folders": loop_command(root / "folders_run", *on_images, "--data-path", images["folders"]),
            "shards": loop_command(
                root / "shards_run", *on_images, "--data-path", images["shards"], "--num-workers", 2
            ),
            "yaml": Command([str(part) for part in [LOOP, *yaml]], root / "yaml"),
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def later(root, runs, loop_command, train_command, vae_folder, evaluation_flags):
    """Runs that go on where an earlier one was."""
    for name in ("one", "trainer"):
        runs[name].ok()
    shutil.copytree(root / "one", root / "resumed")
    shutil.copytree(root / "one", root / "rewound")
    shutil.rmtree(root / "resumed/results/000-tiny/checkpoint-4")
    trainer = ("--per_device_train_batch_size", 8, "--learning_rate", "1e-3", "--ema_decay", "0.5", "--seed", 23)
    flags = (*EIGHT, *FAST, "--global-seed", 23)
    return run_all(
        {
            "resumed": loop_command(
                root / "resumed", *flags, "--resume", *evaluation_flags, "--vae", vae_folder
            ),
            "rewound": loop_command(root / "rewound", *flags, "--resume", "results/000-tiny/checkpoint-2"),
            "loop_after_trainer": loop_command(
                root / "loop_after_trainer", *flags, "--resume", root / "trainer/out/checkpoint-2"
            ),
            "trainer_after_loop": train_command(
                root / "trainer_after_loop", *trainer,
                "--resume_from_checkpoint", root / "one/results/000-tiny/checkpoint-2",
            ),
            "again": loop_command(root / "one", *flags, "--max-steps", 1),
            "other batch": loop_command(
                root / "other_batch", *FAST, "--global-batch-size", 4, "--max-steps", 5,
                "--resume", root / "trainer_decayed/out/checkpoint-4",
            ),
            "finished": loop_command(root / "two", *flags, "--resume", "True", "--max-steps", 3),
        }
    )  # fmt: skip


def state(folder: Path, name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in read_paddle(folder / name).items() if isinstance(value, np.ndarray)}


def assert_same(first: Path, second: Path) -> None:
    for name in ("model_state.pdparams", "ema_state.pdparams", "optimizer.pdopt"):
        one, two = state(first, name), state(second, name)
        assert one.keys() == two.keys() and one
        for key, value in one.items():
            np.testing.assert_array_equal(value, two[key], err_msg=f"{name}: {key}")


def test_the_published_command_runs(runs, root):
    assert len(runs["published"].ok().logged("loss")) == 2
    assert (root / "published/results/000-tiny/checkpoint-2/ema_state.pdparams").is_file()


def test_loop_and_trainer_give_the_same_losses_and_weights(runs, root):
    for loop, trainer in (("one", "trainer"), ("decayed", "trainer_decayed")):
        losses = runs[loop].ok().logged("loss")
        assert len(set(losses)) == 4
        assert losses == runs[trainer].ok().logged("loss")
        assert_same(root / loop / "results/000-tiny/checkpoint-4", root / trainer / "out/checkpoint-4")


def test_packed_features_train_as_the_files_they_were_made_of(runs, root):
    runs["packed"].ok()
    assert_same(root / "packed_run/results/000-tiny/checkpoint-4", root / "one/results/000-tiny/checkpoint-4")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("packed", "packed_run/results/000-tiny"), ("two_plain", "two_plain/results/000-tiny"), ("trainer_decayed", "")],
)
def test_a_profile_is_written_beside_the_checkpoints(runs, root, name, folder):
    """That the same is learned show the tests of these runs."""
    folder = root / folder if folder else root / name / "out"
    lines = [line for line in runs[name].ok().out.splitlines() if line.startswith("wrote the profile of steps 3 to 4")]
    assert len(lines) == 1
    assert sorted(path.name for path in (folder / "profile").iterdir()) == ["operators.txt", "trace.json"]
    assert "\nadamw_ " in (folder / "profile/operators.txt").read_text()


def test_only_the_first_process_says_what_was_tuned_and_profiles(runs, root):
    assert runs["two_plain"].ok().out.count("runtime: FLAGS_use_stride_kernel=0") == 1
    other = (root / "two_plain/log/workerlog.1").read_text()
    assert "runtime: " not in other and "profile" not in other


@pytest.mark.parametrize("name", ["two", "two_plain"])
def test_two_processes_train_as_one_with_and_without_recompute(runs, root, name):
    assert runs[name].ok().logged("loss") == runs["one"].ok().logged("loss")
    # The first moments are means of gradients: those of one process alone would be other ones.
    moments = [state(root / run / "results/000-tiny/checkpoint-4", "optimizer.pdopt") for run in ("one", name)]
    for key in (key for key in moments[0] if "moment1" in key):
        scale = np.abs(moments[0][key]).max()
        np.testing.assert_allclose(moments[1][key], moments[0][key], atol=1e-3 * scale, rtol=0, err_msg=key)


def test_resume_is_exact(later, root, runs):
    later["resumed"].ok()
    one = root / "one/results/000-tiny/checkpoint-4"
    assert_same(one, root / "resumed/results/000-tiny/checkpoint-4")
    assert later["resumed"].logged("loss") == runs["one"].logged("loss")[2:]
    assert "resuming from results/000-tiny/checkpoint-2" in later["resumed"].out


def test_resuming_an_earlier_checkpoint_sets_the_later_ones_aside(later, root):
    moved = "checkpoints and the best weights (best) of an earlier run were moved to results/000-tiny/overwritten-1"
    assert moved in later["rewound"].ok().err
    folder = root / "rewound/results/000-tiny"
    assert_same(folder / "checkpoint-4", folder / "overwritten-1/checkpoint-4")


def test_either_resumes_the_others_checkpoint(later, root, runs):
    later["loop_after_trainer"].ok()
    later["trainer_after_loop"].ok()
    assert_same(root / "one/results/000-tiny/checkpoint-4", root / "trainer/out/checkpoint-4")
    assert_same(root / "one/results/000-tiny/checkpoint-4", root / "trainer_after_loop/out/checkpoint-4")


def test_folders_and_tar_shards_train_alike(runs, root):
    assert runs["folders"].ok().logged("loss") == runs["shards"].ok().logged("loss")
    results = [root / f"{name}_run/results/000-tiny/checkpoint-2" for name in ("folders", "shards")]
    assert_same(*results)


def test_a_yaml_file_gives_the_flags(runs, root):
    assert "1 steps of 2 samples" in runs["yaml"].ok().out
    saved = json.loads((root / "yaml/results/000-tiny/arguments.json").read_text())
    assert saved["ckpt_every"] == 50000 and saved["image_size"] == 64


def test_what_is_logged(runs, later, root):
    line = next(line for line in runs["one"].ok().out.splitlines() if line.startswith("step 4/4"))
    for name in ("loss", "mse", "vb", "learning_rate", "samples_per_second", "steps_per_second", "peak_memory_gib"):
        assert f"{name} " in line
    folder = root / "one/results/000-tiny"
    assert line in (folder / "log.txt").read_text()
    assert list((folder / "runs").glob("vdlrecords*"))
    assert "note: float16 has no effect on a CPU; computing in float32" in runs["one"].out


def test_a_resume_says_what_is_not_as_before(later, root):
    assert "note: other samples a step than before" in later["other batch"].ok().out
    assert "note: other samples" not in later["resumed"].out
    assert "is at step 4: nothing is left to train" in later["finished"].ok().out
    first, resumed = (root / "resumed/results/000-tiny" / f"arguments{end}.json" for end in ("", "-2"))
    assert json.loads(first.read_text())["resume"] is None and json.loads(resumed.read_text())["resume"] is True


def test_the_best_weights_are_kept_and_their_distance_is_logged(runs, later, root):
    """They are of the third step or the last one, so that a run resumed at the second one finds them again."""
    from visualdl import LogReader

    bests = []
    for name, results in (("one", runs), ("resumed", later)):
        folder = root / name / "results/000-tiny"
        lines = evaluations(results[name].ok().out)
        assert list(lines) == [3, 4] and all(line in (folder / "log.txt").read_text() for line in lines.values())
        bests.append(json.loads((folder / "best/evaluation.json").read_text()))
        assert ", the best so far; " in lines[bests[-1]["step"]] and bests[-1]["samples"] == 40
        assert load_dit(folder / "best", None, True).config.num_classes == 10
    assert bests[0] == bests[1]
    assert (root / "resumed/results/000-tiny/overwritten-1/best").is_dir()
    (log,) = (root / "one/results/000-tiny/runs").glob("vdlrecords*")
    records = LogReader(file_path=str(log)).get_data("scalar", "eval/fid")
    assert [record.id for record in records] == [3, 4]
    assert min(record.value for record in records) == pytest.approx(bests[0]["fid"], rel=1e-6)


def evaluations(out: str) -> dict[int, str]:
    """The line of each evaluation by its step."""
    return {int(line[5]): line for line in out.splitlines() if line[6:].startswith(": Frechet distance")}


def test_a_step_is_evaluated_before_its_checkpoint_is_written(runs):
    """Else an evaluation that is interrupted would not be made again."""
    out = runs["one"].ok().out
    assert 0 < out.index(evaluations(out)[4]) < out.index("wrote results/000-tiny/checkpoint-4")


def test_the_time_of_an_evaluation_is_not_that_of_the_steps(runs):
    """The rate of the fourth step is measured from the third one on, after which there is an evaluation."""
    evaluation = float(re.search(r"; (\S+) s$", evaluations(runs["one"].ok().out)[3])[1])
    assert 1 / float(runs["one"].logged("steps_per_second")[3]) < evaluation / 2


def test_experiments_are_numbered(later, root):
    assert later["again"].ok().out.count("results/001-tiny") == 2
    assert (root / "one/results/001-tiny/checkpoint-1").is_dir()


@pytest.fixture(scope="module")
def fine_tuned(root, loop_command, train_command, golden_json):
    """A run that starts from official weights with other classes, what both trainers say, and its resume."""
    model = golden_json("config")["model"]
    config = root / "fine.json"
    keys = {"sample_size": 8, "patch_size": model["patch_size"], "in_channels": model["in_channels"]}
    keys |= {"num_layers": model["depth"], "num_attention_heads": model["num_heads"], "num_classes": 12}
    config.write_text(json.dumps(keys | {"attention_head_dim": model["hidden_size"] // model["num_heads"]}))
    weights = REPOSITORY / "tests/data/dit/official.pt"
    started = run_all(
        {
            "loop": loop_command(root / "fine", "--model", config, "--init-from", weights, *EIGHT, "--global-seed", 42),
            "trainer": train_command(
                root / "fine_trainer", "--config_file", config, "--per_device_train_batch_size", 8,
                "--pretrained_model_name_or_path", weights, "--save_steps", 2,
            ),
        }
    )  # fmt: skip
    for result in started.values():
        result.ok()
    shutil.rmtree(root / "fine/results/000-fine/checkpoint-4")
    shutil.rmtree(root / "fine_trainer/out/checkpoint-4")
    again = {
        "loop again": loop_command(
            root / "fine", "--model", config, "--init-from", weights, *EIGHT, "--global-seed", 42, "--resume"
        ),
        "trainer again": train_command(
            root / "fine_trainer", "--config_file", config, "--per_device_train_batch_size", 8,
            "--pretrained_model_name_or_path", weights,
        ),
    }  # fmt: skip
    return started | run_all(again)


def test_fine_tuning_says_what_it_changes(fine_tuned, root):
    said = {"loop": fine_tuned["loop"].out, "trainer": fine_tuned["trainer"].err}
    for text in said.values():
        assert "note: the label table was made anew for 12 classes" in text
        assert "note: the weights were trained with official timestep frequencies" in text
    for checkpoint in ("fine/results/000-fine/checkpoint-2", "fine_trainer/out/checkpoint-2"):
        config = json.loads((root / checkpoint / "config.json").read_text())
        assert (config["timestep_convention"], config["num_classes"]) == ("official", 12)


def test_fine_tuning_starts_alike_and_resumes(fine_tuned):
    losses = fine_tuned["loop"].logged("loss")
    assert losses == fine_tuned["trainer"].logged("loss")
    for name in ("loop again", "trainer again"):
        assert fine_tuned[name].ok().logged("loss") == losses[2:]
        assert "note: the label table" not in fine_tuned[name].out + fine_tuned[name].err


BAD = {
    "unknown key": "bad.yaml has the unknown key 'learning_rte'",
    "unknown model": "unknown model 'DiT-M/2'; known are DiT-XL/2",
    "other image size": "--image-size 256 contradicts",
    "other classes": "--num-classes 5 contradicts",
    "batch": "--global-batch-size 0 is not a positive multiple of the 1 processes",
    "alone": "--use_parallel needs several processes",
    "steps": "--log-every must be at least 1",
    "no steps": "--max-steps must be at least 1",
    "learning rate": "argument --lr: must be finite and below 3e+38, not nan",
    "damaged checkpoint": "checkpoint-4/trainer_state.json has 1 bytes, not 67: it is damaged",
    "no features": "nowhere/imagenet64_features does not exist",
    "no images": "the image folder nowhere does not exist",
    "other VAE": "vae_tiny makes latents of 1/2 of the image's side; the model takes 1/8",
    "nothing to resume": "--resume found no experiment of tiny with a checkpoint in results",
    "no weights": "the model file nowhere.pt does not exist",
    "other weights": "choose the configuration of the trained weights",
    "no GPU": "--device gpu needs a GPU",
}


@pytest.fixture(scope="module")
def errors(root, runs, loop_command, images):
    folder = root / "errors"
    folder.mkdir()
    (folder / "bad.yaml").write_text("learning_rte: 1\n")
    damaged = root / "damaged/checkpoint-4"
    shutil.copytree(root / "one/results/000-tiny/checkpoint-4", damaged)
    (damaged / "trainer_state.json").write_text("{")

    def loop(*flags: object) -> Command:
        return loop_command(folder, *flags)

    results = run_all(
        {
            "unknown key": loop("-c", "bad.yaml"),
            "unknown model": loop("--model", "DiT-M/2"),
            "other image size": loop("--image-size", 256),
            "other classes": loop("--num-classes", 5),
            "batch": loop("--global-batch-size", 0),
            "alone": loop("--use_parallel", "True"),
            "steps": loop("--log-every", 0),
            "no steps": loop("--max-steps", 0),
            "learning rate": loop("--lr", "nan"),
            "damaged checkpoint": loop("--resume", damaged),
            "no features": loop("--feature-path", "nowhere"),
            "no images": loop("--data-path", "nowhere"),
            "other VAE": loop("--data-path", images["folders"], "--vae", REPOSITORY / "tests/data/vae/vae_tiny"),
            "nothing to resume": loop("--resume"),
            "no weights": loop("--init-from", "nowhere.pt"),
            "other weights": loop("--init-from", REPOSITORY / "tests/data/dit/official.pt"),
            "no GPU": loop("--device", "gpu"),
        }
    )
    assert [path.name for path in folder.iterdir()] == ["bad.yaml"]
    return results


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_ends_with_one_line_and_no_experiment(errors, case):
    result = errors[case]
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and BAD[case] in line


def test_a_loss_that_is_not_finite_ends_the_run(root, loop_command):
    command = loop_command(root / "exploding", *EIGHT, "--lr", "1e30")
    result = run_all({"exploding": command})["exploding"]
    assert result.code == 1 and "is not finite at step" in result.err.splitlines()[-1]
    assert not list((root / "exploding/results").glob("*/checkpoint-*"))
