"""Reference values computed with the public PyTorch code of DiT, and models with its weights."""

from latent_diffusion import runtime

runtime.start()  # before anything imports paddle

import dataclasses  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import paddle  # noqa: E402
import pytest  # noqa: E402

from dit.configuration import DiTConfig  # noqa: E402
from dit.modeling import DiT  # noqa: E402
from latent_diffusion.ema import EMA  # noqa: E402
from latent_diffusion.objectives import LearnedRangeDDPM  # noqa: E402
from latent_diffusion.schedules import NoiseSchedule  # noqa: E402
from latent_diffusion.weights import read_torch  # noqa: E402
from tests import formulations  # noqa: E402

DATA = Path(__file__).parent / "data" / "dit"

# The keys of a DiT as small as it can be.
TINY = {
    "sample_size": 8,
    "patch_size": 4,
    "in_channels": 4,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}


def dit_config(arguments: dict, convention: str = "official") -> DiTConfig:
    """The configuration for the arguments of the official `DiT` class."""
    return DiTConfig(
        sample_size=arguments["input_size"],
        patch_size=arguments["patch_size"],
        in_channels=arguments["in_channels"],
        num_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        attention_head_dim=arguments["hidden_size"] // arguments["num_heads"],
        num_classes=arguments["num_classes"],
        mlp_ratio=arguments["mlp_ratio"],
        class_dropout_prob=arguments["class_dropout_prob"],
        learn_sigma=arguments["learn_sigma"],
        timestep_convention=convention,
    )


def linear_weights(model: paddle.nn.Layer) -> set[str]:
    """Names of the weights that Paddle stores transposed."""
    return {f"{n}.weight" for n, layer in model.named_sublayers() if isinstance(layer, paddle.nn.Linear)}


def load_official(model: DiT, state: dict[str, np.ndarray]) -> DiT:
    """Sets weights in the layout of the official code; every one of them, and no others."""
    transposed = linear_weights(model)
    missing, unexpected = model.set_state_dict({n: v.T if n in transposed else v for n, v in state.items()})
    assert not missing and not unexpected
    return model.eval()


def arrays_of(folder: Path):
    """`arrays_of(folder)("forward")` -> the arrays of folder/forward.npz."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(folder / f"{name}.npz") as file:
            return dict(file)

    return load


def json_of(folder: Path):
    """`json_of(folder)("models")` -> the content of folder/models.json."""
    return lambda name: json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(autouse=True)
def same_random_weights_in_every_run():
    paddle.seed(0)


@pytest.fixture(scope="session")
def golden():
    """The arrays of tests/data/dit, see `arrays_of`."""
    return arrays_of(DATA)


@pytest.fixture(scope="session")
def golden_json():
    """The JSON files of tests/data/dit, see `json_of`."""
    return json_of(DATA)


@pytest.fixture(scope="session")
def official_weights():
    """The weights of the reference model, in the layout of the official code."""
    return read_torch(DATA / "official.pt")


@pytest.fixture(scope="session")
def make_dit(golden_json, official_weights):
    """`make_dit(convention)` -> the reference model with its weights, in eval mode."""

    def make(convention: str = "official") -> DiT:
        return load_official(DiT(dit_config(golden_json("config")["model"], convention)), official_weights)

    return make


@pytest.fixture(scope="session")
def make_mini_dit(golden_json):
    """`make_mini_dit("ema", convention)` -> the mini model with that entry of training.pt."""

    def make(entry: str, convention: str = "official") -> DiT:
        model = DiT(dit_config(golden_json("config")["mini"], convention))
        return load_official(model, read_torch(DATA / "training.pt")[entry])

    return make


@pytest.fixture
def dit(make_dit) -> DiT:
    """The reference model with the official timestep convention, in eval mode; the test's own."""
    return make_dit()


@dataclasses.dataclass
class GoldenTraining:
    """What three training steps gave; weights by name, in the layout of the official code."""

    losses: list[dict[str, np.ndarray]]
    outputs: list[np.ndarray]
    noisy: list[np.ndarray]
    grads: dict[str, np.ndarray]
    delta: dict[str, np.ndarray]
    ema_delta: dict[str, np.ndarray]
    ema_fast_delta: dict[str, np.ndarray]


@pytest.fixture(scope="session", params=formulations.ON_CPU)
def golden_training(request, make_dit, golden, golden_json) -> GoldenTraining:
    """Trains the reference model on the reference batches for three steps."""
    with formulations.computing_with(request.param):
        return _train(make_dit(), golden, golden_json)


def _train(model, golden, golden_json) -> GoldenTraining:
    batches, settings = golden("losses_batches"), golden_json("config")
    transposed = linear_weights(model)

    def named(state) -> dict[str, np.ndarray]:
        return {n: v.numpy().T.copy() if n in transposed else v.numpy().copy() for n, v in state.items()}

    start = named(model.state_dict())

    def delta(state) -> dict[str, np.ndarray]:
        return {n: v - start[n] for n, v in named(state).items()}

    objective = LearnedRangeDDPM(NoiseSchedule.linear())
    optimizer = paddle.optimizer.AdamW(
        settings["lr"], parameters=model.parameters(), weight_decay=float(settings["weight_decay"])
    )
    emas = [EMA(model, settings["ema_decay"]), EMA(model, settings["ema_fast_decay"])]
    losses, outputs, noisy, grads = [], [], [], {}
    for k in range(3):
        x_start, t, noise, y = (paddle.to_tensor(batches[n][k]) for n in ("x_start", "t", "noise", "y"))

        def denoise(x, t, y=y):
            noisy.append(x.numpy())
            out = model(x, t, y)
            outputs.append(out.numpy())
            return out

        terms = objective.losses(denoise, x_start, t, noise)
        terms["loss"].mean().backward()
        losses.append({n: v.numpy() for n, v in terms.items()})
        if k == 0:
            grads = named({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.clear_grad()
        for ema in emas:
            ema.update(k + 1)
    deltas = [delta(model.state_dict()), *(delta(ema.state_dict()) for ema in emas)]
    return GoldenTraining(losses, outputs, noisy, grads, *deltas)


def write_vae(folder: Path) -> Path:
    """Writes a small `AutoencoderKL` with random weights: images of any size to 4 channels of an eighth of it."""
    from ppdiffusers.models.autoencoder_kl import AutoencoderKL

    paddle.seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 8, 8],
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.5,
    )
    vae.save_pretrained(str(folder), safe_serialization=False)
    return folder


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    """From `write_vae`."""
    return write_vae(tmp_path_factory.mktemp("vae"))


def write_clip(folder: Path, width: int, length: int) -> Path:
    """Writes a folder of PaddleNLP with a tokenizer of CLIP in it: a small text encoder with random weights.

    It takes `length` tokens and gives `width` values for each.
    """
    runtime.import_paddlenlp()
    from ppdiffusers.transformers import CLIPTextConfig, CLIPTextModel

    merges = ["t h", "th e</w>", "d i", "di g", "dig i", "digi t</w>"]
    tokens = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz0123456789!',."]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    paddle.seed(0)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=length,
            hidden_act="gelu",
            layer_norm_eps=1e-3,
        )
    )
    for parameter in model.parameters():
        parameter.set_value(0.3 * paddle.randn(parameter.shape))
    model.save_pretrained(str(folder), safe_serialization=False)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """From `write_clip`: 12 tokens, 16 values for each."""
    return write_clip(tmp_path_factory.mktemp("clip"), width=16, length=12)


@pytest.fixture(scope="session")
def coco_clip_folder(tmp_path_factory) -> Path:
    """From `write_clip`: contexts of the shape of the reference features of U-ViT."""
    return write_clip(tmp_path_factory.mktemp("coco_clip"), width=32, length=7)
