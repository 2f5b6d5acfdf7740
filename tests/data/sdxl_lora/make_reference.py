"""What diffusers and peft make of the tiny Stable Diffusion XL of formula.py: a training step of its LoRA.

The first argument names the file to write. It follows train_text_to_image_lora_sdxl.py of diffusers, in float64.
"""

import sys

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from formula import RANK, SCHEDULER, TEXT_ENCODERS, UNET, batch, weight
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

UNET_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def fill(network, part, targets, kind):
    """Sets all weights, adds LoRA and gives its parameters by diffusers' names."""
    network.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.from_numpy(weight(f"{part}.{name}", tuple(parameter.shape))))
    network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    lora = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            for side, usual in (("lora_A.default", f"{kind}.down"), ("lora_B.default", f"{kind}.up")):
                name = name.replace(side, usual)
            lora[f"{part}.{name}"] = parameter
            parameter.data.copy_(torch.from_numpy(weight(f"{part}.{name}", tuple(parameter.shape))))
    return lora


def main(path):
    torch.set_default_dtype(torch.float64)
    unet = UNet2DConditionModel.from_config(UNET)
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    encoders = {part: cls(CLIPTextConfig(**TEXT_ENCODERS[part])).eval() for part, cls in classes.items()}
    lora = fill(unet, "unet", UNET_TARGETS, "lora")
    for part, encoder in encoders.items():
        lora |= fill(encoder, part, TEXT_TARGETS, "lora_linear_layer")
    data = {name: torch.from_numpy(value) for name, value in batch().items()}
    data |= {name: value.double() for name, value in data.items() if value.is_floating_point()}

    hidden = []
    for tokens, encoder in zip((data["tokens"], data["tokens_2"]), encoders.values(), strict=True):
        encoded = encoder(tokens, output_hidden_states=True, return_dict=False)
        pooled = encoded[0]
        hidden.append(encoded[-1][-2])
    contexts = torch.concat(hidden, dim=-1)
    noisy = DDPMScheduler.from_config(SCHEDULER).add_noise(data["latents"], data["noise"], data["t"])
    conditions = {"time_ids": data["time_ids"], "text_embeds": pooled}
    prediction = unet(noisy, data["t"], contexts, added_cond_kwargs=conditions, return_dict=False)[0]
    loss = torch.nn.functional.mse_loss(prediction, data["noise"])
    loss.backward()

    values = {"contexts": contexts, "pooled": pooled, "noisy": noisy, "prediction": prediction, "loss": loss}
    values |= {f"gradient.{name}": p.grad for name, p in lora.items() if p.grad is not None}
    np.savez_compressed(path, **{name: value.detach().float().numpy() for name, value in values.items()})


if __name__ == "__main__":
    main(sys.argv[1])
