"""LoRA layers, their files in every spelling, and merging."""

import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors import safe_open

from latent_diffusion.errors import InputError
from latent_diffusion.vae import load_vae
from latent_diffusion.weights import read_safetensors, transpose_linear, write_paddle, write_safetensors, write_torch
from sdxl_lora.lora import PADDLE_FILE, TORCH_FILE, add_lora, load_lora, merge_lora, read_lora, write_lora
from sdxl_lora.pretrained import load_scheduler, load_unet
from sdxl_lora.text_encoders import TextEncoders
from tests.data.sdxl_lora.formula import RANK

UNET_LAYER = "unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_k.lora"
TEXT_LAYER = "text_encoder.text_model.encoder.layers.1.self_attn.out_proj.lora_linear_layer"


@pytest.fixture(scope="module")
def model(make_lora_model):
    return make_lora_model(train_text_encoder=True)


@pytest.fixture(scope="module")
def weights(model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "new/folder"
    write_lora(folder, weights)
    return folder


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == np.float32


def test_new_layers_are_drawn_as_peft_draws_them_and_change_nothing(diffusers_pipeline):
    layers = add_lora("unet", load_unet(str(diffusers_pipeline)), rank=8)
    assert len(layers) == 2 * 4 * (2 + 2 + 4)  # self and cross attention, 4 layers each, of every transformer block
    downs = np.concatenate([layer.down.weight.numpy().ravel() for layer in layers.values()])
    assert abs(downs.std() - 1 / 8) < 0.002 and abs(downs.mean()) < 0.002
    assert all(not layer.up.weight.numpy().any() for layer in layers.values())
    assert layers[UNET_LAYER].down.weight.shape == [64, 8] and layers[UNET_LAYER].up.weight.shape == [8, 64]


def test_every_attention_of_both_text_encoders_gets_layers(weights):
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    expected = {
        f"{part}.text_model.encoder.layers.{i}.self_attn.{projection}.lora_linear_layer.{side}.weight"
        for part in ("text_encoder", "text_encoder_2")
        for i in range(2)
        for projection in projections
        for side in ("down", "up")
    }
    assert {name for name in weights if name.startswith("text_encoder")} == expected


def test_layers_are_float32_beside_half_precision(diffusers_pipeline):
    layers = add_lora("unet", load_unet(str(diffusers_pipeline), "float16"), rank=2)
    encoder = TextEncoders.load(str(diffusers_pipeline), "float16").models[0]
    layers |= add_lora("text_encoder", encoder, rank=2)
    assert {p.dtype for layer in layers.values() for p in layer.parameters()} == {paddle.float32}


def test_both_files_hold_the_same_each_in_its_layout(folder, weights):
    assert {path.name for path in folder.iterdir()} == {TORCH_FILE, PADDLE_FILE}
    assert_equal(read_safetensors(folder / PADDLE_FILE), weights)
    assert_equal(read_safetensors(folder / TORCH_FILE), transpose_linear(weights))
    for name, layout in ((TORCH_FILE, "pt"), (PADDLE_FILE, "pd")):
        with safe_open(folder / name, framework="np") as file:
            assert file.metadata() == {"format": layout}
    for path in (folder, folder / TORCH_FILE, folder / PADDLE_FILE):
        assert_equal(read_lora(path), weights)


def test_tensors_are_written_too(model, weights, tmp_path):
    write_lora(tmp_path, model.state_dict())
    assert_equal(read_lora(tmp_path), weights)


def test_a_failed_write_leaves_the_old_files(folder, weights, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "copy")

    def fail(*_arguments):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_lora(copy, {name: value + 1 for name, value in weights.items()})
    assert {path.name for path in copy.iterdir()} == {TORCH_FILE, PADDLE_FILE}
    assert_equal(read_lora(copy), weights)


def in_peft(name: str) -> str:
    for kind in ("lora", "lora_linear_layer"):
        name = name.replace(f".{kind}.down.", ".lora_A.").replace(f".{kind}.up.", ".lora_B.")
    return name


def in_processors(name: str) -> str:
    """As diffusers named them before version 0.22: `attn1.processor.to_q_lora.down.weight`."""
    block, _, rest = name.replace("to_out.0", "to_out").partition(".to_")
    return f"{block}.processor.to_{rest.replace('.lora.', '_lora.')}" if rest else name


def in_old_text_encoders(name: str) -> str:
    """Likewise: `self_attn.to_q_lora.down.weight`."""
    for letter in ("q", "k", "v", "out"):
        name = name.replace(f".{letter}_proj.lora_linear_layer.", f".to_{letter}_lora.")
    return in_processors(name)


@pytest.mark.parametrize("spelling", [in_peft, in_processors, in_old_text_encoders])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_every_spelling_of_pytorch_is_read(weights, tmp_path, spelling, suffix):
    theirs = {spelling(name): value for name, value in transpose_linear(weights).items()}
    assert theirs.keys() != weights.keys()
    file = tmp_path / f"pytorch_lora_weights{suffix}"
    write_torch(file, theirs, {}) if suffix == ".bin" else write_safetensors(file, theirs)
    assert_equal(read_lora(tmp_path), weights)


def test_names_of_a_unet_alone_may_lack_its_prefix(weights, tmp_path):
    own = {name: value for name, value in weights.items() if name.startswith("unet.")}
    bare = {in_processors(name).removeprefix("unet."): value for name, value in transpose_linear(own).items()}
    write_safetensors(tmp_path / "old.safetensors", bare)
    assert_equal(read_lora(tmp_path / "old.safetensors"), own)


def write_with_settings(folder: Path, weights: dict[str, np.ndarray], **settings) -> None:
    """As diffusers from version 0.35 writes it."""
    from safetensors.numpy import save_file

    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    save_file({in_peft(n): w for n, w in transpose_linear(weights).items()}, folder / TORCH_FILE, metadata)


def test_layers_are_scaled_as_the_file_says(weights, tmp_path):
    write_with_settings(tmp_path, weights, **{"unet.r": RANK, "unet.lora_alpha": 3 * RANK, "unet.alpha_pattern": {}})
    expected = {n: w * np.float32(3 if n.startswith("unet.") and ".up." in n else 1) for n, w in weights.items()}
    assert_equal(read_lora(tmp_path), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unet.use_dora": True}, "was trained with use_dora of peft, which is not supported"),
        ({"text_encoder.alpha_pattern": {"q_proj": 7}}, "was trained with alpha_pattern of peft"),
        ({"unet.lora_alpha": "8"}, "has lora_alpha '8', which is no positive number"),
        ({"unet.lora_alpha": float("inf")}, "has lora_alpha inf, which"),
    ],
)
def test_other_ways_to_scale_are_refused(weights, tmp_path, settings, message):
    write_with_settings(tmp_path, weights, **settings)
    with pytest.raises(InputError, match=message):
        read_lora(tmp_path)


@pytest.mark.parametrize("name", ["paddle_lora_weights.pdparams", "anything.pdparams", "pytorch_lora_weights.bin"])
def test_the_layout_of_square_layers_is_told_by_their_rank(weights, tmp_path, name):
    own = {name: value for name, value in weights.items() if name.startswith("text_encoder")}
    if name.endswith(".bin"):
        write_torch(tmp_path / name, transpose_linear(own), {})
    else:
        write_paddle(tmp_path / name, own)
    assert_equal(read_lora(tmp_path / name), own)


@pytest.mark.parametrize("name", [TORCH_FILE, PADDLE_FILE])
def test_where_the_rank_is_the_width_the_name_tells(tmp_path, name):
    own = {f"{UNET_LAYER}.{side}.weight": np.random.rand(4, 4).astype(np.float32) for side in ("down", "up")}
    write_safetensors(tmp_path / name, transpose_linear(own) if name == TORCH_FILE else own)
    assert_equal(read_lora(tmp_path / name), own)


SQUARE = np.zeros([8, 2], np.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": SQUARE}, "no weight of a LoRA that diffusers"),
        ({f"{UNET_LAYER}.down.weight": SQUARE, f"{UNET_LAYER}.alpha": SQUARE}, r"holds unet.*\.alpha, which is no wei"),
        ({"conv_in.weight": SQUARE}, r"holds conv_in\.weight, which is no weight of a LoRA"),
        ({f"{UNET_LAYER}.down.weight": SQUARE}, r"only half of the LoRA of unet\.mid_block.*attn2\.to_k$"),
        ({f"{UNET_LAYER}.down.weight": SQUARE[:, :, None, None]}, "only LoRA of Linear layers is supported"),
        ({f"{UNET_LAYER}.down.weight": SQUARE, f"{UNET_LAYER}.up.weight": SQUARE[:3]}, "different ranks"),
    ],
)
def test_what_is_no_lora_is_refused(tmp_path, content, message):
    write_safetensors(tmp_path / TORCH_FILE, content)
    with pytest.raises(InputError, match=message):
        read_lora(tmp_path)


def test_a_folder_without_a_lora_is_named(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path} holds no LoRA: none of paddle_lora_weights\.safetensors, "):
        read_lora(tmp_path)
    with pytest.raises(InputError, match=r"nowhere\.safetensors does not exist"):
        read_lora(tmp_path / "nowhere.safetensors")


def test_a_merged_network_computes_what_the_layers_add(diffusers_pipeline, model, weights):
    unet = load_unet(str(diffusers_pipeline))
    merge_lora({"unet": unet}, {n: w for n, w in weights.items() if n.startswith("unet.")}, Path("lora"))
    x, t = paddle.randn([1, 4, 8, 8]), paddle.to_tensor([500])
    condition = {"text_embeds": paddle.randn([1, 32]), "time_ids": paddle.ones([1, 6])}
    contexts = paddle.randn([1, 16, 64])
    found, expected = (u(x, t, contexts, added_cond_kwargs=condition).sample for u in (unet, model.unet))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, value: (name.replace("mid_block", "middle"), value), r"unet\.middle.*, which is no layer here"),
        (lambda name, value: (name.replace("to_k", "to_out"), value), r"attn2\.to_out, which is no layer here"),
        (lambda name, value: (name.replace("unet.", "text_encoder_2."), value), r"text_encoder_2\.mid_block"),
        (
            lambda name, value: (name, value[:8] if "down" in name else value),
            r"shape \[8, 64\], here it has \[64, 64\]",
        ),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_whole(diffusers_pipeline, weights, change, message):
    unet = load_unet(str(diffusers_pipeline))
    before = {name: value.numpy() for name, value in unet.state_dict().items()}
    other = {name: value for name, value in weights.items() if name.startswith("unet.") and UNET_LAYER not in name}
    other |= dict(change(n, weights[n]) for n in weights if UNET_LAYER in n)
    with pytest.raises(InputError, match=f"lora is of another model: .*{message}"):
        merge_lora({"unet": unet}, other, Path("lora"))
    for name, value in unet.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.fixture(scope="module")
def tiny_lora(tiny_pipeline, tmp_path_factory):
    """`(model, folder)`: the tiny pipeline with random LoRA everywhere, and its files."""
    from sdxl_lora.modeling import SDXLLoRA

    model = SDXLLoRA(load_unet(str(tiny_pipeline)), 2, TextEncoders.load(str(tiny_pipeline)))
    for parameter in model.parameters():
        parameter.set_value(0.3 * paddle.randn(parameter.shape))
    return model, tmp_path_factory.mktemp("tiny")


def computed(unet, encoders: TextEncoders) -> np.ndarray:
    """A prediction for a prompt, as one array with its encodings."""
    tokens = {name: paddle.to_tensor(value[None]) for name, value in encoders.tokenize("a cat").items()}
    with paddle.no_grad():
        contexts, pooled = encoders.encode(**tokens)
        condition = {"text_embeds": pooled, "time_ids": paddle.ones([1, 6])}
        prediction = unet(paddle.ones([1, 4, 8, 8]), paddle.to_tensor([500]), contexts, added_cond_kwargs=condition)
    return np.concatenate([value.numpy().ravel() for value in (contexts, pooled, prediction.sample)])


def load_pipeline(folder: Path):
    """As `StableDiffusionXLPipeline.from_pretrained` does, in a fraction of the time."""
    from ppdiffusers import StableDiffusionXLPipeline

    encoders = TextEncoders.load(str(folder))
    return StableDiffusionXLPipeline(
        load_vae(f"{folder}/vae"),
        *encoders.models,
        *encoders.tokenizers,
        unet=load_unet(str(folder)),
        scheduler=load_scheduler(str(folder)),
    )


def computed_by(pipeline) -> np.ndarray:
    encoders = pipeline.text_encoder, pipeline.text_encoder_2
    return computed(pipeline.unet, TextEncoders(encoders, (pipeline.tokenizer, pipeline.tokenizer_2)))


def test_ppdiffusers_loads_the_lora_of_a_unet(tiny_pipeline, tiny_lora):
    model, folder = tiny_lora
    own = {name: value for name, value in model.state_dict().items() if name.startswith("unet.")}
    write_lora(folder / "unet", own)
    pipeline = load_pipeline(tiny_pipeline)
    before = computed_by(pipeline)
    pipeline.load_lora_weights(str(folder / "unet"))
    found, expected = computed_by(pipeline), computed(model.unet, TextEncoders.load(str(tiny_pipeline)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found - before).max() > 0.1


def test_ppdiffusers_gets_the_lora_of_text_encoders_merged_where_its_own_loader_fails(tiny_pipeline, tiny_lora):
    model, folder = tiny_lora
    write_lora(folder / "all", model.state_dict())
    pipeline = load_pipeline(tiny_pipeline)
    with pytest.raises(ValueError, match="_modify_text_encoder"):  # it says so: nothing is dropped silently
        pipeline.load_lora_weights(str(folder / "all"))
    pipeline = load_pipeline(tiny_pipeline)
    load_lora(pipeline, folder / "all")
    expected = computed(model.unet, model.text_encoders)
    np.testing.assert_allclose(computed_by(pipeline), expected, rtol=0, atol=1e-5)
    assert np.abs(expected - computed_by(load_pipeline(tiny_pipeline))).max() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_in_half_precision_are_written_as_what_they_are(tmp_path, dtype):
    values = {"unet.a.to_q.lora.down.weight": [[0.5], [1.5]], "unet.a.to_q.lora.up.weight": [[-2.0, 0.25]]}
    write_lora(tmp_path, {name: paddle.to_tensor(value, dtype) for name, value in values.items()})
    found = read_lora(tmp_path)
    assert {name: value.tolist() for name, value in found.items()} == values
