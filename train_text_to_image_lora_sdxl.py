"""Fine-tunes Stable Diffusion XL with LoRA on images with captions; `--help` lists the flags."""

from latent_diffusion import runtime
from latent_diffusion.errors import command
from latent_diffusion.progress import outlive_lost_lines


@command
def main() -> None:
    tuning = runtime.start()
    runtime.import_paddlenlp()
    from latent_diffusion.training_arguments import parse
    from sdxl_lora.trainer import train
    from sdxl_lora.training_arguments import LoRAArguments, LoRATrainingArguments

    lora_args, args = parse(LoRAArguments, LoRATrainingArguments, description=__doc__)
    runtime.announce(tuning)
    outlive_lost_lines()
    train(lora_args, args)


if __name__ == "__main__":
    main()
