"""Tiny Stable Diffusion XL pipelines in the layouts of both libraries, and one with LoRA."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from latent_diffusion import runtime
from latent_diffusion.weights import write_safetensors
from tests.conftest import linear_weights
from tests.data.sdxl_lora.formula import RANK, SCHEDULER, TEXT_ENCODERS, UNET, weight

TEXTS = ["the digit three", "a cat in the rain"]


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory) -> Iterator[Path]:
    """The folder that `datasets` copies parquet files to, also in processes that tests start."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
        yield folder


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
    """A folder from `demo.tiny_sdxl.write_pipeline`."""
    runtime.import_paddlenlp()
    from demo.tiny_sdxl import write_pipeline

    folder = tmp_path_factory.mktemp("sdxl") / "pipeline"
    write_pipeline(folder, TEXTS)
    return folder


@pytest.fixture(scope="session")
def diffusers_pipeline(tmp_path_factory) -> Path:
    """A folder in the layout of diffusers (PyTorch), with the weights of `formula.py`; without a VAE."""
    runtime.import_paddlenlp()
    from ppdiffusers import UNet2DConditionModel
    from ppdiffusers.transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("diffusers")
    networks = {"unet": (UNET, "diffusion_pytorch_model.safetensors", lambda: UNet2DConditionModel.from_config(UNET))}
    for (part, config), cls in zip(TEXT_ENCODERS.items(), (CLIPTextModel, CLIPTextModelWithProjection), strict=True):
        networks[part] = config, "model.safetensors", lambda cls=cls, c=config: cls(CLIPTextConfig(**c))
    for part, (config, file, build) in networks.items():
        _write_json(folder / part / "config.json", config)
        network = build()
        transposed = linear_weights(network)
        shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        shapes |= {name: shapes[name][::-1] for name in transposed}
        write_safetensors(folder / part / file, {n: weight(f"{part}.{n}", shape) for n, shape in shapes.items()})
    _write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
    for part, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        _write_tokenizer(folder / part, pad)
    classes = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    _write_json(folder / "model_index.json", {"_class_name": "StableDiffusionXLPipeline"} | classes)
    return folder


def _write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def _write_tokenizer(folder: Path, pad: str) -> None:
    """The files of a published tokenizer, with a few words."""
    merges = ["t h", "th e</w>", "c a", "ca t</w>"]
    tokens = ["!", "!</w>", *(letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokens += [merge.replace(" ", "") for merge in merges]
    numbers = {token: i for i, token in enumerate(tokens)} | {"<|startoftext|>": 98, "<|endoftext|>": 99}
    start, end = (
        {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for content in ("<|startoftext|>", "<|endoftext|>")
    )
    _write_json(folder / "vocab.json", numbers)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": {"__type": "AddedToken"} | start,
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "eos_token": {"__type": "AddedToken"} | end,
            "errors": "replace",
            "model_max_length": 16,
            "pad_token": pad,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": {"__type": "AddedToken"} | end,
        },
    )
    _write_json(
        folder / "special_tokens_map.json", {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    )


@pytest.fixture(scope="session")
def make_lora_model(diffusers_pipeline):
    """`make_lora_model(train_text_encoder)` -> the pipeline of `diffusers_pipeline` with the LoRA of `formula.py`."""
    from sdxl_lora.modeling import SDXLLoRA
    from sdxl_lora.pretrained import load_unet
    from sdxl_lora.text_encoders import TextEncoders

    def make(train_text_encoder: bool = False) -> SDXLLoRA:
        encoders = TextEncoders.load(str(diffusers_pipeline)) if train_text_encoder else None
        model = SDXLLoRA(load_unet(str(diffusers_pipeline)), RANK, encoders)
        for name, parameter in model.state_dict().items():
            parameter.set_value(weight(name, tuple(parameter.shape[::-1])).T)
        return model

    return make
