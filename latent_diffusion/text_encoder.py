"""The frozen text encoder: captions to what a network is conditioned on (ppdiffusers' `CLIPTextModel`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from .checkpoint import set_weights
from .errors import InputError
from .files import read_lines, write_json
from .hub import existing_file, local_folder, read_json
from .pretrained import check_size, describing
from .runtime import import_paddlenlp
from .weights import read_weights, transpose_linear

# Names of these in errors.
_MODEL, _TOKENIZER = "text encoder", "tokenizer"

# PaddleNLP called its configurations so before version 2.5.
_CONFIG_FILES = ("config.json", "model_config.json")
# PaddleNLP and transformers both write a `model.safetensors`; those in half precision are the last choice.
CLIP_WEIGHT_FILES = (
    "model_state.pdparams",
    "model.safetensors",
    "pytorch_model.bin",
    "model.fp16.safetensors",
    "pytorch_model.fp16.bin",
)

# What the output depends on, and the numbers of special tokens: an exported configuration keeps them.
_CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "projection_dim",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# Keys of the text network in PaddleNLP before version 2.5.
_FORMER_KEYS = {
    "text_embed_dim": "hidden_size",
    "text_layers": "num_hidden_layers",
    "text_heads": "num_attention_heads",
    "text_hidden_act": "hidden_act",
    "max_text_length": "max_position_embeddings",
}

# What a file of a whole CLIP has besides the text network, and a table of numbers that old files store.
_OTHER_PARTS = ("vision_model.", "visual_projection", "vision_projection", "logit_scale")
_PROJECTION = "text_projection"
_POSITION_IDS = ".position_ids"

# The files that make a tokenizer of each class.
_VOCABULARIES = {
    "CLIPTokenizer": {"vocab_file": "vocab.json", "merges_file": "merges.txt"},
    "BertTokenizer": {"vocab_file": "vocab.txt"},
}
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = (
    _TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    ("vocab.json", "vocab.txt"),
)
# The same without their order, and a file that makes code.
_READ_BY_PADDLENLP = {*_TOKENIZER_FILES[:-1], *_TOKENIZER_FILES[-1]}
_TEMPLATE = "chat_template.json"
# What PaddleNLP writes of the folder a tokenizer came from.
_PLACES = ("name_or_path", "special_tokens_map_file", "tokenizer_file")


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A text encoder with its tokenizer.

    Attributes:
        model: from `load_text_encoder`.
        tokenizer: from `load_tokenizer`.
    """

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, text_encoder: str, tokenizer: str, max_length: int) -> "TextEncoder":
        """Loads both; every text becomes `max_length` tokens.

        Args:
            text_encoder: for `load_text_encoder`.
            tokenizer: for `load_tokenizer`.
            max_length: from 2, the tokens that begin and end a text, to the length that the text encoder knows.

        Raises:
            InputError: either cannot be loaded, they do not fit each other, or `max_length` is out of range.
        """
        loaded = cls(load_text_encoder(text_encoder), load_tokenizer(tokenizer, max_length))
        config = loaded.model.config
        if not 2 <= max_length <= config.max_position_embeddings:
            raise InputError(
                f"the text encoder {text_encoder} takes 2 to {config.max_position_embeddings} tokens; "
                f"choose another maximum length than {max_length}"
            )
        check_vocabulary(loaded.tokenizer, tokenizer, config.vocab_size, text_encoder)
        return loaded

    @property
    def length(self) -> int:
        """The number of tokens that a text becomes, L."""
        return self.tokenizer.model_max_length

    @property
    def width(self) -> int:
        """The number of values a token becomes, D."""
        return self.model.config.hidden_size

    @paddle.no_grad()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """The last hidden state of each text, as ppdiffusers' `LDMTextToImagePipeline` computes it.

        Texts are padded or cut off to L tokens. Padding is not masked: the network learns what it means.

        Args:
            texts: B captions, at least one.

        Returns:
            float32 [B, L, D].
        """
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pd"
        )
        return self.model(tokens.input_ids)[0].astype("float32").numpy()


def load_text_encoder(name_or_path: str, projected: bool = False):
    """Loads the text network of a CLIP.

    Args:
        name_or_path: a folder of ppdiffusers, PaddleNLP or transformers (PyTorch), which may hold a whole CLIP, or its
            name on the hub.
        projected: with its projection of whole texts.

    Returns:
        A `CLIPTextModel` of ppdiffusers, or with the projection a `CLIPTextModelWithProjection`; in eval mode.

    Raises:
        InputError: there is no such folder, its files are bad, or the hub cannot be reached.
    """
    import_paddlenlp()
    from paddlenlp.transformers.model_utils import no_init_weights
    from ppdiffusers.transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = local_folder(name_or_path, (_CONFIG_FILES, CLIP_WEIGHT_FILES), _MODEL)
    source = existing_file(folder, _CONFIG_FILES, _MODEL)
    file = existing_file(folder, CLIP_WEIGHT_FILES, _MODEL)
    config = read_json(source)
    with describing(source, "a CLIP text encoder"):
        settings = CLIPTextConfig(**text_settings(config))
        left_out = _OTHER_PARTS if projected else (*_OTHER_PARTS, _PROJECTION)
        weights = read_clip_weights(file, settings.intermediate_size, left_out)
        projection = abs(settings.hidden_size * settings.projection_dim) if projected else 0
        check_size(weights, least_weights(settings) + projection, settings.num_hidden_layers)
        with no_init_weights():  # which takes two of three seconds, and all weights are set below
            model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(settings)
    set_weights(model, weights, file)
    model.eval()
    return model


def text_settings(config: dict) -> dict:
    """Arguments of `CLIPTextConfig`; that of a whole CLIP is nested, and so was every one of old PaddleNLP."""
    for part in (config.get("text_config"), *config.get("init_args", ())):
        if isinstance(part, dict):
            config = config | part
    settings = {new: config[old] for old, new in _FORMER_KEYS.items() if old in config}
    if settings:
        settings["intermediate_size"] = 4 * settings["hidden_size"]
    return settings | {key: config[key] for key in _CONFIG_KEYS if key in config}


def least_weights(settings: Any) -> float:
    """Numbers that the weights of a transformer of CLIP, of text or of images, have at least, by its configuration."""
    width, hidden = abs(settings.hidden_size), abs(settings.intermediate_size)
    rows = sum(abs(getattr(settings, key, 0)) for key in ("vocab_size", "max_position_embeddings"))
    positions = (getattr(settings, "image_size", 0) // getattr(settings, "patch_size", 1)) ** 2
    return width * (abs(settings.num_hidden_layers) * (4 * width + 2 * hidden) + rows + positions)


def read_clip_weights(file: Path, intermediate_size: int, left_out: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Reads the weights of a CLIP or of its text network: under ppdiffusers' names of today, Linear weights [in, out].

    Args:
        file: of ppdiffusers, PaddleNLP or transformers (PyTorch).
        intermediate_size: of the text network's MLPs, which tells the layouts of safetensors files apart.
        left_out: how the names begin that are not wanted.

    Raises:
        InputError: the file cannot be read or is refused.
    """
    from ppdiffusers.transformers import CLIPTextModel

    weights = read_weights(file)
    former = CLIPTextModel._deprecated_dict
    if any(former["key"] in name for name in weights):
        weights = {_replaced(name, former["name_mapping"]): value for name, value in weights.items()}
    weights = {
        name: value
        for name, value in weights.items()
        if not name.startswith(left_out) and not name.endswith(_POSITION_IDS)
    }
    if _is_torch(weights, intermediate_size, file):
        tables = {name: value for name, value in weights.items() if name.endswith("_embedding.weight")}
        weights = transpose_linear(weights) | tables
    return weights


def _replaced(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def _is_torch(weights: dict[str, np.ndarray], intermediate_size: int, file: Path) -> bool:
    """Whether a Linear's weights are stored (out, in), as PyTorch does."""
    if file.suffix != ".safetensors":
        return file.suffix == ".bin"
    first = weights.get("text_model.encoder.layers.0.mlp.fc1.weight")
    return first is not None and first.shape[:1] == (intermediate_size,)


def load_tokenizer(name_or_path: str, max_length: int):
    """Loads the tokenizer of a CLIP (`vocab.json` and `merges.txt`) or BERT (`vocab.txt`).

    Args:
        name_or_path: a folder or a name on the hub.
        max_length: its `model_max_length`, to which texts are padded and cut off.

    Returns:
        A `CLIPTokenizer` or `BertTokenizer` of ppdiffusers: the class that `tokenizer_config.json` names, or else the
        one whose files are there.

    Raises:
        InputError: there is no such folder, its files are bad, or the hub cannot be reached.
    """
    import_paddlenlp()
    from ppdiffusers import transformers

    folder = local_folder(name_or_path, _TOKENIZER_FILES, _TOKENIZER)
    _check_tokenizer_files(folder)
    name = _tokenizer_class(folder)
    vocabulary = {
        argument: str(existing_file(folder, (file,), _TOKENIZER)) for argument, file in _VOCABULARIES[name].items()
    }
    try:
        # An absolute path is never taken for the name of one that PaddleNLP brings. What is given here overrides what
        # the files say: they may name vocabularies outside of the folder, and templates that would be compiled.
        return getattr(transformers, name).from_pretrained(
            str(folder.absolute()), **vocabulary, model_max_length=max_length, chat_template=None
        )
    except Exception as error:  # a wrong value can make it raise anything
        raise InputError(
            f"the tokenizer folder {folder} holds no working {name}: {' '.join(str(error).split())}"
        ) from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes the files of a tokenizer from `load_tokenizer` into a folder, which is made."""
    tokenizer.save_pretrained(str(folder))
    # It would say where on this machine it was read.
    path = folder / _TOKENIZER_CONFIG
    write_json(path, {key: value for key, value in read_json(path).items() if key not in _PLACES})


def _check_tokenizer_files(folder: Path) -> None:
    """PaddleNLP reads whatever lies there under these names, and compiles the template."""
    if (template := folder / _TEMPLATE).exists():
        raise InputError(f"{template} is a template of chats, which would be compiled; remove it")
    for file in folder.iterdir():
        if file.name in _READ_BY_PADDLENLP:
            read_json(file) if file.suffix == ".json" else read_lines(file)


def check_vocabulary(tokenizer: Any, tokenizer_name: str, vocab_size: int, model_name: str) -> None:
    """Raises `InputError` if the tokenizer has tokens that a text network of `vocab_size` does not know."""
    # Its length is no measure: PaddleNLP counts special tokens twice that transformers lists in its configuration.
    if (last := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise InputError(
            f"the tokenizer {tokenizer_name} has a token {last}, but the text encoder {model_name} only knows "
            f"{vocab_size}; give the tokenizer that belongs to it"
        )


def _tokenizer_class(folder: Path) -> str:
    if (path := folder / _TOKENIZER_CONFIG).is_file() and (named := read_json(path).get("tokenizer_class")):
        name = str(named).removesuffix("Fast")
        if name not in _VOCABULARIES:
            raise InputError(f"{path} names the class {named}; known are {' and '.join(_VOCABULARIES)}")
        return name
    found = existing_file(folder, [files["vocab_file"] for files in _VOCABULARIES.values()], _TOKENIZER)
    return next(name for name, files in _VOCABULARIES.items() if files["vocab_file"] == found.name)
