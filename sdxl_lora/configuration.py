"""What is trained of a Stable Diffusion XL pipeline."""

from dataclasses import dataclass

from latent_diffusion.configuration import Configuration


@dataclass(frozen=True)
class LoRAConfig(Configuration):
    """Which low-rank layers are trained; a checkpoint keeps it.

    Attributes:
        rank: width of the layers between.
        train_text_encoder: whether the text encoders have such layers, too.
    """

    rank: int
    train_text_encoder: bool = False
