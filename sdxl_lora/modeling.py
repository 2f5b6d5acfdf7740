"""What is trained: LoRA layers in a frozen Stable Diffusion XL UNet, and in its text encoders where that is asked."""

import sys
from pathlib import Path
from typing import Any

import paddle
from paddle import nn

from latent_diffusion.runtime import is_first_process
from latent_diffusion.transformer import NEEDS_GPU

from .configuration import LoRAConfig
from .lora import TEXT_ENCODERS, UNET, add_lora, write_lora
from .text_encoders import TextEncoders


class SDXLLoRA(nn.Layer):
    """Predicts noise with a UNet that has LoRA layers; its parameters and `state_dict()` are those of LoRA alone.

    The networks themselves are no sublayers: what goes through the parameters of a model (optimizers, averages,
    checkpoints, data parallelism, checks) sees a few million in place of billions that never change. They stay in eval
    mode; `unet` and `text_encoders` serve to draw with, LoRA included.

    Args:
        unet: a frozen `UNet2DConditionModel`, from `load_unet`; it is changed.
        rank: of the LoRA layers.
        text_encoders: to be trained, too, or None where prompts come encoded; they are changed.
    """

    def __init__(self, unet: Any, rank: int, text_encoders: TextEncoders | None = None):
        super().__init__()
        self.config = LoRAConfig(rank, text_encoders is not None)
        object.__setattr__(self, UNET, unet)
        self.text_encoders = text_encoders
        self._add(UNET, unet)
        if text_encoders is not None:
            for part, network in zip(TEXT_ENCODERS, text_encoders.models, strict=True):
                self._add(part, network)
            self._freeze_last_layer(text_encoders.models[0])

    def _add(self, part: str, network: nn.Layer) -> None:
        for name, layer in add_lora(part, network, self.config.rank).items():
            self.add_sublayer(name, layer)

    def _freeze_last_layer(self, encoder: nn.Layer) -> None:
        """Nothing that the UNet takes depends on the last layer of the first text encoder.

        It has LoRA layers nevertheless, for readers who expect them in every layer, but data parallelism must not wait
        for their gradients.
        """
        for parameter in encoder.text_model.encoder.layers[-1].parameters():
            parameter.stop_gradient = True

    @property
    def enable_recompute(self) -> bool:
        """Whether activations are computed again in the backward pass; PaddleNLP's `--recompute` sets it."""
        return self.unet.is_gradient_checkpointing

    @enable_recompute.setter
    def enable_recompute(self, enabled: bool) -> None:
        self.unet.enable_gradient_checkpointing() if enabled else self.unet.disable_gradient_checkpointing()

    def enable_xformers_memory_efficient_attention(self) -> None:
        """Uses Paddle's flash / memory-efficient attention; on a CPU says that this has no effect."""
        if paddle.device.is_compiled_with_cuda():
            self.unet.enable_xformers_memory_efficient_attention()
        elif is_first_process():
            print(f"note: {NEEDS_GPU}", file=sys.stderr)

    def export_weights(self, folder: Path, weights: dict[str, paddle.Tensor]) -> None:
        """Writes weights of the names of `state_dict()` as ppdiffusers and diffusers load them, see `write_lora`."""
        write_lora(folder, weights)

    def forward(
        self,
        x: paddle.Tensor,
        t: paddle.Tensor,
        time_ids: paddle.Tensor,
        contexts: paddle.Tensor | None = None,
        pooled: paddle.Tensor | None = None,
        tokens: paddle.Tensor | None = None,
        tokens_2: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """Predicts the noise (or velocity) of noisy latents.

        Args:
            x: latents [B, C, h, w].
            t: timesteps [B], integer, from 0.
            time_ids: [B, 6]: height, width of the original image, top, left of the crop, height, width of the target.
            contexts, pooled: encoded prompts [B, L, D] and [B, P], where the text encoders are not trained.
            tokens, tokens_2: int64 [B, L], from `TextEncoders.tokenize`, where they are.

        Returns:
            float32 [B, C, h, w].
        """
        if self.text_encoders is not None:
            contexts, pooled = self.text_encoders.encode(tokens, tokens_2)
        if self.enable_recompute and self.training:
            # The UNet computes only blocks again whose input needs gradients: without this not the first with LoRA,
            # which took a quarter of all activations' memory.
            x = x.detach()
            x.stop_gradient = False
        dtype = self.unet.dtype
        condition = {"text_embeds": pooled.astype(dtype), "time_ids": time_ids}
        return self.unet(x, t, contexts.astype(dtype), added_cond_kwargs=condition).sample.astype("float32")
