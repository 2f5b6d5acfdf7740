"""Every command and snippet of the READMEs runs, on a tiny model in a folder that mirrors the repository."""

import dataclasses
import json
import re
import shlex
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .commands import REPOSITORY, TINY, Command, run, run_all

READMES = ("README.md", "README_zh.md")

# Commands that a test cannot run, and why.
MULTI_NODE = "needs two machines"
GPU = "installs the GPU build from an index that the user names"
LAUNCH_8 = "python -m paddle.distributed.launch {} --nproc_per_node 8 train_image_generation_dit_trainer.py --do_train"
NOT_RUN = {
    "make demo": "takes minutes",
    "make test": "runs this test",
    "source .venv/bin/activate": "the test's environment is active",
    "python3 -m venv .venv-gpu": GPU,
    ".venv-gpu/bin/python -m pip install --upgrade pip": GPU,
    '.venv-gpu/bin/python -m pip install -r requirements-gpu.txt --extra-index-url "$PADDLE_WHEEL_INDEX"': GPU,
    "source .venv-gpu/bin/activate": GPU,
    LAUNCH_8.format("--ips 10.0.0.1,10.0.0.2"): MULTI_NODE,
    LAUNCH_8.format("--master 10.0.0.1:49178 --nnodes 2"): MULTI_NODE,
    "visualdl --logdir ./image_generation_dit_output_trainer/runs --language en --disable-telemetry": (
        "a server that runs until it is stopped"
    ),
}

# What is added to the others, by script: the last of two equal flags counts.
TRAIN, EXTRACT, CONVERT = (
    "train_image_generation_dit_trainer.py",
    "extract_features.py",
    "scripts/convert_dit_to_ppdiffusers.py",
)
ADDED = {
    EXTRACT: ("--image-size", "64", "--vae", "vae"),
    TRAIN: ("--config_file", "tiny.json", "--max_steps", "4", "--vae_name_or_path", "vae"),
    CONVERT: ("--vae_name_or_path", "vae"),
}
# What is changed: processes for two cores, and what only the GPU build of Paddle has.
PROCESSES = ("--nproc_per_node 8", "--nproc_per_node 2")
GPU_SNIPPET = {"paddle.float16": "paddle.float32", "paddle.device.cuda.max_memory_reserved()": "0"}

# Flags of the launcher, VisualDL and pip.
FOREIGN_FLAGS = {"--nproc_per_node", "--ips", "--master", "--nnodes", "--logdir", "--language", "--disable-telemetry"}
FOREIGN_FLAGS |= {"--upgrade", "--extra-index-url", "--help"}

# Files of facebookresearch/DiT and fast-DiT that the READMEs name.
FOREIGN_FILES = {"models.py", "sample.py", "train.py"}
FOLDERS = ("config", "demo", "dit", "docs", "latent_diffusion", "requirements", "scripts", "tests")


def read(name: str) -> str:
    return (REPOSITORY / name).read_text()


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def snippets(language: str) -> list[str]:
    return [content for found, content in blocks(read("README.md")) if found == language]


def readme_commands() -> list[str]:
    lines = "\n".join(snippets("bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


def script_of(command: str) -> str | None:
    return next((word for word in shlex.split(command) if word in ADDED), None)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory, vae_folder) -> Path:
    """The code, two classes of images where the README has ImageNet's, a tiny configuration and a VAE."""
    folder = tmp_path_factory.mktemp("mirror")
    for name in (TRAIN, EXTRACT, *FOLDERS):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "vae").symlink_to(vae_folder)
    (folder / "tiny.json").write_text(json.dumps(TINY | {"num_classes": 1000}))
    rng = np.random.default_rng(0)
    for label in ("n01440764", "n01443537"):
        (folder / "imagenet/train" / label).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"imagenet/train/{label}/{i}.png")
    return folder


@pytest.fixture(scope="module")
def after_commands(mirror) -> Path:
    """The mirror after every command that can be run; commands of one script do not depend on each other."""
    runnable = [command for command in readme_commands() if command not in NOT_RUN]
    for script, group in groupby(runnable, key=script_of):
        stage = {}
        for command in group:
            interpreter, *words = shlex.split(command.replace(*PROCESSES))
            assert interpreter == "python" and script, f"neither run nor listed in NOT_RUN: {command}"
            stage[command] = Command([*words, *ADDED[script]], mirror)
        for command, result in run_all(stage).items():
            assert result.code == 0, f"{command}\n{result.out}\n{result.err}"
    return mirror


def test_the_readmes_have_the_same_commands_and_sections():
    english, chinese = (read(name) for name in READMES)
    assert blocks_that_run(english) == blocks_that_run(chinese)
    assert [sorted(code) for code in code_by_section(english)] == [sorted(code) for code in code_by_section(chinese)]
    for text in (english, chinese):
        assert re.search(r"^<!-- demo-table -->\n(.*\n)*?<!-- /demo-table -->$", text, re.MULTILINE)
        assert {language for language, _ in blocks(text)} <= {"bash", "python", "text"}


def blocks_that_run(text: str) -> list[tuple[str, str]]:
    return [block for block in blocks(text) if block[0] != "text"]


def code_by_section(text: str) -> list[list[str]]:
    """The level of each heading, and the code between backquotes below it."""
    sections = re.split(r"^(?=#+ )", prose(text), flags=re.MULTILINE)
    return [[re.match("#*", section)[0], *re.findall("`([^`\n]+)`", section)] for section in sections]


def test_every_command_is_run_or_says_why_not():
    commands = readme_commands()
    assert [command for command in commands if command not in NOT_RUN and not script_of(command)] == []
    assert NOT_RUN.keys() <= set(commands)


def test_the_commands_run(after_commands):
    for path in ("image_generation_dit_output_trainer/checkpoint-4", "output/dit_s_4/checkpoint-4", "DiT_S_4_256/vae"):
        assert (after_commands / path).is_dir()


def test_the_trees_are_what_is_written(after_commands):
    trees = {tree.split(maxsplit=1)[0]: tree for tree in snippets("text")}
    exported = {path.name for path in (after_commands / "DiT_XL_2_256").rglob("*")}
    assert tree_names(trees["DiT_XL_2_256"]) == exported
    features = {path.name for path in (after_commands / "data/fastdit_imagenet256").iterdir()}
    assert tree_names(trees["data/fastdit_imagenet256"]) == {
        name.replace("imagenet64", "imagenet256") for name in features
    }
    saved = {path.name for path in (after_commands / "image_generation_dit_output_trainer/checkpoint-4").iterdir()}
    in_fp16_only = {"scaler.pdparams"}
    assert tree_names(trees["image_generation_dit_output_trainer/checkpoint-5000"]) - in_fp16_only == saved


def tree_names(tree: str) -> set[str]:
    return set(re.findall(r"[├└]── (\S+)", tree))


def test_the_snippets_run(after_commands):
    sources = snippets("python")
    assert len(sources) == 2
    for i, source in enumerate(sources):
        for theirs, ours in GPU_SNIPPET.items():
            source = source.replace(theirs, ours)
        (after_commands / f"snippet{i}.py").write_text(source)
    both = "import runpy; [runpy.run_path(f'snippet{i}.py') for i in range(2)]"
    run(Command(["-c", both], after_commands)).ok()
    for name in ("white_shark.png", "class_2.png", "class_7.png"):
        with Image.open(after_commands / name) as image:
            assert image.size == (64, 64)


@pytest.mark.parametrize("name", READMES)
def test_every_flag_exists(name):
    from dit.trainer import DiTArguments, DiTTrainingArguments

    known = FOREIGN_FLAGS | {
        f"--{field.name}" for cls in (DiTArguments, DiTTrainingArguments) for field in dataclasses.fields(cls)
    }
    for script in (EXTRACT, CONVERT):
        known |= set(re.findall(r'"(--[\w-]+)"', read(script)))
    assert sorted(set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", read(name), re.ASCII)) - known) == []


@pytest.mark.parametrize("name", READMES)
def test_every_path_exists(name):
    text = read(name)
    links = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("https://")]
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    assert [target for target in links if target not in anchors and not (REPOSITORY / target).exists()] == []
    paths = [path for word in re.findall(r"[A-Za-z0-9_./{},-]+", text) for path in expanded(word.rstrip(",."))]
    own = [path for path in paths if path.split("/")[0] in FOLDERS and "/" in path]
    own += [path for path in paths if re.fullmatch(r"[\w-]+\.(py|md)|requirements[\w-]*\.txt", path)]
    assert "config/DiT_XL_patch8_512.json" in own
    assert sorted({path for path in own if path not in FOREIGN_FILES and not (REPOSITORY / path).exists()}) == []


def expanded(word: str) -> list[str]:
    """`a{2,4}b` -> a2b, a4b."""
    if match := re.fullmatch(r"(.*)\{(.*)\}(.*)", word):
        return [f"{match[1]}{choice}{match[3]}" for choice in match[2].split(",")]
    return [word]
