"""The two text encoders of a Stable Diffusion XL pipeline, with their tokenizers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from latent_diffusion.errors import InputError
from latent_diffusion.features import stack
from latent_diffusion.text_encoder import check_vocabulary, load_text_encoder, load_tokenizer

from .lora import TEXT_ENCODERS
from .pretrained import freeze, part_of

# Folders in a pipeline's.
TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True, eq=False)
class TextEncoders:
    """Two text encoders whose outputs are joined, each with its tokenizer.

    Attributes:
        models: a `CLIPTextModel` and a `CLIPTextModelWithProjection` of ppdiffusers, frozen, in eval mode.
        tokenizers: a `CLIPTokenizer` of ppdiffusers for each.
    """

    models: tuple[Any, Any]
    tokenizers: tuple[Any, Any]

    @classmethod
    def load(cls, name_or_path: str, dtype: str = "float32") -> "TextEncoders":
        """Loads those of a pipeline.

        Args:
            name_or_path: a pipeline folder of ppdiffusers or diffusers, or its name on the hub.
            dtype: of their weights, whatever the files have.

        Raises:
            InputError: there is no such folder, it is of another kind of pipeline, its files are bad or do not fit each
                other, or the hub cannot be reached.
        """
        encoder_names, tokenizer_names = (
            [part_of(name_or_path, part) for part in parts] for parts in (TEXT_ENCODERS, TOKENIZERS)
        )
        models = tuple(load_text_encoder(name, projected=i == 1) for i, name in enumerate(encoder_names))
        lengths = [model.config.max_position_embeddings for model in models]
        if lengths[0] != lengths[1]:
            raise InputError(
                f"the text encoders of {name_or_path} take {lengths[0]} and {lengths[1]} tokens, not the same"
            )
        tokenizers = tuple(load_tokenizer(name, lengths[0]) for name in tokenizer_names)
        for model, name, tokenizer, tokenizer_name in zip(
            models, encoder_names, tokenizers, tokenizer_names, strict=True
        ):
            check_vocabulary(tokenizer, tokenizer_name, model.config.vocab_size, name)
            model.to(dtype=dtype)
            freeze(model)
        return cls(models, tokenizers)

    @property
    def max_length(self) -> int:
        """The number of tokens that a text becomes, L."""
        return self.tokenizers[0].model_max_length

    @property
    def context_shape(self) -> tuple[int, int]:
        """(L, D1 + D2) of an encoded text."""
        return self.max_length, sum(model.config.hidden_size for model in self.models)

    @property
    def pooled_width(self) -> int:
        """The number of values that a whole text becomes, P."""
        return self.models[1].config.projection_dim

    def tokenize(self, text: str) -> dict[str, np.ndarray]:
        """The tokens of a text for either encoder, padded or cut off to L; computed without Paddle.

        Returns:
            "tokens" and "tokens_2", int64 [L].
        """
        tokens, tokens_2 = (
            tokenizer(text, padding="max_length", truncation=True, max_length=self.max_length)["input_ids"]
            for tokenizer in self.tokenizers
        )
        return {"tokens": np.asarray(tokens, np.int64), "tokens_2": np.asarray(tokens_2, np.int64)}

    @paddle.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> tuple[paddle.Tensor, paddle.Tensor]:
        """What `encode` makes of the tokens of B texts, without gradients."""
        tokens = stack([self.tokenize(text) for text in texts])
        return self.encode(**{name: paddle.to_tensor(ids) for name, ids in tokens.items()})

    def encode(self, tokens: paddle.Tensor, tokens_2: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """What the UNet is conditioned on, as `StableDiffusionXLPipeline.encode_prompt` computes it.

        Gradients pass; padding is not masked.

        Args:
            tokens, tokens_2: int64 [B, L], from `tokenize`.

        Returns:
            The hidden states before the last layers, of both encoders side by side [B, L, D1 + D2]; and the second
            one's projection of whole texts [B, P]. In the dtype of the encoders.
        """
        first, second = (
            model(ids, output_hidden_states=True, return_dict=True)
            for model, ids in zip(self.models, (tokens, tokens_2), strict=True)
        )
        return paddle.concat([first.hidden_states[-2], second.hidden_states[-2]], axis=-1), second.text_embeds
