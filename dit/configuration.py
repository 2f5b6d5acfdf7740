"""What a DiT is made of: one record, read from JSON or from one of the twelve published names."""

from dataclasses import dataclass

from latent_diffusion.configuration import VAE_DOWNSAMPLING, ModelConfig, check_image_size
from latent_diffusion.errors import InputError

# DiT paper, table 1: layers, hidden size / heads, heads.
_SIZES = {"S": (12, 64, 6), "B": (12, 64, 12), "L": (24, 64, 16), "XL": (28, 72, 16)}
MODEL_NAMES = tuple(f"DiT-{size}/{patch}" for size in ("XL", "L", "B", "S") for patch in (2, 4, 8))

TIMESTEP_CONVENTIONS = ("ppdiffusers", "official")


@dataclass(frozen=True)
class DiTConfig(ModelConfig):
    """Configuration of a DiT backbone: the keys of `config/DiT_*.json`, beside those of `ModelConfig`.

    Attributes:
        num_classes: number of classes; label `num_classes` is the null class of classifier-free guidance.
        mlp_ratio: hidden width of the MLP over the width of the transformer.
        class_dropout_prob: probability that training replaces a label by the null class.
        learn_sigma: also predict the variance, in as many further channels.
        timestep_convention: "ppdiffusers" (frequencies exp(-ln(10000) i / 127): exports exactly to ppdiffusers and
            diffusers) or "official" (i / 128: what the published checkpoints were trained with).
    """

    num_classes: int = 1000
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    timestep_convention: str = "ppdiffusers"

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % 4:
            raise InputError(f"the width {self.hidden_size} (heads x head dimension) must be a multiple of 4")
        if not 0 <= self.class_dropout_prob <= 1 or self.mlp_ratio <= 0:
            raise InputError("class_dropout_prob must be in [0, 1] and mlp_ratio positive")
        if self.timestep_convention not in TIMESTEP_CONVENTIONS:
            known = ", ".join(TIMESTEP_CONVENTIONS)
            raise InputError(f"timestep_convention must be one of {known}, not {self.timestep_convention!r}")

    @property
    def least_weights(self) -> float:
        mlps = 2 * self.num_layers * int(self.hidden_size * self.mlp_ratio) * self.hidden_size
        return super().least_weights + mlps + self.num_classes * self.hidden_size

    @property
    def out_channels(self) -> int:
        """Channels of the output: noise, and variance when it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @classmethod
    def from_name_or_file(
        cls, model: str, image_size: int | None = None, num_classes: int | None = None
    ) -> "DiTConfig":
        """The configuration that `--model` means: one of the published names, or a `.json` file.

        Args:
            model: "DiT-XL/2", ... or a path.
            image_size: side of the images in pixels; None for that of the file, or 256.
            num_classes: None for that of the file, or 1000.

        Raises:
            InputError: no such model, or a file that says otherwise.
        """
        if not model.endswith(".json"):
            return cls.from_name(
                model, 256 if image_size is None else image_size, 1000 if num_classes is None else num_classes
            )
        config = cls.from_json(model)
        if image_size not in (None, config.resolution):
            raise InputError(f"--image-size {image_size} contradicts {model}, which is for {config.resolution} pixels")
        if num_classes not in (None, config.num_classes):
            raise InputError(f"--num-classes {num_classes} contradicts {model}, which has {config.num_classes}")
        return config

    @classmethod
    def from_name(cls, name: str, image_size: int = 256, num_classes: int = 1000) -> "DiTConfig":
        """The published model `name` ("DiT-XL/2", ...) for square images of `image_size` pixels.

        Raises:
            InputError: no such model, or an image size that is not a multiple of 8.
        """
        if name not in MODEL_NAMES:
            raise InputError(f"unknown model {name!r}; known are {', '.join(MODEL_NAMES)}")
        check_image_size(image_size)
        size, patch = name.removeprefix("DiT-").split("/")
        layers, head_dim, heads = _SIZES[size]
        return cls(
            sample_size=image_size // VAE_DOWNSAMPLING,
            patch_size=int(patch),
            in_channels=4,
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_classes=num_classes,
        )
