import json
import pickle
import shutil

import numpy as np
import paddle
import pytest

from latent_diffusion import hub
from latent_diffusion.errors import InputError
from latent_diffusion.text_encoder import TextEncoder, load_text_encoder, load_tokenizer
from latent_diffusion.weights import read_paddle, transpose_linear, write_paddle, write_safetensors, write_torch
from tests.peer import needs_peer, run_peer

LENGTH, WIDTH = 12, 16
TEXTS = ["the digit three", "", "A Photo, of 12 cats! it's a caption that is long enough to be cut off", "th"]


@pytest.fixture(scope="module")
def clip(clip_folder):
    return clip_folder


@pytest.fixture
def folder(clip, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(clip, tmp_path / "clip")


@pytest.fixture(scope="module")
def expected(clip):
    return load(clip).encode(TEXTS)


def load(folder):
    return TextEncoder.load(str(folder), str(folder), LENGTH)


def change_json(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def test_texts_become_the_last_hidden_states_that_the_pipeline_computes(clip, expected):
    from ppdiffusers.transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(clip), model_max_length=LENGTH)
    model = CLIPTextModel.from_pretrained(str(clip))
    model.eval()
    settings = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    with paddle.no_grad():
        theirs = model(tokenizer(TEXTS, **settings, return_tensors="pd").input_ids)[0].numpy()
    assert expected.dtype == np.float32 and expected.shape == (len(TEXTS), LENGTH, WIDTH)
    np.testing.assert_array_equal(expected, theirs)
    own = load(clip)
    assert (own.length, own.width) == (LENGTH, WIDTH)
    assert not own.model.training


def test_a_text_alone_gives_what_it_gives_among_others(clip, expected):
    own = load(clip)
    for text, context in zip(TEXTS, expected, strict=True):
        assert np.abs(own.encode([text])[0] - context).max() < 1e-5


def in_torch_layout(weights):
    tables = {name: value for name, value in weights.items() if name.endswith("_embedding.weight")}
    numbers = {"text_model.embeddings.position_ids": np.arange(LENGTH)[None]}
    return transpose_linear(weights) | tables | numbers


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors", "PaddleNLP's model.safetensors"])
def test_every_format_gives_the_same(folder, expected, kind):
    weights = read_paddle(folder / "model_state.pdparams")
    if kind == "pytorch_model.bin":
        write_torch(folder / kind, in_torch_layout(weights), {})
    elif kind == "model.safetensors":
        write_safetensors(folder / kind, in_torch_layout(weights), {})
    else:
        load_text_encoder(str(folder)).save_pretrained(str(folder), safe_serialization=True)
        assert (folder / "model.safetensors").exists()
    (folder / "model_state.pdparams").unlink()
    np.testing.assert_array_equal(load(folder).encode(TEXTS), expected)


def test_the_text_network_of_a_whole_clip_is_taken(folder, expected):
    weights = in_torch_layout(read_paddle(folder / "model_state.pdparams"))
    others = ("vision_model.post_layernorm.weight", "visual_projection.weight", "text_projection.weight", "logit_scale")
    write_torch(folder / "pytorch_model.bin", weights | dict.fromkeys(others, np.zeros([3], np.float32)), {})
    (folder / "model_state.pdparams").unlink()
    text = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "clip", "text_config": text, "vision_config": {"hidden_size": 8}, "projection_dim": 8}
    (folder / "config.json").write_text(json.dumps(whole))
    np.testing.assert_array_equal(load(folder).encode(TEXTS), expected)


FORMER_NAMES = {
    ".encoder.": ".transformer.",
    ".embeddings.position_embedding.": ".positional_embedding.",
    ".embeddings.token_embedding.": ".token_embedding.",
    ".final_layer_norm.": ".ln_final.",
    ".mlp.fc1.": ".linear1.",
    ".mlp.fc2.": ".linear2.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
}


def test_a_folder_of_old_paddlenlp_gives_the_same(folder, expected):
    former = {}
    for name, value in read_paddle(folder / "model_state.pdparams").items():
        for now, then in FORMER_NAMES.items():
            name = name.replace(now, then)
        former[name] = value
    write_paddle(folder / "model_state.pdparams", former)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    arguments = {
        "max_text_length": LENGTH,
        "vocab_size": config["vocab_size"],
        "text_embed_dim": WIDTH,
        "text_heads": 4,
        "text_layers": 2,
        "text_hidden_act": "gelu",
        "layer_norm_eps": 1e-3,
    }
    nested = {"init_args": [arguments | {"init_class": "CLIPTextTransformer"}], "init_class": "CLIPTextModel"}
    (folder / "model_config.json").write_text(json.dumps(nested))
    np.testing.assert_array_equal(load(folder).encode(TEXTS), expected)


@pytest.mark.parametrize(
    ("missing", "named"), [("config.json", "config.json or model_config.json"), ("model_state.pdparams", "bin")]
)
def test_a_missing_file_is_named(folder, missing, named):
    (folder / missing).unlink()
    with pytest.raises(InputError, match=rf"the text encoder folder .*clip holds no .*{named}"):
        load_text_encoder(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "none"}, r"config\.json does not describe a CLIP text encoder"),
        ({"num_attention_heads": 3}, r"config\.json does not describe a CLIP text encoder"),
        ({"init_args": 1}, r"config\.json does not describe a CLIP text encoder"),
        ({"text_layers": 2}, r"config\.json does not describe a CLIP text encoder"),
        ({"num_hidden_layers": 1}, r"model_state\.pdparams has the weight text_model\.encoder\.layers\.1\."),
        ({"num_hidden_layers": 3}, r"model_state\.pdparams lacks the weight text_model\.encoder\.layers\.2\."),
        ({"vocab_size": 8}, r"token_embedding\.weight in .*model_state\.pdparams has shape"),
    ],
)
def test_a_configuration_that_is_not_that_of_the_weights_is_named(folder, changes, message):
    change_json(folder / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        load_text_encoder(str(folder))


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the file was executed",)


def test_a_pickle_of_anything_but_weights_is_refused_and_not_executed(folder):
    (folder / "model_state.pdparams").write_bytes(pickle.dumps({"text_model.final_layer_norm.bias": Bomb()}))
    with pytest.raises(InputError, match=r"model_state\.pdparams was refused"):
        load_text_encoder(str(folder))


@pytest.mark.parametrize("max_length", [-1, 1, LENGTH + 1])
def test_a_length_that_the_text_encoder_does_not_know_is_named(clip, max_length):
    with pytest.raises(
        InputError, match=rf"takes 2 to {LENGTH} tokens; choose another maximum length than {max_length}"
    ):
        TextEncoder.load(str(clip), str(clip), max_length)


def test_shorter_texts_are_the_beginning_of_longer_ones(clip, expected):
    """Since attention is causal, and the end token that is put where a text is cut off is the last."""
    short = TextEncoder.load(str(clip), str(clip), 5)
    assert short.length == 5
    assert np.abs(short.encode(TEXTS)[:, :4] - expected[:, :4]).max() < 1e-5


def test_a_tokenizer_of_another_text_encoder_is_named(clip, folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"more": len(vocabulary)}))
    with pytest.raises(InputError, match=rf"has a token {len(vocabulary)}, but the text encoder .* {len(vocabulary)};"):
        TextEncoder.load(str(clip), str(folder), LENGTH)


@pytest.mark.parametrize("named", [None, "BertTokenizer", "BertTokenizerFast"])
def test_a_tokenizer_of_bert_is_loaded(tmp_path, named):
    from ppdiffusers.transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "digit"]))
    if named:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    tokenizer = load_tokenizer(str(tmp_path), LENGTH)
    assert type(tokenizer) is BertTokenizer and tokenizer.model_max_length == LENGTH
    assert tokenizer("the digit seven")["input_ids"] == [2, 5, 6, 1, 3]


def test_the_named_class_goes_before_the_files(folder):
    from ppdiffusers.transformers import CLIPTokenizer

    (folder / "vocab.txt").write_text("[PAD]\n")
    change_json(folder / "tokenizer_config.json", tokenizer_class="CLIPTokenizerFast", model_max_length=77)
    tokenizer = load_tokenizer(str(folder), LENGTH)
    assert type(tokenizer) is CLIPTokenizer and tokenizer.model_max_length == LENGTH


@pytest.mark.parametrize("named", ["LlamaTokenizer", ["CLIPTokenizer"], "../CLIPTokenizer"])
def test_another_class_is_named(folder, named):
    change_json(folder / "tokenizer_config.json", tokenizer_class=named)
    with pytest.raises(
        InputError, match=r"tokenizer_config\.json names the class .*; known are CLIPTokenizer and Bert"
    ):
        load_tokenizer(str(folder), LENGTH)


def test_a_vocabulary_elsewhere_is_not_read(folder, tmp_path):
    (tmp_path / "elsewhere.json").write_text("{}")
    expected = load_tokenizer(str(folder), LENGTH)("the digit")["input_ids"]
    change_json(folder / "tokenizer_config.json", vocab_file=str(tmp_path / "elsewhere.json"))
    assert load_tokenizer(str(folder), LENGTH)("the digit")["input_ids"] == expected


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_a_missing_vocabulary_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(InputError, match=rf"the tokenizer folder .*clip holds no .*{missing}"):
        load_tokenizer(str(folder), LENGTH)


def test_a_broken_vocabulary_is_named(folder):
    (folder / "vocab.json").write_text("{")
    with pytest.raises(InputError, match=r"vocab\.json is not JSON"):
        load_tokenizer(str(folder), LENGTH)


def test_names_on_the_hub_are_downloaded(monkeypatch, clip, expected):
    asked = []

    def download(name, file):
        asked.append((name, file))
        return clip / file if (clip / file).exists() else None

    monkeypatch.setattr(hub, "_download", download)
    own = TextEncoder.load("some/model/text_encoder", "some/model/tokenizer", LENGTH)
    np.testing.assert_array_equal(own.encode(TEXTS), expected)
    assert [file for name, file in asked if name.endswith("text_encoder")] == ["config.json", "model_state.pdparams"]
    assert {file for name, file in asked if name.endswith("tokenizer")} >= {"tokenizer_config.json", "vocab.json"}


# A text encoder and a tokenizer of transformers, and what they make of texts.
RUN_PEER = """
import json, sys
import numpy as np, torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

settings, texts = json.loads(sys.argv[1])
length = settings["max_position_embeddings"]
tokenizer = CLIPTokenizer("vocab.json", "merges.txt", pad_token="!</w>", model_max_length=length)
tokenizer.save_pretrained("tokenizer")
torch.manual_seed(0)
whole = CLIPModel(CLIPConfig(text_config=settings, vision_config={"hidden_size": 8, "num_attention_heads": 2})).eval()
model = CLIPTextModel(CLIPTextConfig(**settings)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    whole.text_model.load_state_dict(model.text_model.state_dict())
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    np.savez("peer.npz", tokens=tokens.numpy(), contexts=model(tokens)[0].numpy())
model.save_pretrained("safetensors")
model.save_pretrained("bin", safe_serialization=False)
whole.save_pretrained("whole")
"""


@needs_peer
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_folder_of_transformers_computes_what_transformers_does(folder, activation):
    config = json.loads((folder / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    settings = {name: config[name] for name in (*names, "max_position_embeddings", "layer_norm_eps")}
    numbers = {"bos_token_id": config["vocab_size"] - 2, "eos_token_id": config["vocab_size"] - 1}
    arguments = json.dumps([settings | numbers | {"hidden_act": activation}, TEXTS])
    run_peer(folder, "-c", RUN_PEER, arguments)
    with np.load(folder / "peer.npz") as file:
        tokens, contexts = file["tokens"], file["contexts"]
    for kind in ("safetensors", "bin", "whole"):
        own = TextEncoder.load(str(folder / kind), str(folder / "tokenizer"), LENGTH)
        assert np.abs(own.encode(TEXTS) - contexts).max() < 1e-5, kind
    found = own.tokenizer(TEXTS, padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
    np.testing.assert_array_equal(found, tokens)
