"""A Stable Diffusion XL pipeline with a LoRA merged in, as a folder of ppdiffusers."""

from pathlib import Path

from latent_diffusion.files import check_apart, new_folder
from latent_diffusion.pretrained import PIPELINE_INDEX
from latent_diffusion.text_encoder import save_tokenizer
from latent_diffusion.vae import load_fitting_vae

from .lora import TEXT_ENCODERS, UNET, merge_lora, read_lora
from .pretrained import VAE, check_conditions, load_scheduler, load_unet, part_of, zeros_for_empty_prompt
from .text_encoders import TOKENIZERS, TextEncoders


def merge_pipeline(base: str, lora_path: Path, output_path: Path, vae_name: str | None = None) -> None:
    """Writes a folder that `StableDiffusionXLPipeline.from_pretrained` of ppdiffusers loads, all weights in float32.

    Args:
        base: the pipeline that the LoRA was trained with: a folder of ppdiffusers or diffusers, or its name on the hub.
        lora_path: for `read_lora`.
        output_path: the folder, replaced when it exists.
        vae_name: for `load_vae`; None for the pipeline's own.

    Raises:
        InputError: a part cannot be loaded, they do not fit each other, or the folder cannot be written, or holds the
            base or the LoRA.
    """
    check_apart(output_path, base, lora_path)
    from paddlenlp.utils.log import logger
    from ppdiffusers import StableDiffusionXLPipeline

    logger.set_level("WARNING")  # it names every file it writes, under a temporary name
    lora = read_lora(lora_path)
    encoders, unet = TextEncoders.load(base), load_unet(base)
    check_conditions(unet.config, encoders.context_shape[1], encoders.pooled_width)
    vae = load_fitting_vae(vae_name or part_of(base, VAE), unet.config.in_channels)
    networks = {UNET: unet} | dict(zip(TEXT_ENCODERS, encoders.models, strict=True))
    merge_lora(networks, lora, lora_path)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        **networks,
        **dict(zip(TOKENIZERS, encoders.tokenizers, strict=True)),
        scheduler=load_scheduler(base),
        force_zeros_for_empty_prompt=zeros_for_empty_prompt(base),
    )
    with new_folder(output_path, marker=PIPELINE_INDEX) as folder:
        pipeline.save_pretrained(str(folder))
        for part, tokenizer in zip(TOKENIZERS, encoders.tokenizers, strict=True):
            save_tokenizer(tokenizer, folder / part)
