"""The READMEs agree, and each command and snippet runs, on a tiny model in a folder that mirrors the repository."""

import dataclasses
import json
import re
import shlex
import sys
from itertools import groupby, takewhile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit.configuration import DiTConfig
from dit.modeling import DiT
from dit.official import save_official
from uvit_ldm.configuration import UViTConfig

from ..latent_diffusion.evaluation.test_clip_score import write_whole_clip
from . import test_sdxl, test_uvit
from .commands import REPOSITORY, TINY, Command, Result, run, run_all

READMES = ("README.md", "README_zh.md")


def commands_in(text: str) -> list[str]:
    """The commands of a text, each in one line."""
    lines = text.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


# Commands that a test cannot run, and why.
GPU = "installs the GPU build from an index that the user names"
TWO_MACHINES = "needs two machines; tests/cli/test_two_nodes.py runs it on two network namespaces"
NODE = (
    "python -m paddle.distributed.launch --master 10.0.0.1:49178 --host 10.0.0.{} --nnodes 2 --nproc_per_node 8 "
    "--log_dir log_{} train_image_generation_dit_trainer.py --do_train"
)
NOT_RUN = {
    "make demo": "takes minutes",
    "make demo-t2i": "takes minutes",
    "make demo-lora": "takes minutes",
    "make test": "runs this test",
    "source .venv/bin/activate": "the test's environment is active",
    "python3 -m venv .venv-gpu": GPU,
    ".venv-gpu/bin/python -m pip install --upgrade pip": GPU,
    '.venv-gpu/bin/python -m pip install -r requirements-gpu.txt --extra-index-url "$PADDLE_WHEEL_INDEX"': GPU,
    "source .venv-gpu/bin/activate": GPU,
    NODE.format(1, 0): TWO_MACHINES,
    NODE.format(2, 1): TWO_MACHINES,
    "visualdl --logdir ./image_generation_dit_output_trainer/runs --language en --disable-telemetry": (
        "a server that runs until it is stopped"
    ),
    "curl -L --create-dirs -o pretrained_models/DiT-XL-2-256x256.pt "
    "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt": "needs the network",
    "curl -L --create-dirs -o pretrained_models/pt_inception-2015-12-05-6726825d.pth "
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth": (
        "needs the network"
    ),
    "python -m demo.merging": "needs what both demos leave behind",
    "python scripts/sweep_sampling.py --ckpt output/demo/training --vae output/demo/vae "
    "--reference data/demo/images/train --extractor digits-classifier --cfg-scales 1 1.5 2 3 4 --steps 10 25 50 "
    "--guidance-intervals 0:1 0.2:0.8 --num-samples 360 --output-dir output/demo/sweep": (
        "needs what the demo leaves behind"
    ),
    "make bench": "takes an hour",
    "python -m benchmarks.scaling": "takes half a minute: four runs of the Trainer, two of them with two processes",
    "python -m benchmarks.ablation": "takes minutes; tests/benchmarks runs the program that it times",
}
NOT_RUN |= {
    f"python -m benchmarks.{name}": "takes minutes; tests/benchmarks runs it in small"
    for name in ("training_step", "guided_sampling", "loading", "sdxl_lora")
}
NOT_RUN |= dict.fromkeys(commands_in(test_uvit.TRAINING + test_uvit.EXPORT), "tests/cli/test_uvit.py runs it")
NOT_RUN |= dict.fromkeys(
    commands_in(test_sdxl.SCRIPTS + test_sdxl.LOCAL + test_sdxl.MERGE), "tests/cli/test_sdxl.py runs it"
)
COCO_FEATURES = "https://bj.bcebos.com/v1/paddlenlp/datasets/paddlemix/coco256_features"
NOT_RUN |= {
    f"wget -P data/coco256_features {COCO_FEATURES}/{name}": "needs the network"
    for name in ("train.tar", "val.tar", "empty_context.npy")
}
NOT_RUN |= {
    f"tar -xf data/coco256_features/{name}.tar -C data/coco256_features": "unpacks what was not downloaded"
    for name in ("train", "val")
}

EXTRACT, CONVERT_FEATURES = "extract_features.py", "scripts/convert_features.py"
TRAIN, LOOP = "train_image_generation_dit_trainer.py", "train.py"
SAMPLE, SAMPLE_MANY = "sample.py", "sample_ddp.py"
EXPORT, EXPORT_OFFICIAL = "scripts/convert_dit_to_ppdiffusers.py", "scripts/convert_ppdiffusers_to_dit.py"
EXTRACT_COCO, TRAIN_UVIT = "extract_coco_features.py", "run_train_ldm_uvit_small_deep.sh"
EXPORT_UVIT, SAMPLE_T2I = "generate_pipelines.py", "sample_t2i.py"
EVALUATE, SWEEP = "evaluate.py", "scripts/sweep_sampling.py"
BENCHMARKS = (
    "benchmarks.training",
    "benchmarks.features",
    "benchmarks.sampling",
    "benchmarks.token_merging",
    "benchmarks.evaluation",
    "benchmarks.checkpoints",
    "benchmarks.startup",
)
KERNELS = "latent_diffusion.native"

# What is added to a command, by its script: the last of two equal flags counts.
FEW_STEPS = ("--num-sampling-steps", "2", "--vae", "vae")
ADDED = {
    EXTRACT: ("--vae", "vae"),
    CONVERT_FEATURES: (),
    TRAIN: ("--config_file", "tiny.json", "--max_steps", "4", "--vae_name_or_path", "vae")
    + ("--eval_extractor", "pixels", "--eval_samples", "4", "--num_inference_steps", "2"),
    LOOP: ("--max-steps", "2", "--global-batch-size", "2", "--num-workers", "1", "--vae", "vae"),
    SAMPLE: FEW_STEPS,
    SAMPLE_MANY: (*FEW_STEPS, "--num-fid-samples", "3", "--ckpt", "pretrained_models/DiT-XL-2-256x256.pt"),
    EXPORT: ("--vae_name_or_path", "vae"),
    EXPORT_OFFICIAL: (),
    EXTRACT_COCO: ("--model_max_length", "7"),
    TRAIN_UVIT: ("--unet_config_file", "tiny_uvit.json", "--max_steps", "4", "--save_steps", "4", "--warmup_steps", "1")
    + ("--per_device_train_batch_size", "2", "--dataloader_num_workers", "0"),
    EXPORT_UVIT: ("--model_max_length", "7"),
    SAMPLE_T2I: ("--num-sampling-steps", "2", "--num-fid-samples", "3"),
    EVALUATE: ("--extractor", "pixels"),
    SWEEP: ("--extractor", "pixels", "--vae", "vae", "--cfg-scales", "1", "2", "--steps", "2", "--samplers", "ddim")
    + ("--num-samples", "2", "--batch-size", "2"),
    "benchmarks.training": ("--model", "tiny.json", "--image-size", "256", "--global-batch-size", "2")
    + ("--steps", "1", "--num-workers", "1", "--vae", "vae"),
    "benchmarks.checkpoints": ("--model", "tiny.json", "--rounds", "1", "--repeats", "1"),
    "benchmarks.startup": ("--commands", "train.py", "--rounds", "1"),
    KERNELS: (),
    "benchmarks.features": ("--image-size", "64", "--images", "2"),
    "benchmarks.sampling": ("--model", "DiT-S/8", "--image-size", "64", "--num-sampling-steps", "1"),
    "benchmarks.evaluation": ("--image-size", "64", "--batch-size", "2", "--rounds", "1", "--features", "64")
    + ("--images", "16"),
    "benchmarks.token_merging": (
        "--dit",
        "tiny.json",
        "--uvit",
        "tiny_uvit.json",
        "--batch-size",
        "1",
        "--steps",
        "1",
    ),
}
# Variables of the training script: the machine's GPUs are not asked for.
ON_THE_CPU = {"PYTHON": sys.executable, "GPUS": ""}
# Commands of one stage do not depend on each other.
STAGES = (
    {EXTRACT, EXTRACT_COCO, KERNELS},
    {CONVERT_FEATURES, TRAIN, LOOP, TRAIN_UVIT},
    {SAMPLE, SAMPLE_MANY, EXPORT, EXPORT_UVIT, EVALUATE, SWEEP},
    {EXPORT_OFFICIAL, SAMPLE_T2I, *BENCHMARKS},
)
# What is added to a command that names a model, itself or in a file; the first that fits.
TINY_MODELS = {"--num-classes 10 ": "tiny_10.json", " --model ": "tiny.json", " -c ": "tiny.json"}
# What is changed: processes for two cores, and what only the GPU build of Paddle has.
PROCESSES = re.compile("(?<=--nproc_per_node[ =])8")
GPU_SNIPPET = {"paddle.float16\npipe=DiT": "paddle.float32\npipe=DiT", "paddle.device.cuda.max_memory_reserved()": "0"}

# What the commands leave behind.
WRITTEN = (
    "data/imagenet256_from_files/manifest.json",
    "data/fastdit_from_packed/imagenet256_features/3.npy",
    "output/dit_s_4/checkpoint-4",
    "output/dit_8_processes/checkpoint-4",
    "output/dit_sharded/checkpoint-4",
    "results/*-tiny/checkpoint-2",
    "results/*-tiny/log.txt",
    "results/*-tiny/runs",
    "results/*-tiny_10/checkpoint-2",
    "sample.png",
    "dogs.png",
    "samples/*-size-256-vae-vae-cfg-1.5-seed-0/000002.png",
    "samples/*-size-256-vae-vae-cfg-1.5-seed-0.npz",
    "DiT_S_4_256/transformer/*.safetensors",
    "DiT_XL_2_256_diffusers/transformer/diffusion_pytorch_model.safetensors",
    "DiT-XL-2-256x256.pt",
    "data/coco256_features/run_vis/1.npy",
    "output_dir/uvit_t2i_small_deep/checkpoint-4",
    "output_dir/uvit_t2i_mid/checkpoint-4",
    "ldm_uvit_stock/text_encoder/model_config.json",
    "samples/*-prompts-prompts-size-256-*.prompts.txt",
    "samples/*-prompts-captions_val2014-size-256-*.npz",
    "samples/DiT-XL-2-pretrained-size-256-vae-ema-cfg-1.5-seed-0.pixels.json",
    "imagenet256_val.npz",
    "sweep/sweep.csv",
    "sweep/sweep.png",
)

# Flags of the launcher, VisualDL, pip, curl, accelerate and other code bases, and what argparse makes of `--help` and
# `--tf32`.
FOREIGN_FLAGS = {"--nproc_per_node", "--use_env", "--ips", "--master", "--host", "--nnodes", "--log_dir"}
FOREIGN_FLAGS |= {"--logdir", "--language", "--disable-telemetry", "--upgrade", "--extra-index-url", "--create-dirs"}
FOREIGN_FLAGS |= {"--mixed_precision", "--help", "--no-tf32"}
FOREIGN_FLAGS |= {"--gpus", "--config", "--nnet_path", "--uvit_config_file", "--tokenizer_name", "--dp_degree"}
FOREIGN_FLAGS |= {"--save-stats", "--input1", "--input2", "--fid", "--kid", "--isc", "--prc"}
FOREIGN_FLAGS |= {"--push_to_hub", "--use_8bit_adam", "--allow_tf32", "--scale_lr", "--debug_loss", "--revision"}
FOREIGN_FLAGS |= {"--image_interpolation_mode", "--cache_dir", "--variant"}

# Files of other code bases that the READMEs name.
FOREIGN_FILES = {"models.py", "train_txt2img_mscoco_uvit_trainer.py"}
FOREIGN_FILES |= {"train_t2i_discrete.py", "sample_t2i_discrete.py", "dpm_solver_pp.py"}
FOREIGN_FILES |= {"evaluations/evaluator.py"}
FOREIGN_FILES |= {f"scripts/extract_{name}.py" for name in ("mscoco_feature", "empty_feature", "test_prompt_feature")}
FOLDERS = ("benchmarks", "config", "demo", "dit", "docs", "latent_diffusion", "requirements", "scripts", "tests")
FOLDERS += ("uvit_ldm", "sdxl_lora")


def read(name: str) -> str:
    return (REPOSITORY / name).read_text()


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def snippets(language: str) -> list[str]:
    return [content for found, content in blocks(read("README.md")) if found == language]


def readme_commands() -> list[str]:
    return commands_in("\n".join(snippets("bash")))


def script_of(command: str) -> str | None:
    return next((word for word in shlex.split(command) if word in ADDED), None)


def stage_of(command: str) -> int:
    return next(number for number, scripts in enumerate(STAGES) if script_of(command) in scripts)


def is_long(command: str) -> bool:
    """Whether it starts several processes. Such commands go first, so that neither core is idle in the end."""
    return "paddle.distributed.launch" in command or script_of(command) == "benchmarks.training"


def tiny(command: str, folder: Path) -> Command:
    """The command for two processes at most and a tiny model."""
    words = shlex.split(PROCESSES.sub("2", command))
    variables = dict(word.split("=") for word in takewhile(lambda word: "=" in word, words))
    program, *words = words[len(variables) :]
    words += ADDED[script_of(command)]
    if program == "sh":
        return Command(words, folder, program, variables | ON_THE_CPU)
    assert program == "python" and not variables
    model = next((("--model", name) for part, name in TINY_MODELS.items() if part in command), ())
    return Command([*words, *model], folder)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory, vae_folder, coco_clip_folder) -> Path:
    """The code, and in tiny what the README supposes: images, published weights, a run of DiT-L/4.

    Stable Diffusion's parts lie where their names on the hub lead to.
    """
    folder = tmp_path_factory.mktemp("mirror")
    scripts = tuple(script for script in ADDED if "/" not in script and not script.startswith(("benchmarks.", KERNELS)))
    for name in (*FOLDERS, *scripts, "train_txt2img_uvit_coco_trainer.py"):
        (folder / name).symlink_to(REPOSITORY / name)
    hub = folder / "runwayml/stable-diffusion-v1-5"
    hub.mkdir(parents=True)
    (hub / "vae").symlink_to(vae_folder)
    for name in ("text_encoder", "tokenizer"):
        (hub / name).symlink_to(coco_clip_folder)
    (folder / "vae").symlink_to(vae_folder)
    config = DiTConfig.from_dict(TINY | {"sample_size": 32, "patch_size": 4, "num_classes": 1000})
    config.save(folder / "tiny.json")
    dataclasses.replace(config, num_classes=10).save(folder / "tiny_10.json")
    of_text = {key: value for key, value in TINY.items() if key != "num_classes"}
    of_text |= {"sample_size": 32, "patch_size": 4, "clip_dim": 32, "num_text_tokens": 7}
    UViTConfig.from_dict(of_text).save(folder / "tiny_uvit.json")
    (folder / "pretrained_models").mkdir()
    (folder / "models").symlink_to("pretrained_models")
    save_official(DiT(config), folder / "pretrained_models/DiT-XL-2-256x256.pt")
    at_512 = dataclasses.replace(config, sample_size=64)
    save_official(DiT(at_512), folder / "pretrained_models/DiT-XL-2-512x512.pt")
    (folder / "results").mkdir()
    (folder / "results/000-DiT-L-4").symlink_to("../image_generation_dit_output_trainer")
    rng = np.random.default_rng(0)
    for label in ("n01440764", "n01443537"):
        (folder / "imagenet/train" / label).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"imagenet/train/{label}/{i}.png")
    (folder / "imagenet/val").symlink_to("train")
    write_coco(folder / "coco")
    (folder / "prompts.txt").write_text("the cat\nthe dog\n")
    write_evaluated(folder, coco_clip_folder)
    return folder


def write_evaluated(folder: Path, clip_folder: Path) -> None:
    """Samples and references of the names that `evaluate.py` is given, and a CLIP."""
    images = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    (folder / "samples").mkdir()
    for command in readme_commands():
        if script_of(command) == EVALUATE and (name := re.search(r"--samples (\S+?)(?:\.npz)?( |$)", command)):
            np.savez(folder / f"{name[1]}.npz", arr_0=images)
            (folder / f"{name[1]}.prompts.txt").write_text("the cat\n" * len(images))
            (folder / name[1]).mkdir(exist_ok=True)
            for number, image in enumerate(images):
                Image.fromarray(image).save(folder / name[1] / f"{number:06d}.png")
    moments = {"mu": np.zeros(192), "sigma": np.eye(192)}
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=images, **moments)
    np.savez(folder / "imagenet256_val.npz", **moments)
    (folder / "clip-vit-base-patch32").mkdir()
    write_whole_clip(clip_folder, folder / "clip-vit-base-patch32")


def write_coco(folder: Path) -> None:
    """Two images with captions."""
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"{split}2014").symlink_to("../imagenet/train/n01440764")
    content = {
        "images": [{"id": 7 + i, "file_name": f"{i}.png"} for i in range(2)],
        "annotations": [{"image_id": 7 + i % 2, "caption": f"the digit {i}"} for i in range(5)],
    }
    for split in ("train", "val"):
        (folder / f"annotations/captions_{split}2014.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def results(mirror) -> dict[str, Result]:
    """Every command that can be run, stage by stage."""
    runnable = [command for command in readme_commands() if command not in NOT_RUN]
    results = {}
    for _, stage in groupby(sorted(runnable, key=stage_of), key=stage_of):
        long_first = sorted(stage, key=is_long, reverse=True)
        results |= run_all({command: tiny(command, mirror) for command in long_first})
        for command, result in results.items():
            assert result.code == 0, f"{command}\n{result.out}\n{result.err}"
    return results


@pytest.fixture(scope="module")
def after_commands(mirror, results) -> Path:
    """The mirror after the commands."""
    return mirror


def test_the_readmes_have_the_same_commands_and_sections():
    english, chinese = (read(name) for name in READMES)
    assert blocks_that_run(english) == blocks_that_run(chinese)
    assert code_by_section(english) == code_by_section(chinese)
    assert rows_by_section(english) == rows_by_section(chinese)
    for text in (english, chinese):
        for name in ("demo-table", "demo-t2i-table", "demo-lora-table", "token-merging-table", "benchmark-tables"):
            assert re.search(rf"^<!-- {name} -->\n(.*\n)*?<!-- /{name} -->$", text, re.MULTILINE)
        assert {language for language, _ in blocks(text)} <= {"bash", "python", "text"}


def blocks_that_run(text: str) -> list[tuple[str, str]]:
    return [block for block in blocks(text) if block[0] != "text"]


def sections(text: str) -> list[str]:
    return re.split(r"^(?=#+ )", prose(text), flags=re.MULTILINE)


def code_by_section(text: str) -> list[list[str]]:
    """The level of each heading, and the code between backquotes below it."""
    return [[re.match("#*", part)[0], *sorted(re.findall("`([^`\n]+)`", part))] for part in sections(text)]


def rows_by_section(text: str) -> list[list[list[str]]]:
    """The numbers in each row of the tables below each heading."""
    rows = (re.findall(r"^\|.*", part, re.MULTILINE) for part in sections(text))
    return [[sorted(re.findall(r"\d+(?:[.,]\d+)*", row)) for row in below] for below in rows]


def test_every_command_is_run_or_says_why_not():
    commands = readme_commands()
    assert [command for command in commands if command not in NOT_RUN and not script_of(command)] == []
    assert NOT_RUN.keys() <= set(commands)


def test_the_commands_run(after_commands):
    for pattern in WRITTEN:
        assert list(after_commands.glob(pattern)), pattern


def test_the_benchmarks_print_tables(results):
    for script in BENCHMARKS:
        assert re.search(r"^\| -+ .*\|\n\| \w", results[f"python -m {script}"].out, re.MULTILINE), script


def test_the_trees_are_what_is_written(after_commands):
    trees = {tree.split(maxsplit=1)[0]: tree_names(tree) for tree in snippets("text")}
    for name in test_sdxl.TREES:
        del trees[name]  # compared there
    trees["image_generation_dit_output_trainer/checkpoint-5000"] -= {"scaler.pdparams"}  # in fp16 only
    trees["data/coco256_features"] -= {"val"}  # by the same command with another split
    assert trees == {
        "data/fastdit_imagenet256": names_in(after_commands, "data/fastdit_imagenet256/*"),
        "data/imagenet256_packed": names_in(after_commands, "data/imagenet256_packed/*"),
        "image_generation_dit_output_trainer/checkpoint-5000": names_in(
            after_commands, "image_generation_dit_output_trainer/checkpoint-4/*"
        ),
        "DiT_XL_2_256": names_in(after_commands, "DiT_XL_2_256/**/*"),
        "data/coco256_features": names_in(after_commands, "data/coco256_features/*"),
        "data/coco256_packed": names_in(after_commands, "data/coco256_packed/*")
        | names_in(after_commands, "data/coco256_packed/train/*"),
        "ldm_uvit_pipelines": names_in(after_commands, "ldm_uvit_pipelines/**/*"),
    }


def names_in(folder: Path, pattern: str) -> set[str]:
    return {path.name for path in folder.glob(pattern)}


def tree_names(tree: str) -> set[str]:
    return set(re.findall(r"[├└]── (\S+)", tree))


def test_the_snippets_run(after_commands):
    sources = snippets("python")
    sources.remove(f"import paddle{test_sdxl.SNIPPET}")  # run there
    assert f"import paddle{test_uvit.SNIPPET}" in sources  # as published, but for the import
    for i, source in enumerate(sources):
        for theirs, ours in GPU_SNIPPET.items():
            source = source.replace(theirs, ours)
        (after_commands / f"snippet{i}.py").write_text(source)
    in_turn = f"import runpy; [runpy.run_path(f'snippet{{i}}.py') for i in range({len(sources)})]"
    run(Command(["-c", in_turn], after_commands)).ok()
    for name in ("white_shark", "class_2", "class_7", "an_elephant_under_the_sea", "elephant"):
        with Image.open(after_commands / f"{name}.png") as image:
            assert image.size == (256, 256)


@pytest.mark.parametrize("name", READMES)
def test_every_flag_exists(name):
    from dit.trainer import DiTArguments, DiTTrainingArguments
    from sdxl_lora.training_arguments import LoRAArguments, LoRATrainingArguments
    from uvit_ldm.trainer import UViTArguments, UViTTrainingArguments

    classes = (DiTArguments, DiTTrainingArguments, UViTArguments, UViTTrainingArguments)
    classes += (LoRAArguments, LoRATrainingArguments)
    known = FOREIGN_FLAGS | {f"--{field.name}" for cls in classes for field in dataclasses.fields(cls)}
    known |= {f"--{alias}" for cls in classes for aliases in cls._aliases.values() for alias in aliases}
    shared = ("dit/sampling_arguments.py", "latent_diffusion/sampling_arguments.py", "latent_diffusion/command_line.py")
    shared += ("latent_diffusion/evaluation/extractors.py",)
    for source in (*ADDED, *shared, "scripts/merge_sdxl_lora.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', read(path_of(source))))
    found = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", read(name), re.ASCII))
    assert sorted(flag for flag in found if one_spelling(flag) not in map(one_spelling, known)) == []


def path_of(source: str) -> str:
    """The file of a script or a module."""
    if source.endswith((".py", ".sh")):
        return source
    path = source.replace(".", "/")
    return f"{path}/__main__.py" if (REPOSITORY / path).is_dir() else f"{path}.py"


def one_spelling(flag: str) -> str:
    return flag.replace("_", "-")


@pytest.mark.parametrize("name", READMES)
def test_every_path_exists(name):
    text = read(name)
    links = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("https://")]
    anchors = {"#" + anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    assert [target for target in links if target not in anchors and not (REPOSITORY / target).exists()] == []
    paths = [path for word in re.findall(r"[A-Za-z0-9_./{},-]+", text) for path in expanded(word.rstrip(",."))]
    own = [path for path in paths if path.split("/")[0] in FOLDERS and "/" in path]
    own += [path for path in paths if re.fullmatch(r"[\w-]+\.(py|md|sh)|requirements[\w-]*\.txt", path)]
    assert "config/DiT_XL_patch8_512.json" in own
    assert sorted({path for path in own if path not in FOREIGN_FILES and not (REPOSITORY / path).exists()}) == []


def anchor(heading: str) -> str:
    """As GitHub makes it: without punctuation."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def expanded(word: str) -> list[str]:
    """`a{2,4}b` -> a2b, a4b."""
    if match := re.fullmatch(r"(.*)\{(.*)\}(.*)", word):
        return [f"{match[1]}{choice}{match[3]}" for choice in match[2].split(",")]
    return [word]
