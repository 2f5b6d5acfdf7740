"""What a DiT is made of: one record, read from JSON or from one of the twelve published names."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from latent_diffusion.errors import InputError

# DiT paper, table 1: layers, hidden size / heads, heads.
_SIZES = {"S": (12, 64, 6), "B": (12, 64, 12), "L": (24, 64, 16), "XL": (28, 72, 16)}
MODEL_NAMES = tuple(f"DiT-{size}/{patch}" for size in ("XL", "L", "B", "S") for patch in (2, 4, 8))

# The VAE of Stable Diffusion, which DiT trains on, halves the image three times.
VAE_DOWNSAMPLING = 8

TIMESTEP_CONVENTIONS = ("ppdiffusers", "official")


@dataclass(frozen=True)
class DiTConfig:
    """Configuration of a DiT backbone; the keys of `config/*.json`.

    Attributes:
        sample_size: height and width of the latent (image size / 8).
        patch_size: side of a patch, in latent pixels; divides `sample_size`.
        in_channels: channels of the latent.
        num_layers, num_attention_heads, attention_head_dim: depth and width of the transformer.
        num_classes: number of classes; label `num_classes` is the null class of classifier-free guidance.
        mlp_ratio: hidden width of the MLP over the width of the transformer.
        class_dropout_prob: probability that training replaces a label by the null class.
        learn_sigma: also predict the variance, in as many further channels.
        timestep_convention: "ppdiffusers" (frequencies exp(-ln(10000) i / 127): exports exactly to ppdiffusers and
            diffusers) or "official" (i / 128: what the published checkpoints were trained with).
    """

    sample_size: int
    patch_size: int
    in_channels: int
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    timestep_convention: str = "ppdiffusers"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not field.type:
                raise InputError(
                    f"the configuration key {field.name} must be of type {field.type.__name__}, not {value!r}"
                )
            if field.type is int and value < 1:
                raise InputError(f"the configuration key {field.name} must be at least 1, not {value}")
        if self.sample_size % self.patch_size:
            raise InputError(f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % 4:
            raise InputError(f"the width {self.hidden_size} (heads x head dimension) must be a multiple of 4")
        if not 0 <= self.class_dropout_prob <= 1 or self.mlp_ratio <= 0:
            raise InputError("class_dropout_prob must be in [0, 1] and mlp_ratio positive")
        if self.timestep_convention not in TIMESTEP_CONVENTIONS:
            known = ", ".join(TIMESTEP_CONVENTIONS)
            raise InputError(f"timestep_convention must be one of {known}, not {self.timestep_convention!r}")

    @property
    def hidden_size(self) -> int:
        """Width D of the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def out_channels(self) -> int:
        """Channels of the output: noise, and variance when it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        return self.in_channels, self.sample_size, self.sample_size

    @property
    def resolution(self) -> int:
        """Side of the image, in pixels."""
        return self.sample_size * VAE_DOWNSAMPLING

    def to_dict(self) -> dict:
        """The configuration as plain values, as `from_dict` takes it."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes the configuration as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_dict(cls, values: dict, source: str = "the configuration") -> "DiTConfig":
        """Makes a configuration; `source` names it in errors.

        Raises:
            InputError: an unknown or missing key, or a value that cannot be.
        """
        if not isinstance(values, dict):
            raise InputError(f"{source} must be a JSON object of configuration keys")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values)
        if unknown:
            raise InputError(f"{source} has the unknown key {unknown[0]!r}; known are {', '.join(fields)}")
        if missing:
            raise InputError(f"{source} lacks the key {missing[0]!r}")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def from_json(cls, path: str | Path) -> "DiTConfig":
        """Reads `config/*.json` or the `config.json` of a checkpoint.

        Raises:
            InputError: the file is missing, is no JSON or no DiT configuration.
        """
        try:
            values = json.loads(Path(path).read_text())
        except OSError as error:
            raise InputError(f"cannot read the configuration file {path}: {error.strerror}") from None
        except ValueError as error:
            raise InputError(f"the configuration file {path} is not JSON: {error}") from None
        return cls.from_dict(values, source=str(path))

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
            return cls.from_name(model, image_size or 256, num_classes or 1000)
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
        if image_size < 1 or image_size % VAE_DOWNSAMPLING:
            raise InputError(f"the image size {image_size} is not a positive multiple of {VAE_DOWNSAMPLING}")
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
