"""Reference values computed with the public PyTorch code of U-ViT, and models with its weights."""

import dataclasses
import gzip
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion.ema import EMA
from latent_diffusion.text_encoder import TextEncoder
from latent_diffusion.weights import read_torch
from tests import formulations
from tests.conftest import arrays_of, json_of, load_official
from uvit_ldm.configuration import UViTConfig
from uvit_ldm.modeling import UViT
from uvit_ldm.objective import make_objective

DATA = Path(__file__).parent.parent / "data" / "uvit"


def uvit_config(arguments: dict) -> UViTConfig:
    """The configuration for the arguments of the official `UViT` class."""
    return UViTConfig(
        sample_size=arguments["img_size"],
        patch_size=arguments["patch_size"],
        in_channels=arguments["in_chans"],
        num_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        attention_head_dim=arguments["embed_dim"] // arguments["num_heads"],
        mlp_ratio=arguments["mlp_ratio"],
        qkv_bias=arguments["qkv_bias"],
        clip_dim=arguments["clip_dim"],
        num_text_tokens=arguments["num_clip_token"],
    )


@pytest.fixture(scope="session")
def golden():
    """The arrays of tests/data/uvit, see `arrays_of`."""
    return arrays_of(DATA)


@pytest.fixture(scope="session")
def golden_json():
    """The JSON files of tests/data/uvit, see `json_of`."""
    return json_of(DATA)


@pytest.fixture(scope="session")
def official_files(tmp_path_factory) -> dict[str, Path]:
    """The weight files of the official code: "uvit" (as `nnet.pth`) and "uvit_ema" (as `nnet_ema.pth`)."""
    folder = tmp_path_factory.mktemp("official")
    files = {name: folder / f"{name}.pth" for name in ("uvit", "uvit_ema")}
    for name, path in files.items():
        path.write_bytes(gzip.decompress((DATA / f"{name}.pth.gz").read_bytes()))
    return files


@pytest.fixture(scope="session")
def official_weights(official_files) -> dict[str, dict[str, np.ndarray]]:
    """The weights in these files, in the layout of the official code."""
    return {name: read_torch(path) for name, path in official_files.items()}


@pytest.fixture(scope="session")
def tiny_config(golden_json) -> UViTConfig:
    """The configuration of the reference model."""
    return uvit_config(golden_json("config")["nnet"])


@pytest.fixture(scope="session")
def make_uvit(tiny_config, official_weights):
    """`make_uvit("uvit_ema")` -> the reference model with those weights, in eval mode."""
    return lambda name="uvit": load_official(UViT(tiny_config), official_weights[name])


@pytest.fixture
def uvit(make_uvit) -> UViT:
    """The reference model, in eval mode; the test's own."""
    return make_uvit()


@dataclasses.dataclass
class GoldenTraining:
    """What three training steps gave; weights by name, in the layout of the official code."""

    losses: list[np.ndarray]
    noisy: list[np.ndarray]
    grads: dict[str, np.ndarray]
    delta: dict[str, np.ndarray]
    ema: dict[str, np.ndarray]
    ema_half: dict[str, np.ndarray]


@pytest.fixture(scope="session", params=formulations.ON_CPU)
def golden_training(request, make_uvit, golden, golden_json) -> GoldenTraining:
    """Trains the reference model on the reference batches for three steps."""
    with formulations.computing_with(request.param):
        return _train(make_uvit(), golden, golden_json)


def _train(model, golden, golden_json) -> GoldenTraining:
    batches, settings = golden("losses_batches"), golden_json("config")["optimizer"]
    transposed = {f"{n}.weight" for n, layer in model.named_sublayers() if isinstance(layer, paddle.nn.Linear)}

    def named(state) -> dict[str, np.ndarray]:
        return {n: (v.numpy().T if n in transposed else v.numpy()).copy() for n, v in state.items()}

    start = named(model.state_dict())
    # The reference run starts its averages from the weights reversed along all axes, so that an update shows.
    flipped = {n: np.flip(v) for n, v in start.items()}
    emas = [EMA(model, 0.9999), EMA(model, 0.5)]
    for ema in emas:
        ema.set_state_dict({n: v.T.copy() if n in transposed else v.copy() for n, v in flipped.items()})
    beta1, beta2 = settings["betas"]
    optimizer = paddle.optimizer.AdamW(
        0.0,
        beta1=beta1,
        beta2=beta2,
        epsilon=settings["eps"],
        parameters=model.parameters(),
        weight_decay=settings["weight_decay"],
    )
    objective, losses, noisy, grads = make_objective(), [], [], {}
    for k in range(3):
        x0, n, eps, context = (paddle.to_tensor(batches[name][k]) for name in ("x0", "n", "eps", "context"))

        def denoise(x, t, context=context):
            noisy.append(x.numpy())
            return model(x, t, context)

        loss = objective.losses(denoise, x0, n, eps)["loss"]
        loss.mean().backward()
        losses.append(loss.numpy())
        if k == 0:
            grads = named({n: p.grad for n, p in model.named_parameters()})
        optimizer.set_lr(float(batches["lr_used"][k]))
        optimizer.step()
        optimizer.clear_grad()
        for ema in emas:
            ema.update(k + 1)
    state = named(model.state_dict())
    delta = {n: v - start[n] for n, v in state.items()}
    return GoldenTraining(losses, noisy, grads, delta, *(named(ema.state_dict()) for ema in emas))


@pytest.fixture(scope="session")
def coco_text_encoder(coco_clip_folder) -> TextEncoder:
    """A text encoder and tokenizer for the reference model."""
    return TextEncoder.load(str(coco_clip_folder), str(coco_clip_folder), 7)
