"""A training step in PyTorch: forward, loss, backward, AdamW and EMA, on one batch of random latents.

Networks: DiT and UViT as their official codes write them (torch_dit.py, torch_uvit.py), DiTTransformer2DModel of
diffusers. The loss is that of the official codes, for DiT with the variational bound; class dropout is off, since this
project has it in its data. AdamW is the fused one, the EMA one call for all parameters: the fastest that PyTorch ships.
"""

import os

import torch
from timing import print_figures
from torch_dit import DiT
from torch_objectives import LearnedRangeDDPM, NoisePrediction
from torch_uvit import UViT
from training_steps import measure, parse

DECAY = 0.9999


def diffusers_dit(config):
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=config["num_attention_heads"],
        attention_head_dim=config["attention_head_dim"],
        in_channels=config["in_channels"],
        out_channels=config["in_channels"] * (2 if config["learn_sigma"] else 1),
        num_layers=config["num_layers"],
        sample_size=config["sample_size"],
        patch_size=config["patch_size"],
        num_embeds_ada_norm=config["num_classes"],
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


NETWORKS = {"DiT": DiT, "UViT": UViT, "DiTTransformer2DModel": diffusers_dit}


def main():
    arguments = parse(__doc__, "--checkpointing", "--compiled", "--bf16")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if arguments.device == "gpu" else "cpu"
    model = NETWORKS[arguments.network](arguments.config).to(device).train()
    if arguments.checkpointing:
        model.enable_gradient_checkpointing()
    parameters = list(model.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    objective = (NoisePrediction if arguments.network == "UViT" else LearnedRangeDDPM)(device)
    network = torch.compile(model) if arguments.compiled else model
    latents, t, noise, condition = batch(arguments, objective.first_timestep, device)

    def denoise(x, t):
        with torch.autocast(device, torch.bfloat16, enabled=arguments.bf16):
            if arguments.network == "DiTTransformer2DModel":
                return network(x, timestep=t, class_labels=condition).sample
            return network(x, t, condition)

    def step():
        objective.loss(denoise, latents, t, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - DECAY)

    figures = measure(step, arguments, torch.cuda if device == "cuda" else None)
    print_figures(gradients=4 * sum(p.numel() for p in parameters), **figures)


def batch(arguments, first_timestep, device):
    """Latents, timesteps, noise, and labels or encoded prompts."""
    config, count = arguments.config, arguments.batch_size
    shape = count, config["in_channels"], config["sample_size"], config["sample_size"]
    t = first_timestep + torch.randint(1000, [count])
    if arguments.network == "UViT":
        condition = torch.randn(count, config["num_text_tokens"], config["clip_dim"])
    else:
        condition = torch.randint(config["num_classes"], [count])
    return [tensor.to(device) for tensor in (torch.randn(shape), t, torch.randn(shape), condition)]


if __name__ == "__main__":
    main()
