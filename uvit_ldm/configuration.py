"""What a text-to-image U-ViT is made of: one record, read from JSON; and the constants of its training."""

from dataclasses import dataclass

from latent_diffusion.configuration import ModelConfig
from latent_diffusion.errors import InputError

# What latents of Stable Diffusion's VAE are multiplied by (`configs/mscoco_uvit_small.py` of baofff/U-ViT); the VAE's
# own configuration says 0.18215, which DiT uses.
LATENT_SCALING_FACTOR = 0.23010

# Probability that training replaces a caption by the empty one (`p_uncond` in the same file).
CONDITION_DROPOUT = 0.1

# Whose VAE, text encoder and tokenizer the features are made with where nothing else is named.
STABLE_DIFFUSION = "runwayml/stable-diffusion-v1-5"

# The pipelines that a network is exported for, and what each calls the text encoder. The first loads classes of this
# project (`pipeline.py`) and so needs the repository on Python's path; the second is all of ppdiffusers.
PIPELINES = {"LDMTextToImagePipeline": "bert", "LDMTextToImageUViTPipeline": "text_encoder"}
STOCK_PIPELINE = "LDMTextToImageUViTPipeline"

# Where the configuration of a pipeline's network keeps the scaling factor: the libraries pass over keys that begin with
# an underscore.
SCALING_KEY = "_scaling_factor"

# What ppdiffusers' configuration of the class may hold beside these keys, and the only value that is supported.
_FIXED_KEYS = {
    "norm_type": "layer_norm",
    "conv": True,
    "qk_scale": None,
    "pos_drop_rate": 0.0,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
}


@dataclass(frozen=True)
class UViTConfig(ModelConfig):
    """Configuration of a U-ViT backbone: the keys of `config/uvit_*.json`, beside those of `ModelConfig`.

    Attributes:
        num_layers: depth d; the network has d // 2 blocks in, one in the middle, and d // 2 out.
        mlp_ratio: hidden width of the MLP over the width of the transformer.
        qkv_bias: whether queries, keys and values have a bias.
        clip_dim: width of the text encoder's output.
        num_text_tokens: tokens of a prompt, with its padding.
        scaling_factor: what the VAE's latents are multiplied by.
    """

    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    clip_dim: int = 768
    num_text_tokens: int = 77
    scaling_factor: float = LATENT_SCALING_FACTOR

    def __post_init__(self):
        super().__post_init__()
        if self.num_layers < 2:
            raise InputError(f"num_layers must be at least 2, not {self.num_layers}")
        if self.hidden_size % 2:
            raise InputError(f"the width {self.hidden_size} (heads x head dimension) must be even")
        if self.mlp_ratio <= 0 or self.scaling_factor <= 0:
            raise InputError("mlp_ratio and scaling_factor must be positive numbers")

    @property
    def least_weights(self) -> float:
        mlps = 2 * self.num_layers * int(self.hidden_size * self.mlp_ratio) * self.hidden_size
        return super().least_weights + mlps + (self.num_text_tokens + self.clip_dim) * self.hidden_size

    @property
    def extras(self) -> int:
        """Tokens before those of the image: one of time, the others of text."""
        return 1 + self.num_text_tokens

    @property
    def context_shape(self) -> tuple[int, int]:
        """(L, D) of an encoded prompt."""
        return self.num_text_tokens, self.clip_dim

    @classmethod
    def from_dict(cls, values: dict, source: str = "the configuration") -> "UViTConfig":
        """As `ModelConfig.from_dict`; also takes what the `config.json` of (pp)diffusers' `UViTT2IModel` holds."""
        if not isinstance(values, dict):
            return super().from_dict(values, source)
        own = {key: value for key, value in values.items() if not key.startswith("_")}
        if SCALING_KEY in values:
            own["scaling_factor"] = values[SCALING_KEY]
        fixed = _FIXED_KEYS | {"out_channels": own.get("in_channels")}
        for key in fixed.keys() & own.keys():
            if own.pop(key) not in (fixed[key], None):
                raise InputError(f"{source} has {key} {values[key]!r}; only {fixed[key]!r} is supported")
        return super().from_dict(own, source)
