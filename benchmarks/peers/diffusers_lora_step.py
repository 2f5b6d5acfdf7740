"""A training step of LoRA in the UNet with diffusers and peft in PyTorch, as ours_lora_step.py makes it.

As `train_text_to_image_lora_sdxl.py` of diffusers: peft's adapter in a frozen UNet, gradients clipped to norm 1. AdamW
is the fused one, the fastest that PyTorch ships.
"""

import os

import torch
from diffusers import UNet2DConditionModel
from lora_steps import RANK, random_batch
from peft import LoraConfig
from timing import print_figures
from training_steps import measure, parse


def main():
    arguments = parse(__doc__, "--checkpointing")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if arguments.device == "gpu" else "cpu"
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**arguments.config)
    unet.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    unet.to(device).train()
    if arguments.checkpointing:
        unet.enable_gradient_checkpointing()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
    batch = random_batch(arguments.config, arguments.batch_size)
    values = {name: torch.from_numpy(value).to(device) for name, value in batch.items()}
    condition = {"text_embeds": values["pooled"], "time_ids": values["time_ids"]}

    def step():
        found = unet(values["latents"], values["t"], values["contexts"], added_cond_kwargs=condition).sample
        torch.nn.functional.mse_loss(found, values["noise"]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    print_figures(**measure(step, arguments, torch.cuda if device == "cuda" else None))


if __name__ == "__main__":
    main()
