"""Pictures of digits, from the pipelines that the demos export."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from latent_diffusion.progress import progress
from latent_diffusion.runtime import import_paddlenlp

BATCH_SIZE = 100
INFERENCE_STEPS = 25


@dataclass(frozen=True)
class DigitPipeline:
    """A pipeline in memory, and the scale of guidance that it draws digits with.

    Attributes:
        pipe: a pipeline of ppdiffusers whose first argument is a list of what to draw.
        guidance_scale: 1 for none.
    """

    pipe: Any
    guidance_scale: float

    def draw(self, conditions: Sequence, seed: int = 0) -> np.ndarray:
        """An image of each condition: uint8 `[N, 64, 64, 3]`."""
        paddle.seed(seed)  # on a CPU pipelines draw from the global generator, whatever they are given
        self.pipe.set_progress_bar_config(disable=True)
        images = []
        with progress(total=len(conditions), desc="samples", unit="image") as bar:
            for start in range(0, len(conditions), BATCH_SIZE):
                batch = list(conditions[start : start + BATCH_SIZE])
                drawn = self.pipe(batch, guidance_scale=self.guidance_scale, num_inference_steps=INFERENCE_STEPS)
                images += drawn.images
                bar.update(len(batch))
        return np.stack([np.asarray(image) for image in images])


def load_dit(folder: Path) -> DigitPipeline:
    """The pipeline of `make demo`; its conditions are digits."""
    from ppdiffusers.pipelines.dit.pipeline_dit import DiTPipeline

    return DigitPipeline(DiTPipeline.from_pretrained(str(folder)), guidance_scale=3.0)


def load_text_to_image(folder: Path) -> DigitPipeline:
    """The pipeline of `make demo-t2i`; its conditions are prompts."""
    import_paddlenlp()
    from paddlenlp.utils.log import logger
    from ppdiffusers import LDMTextToImagePipeline

    logger.set_level("WARNING")  # it names every file it reads
    return DigitPipeline(LDMTextToImagePipeline.from_pretrained(str(folder)), guidance_scale=3.0)


def load_sdxl(folder: Path, lora: Path | None = None) -> DigitPipeline:
    """A pipeline of `make demo-lora`, with the LoRA of a folder where one is given; its conditions are prompts."""
    import_paddlenlp()
    from paddlenlp.utils.log import logger
    from ppdiffusers import StableDiffusionXLPipeline

    logger.set_level("WARNING")  # it names every file it reads
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(folder))
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    return DigitPipeline(pipeline, guidance_scale=2.0)
