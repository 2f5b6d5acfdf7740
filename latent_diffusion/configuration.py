"""Configurations: the checks, reading and writing JSON, and the keys that every backbone has."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError
from .files import write_json
from .reading import read_json

# The VAE of Stable Diffusion, whose latents both systems train on, halves the image three times.
VAE_DOWNSAMPLING = 8

# Of a latent: images of 8192 pixels a side. Positions are computed for all of it, whatever the weights are.
_MAX_SAMPLE_SIZE = 1024


def check_image_size(size: int) -> None:
    """Raises `InputError` unless the VAE can bring images of this side, in pixels, to latents."""
    if size < 1 or size % VAE_DOWNSAMPLING:
        raise InputError(f"the image size {size} is not a positive multiple of {VAE_DOWNSAMPLING}")


@dataclass(frozen=True)
class Configuration:
    """A record of keys with values, read from JSON; a subclass adds the keys.

    Raises:
        InputError: a value of another type than its key's, or one that cannot be.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not field.type:
                raise InputError(
                    f"the configuration key {field.name} must be of type {field.type.__name__}, not {value!r}"
                )
            if field.type is float and not math.isfinite(getattr(self, field.name)):
                raise InputError(f"the configuration key {field.name} must be finite, not {value}")
            if field.type is int and value < 1:
                raise InputError(f"the configuration key {field.name} must be at least 1, not {value}")

    def to_dict(self) -> dict:
        """The configuration as plain values, as `from_dict` takes it."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes the configuration as JSON."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def from_dict(cls, values: dict, source: str = "the configuration") -> "Configuration":
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
    def from_json(cls, path: str | Path) -> "Configuration":
        """Reads `config/*.json` or the `config.json` of a checkpoint.

        Raises:
            InputError: the file is missing, is no JSON or no configuration of this kind.
        """
        try:
            values = read_json(Path(path))
        except OSError as error:
            raise InputError(f"cannot read the configuration file {path}: {error.strerror}") from None
        except ValueError as error:
            raise InputError(f"the configuration file {path} is not JSON: {error}") from None
        return cls.from_dict(values, source=str(path))


@dataclass(frozen=True)
class ModelConfig(Configuration):
    """Base of the configurations of backbones; a subclass adds keys with defaults.

    Attributes:
        sample_size: height and width of the latent (image size / 8).
        patch_size: side of a patch, in latent pixels; divides `sample_size`.
        in_channels: channels of the latent.
        num_layers, num_attention_heads, attention_head_dim: depth and width of the transformer.
    """

    sample_size: int
    patch_size: int
    in_channels: int
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int

    def __post_init__(self):
        super().__post_init__()
        if self.sample_size > _MAX_SAMPLE_SIZE:
            raise InputError(f"sample_size {self.sample_size} is more than {_MAX_SAMPLE_SIZE}")
        if self.sample_size % self.patch_size:
            raise InputError(f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def hidden_size(self) -> int:
        """Width D of the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        return self.in_channels, self.sample_size, self.sample_size

    @property
    def side(self) -> int:
        """Tokens in a row of the image."""
        return self.sample_size // self.patch_size

    @property
    def resolution(self) -> int:
        """Side of the image, in pixels."""
        return self.sample_size * VAE_DOWNSAMPLING

    @property
    def least_weights(self) -> float:
        """Numbers that the weights of such a network have at least: for a check before memory is taken for it."""
        block = 4 * self.hidden_size**2
        return self.num_layers * block + self.hidden_size * (self.side**2 + self.in_channels * self.patch_size**2)
