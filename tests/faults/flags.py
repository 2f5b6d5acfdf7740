"""The flags of every command: any combination of values runs, or is refused in one sentence before any work starts.

The flags are those of the parsers; flag_values.py says of each which values run and which are refused. Whatever else
its type can hold must do either.
"""

import argparse
import gzip
import importlib
import itertools
import json
import math
import random
import re
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.training_arguments import UNSUPPORTED
from tests.cli.commands import REPOSITORY, TINY, Command, Result, write_features, write_reference
from tests.conftest import DATA, dit_config, write_clip, write_vae
from tests.sdxl_lora.captioned import pixels, png, write_image_folder, write_parquet

from . import flag_values as values
from .runs import Server

# Seconds after which a command hangs.
TIMEOUT = 60.0


@dataclass(frozen=True)
class Surface:
    """One command and its flags.

    Attributes:
        module: the script, as it is imported.
        base: flags that every case begins with.
        good: values that run, by flag.
        bad: values that are refused.
        result: a pattern of what a run leaves.
        given: name of the folder whose content a run finds where it is started.
        instead: by flag what it takes the place of in `base`.
    """

    module: str
    base: str
    good: dict[str, list[str | None]]
    bad: dict[str, list[str | None]]
    result: str
    given: str = "nothing"
    instead: dict[str, str] = field(default_factory=dict)

    @property
    def script(self) -> Path:
        return REPOSITORY / f"{self.module.replace('.', '/')}.py"

    def actions(self) -> dict[str, argparse.Action]:
        """What the parser knows, by the first name of a flag without dashes."""
        parser = self._parser()
        named = {}
        for action in parser._actions:
            if action.option_strings and action.dest != "help":
                names = [name for name in action.option_strings if name.startswith("--")]
                # The two names of a switch are two flags; those of another flag are one.
                switch = isinstance(action, argparse.BooleanOptionalAction)
                for name in names if switch else names[:1]:
                    named[name.removeprefix("--")] = action
        return named

    def aliases(self) -> dict[str, str]:
        """The flag that each further name means, without dashes."""
        return {
            name.removeprefix("--"): flag
            for flag, action in self.actions().items()
            if not isinstance(action, argparse.BooleanOptionalAction)
            for name in action.option_strings
            if name.startswith("--") and name != f"--{flag}"
        }

    def _parser(self) -> ArgumentParser:
        def stop(parser, *args, **kwargs):
            raise _Parsed(parser)

        if self.module.startswith("train_"):
            from dit.trainer import DiTArguments, DiTTrainingArguments
            from latent_diffusion import training_arguments
            from sdxl_lora.training_arguments import LoRAArguments, LoRATrainingArguments
            from uvit_ldm.trainer import UViTArguments, UViTTrainingArguments

            types = {
                "train_image_generation_dit_trainer": (DiTArguments, DiTTrainingArguments),
                "train_txt2img_uvit_coco_trainer": (UViTArguments, UViTTrainingArguments),
                "train_text_to_image_lora_sdxl": (LoRAArguments, LoRATrainingArguments),
            }[self.module]
            parse, arguments = training_arguments.parse, {"description": ""}
        else:
            types, parse, arguments = (), importlib.import_module(self.module).parse_arguments, {}
        try:
            with mock.patch.object(ArgumentParser, "parse_known_args", stop):
                parse(*types, **arguments)
        except _Parsed as parsed:
            return parsed.args[0]
        raise AssertionError(f"{self.module} parses nothing")


class _Parsed(Exception):
    pass


SURFACES = {
    "trainer": Surface(
        "train_image_generation_dit_trainer",
        "--do_train --config_file {dit_config} --feature_path {features} --vae_name_or_path {vae} --output_dir out "
        "--max_steps 2 --logging_steps 1 --image_logging_steps 0 --num_inference_steps 2 --report_to none",
        values.DIT_GOOD,
        values.DIT_BAD,
        "checkpoint-*/model_state.pdparams",
        "dit_run",
    ),
    "uvit trainer": Surface(
        "train_txt2img_uvit_coco_trainer",
        "--do_train --unet_config_file {uvit_config} --feature_path {coco} --vae_name_or_path {vae} --output_dir out "
        "--text_encoder_name_or_path {clip} --tokenizer_name_or_path {clip} --num_inference_steps 2 "
        "--per_device_train_batch_size 2 --max_steps 2 --logging_steps 1 --image_logging_steps 0 --report_to none",
        values.UVIT_GOOD,
        values.UVIT_BAD,
        "checkpoint-*/model_state.pdparams",
        "uvit_run",
    ),
    "sdxl trainer": Surface(
        "train_text_to_image_lora_sdxl",
        "--pretrained_model_name_or_path {pipeline} --dataset_name {captioned} --resolution 64 --output_dir out "
        "--train_batch_size 2 --max_train_steps 2 --num_train_epochs 1 --logging_steps 1 --num_inference_steps 2 "
        "--report_to none",
        values.SDXL_GOOD,
        values.SDXL_BAD,
        "pytorch_lora_weights.safetensors",
        "sdxl_run",
        {"train_data_dir": "--dataset_name {captioned}"},
    ),
    "loop": Surface(
        "train",
        "--model {dit_config} --feature-path {features} --results-dir out --vae {vae} --max-steps 2 --log-every 1 "
        "--global-batch-size 4 --num-workers 0",
        values.LOOP_GOOD,
        values.LOOP_BAD,
        "checkpoint-*/model_state.pdparams",
        "dit_run",
    ),
    "grid": Surface(
        "sample",
        "--model {official_config} --ckpt {official} --vae {vae} --num-sampling-steps 2 --class-labels 1",
        values.GRID_GOOD,
        values.GRID_BAD,
        "*.png",
    ),
    "many": Surface(
        "sample_ddp",
        "--model {official_config} --ckpt {official} --vae {vae} --num-sampling-steps 2 --num-fid-samples 2 "
        "--per-proc-batch-size 2",
        values.SAMPLE_GOOD | values.MANY_GOOD,
        values.SAMPLE_BAD | values.MANY_BAD,
        "*.npz",
    ),
    "prompts": Surface(
        "sample_t2i",
        "--ckpt {nnet} --model {uvit_config} --vae {vae} --text_encoder_name_or_path {clip} "
        "--tokenizer_name_or_path {clip} --prompts {prompts} --num-sampling-steps 2 --num-fid-samples 2 "
        "--per-proc-batch-size 2",
        values.PROMPTS_GOOD,
        values.PROMPTS_BAD,
        "*.npz",
    ),
    "pipeline": Surface(
        "generate_pipelines",
        "--model_file {nnet} --unet_config_file {uvit_config} --vae_name_or_path {vae} "
        "--text_encoder_name_or_path {clip} --tokenizer_name_or_path {clip} --model_max_length 7 --output_path out",
        values.PIPELINE_GOOD,
        values.PIPELINE_BAD,
        "model_index.json",
    ),
    "convert": Surface(
        "scripts.convert_dit_to_ppdiffusers",
        "--model_file {official} --config_file {official_config} --vae_name_or_path {vae} --output_path out",
        values.CONVERT_GOOD,
        values.CONVERT_BAD,
        "model_index.json",
    ),
    "merge": Surface(
        "scripts.merge_sdxl_lora",
        "--pretrained_model_name_or_path {pipeline} --lora_path {sdxl_run_checkpoint} --output_path out",
        values.MERGE_GOOD,
        values.MERGE_BAD,
        "model_index.json",
    ),
    "convert back": Surface(
        "scripts.convert_ppdiffusers_to_dit",
        "--model_file {official} --config_file {official_config} --output_path out.pt",
        values.BACK_GOOD,
        values.BACK_BAD,
        "*.*",
    ),
}


@dataclass(frozen=True)
class Case:
    """Flags with values for one command, and what must come of it: "runs", "refused" or "either"."""

    surface: Surface
    chosen: tuple[tuple[str, str | None], ...]
    expected: str
    processes: int = 1

    def words(self, files: dict[str, Path]) -> list[str]:
        """The command line, without the script."""
        base = self.surface.base
        for flag, _ in self.chosen:
            base = base.replace(self.surface.instead.get(flag, " "), " ")
        lines = [base, *(f"--{flag} {value or ''}" for flag, value in self.chosen)]
        return shlex.split(" ".join(lines).format(**files))


def surface_values(surface: Surface) -> dict[str, dict[str, list[str | None]]]:
    """For each flag its values, by what must come of them.

    Raises:
        AssertionError: the tables lack a flag that this suite supports, or name one that is none.
    """
    actions = surface.actions()
    unsupported = set(itertools.chain(*UNSUPPORTED.values()))
    unknown = (set(surface.good) | set(surface.bad)) - set(actions)
    assert not unknown, f"{surface.module} has no flags {sorted(unknown)}"
    found = {}
    for flag, action in actions.items():
        good, bad = surface.good.get(flag, []), [*surface.bad.get(flag, []), *_never(action)]
        if flag not in surface.good and flag not in surface.bad:
            assert action.dest in unsupported, f"flag_values.py has no values of --{flag} of {surface.module}"
            bad += _other_than_default(action)
        either = [value for value in _any(action) if value not in [*good, *bad]] if flag in surface.good else []
        found[flag] = {"runs": good, "refused": bad, "either": either}
    return found


def _never(action: argparse.Action) -> list[str | None]:
    """Values that the type of a flag rules out."""
    if action.nargs == 0:
        return []
    empty = [] if action.default == "" else ['""']
    if action.choices:
        return [*empty, "nonsense"]
    if action.type is int:
        return [*empty, "x", "1.5", "nan", "9223372036854775808"]
    if action.type is float:
        return [*empty, "x", "nan", "inf", "1e39"]
    if action.nargs == "?" and action.const is True:
        return [*empty, "maybe"]
    return empty


def _any(action: argparse.Action) -> list[str]:
    """Values that the type of a flag can hold."""
    if action.type is int and action.nargs is None and not action.choices:
        return ["0", "-1", "5"]
    if action.type is float and action.nargs is None:
        return ["0", "-1", "0.5", "1e9"]
    return []


def _other_than_default(action: argparse.Action) -> list[str | None]:
    """Values of a flag of PaddleNLP that this suite does not support."""
    if action.nargs == 0:
        return [None]
    if isinstance(action.default, bool) or action.nargs == "?":
        return ["False" if action.default else "True"]
    if action.type in (int, float):
        return [str(value) for value in (0, 2, 5) if value != action.default]
    return ["True", "0"] if action.type and action.type.__name__ == "strtobool" else ["nonsense"]


def singles(surface: Surface) -> list[Case]:
    """Every flag alone, with each of its values; under its further names with one."""
    found = surface_values(surface)
    aliases = [(alias, found[flag]["runs"][0]) for alias, flag in surface.aliases().items()]
    return [
        *(Case(surface, (chosen,), "runs") for chosen in aliases),
        *(
            Case(surface, ((flag, value),), expected)
            for flag, by_expected in found.items()
            for expected, listed in by_expected.items()
            for value in listed
        ),
    ]


def covering(surface: Surface, rng: random.Random, width: int = 8, tries: int = 20) -> Iterator[Case]:
    """Rows of flags with values that run alone, until any two values of two flags have been in a row."""
    flags = {flag: found["runs"] for flag, found in surface_values(surface).items() if found["runs"]}
    listed = {flag: [(flag, value) for value in flags[flag]] for flag in flags}
    pairs = (itertools.product(listed[one], listed[other]) for one, other in itertools.combinations(flags, 2))
    # A dict is a set with an order, which the seed alone decides.
    missing = dict.fromkeys(itertools.chain(*pairs))

    def row_with(pair: tuple) -> list[tuple[str, str | None]]:
        taken = dict(pair)
        others = rng.sample([flag for flag in flags if flag not in taken], min(width, len(flags)) - 2)
        taken |= {flag: rng.choice(flags[flag]) for flag in others}
        return [(flag, taken[flag]) for flag in flags if flag in taken]

    while missing:
        # A pair that is missing, and the best of a few ways to fill the row.
        rows = [row_with(next(iter(missing))) for _ in range(tries)]
        row = max(rows, key=lambda row: sum(pair in missing for pair in itertools.combinations(row, 2)))
        for pair in itertools.combinations(row, 2):
            missing.pop(pair, None)
        yield Case(surface, tuple(row), "either")


def of_two_processes() -> list[Case]:
    """What several processes have that one has not."""
    lines = {
        "--sharding stage1 --recompute --gradient_accumulation_steps 2 --use_ema False": "runs",
        "--sharding stage1 --sharding_parallel_degree 2 --bf16 --save_steps 1": "runs",
        "--sharding stage2": "refused",
        "--sharding 'stage2 offload'": "refused",
        "--sharding stage3 --use_ema False": "refused",
        "--recompute --gradient_accumulation_steps 2 --dataloader_num_workers 1": "runs",
        "--sharding stage3": "refused",
        "--sharding stage1 --sharding_parallel_degree 3": "refused",
        "--sharding stage1 --sharding_parallel_degree 1": "refused",
        "--sharding stage1 --sharding_parallel_config split_param": "refused",
        "--sharding stage4": "refused",
        "--sharding stage1 --tensor_parallel_degree 2": "refused",
        "--gradient_accumulation_steps 0": "refused",
    }
    return [
        Case(SURFACES[name], (("do_train", line),), expected, processes=2)
        for name in ("trainer", "uvit trainer")
        for line, expected in lines.items()
    ]


def random_rows(surface: Surface, rng: random.Random, width: int = 3) -> Iterator[Case]:
    """Endless rows of that many flags with any of their values; one that is refused alone is refused among others."""
    flags = surface_values(surface)
    while True:
        row, expected = [], "either"
        for flag in rng.sample(sorted(flags), width):
            kind = rng.choice([kind for kind, listed in flags[flag].items() if listed])
            row.append((flag, rng.choice(flags[flag][kind])))
        yield Case(surface, tuple(row), expected)


def make_files(folder: Path, server: Server) -> dict[str, Path]:
    """What the values name, by name; each run's checkpoint of its first step among them."""
    runs = {"dit_run": "trainer", "uvit_run": "uvit trainer", "sdxl_run": "sdxl trainer"}
    files = {name: folder / name for name in ("features", "images", "vae", "clip", "nothing", *runs)}
    for path in files.values():
        path.mkdir(parents=True)
    write_features(files["features"], 40)
    write_vae(files["vae"])
    write_clip(files["clip"], width=32, length=7)
    rng = np.random.default_rng(0)
    for name in "ab":
        (files["images"] / name).mkdir()
        for k in range(4):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(files["images"] / name / f"{k}.png")
    files["reference"] = write_reference(folder / "reference.npz")
    files["official"] = DATA / "official.pt"
    files["coco"] = REPOSITORY / "tests/data/uvit/coco_features_tiny"
    uvit = REPOSITORY / "tests/data/uvit/uvit_ema.pth.gz"
    files["nnet"] = _write(folder / "nnet.pth", gzip.decompress(uvit.read_bytes()))
    small = {key: value for key, value in TINY.items() if key != "num_classes"}
    small |= {"num_layers": 4, "num_attention_heads": 4, "clip_dim": 32, "num_text_tokens": 7}
    official = dit_config(json.loads((DATA / "config.json").read_text())["model"])
    texts = {
        "text": "no such file\n",
        "prompts": "the cat\na dog\n",
        "dit_config.json": json.dumps(TINY | {"num_layers": 1}),
        "uvit_config.json": json.dumps(small),
        "official_config.json": json.dumps(official.to_dict()),
        "labels.json": json.dumps({str(k): f"class {k}" for k in range(official.num_classes)}),
        "captions.json": json.dumps({"images": [], "annotations": []}),
        "yaml": "log_every: 1\n",
        "yaml_sample": "cfg_scale: 2\n",
        "yaml_t2i": "cfg_scale: 2\n",
    }
    for name, text in texts.items():
        files[name.removesuffix(".json")] = _write(folder / name, text.encode())
    _make_captioned(files, folder)
    for run, surface in runs.items():
        first = Case(SURFACES[surface], (("max_steps", "1"), ("output_dir", str(files[run] / "resumed"))), "either")
        assert (problem := check(first, server, folder / "first", files)) is None, problem
        files[f"{run}_checkpoint"] = files[run] / "resumed/checkpoint-1"
    return files


def _make_captioned(files: dict[str, Path], folder: Path) -> None:
    """A pipeline of Stable Diffusion XL, and captioned images as parquet files and as files."""
    from demo.tiny_sdxl import write_pipeline

    captions = ["a cat", "the rain", "a red cat", "rain"]
    files["pipeline"] = folder / "pipeline"
    write_pipeline(files["pipeline"], captions)
    files["captioned"] = folder / "captioned"
    images = [{"bytes": png(pixels(k, 70, 80)), "path": None} for k in range(len(captions))]
    write_parquet(
        files["captioned"] / "data" / "train-00000.parquet", images, captions, texts=[[text, "it"] for text in captions]
    )
    files["captioned_images"] = write_image_folder(folder / "captioned_images", captions)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def check(case: Case, server: Server, folder: Path, files: dict[str, Path]) -> str | None:
    """Runs a case in a folder, which is made and removed; returns what is wrong, or None."""
    shutil.copytree(files[case.surface.given], folder)
    before, words = _content(folder), case.words(files)
    command = Command([str(case.surface.script), *words], folder)
    output = folder.with_name(f"{folder.name}.txt")
    try:
        result = server.start(command, output, case.processes).result(TIMEOUT)
        problem = _problem(case, result, folder, before)
    except AssertionError as error:
        problem = str(error)
    finally:
        shutil.rmtree(folder)
    return problem and f"{case.surface.module} {shlex.join(words)} ({case.processes} processes)\n    {problem}"


def _content(folder: Path) -> dict[Path, tuple[int, int]]:
    """Sizes and times of the files in a folder; without locks, which stay: who takes one away could take another's."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def _problem(case: Case, result: Result, folder: Path, before: dict[Path, tuple[int, int]]) -> str | None:
    changed = sorted(str(path) for path, _ in before.items() ^ _content(folder).items())
    errors = [line for line in result.out.splitlines() if line.startswith("error: ")]
    if "Traceback" in result.out or result.code not in (0, 1):
        return f"ended with {result.code}: {result.out[-2000:]}"
    if result.code == 0:
        if case.expected == "refused":
            return f"ran: {result.out[-300:]}"
        if case.expected == "runs" and not any(Path("/", path).match(case.surface.result) for path in changed):
            return f"left no {case.surface.result}: {result.out[-500:]}"
        return None
    # Each process of a launched run has a log of its own.
    if len(set(errors)) != 1 or len(errors) > case.processes or result.out.splitlines()[-1] != errors[0]:
        return f"is refused with other than one line: {result.out[-2000:]}"
    if case.expected == "runs":
        return f"was refused: {errors[0]}"
    if "not finite" in errors[0]:  # what a learning rate can do, and no flag can tell before
        return None
    if re.search(r"^(step \d|sampling:)", result.out, re.MULTILINE):
        return f"was refused after work had begun: {result.out[-500:]}"
    if changed:
        return f"was refused, but changed {changed}: {errors[0]}"
    return None


def cases(scale: float, seed: int) -> Iterator[Case]:
    """Every flag alone, a covering of pairs and random rows; a random share of `scale` of them."""
    rng = random.Random(seed)
    for surface in SURFACES.values():
        listed = [*singles(surface), *covering(surface, rng)]
        listed += itertools.islice(random_rows(surface, rng), len(listed) // 2)
        yield from rng.sample(listed, math.ceil(scale * len(listed)))
    if scale >= 1:
        yield from of_two_processes()


def run(folder: Path, scale: float, seed: int = 0) -> dict[str, int | float | str]:
    """Runs all cases and returns how many did what.

    Raises:
        AssertionError: some did neither run nor end with one sentence; the message has their command lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    server, start, counts, problems = Server(), time.monotonic(), Counter(), []
    files = make_files(folder / "files", server)
    for number, case in enumerate(cases(scale, seed)):
        counts["combinations"] += 1
        if problem := check(case, server, folder / f"case-{number}", files):
            problems.append(problem)
            print(f"flags (seed {seed}): {problem}", flush=True)
        if number % 100 == 99:
            print(
                f"flags: {number + 1} combinations, {len(problems)} problems, {time.monotonic() - start:.0f} s",
                flush=True,
            )
    assert not problems, f"{len(problems)} of {counts['combinations']} combinations:\n" + "\n".join(problems)
    return dict(counts)
