"""What the commands say when they are asked for what cannot be, and when they are asked for help."""

import json
import shutil
import time

import pytest

from .commands import CONVERT, EXTRACT, REPOSITORY, TINY, TRAIN, Command
from .forks import run_all

BAD = {
    "unknown flag": "unknown argument '--learning_rte'",
    "bad number": "argument --max_steps: invalid int value: 'many'",
    "nothing to do": "give --do_train",
    "missing features": "nowhere/imagenet64_features does not exist",
    "bad config": "bad.json lacks the key 'patch_size'",
    "no checkpoint to resume": "nowhere has no manifest.json: it is not a complete checkpoint",
    "nothing to convert": "the model file nowhere does not exist",
    "extraction without images": "the following arguments are required: --data-path",
    "sharding alone": "--sharding needs several processes",
    "saving by epochs": "--save_strategy epoch is not supported",
    "evaluation": "--evaluation_strategy and --load_best_model_at_end are not supported",
    "output below a file": "cannot make or write into the folder bad.json/out",
    "export over something else": "exists and holds no model_index.json",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory, train_command, vae_folder):
    folder = tmp_path_factory.mktemp("errors")
    config = tmp_path_factory.mktemp("config") / "official.json"
    shutil.copy(REPOSITORY / "tests/data/dit/official.pt", config.parent)  # config.json stands beside it there
    config.write_text(json.dumps(TINY | {"num_layers": 3, "num_attention_heads": 4}))
    (folder / "bad.json").write_text(str({k: v for k, v in TINY.items() if k != "patch_size"}).replace("'", '"'))

    def train(*flags: object) -> Command:
        return train_command(folder, *flags)

    commands = {
        "unknown flag": train("--learning_rte", 1e-4),
        "bad number": train("--max_steps", "many"),
        "nothing to do": train("--do_train", "False"),
        "missing features": train("--feature_path", "nowhere"),
        "bad config": train("--config_file", "bad.json"),
        "no checkpoint to resume": train("--resume_from_checkpoint", "nowhere"),
        "sharding alone": train("--sharding", "stage1"),
        "saving by epochs": train("--save_strategy", "epoch"),
        "evaluation": train("--evaluation_strategy", "steps"),
        "output below a file": train("--output_dir", "bad.json/out"),
        "export over something else": Command(
            [
                CONVERT,
                "--model_file",
                str(config.with_name("official.pt")),
                "--config_file",
                str(config),
                "--output_path",
                str(folder),
            ]
            + ["--vae_name_or_path", str(vae_folder)],
            folder,
        ),
        "nothing to convert": Command([CONVERT, "--model_file", "nowhere"], folder),
        "extraction without images": Command([EXTRACT], folder),
    }
    results = run_all(commands)
    assert sorted(path.name for path in folder.iterdir()) == ["bad.json"]
    return results


@pytest.mark.parametrize("case", BAD)
def test_a_command_that_cannot_be_ends_with_one_line(results, case):
    result = results[case]
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and BAD[case] in line


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("help")
    started = time.perf_counter()
    results = run_all({command: Command([command, "--help"], folder) for command in (TRAIN, EXTRACT, CONVERT)})
    results["seconds"] = time.perf_counter() - started
    return results


def test_help_lists_the_suites_own_flags_first(helps):
    text = helps[TRAIN].ok().out.split("options:", 1)[1]
    own, theirs = text.index("this suite's own flags"), text.index("PaddleNLP's TrainingArguments")
    assert own < theirs
    for flag in ("--use_ema", "--feature_path", "--config_file", "--resolution", "--image_logging_steps"):
        assert own < text.index(f"  {flag} ") < theirs
    for flag in ("--per_device_train_batch_size", "--sharding", "--recompute", "--resume_from_checkpoint"):
        assert text.index(f"  {flag} ") > theirs
    assert "(default: ./data/fastdit_imagenet256)" in " ".join(text.split())


@pytest.mark.parametrize(
    ("command", "flags"),
    [(EXTRACT, ["--data-path", "--features-path", "--vae"]), (CONVERT, ["--model_file", "--output_path", "--exact"])],
)
def test_help_lists_every_flag_with_its_default(helps, command, flags):
    text = helps[command].ok().out
    assert all(flag in text for flag in flags)
    assert "(default: " in text


def test_help_comes_soon(helps):
    """Three of them, two at a time; each alone is to take less than 5 seconds."""
    assert helps["seconds"] < 15
