"""CLIP score: how well images fit their texts (Hessel et al., arXiv:2104.08718)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from PIL import Image

from ..checkpoint import set_weights
from ..errors import InputError
from ..extraction import batches
from ..hub import existing_file, local_folder, read_json
from ..pretrained import check_size, checksum, describing
from ..runtime import import_paddlenlp
from ..text_encoder import (
    CLIP_WEIGHT_FILES,
    check_vocabulary,
    least_weights,
    load_tokenizer,
    read_clip_weights,
    text_settings,
)
from .extractor import Extractor

# Its name in errors.
_MODEL = "CLIP model"

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"

# What the images' embeddings depend on.
_VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)

# Texts that are encoded at a time.
TEXTS = 64

# Of OpenAI's models, for pixels in [0, 1].
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class CLIPScorer(Extractor):
    """Scores images with their texts; as an extractor, gives the embeddings of images, float32 of length 1."""

    name = "clip"

    def __init__(self, text: Any, vision: Any, tokenizer: Any, mean: Sequence[float], std: Sequence[float]):
        self._text, self._vision, self._tokenizer = text, vision, tokenizer
        self._mean, self._std = np.float32(mean), np.float32(std)
        self.identity = f"clip-{checksum(paddle.nn.LayerList([text, vision]))[:12]}"
        self.widths = {"features": vision.config.projection_dim}

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": self.embed_images(images).astype(np.float32)}

    @classmethod
    def load(cls, name_or_path: str) -> "CLIPScorer":
        """Loads a CLIP with its tokenizer.

        Args:
            name_or_path: a folder of transformers (PyTorch), PaddleNLP or ppdiffusers with the `config.json` of a whole
                CLIP, its weights and its tokenizer, or its name on the hub. A `preprocessor_config.json` in it says the
                mean and standard deviation of pixels; without one they are OpenAI's.

        Raises:
            InputError: there is no such folder, its files are bad or do not fit each other, or the hub cannot be
                reached.
        """
        folder = local_folder(name_or_path, (_PREPROCESSOR, _CONFIG, CLIP_WEIGHT_FILES), _MODEL)
        text, vision = _load_networks(folder)
        tokenizer = load_tokenizer(name_or_path, text.config.max_position_embeddings)
        check_vocabulary(tokenizer, name_or_path, text.config.vocab_size, name_or_path)
        return cls(text, vision, tokenizer, *_normalization(folder, vision.config.image_size))

    def score(self, embeddings: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """100 * max(cosine of image and text, 0) for each image with its text.

        This is the scale of torchmetrics and of most papers on text-to-image models. Hessel et al. take 2.5 in place of
        100. The CLIP score of a set is the mean over its images.

        Args:
            embeddings: of the images, [N, D] of length 1, from `embed_images`.
            texts: one an image. What is longer than the model takes, 77 tokens with the two that begin and end a text,
                is cut off.

        Returns:
            float64 [N], in [0, 100].

        Raises:
            InputError: there are not as many texts as images, or a text is empty.
        """
        if len(embeddings) != len(texts):
            raise InputError(f"there are {len(embeddings)} images and {len(texts)} texts; give one text an image")
        if empty := [index for index, text in enumerate(texts) if not text.strip()]:
            raise InputError(
                f"text {empty[0]} of {len(texts)} (counted from 0) is empty; CLIP cannot score an image with it"
            )
        cosines = [
            np.sum(embeddings[part.start : part.stop] * self.embed_texts(texts[part.start : part.stop]), axis=1)
            for part in batches(len(texts), TEXTS)
        ]
        return 100 * np.maximum(np.concatenate(cosines), 0)

    @paddle.no_grad()
    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [B, H, W, 3] -> embeddings float64 [B, D] of length 1."""
        return _unit(self._vision(paddle.to_tensor(self._prepare(images))).image_embeds)

    @paddle.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """B texts -> embeddings float64 [B, D] of length 1."""
        # Padding comes after the token whose state is taken, and attention is causal: its length changes nothing.
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pd")
        return _unit(self._text(tokens.input_ids).text_embeds)

    def _prepare(self, images: np.ndarray) -> np.ndarray:
        """Normalized pixels float32 [B, 3, S, S], as transformers' `CLIPImageProcessor` makes them."""
        side = self._vision.config.image_size
        pixels = np.stack([_center_square(image, side) for image in images]).astype(np.float32) / 255
        return ((pixels - self._mean) / self._std).transpose(0, 3, 1, 2)


def _unit(embeddings: paddle.Tensor) -> np.ndarray:
    vectors = embeddings.numpy().astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _center_square(image: np.ndarray, side: int) -> np.ndarray:
    """Resizes uint8 [H, W, 3] so that the shorter side has `side` pixels, then cuts out the center: [side, side, 3]."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    size = side * width // shorter, side * height // shorter
    resized = np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    return resized[top : top + side, left : left + side]


def _load_networks(folder: Path) -> tuple[Any, Any]:
    """The text and the vision network of ppdiffusers, in eval mode."""
    source = existing_file(folder, (_CONFIG,), _MODEL)
    file = existing_file(folder, CLIP_WEIGHT_FILES, _MODEL)
    settings = _settings(read_json(source), source)
    # What scales the cosines in training is not used.
    weights = read_clip_weights(file, settings[0].intermediate_size, left_out=("logit_scale",))
    text, vision = networks = _build(*settings, weights, source)
    set_weights(text, {name: value for name, value in weights.items() if name.startswith("text_")}, file)
    set_weights(vision, {name: value for name, value in weights.items() if not name.startswith("text_")}, file)
    for network in networks:
        network.eval()
    return networks


def _settings(config: dict, source: Path) -> tuple[Any, Any]:
    """The configurations of both networks; `source` names the file in errors."""
    import_paddlenlp()
    from ppdiffusers.transformers import CLIPTextConfig, CLIPVisionConfig

    if not isinstance(vision := config.get("vision_config"), dict):
        raise InputError(
            f"{source} has no vision_config: the CLIP score needs a whole CLIP, not its text encoder alone"
        )
    vision_settings = {key: vision[key] for key in _VISION_KEYS if key in vision}
    # Each part has an entry of its own that a whole CLIP does not use. 512 is the default of all libraries.
    shared = {"projection_dim": config.get("projection_dim", 512)}
    with describing(source, "a CLIP"):
        return CLIPTextConfig(**text_settings(config) | shared), CLIPVisionConfig(**vision_settings | shared)


def _build(text: Any, vision: Any, weights: dict[str, np.ndarray], source: Path) -> tuple[Any, Any]:
    """Both networks, to be given the weights."""
    from paddlenlp.transformers.model_utils import no_init_weights
    from ppdiffusers.transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    with describing(source, "a CLIP"), no_init_weights():
        projections = abs(text.projection_dim) * (text.hidden_size + vision.hidden_size)
        layers = abs(text.num_hidden_layers) + abs(vision.num_hidden_layers)
        check_size(weights, least_weights(text) + least_weights(vision) + projections, layers)
        return CLIPTextModelWithProjection(text), CLIPVisionModelWithProjection(vision)


def _normalization(folder: Path, side: int) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of pixels in [0, 1].

    Raises:
        InputError: the folder asks for another preparation of images than `_prepare` does.
    """
    path = folder / _PREPROCESSOR
    settings = read_json(path) if path.is_file() else {}
    known = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)) | {
        "size": (side, {"shortest_edge": side}),
        "crop_size": (side, {"height": side, "width": side}),
        "resample": (Image.BICUBIC,),
        "rescale_factor": (1 / 255,),
    }
    for key, values in known.items():
        if settings.get(key, values[0]) not in values:
            raise InputError(f"{path} has {key} {settings[key]!r}; images can be prepared with {values[0]!r} only")
    return _channels(settings, "image_mean", _MEAN, path), _channels(settings, "image_std", _STD, path)


def _channels(settings: dict, key: str, default: Sequence[float], path: Path) -> Sequence[float]:
    values = settings.get(key, default)
    if not isinstance(values, Sequence) or len(values) != 3 or not all(map(_is_positive, values)):
        raise InputError(f"{path} has {key} {values!r}; three positive numbers are needed")
    return values


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0
