"""Guided sampling with diffusers' `DiTPipeline` in PyTorch, as it is or with its transformer compiled."""

import os

import torch
from diffusers import DiTPipeline
from guided_sampling_runs import GUIDANCE, measure, parse


def main():
    arguments = parse(__doc__, "--compiled")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if arguments.device == "gpu" else "cpu"
    pipeline = DiTPipeline.from_pretrained(arguments.folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if arguments.compiled:
        pipeline.transformer = torch.compile(pipeline.transformer)

    def draw(labels, steps):
        pipeline(labels, guidance_scale=GUIDANCE, num_inference_steps=steps, output_type="np", return_dict=False)

    measure(draw, arguments, torch.cuda if device == "cuda" else None)


if __name__ == "__main__":
    main()
