import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.clip_score import CLIPScorer
from latent_diffusion.weights import read_safetensors, transpose_linear, write_paddle, write_safetensors, write_torch
from tests.peer import needs_peer, run_peer

# tests/data/clip/peer.npz holds what RUN_PEER computed with transformers 4.48.
PEER = Path(__file__).parents[2] / "data" / "clip" / "peer.npz"

LENGTH, SIDE, WIDTH = 12, 32, 10
TEXTS = ["the digit three", "4", "A Photo, of 12 cats! it's a caption that is long enough to be cut off", "th e"]
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "hidden_act": "quick_gelu",
    # As in OpenAI's files: the token with the highest number ends a text.
    "eos_token_id": 2,
    # A whole CLIP does not use it.
    "projection_dim": 6,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": 8,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
}
PREPROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": SIDE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
}


def block_shapes(name, width, hidden):
    norms = {f"{name}.layer_norm{i}.{kind}": [width] for i in (1, 2) for kind in ("weight", "bias")}
    layers = {f"self_attn.{part}_proj": (width, width) for part in "kvq"} | {"self_attn.out_proj": (width, width)}
    layers |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    return norms | {
        f"{name}.{layer}.{kind}": list(shape[:rank])
        for layer, shape in layers.items()
        for kind, rank in (("weight", 2), ("bias", 1))
    }


def weight_shapes(vocabulary):
    """The names and shapes of transformers' `CLIPModel`."""
    text, vision = TEXT["hidden_size"], VISION["hidden_size"]
    shapes = {
        "text_model.embeddings.token_embedding.weight": [vocabulary, text],
        "text_model.embeddings.position_embedding.weight": [LENGTH, text],
        "vision_model.embeddings.class_embedding": [vision],
        "vision_model.embeddings.patch_embedding.weight": [vision, 3, 8, 8],
        "vision_model.embeddings.position_embedding.weight": [17, vision],
        "text_projection.weight": [WIDTH, text],
        "visual_projection.weight": [WIDTH, vision],
        "logit_scale": [],
    }
    norms = {"text_model.final_layer_norm": text}
    norms |= dict.fromkeys(("vision_model.pre_layrnorm", "vision_model.post_layernorm"), vision)
    for name, width in norms.items():
        shapes |= {f"{name}.weight": [width], f"{name}.bias": [width]}
    for side, config in (("text", TEXT), ("vision", VISION)):
        for layer in range(2):
            name = f"{side}_model.encoder.layers.{layer}"
            shapes |= block_shapes(name, config["hidden_size"], config["intermediate_size"])
    return shapes


def write_whole_clip(clip_folder: Path, folder: Path) -> Path:
    """Writes a folder of transformers: a small CLIP of random weights, with the tokenizer of `clip_folder`."""
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(clip_folder / file, folder)
    vocabulary = len(json.loads((folder / "vocab.json").read_text()))
    text = TEXT | {"vocab_size": vocabulary}
    config = {"model_type": "clip", "text_config": text, "vision_config": VISION, "projection_dim": WIDTH}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    rng = np.random.default_rng(0)
    shapes = weight_shapes(vocabulary)
    weights = {name: 0.4 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", weights)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder, tmp_path_factory):
    return write_whole_clip(clip_folder, tmp_path_factory.mktemp("whole_clip"))


@pytest.fixture(scope="module")
def scorer(clip):
    return CLIPScorer.load(str(clip))


@pytest.fixture(scope="module")
def images():
    """Wider than high; the side of a pixel is not the same number in the network's input."""
    return np.random.default_rng(1).integers(0, 256, [len(TEXTS), 41, 67, 3], np.uint8)


@pytest.fixture(scope="module")
def peer():
    with np.load(PEER) as file:
        return dict(file)


@pytest.fixture
def folder(clip, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(clip, tmp_path / "clip")


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_embeddings_are_those_of_transformers(scorer, images, peer):
    assert scorer.embed_images(images).dtype == np.float64
    np.testing.assert_allclose(scorer.embed_images(images), peer["images"], atol=2e-6)
    np.testing.assert_allclose(scorer.embed_texts(TEXTS), peer["texts"], atol=2e-6)


def test_high_images_are_cropped_as_wide_ones_are(scorer, images, peer):
    np.testing.assert_allclose(scorer.embed_images(images.transpose(0, 2, 1, 3)), peer["high_images"], atol=2e-6)


def test_the_score_is_100_times_the_cosine_and_never_negative(scorer, images, peer):
    cosines = np.sum(peer["images"] * peer["texts"], axis=1)
    assert cosines.min() < -0.01 and cosines.max() > 0.01
    scores = scorer.score(scorer.embed_images(images), TEXTS)
    assert scores.dtype == np.float64 and scores.shape == (len(TEXTS),)
    np.testing.assert_allclose(scores, 100 * np.maximum(cosines, 0), atol=2e-4)


def test_a_score_does_not_depend_on_the_others(scorer, images):
    scores = scorer.score(scorer.embed_images(images), TEXTS)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(
            scorer.score(scorer.embed_images(images[i : i + 1]), [text]), scores[i : i + 1], atol=1e-4
        )


def test_a_text_is_cut_off_where_the_model_ends(scorer):
    longer = TEXTS[2] + " and then more"
    np.testing.assert_array_equal(scorer.embed_texts([longer]), scorer.embed_texts([TEXTS[2]]))


def test_either_way_of_numbering_the_last_token_gives_the_same(scorer, folder):
    config = json.loads((folder / "config.json").read_text())
    number = config["text_config"]["vocab_size"] - 1
    change_json(folder / "config.json", text_config=config["text_config"] | {"eos_token_id": number})
    np.testing.assert_array_equal(CLIPScorer.load(str(folder)).embed_texts(TEXTS), scorer.embed_texts(TEXTS))


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model_state.pdparams", "old PaddleNLP"])
def test_every_format_gives_the_same(scorer, folder, images, kind):
    weights = read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if kind == "pytorch_model.bin":
        numbers = {"text_model.embeddings.position_ids": np.arange(LENGTH)[None]}
        write_torch(folder / kind, weights | numbers, {})
    else:
        tables = {name: value for name, value in weights.items() if name.endswith("_embedding.weight")}
        weights = transpose_linear(weights) | tables
        if kind == "old PaddleNLP":
            weights = {former_name(name): value for name, value in weights.items()}
        write_paddle(folder / "model_state.pdparams", {n: paddle.to_tensor(v) for n, v in weights.items()})
    loaded = CLIPScorer.load(str(folder))
    assert loaded.identity == scorer.identity
    np.testing.assert_array_equal(
        loaded.score(loaded.embed_images(images), TEXTS), scorer.score(scorer.embed_images(images), TEXTS)
    )


def former_name(name):
    from ppdiffusers.transformers import CLIPTextModel

    for former, now in CLIPTextModel._deprecated_dict["name_mapping"].items():
        name = name.replace(now, former)
    return name


def test_other_weights_have_another_identity(scorer, folder):
    weights = read_safetensors(folder / "model.safetensors")
    weights["visual_projection.weight"] = -weights["visual_projection.weight"]
    write_safetensors(folder / "model.safetensors", weights)
    assert CLIPScorer.load(str(folder)).identity != scorer.identity


def test_without_a_preprocessor_pixels_are_normalized_as_openai_does(folder, images):
    (folder / "preprocessor_config.json").unlink()
    without = CLIPScorer.load(str(folder)).embed_images(images)
    means = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "preprocessor_config.json").write_text(json.dumps(means))
    np.testing.assert_array_equal(CLIPScorer.load(str(folder)).embed_images(images), without)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"the CLIP model folder .*/none does not exist"):
        CLIPScorer.load(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"the CLIP model folder .*clip holds no config\.json"),
        ("model.safetensors", r"the CLIP model folder .*clip holds no .*model\.safetensors or pytorch_model\.bin"),
        ("merges.txt", r"the tokenizer folder .*clip holds no merges\.txt"),
    ],
)
def test_a_missing_file_is_named(folder, missing, message):
    (folder / missing).unlink()
    with pytest.raises(InputError, match=message):
        CLIPScorer.load(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": None}, r"config\.json has no vision_config: the CLIP score needs a whole CLIP"),
        ({"vision_config": VISION | {"num_attention_heads": 5}}, r"config\.json does not describe a CLIP"),
        ({"vision_config": VISION | {"patch_size": 4}}, r"model\.safetensors has shape"),
        ({"projection_dim": 6}, r"text_projection\.weight in .*model\.safetensors has shape"),
    ],
)
def test_a_configuration_that_is_not_that_of_the_weights_is_named(folder, changes, message):
    change_json(folder / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        CLIPScorer.load(str(folder))


def test_a_file_without_images_is_named(folder):
    weights = read_safetensors(folder / "model.safetensors")
    texts = {name: value for name, value in weights.items() if name.startswith("text_")}
    write_safetensors(folder / "model.safetensors", texts)
    with pytest.raises(InputError, match=r"model\.safetensors lacks the weight vision_model"):
        CLIPScorer.load(str(folder))


def test_a_tokenizer_of_another_model_is_named(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    change_json(folder / "vocab.json", more=len(vocabulary))
    with pytest.raises(InputError, match=rf"has a token {len(vocabulary)}, but the text encoder .* {len(vocabulary)};"):
        CLIPScorer.load(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"height": SIDE, "width": SIDE}}, r"preprocessor_config\.json has size .*prepared with 32 only"),
        ({"crop_size": 24}, r"preprocessor_config\.json has crop_size 24"),
        ({"resample": 2}, r"preprocessor_config\.json has resample 2"),
        ({"do_normalize": False}, r"preprocessor_config\.json has do_normalize False"),
        ({"image_mean": [0.5, 0.5]}, r"preprocessor_config\.json has image_mean \[0\.5, 0\.5\]; three positive"),
        ({"image_std": [0.5, 0, 0.5]}, r"preprocessor_config\.json has image_std \[0\.5, 0, 0\.5\]; three positive"),
        ({"image_std": "abc"}, r"preprocessor_config\.json has image_std 'abc'; three positive"),
    ],
)
def test_another_preparation_of_images_is_named(folder, changes, message):
    change_json(folder / "preprocessor_config.json", **changes)
    with pytest.raises(InputError, match=message):
        CLIPScorer.load(str(folder))


def test_one_text_an_image_is_asked_for(scorer, images):
    with pytest.raises(InputError, match=r"there are 4 images and 3 texts"):
        scorer.score(scorer.embed_images(images), TEXTS[:3])


def test_an_empty_text_is_named(scorer, images):
    with pytest.raises(InputError, match=r"text 2 of 4 \(counted from 0\) is empty"):
        scorer.score(scorer.embed_images(images), ["one", "two", " ", ""])


# What transformers makes of a folder, images and texts.
RUN_PEER = """
import json, sys
import numpy as np, torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

folder, images, texts, length = json.loads(sys.argv[1])
model = CLIPModel.from_pretrained(folder).eval()
tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=length)
processor = CLIPImageProcessor.from_pretrained(folder)
images = np.load(images)

def unit(x):
    return (x.double() / x.double().norm(dim=1, keepdim=True)).numpy()

def embed(images):
    return unit(model.get_image_features(**processor(list(images), return_tensors="pt")))

with torch.no_grad():
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    np.savez(
        "peer.npz",
        images=embed(images),
        high_images=embed(images.transpose(0, 2, 1, 3)),
        texts=unit(model.get_text_features(**tokens)),
    )
"""


@needs_peer
def test_the_reference_is_what_transformers_computes(clip, images, peer, tmp_path):
    np.save(tmp_path / "images.npy", images)
    arguments = json.dumps([str(clip), str(tmp_path / "images.npy"), TEXTS, LENGTH])
    run_peer(tmp_path, "-c", RUN_PEER, arguments)
    with np.load(tmp_path / "peer.npz") as file:
        for name, expected in peer.items():
            np.testing.assert_allclose(file[name], expected, atol=1e-6, err_msg=name)
