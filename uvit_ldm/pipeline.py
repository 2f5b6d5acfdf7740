"""The parts of an exported folder that ppdiffusers' `LDMTextToImagePipeline` loads: its `model_index.json` names them.

ppdiffusers' own `UViTT2IModel` has no argument `encoder_hidden_states`, which that pipeline gives; its `apply_tome`
passes over U-ViT; and on a CPU its `enable_xformers_memory_efficient_attention` raises an exception, and half precision
has no kernels. These classes do what the user asked for, or say once that it has no effect.
"""

import functools
import sys
from typing import Any

import paddle
from ppdiffusers.configuration_utils import ConfigMixin, register_to_config
from ppdiffusers.models.autoencoder_kl import AutoencoderKL as StockAutoencoderKL

# ppdiffusers loads a component only if its module also names the base class it derives from.
from ppdiffusers.models.modeling_utils import ModelMixin
from ppdiffusers.models.uvit_t2i import UViTT2IModelOutput
from ppdiffusers.transformers import CLIPTextModel as StockCLIPTextModel

from latent_diffusion.token_merging import MergesTokens
from latent_diffusion.transformer import NEEDS_GPU

from .configuration import UViTConfig
from .modeling import UViT

_SWITCH = "set_use_memory_efficient_attention_xformers"


@functools.cache  # each text once
def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _without_effect(*_arguments: Any) -> None:
    _note(NEEDS_GPU)


class _AnyDevice:
    """Mixin of models: on a CPU they load in float32, and the switch of memory-efficient attention does nothing."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        if paddle.device.get_device() != "cpu":
            return super().from_pretrained(*args, **kwargs)
        for key in ("paddle_dtype", "dtype"):
            if "float16" in str(kwargs.get(key)):  # bfloat16, too
                name = str(kwargs.pop(key)).removeprefix("paddle.")  # some loaders hand on its name, some itself
                _note(f"{name} needs a GPU: the pipeline computes in float32 on a CPU")
        model = super().from_pretrained(*args, **kwargs)
        for layer in model.sublayers(include_self=True):
            if hasattr(layer, _SWITCH):
                setattr(layer, _SWITCH, _without_effect)
        return model


class UViTT2IModel(_AnyDevice, MergesTokens, ModelMixin, ConfigMixin):
    """`UViT` as a model of ppdiffusers; arguments, names and layout of weights as ppdiffusers' class of that name."""

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 16,
        num_attention_heads: int = 8,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        clip_dim: int = 768,
        num_text_tokens: int = 77,
    ):
        super().__init__()
        config = UViTConfig(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            clip_dim=clip_dim,
            num_text_tokens=num_text_tokens,
        )
        # Not every kernel that draws initial weights knows half precision; the loader casts the weights it sets.
        with paddle.dtype_guard("float32"):
            network = UViT(config)
        # Its layers become this one's, so that the weights keep their names.
        for name, layer in network.named_children():
            self.add_sublayer(name, layer)
        self.add_parameter("pos_embed", network.pos_embed)
        object.__setattr__(self, "_network", network)

    def forward(
        self,
        sample: paddle.Tensor,
        timestep: paddle.Tensor | int,
        encoder_hidden_states: paddle.Tensor,
        return_dict: bool = True,
    ) -> UViTT2IModelOutput | tuple[paddle.Tensor]:
        """Predicts the noise [B, C, H, W] of latents [B, C, H, W].

        Args:
            timestep: in [1, 1000]; one for all, or [B].
            encoder_hidden_states: encoded prompts [B, L, D].
            return_dict: return the library's record, not a tuple.
        """
        t = timestep if isinstance(timestep, paddle.Tensor) else paddle.to_tensor(timestep)
        t = t.reshape([-1]).expand([sample.shape[0]])
        noise = self._network(sample, t, encoder_hidden_states)
        return UViTT2IModelOutput(sample=noise) if return_dict else (noise,)

    def train(self) -> None:
        super().train()
        self._network.train()

    def eval(self) -> None:
        super().eval()
        self._network.eval()

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: str | None = None) -> None:
        """What the pipeline's switch calls; Paddle chooses the kernel, `attention_op` has no effect."""
        self._network.set_memory_efficient_attention(valid)

    def _merging_blocks(self):
        return self._network._merging_blocks()


class AutoencoderKL(_AnyDevice, StockAutoencoderKL):
    """ppdiffusers' class."""


class CLIPTextModel(_AnyDevice, StockCLIPTextModel):
    """ppdiffusers' class."""
