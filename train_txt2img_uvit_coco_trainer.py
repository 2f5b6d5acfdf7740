"""Trains a text-to-image U-ViT on COCO features with PaddleNLP's Trainer; `--help` lists the flags."""

from latent_diffusion import runtime
from latent_diffusion.errors import command
from latent_diffusion.progress import outlive_lost_lines


@command
def main() -> None:
    tuning = runtime.start()
    runtime.import_paddlenlp()
    from latent_diffusion.training_arguments import parse
    from uvit_ldm.trainer import UViTArguments, UViTTrainingArguments, train

    uvit_args, args = parse(UViTArguments, UViTTrainingArguments, description=__doc__)
    runtime.announce(tuning)
    outlive_lost_lines()
    train(uvit_args, args)


if __name__ == "__main__":
    main()
