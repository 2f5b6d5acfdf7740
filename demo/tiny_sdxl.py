"""A Stable Diffusion XL pipeline of tiny components with random weights: all parts and shapes of a real one."""

from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import paddle
from paddlenlp.utils.log import logger
from ppdiffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from ppdiffusers.transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latent_diffusion.files import new_folder

from .autoencoder import build_autoencoder
from .text_encoder import write_tokenizer

MAX_LENGTH = 16
TEXT_WIDTH = 32
TIME_WIDTH = 8
SEED = 0


def write_pipeline(
    folder: Path,
    texts: Iterable[str],
    vae: AutoencoderKL | None = None,
    train: Callable[[StableDiffusionXLPipeline], object] | None = None,
) -> None:
    """Writes a pipeline folder of ppdiffusers; images of 64x64 pixels become latents of 4x8x8.

    Args:
        folder: appears once whole.
        texts: every word in them, of lower case letters, becomes a token of both tokenizers.
        vae: downsamples by 8; None for one of random weights.
        train: changes the pipeline before it is written.
    """
    logger.set_level("WARNING")  # PaddleNLP names every file it writes
    paddle.seed(SEED)
    # Tokenizers copy their files when they are saved.
    with new_folder(folder, marker="model_index.json") as temporary, TemporaryDirectory() as vocabulary:
        tokens = write_tokenizer(texts, Path(vocabulary))
        pipeline = _build_pipeline(vocabulary, tokens, vae or build_autoencoder())
        if train is not None:
            train(pipeline)
        pipeline.save_pretrained(str(temporary))


def _build_pipeline(vocabulary: str, tokens: int, vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    tokenizers = [CLIPTokenizer.from_pretrained(vocabulary, model_max_length=MAX_LENGTH) for _ in range(2)]
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(tokens, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokens, "gelu")),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=build_unet(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    )


def build_unet() -> UNet2DConditionModel:
    """A UNet with the anatomy of SDXL's: attention below the first resolution only, conditions of texts and sizes."""
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        norm_num_groups=8,
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + TEXT_WIDTH,
    )


def _text_config(tokens: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=TEXT_WIDTH,
        hidden_act=activation,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )
