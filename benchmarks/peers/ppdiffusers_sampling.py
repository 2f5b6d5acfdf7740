"""Guided sampling with ppdiffusers' `DiTPipeline` as it is, without this project's runtime settings."""

import paddle
from guided_sampling_runs import GUIDANCE, measure, parse


def main():
    arguments = parse(__doc__)
    paddle.set_device(arguments.device)
    from ppdiffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(arguments.folder)
    pipeline.set_progress_bar_config(disable=True)

    def draw(labels, steps):
        pipeline(labels, guidance_scale=GUIDANCE, num_inference_steps=steps, output_type="np", return_dict=False)

    measure(draw, arguments, paddle.device.cuda if arguments.device == "gpu" else None)


if __name__ == "__main__":
    main()
