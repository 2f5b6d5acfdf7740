"""Trains a DiT on extracted features with PaddleNLP's Trainer; `--help` lists the flags."""

from latent_diffusion import runtime
from latent_diffusion.errors import command
from latent_diffusion.progress import outlive_lost_lines


@command
def main() -> None:
    tuning = runtime.start()
    runtime.import_paddlenlp()
    from dit.trainer import DiTArguments, DiTTrainingArguments, train
    from latent_diffusion.training_arguments import parse

    dit_args, args = parse(DiTArguments, DiTTrainingArguments, description=__doc__)
    runtime.announce(tuning)
    outlive_lost_lines()
    train(dit_args, args)


if __name__ == "__main__":
    main()
