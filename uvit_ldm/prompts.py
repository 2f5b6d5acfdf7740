"""Prompts that images are drawn of, encoded when they are needed."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from latent_diffusion.errors import InputError
from latent_diffusion.pretrained import checksum
from latent_diffusion.text_encoder import TextEncoder

from .configuration import UViTConfig


class Prompts:
    """The `Captions` of an `ImageSampler`: of each image one, given as text.

    Args:
        texts: at least one.
        encoder: for the network, see `load_encoder`.

    Attributes:
        empty_context: of the empty prompt, float32 [L, D].
    """

    def __init__(self, texts: Sequence[str], encoder: TextEncoder):
        self._texts, self._encoder = texts, encoder
        self.empty_context = encoder.encode([""])[0]

    def __len__(self) -> int:
        return len(self._texts)

    def draw_contexts(self, indices: Sequence[int], generators: Sequence[np.random.Generator]) -> np.ndarray:
        """The prompts of these numbers, encoded: float32 [B, L, D]; nothing is drawn of the generators."""
        return self._encoder.encode([self._texts[index] for index in indices])

    def of_samples(self, count: int) -> list[str]:
        """The prompts of the samples 0 to `count` - 1; after the last one they begin anew."""
        return [self._texts[index % len(self)] for index in range(count)]

    def settings(self) -> dict[str, str]:
        """What the contexts are a function of, by checksums. The tokens of a vocabulary say how texts are split."""
        return {
            "prompts": _checksum(self._texts),
            "text_encoder": checksum(self._encoder.model),
            "tokenizer": _checksum(self._encoder.tokenizer.get_vocab()),
        }


def _checksum(values: Sequence[str] | dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_encoder(text_encoder: str, tokenizer: str, config: UViTConfig) -> TextEncoder:
    """The text encoder of a network's prompts; see `TextEncoder.load`.

    Raises:
        InputError: it cannot be loaded, or its contexts are not those that the network takes.
    """
    encoder = TextEncoder.load(text_encoder, tokenizer, config.num_text_tokens)
    if encoder.width != config.clip_dim:
        raise InputError(
            f"the text encoder {text_encoder} gives contexts of width {encoder.width}, the model takes "
            f"{config.clip_dim}"
        )
    return encoder
